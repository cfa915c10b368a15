package compile

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/weft-mesh/weft/mesh"
)

// ManagedBySelector is the value of the label
// endpointslice.kubernetes.io/managed-by on slices that Kubernetes derives
// from a selector. They carry nothing that the selector and the pods do not.
const ManagedBySelector = "endpointslice-controller.k8s.io"

// memberships returns the services that the pod is an endpoint of: those that
// select it, and those whose slices name it. Sorted by service.
func (w *World) memberships(pod *corev1.Pod, addrs []netip.Addr) []mesh.Membership {
	var out []mesh.Membership
	for _, s := range w.selected(pod) {
		m := mesh.Membership{Service: s.name}
		for _, p := range s.ports {
			if target := podPort(pod, p); target != 0 {
				m.Ports = append(m.Ports, mesh.Port{Service: uint16(p.Port), Target: target, AppProtocol: appProtocol(p)})
			}
		}
		// A pod that has none of the named ports serves nothing. A service
		// without ports is headless, and lists its pods all the same.
		if len(m.Ports) > 0 || len(s.ports) == 0 {
			out = append(out, m)
		}
	}
	out = append(out, w.fromPod[mesh.Name{Namespace: pod.Namespace, Name: pod.Name}]...)
	// Host-network pods share their node's address, so an address does not
	// name one of them.
	if !pod.Spec.HostNetwork {
		for _, a := range addrs {
			out = append(out, w.fromAddr[a]...)
		}
	}
	return mergeMemberships(out)
}

// selected returns the services whose selector matches the pod, in no order.
func (w *World) selected(pod *corev1.Pod) []selectingService {
	return w.selectedBy(pod.Namespace, pod.Labels)
}

// selectedBy returns the services of a namespace whose selector matches the
// labels, in no order.
func (w *World) selectedBy(namespace string, set map[string]string) []selectingService {
	var out []selectingService
	for k, v := range set {
		for _, s := range w.selecting[labelPair{namespace, k, v}] {
			if s.selector.Matches(labels.Set(set)) {
				out = append(out, s)
			}
		}
	}
	return out
}

// podPort returns the port of the pod behind the service port p, or 0 when
// the pod has no port of the name that p asks for.
func podPort(pod *corev1.Pod, p corev1.ServicePort) uint16 {
	if t := numericTarget(p); t != 0 {
		return t
	}
	match := func(c corev1.Container) uint16 {
		for _, cp := range c.Ports {
			if cp.Name == p.TargetPort.StrVal && (cp.Protocol == "" || cp.Protocol == corev1.ProtocolTCP) && validPort(cp.ContainerPort) {
				return uint16(cp.ContainerPort)
			}
		}
		return 0
	}
	for _, c := range pod.Spec.Containers {
		if t := match(c); t != 0 {
			return t
		}
	}
	for _, c := range pod.Spec.InitContainers {
		sidecar := c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways
		if t := match(c); t != 0 && sidecar {
			return t
		}
	}
	return 0
}

// mergeMemberships sorts ms by service and makes one of those that name the
// same service, without double ports.
func mergeMemberships(ms []mesh.Membership) []mesh.Membership {
	slices.SortStableFunc(ms, func(a, b mesh.Membership) int {
		return strings.Compare(a.Service.String(), b.Service.String())
	})
	var out []mesh.Membership
	for _, m := range ms {
		if n := len(out); n > 0 && out[n-1].Service == m.Service {
			out[n-1].Ports = append(slices.Clip(out[n-1].Ports), m.Ports...)
			continue
		}
		out = append(out, m)
	}
	for i := range out {
		ports := slices.Clone(out[i].Ports)
		slices.SortStableFunc(ports, func(a, b mesh.Port) int { return cmp.Compare(a.Service, b.Service) })
		// One endpoint has one target for a service port; the first said wins.
		out[i].Ports = slices.CompactFunc(ports, func(a, b mesh.Port) bool { return a.Service == b.Service })
	}
	return out
}

// compileSlices reads the slices that no selector made: their endpoints are
// pods, known by name or address, or addresses of their own.
func (w *World) compileSlices(in Inputs) {
	w.fromAddr = map[netip.Addr][]mesh.Membership{}
	w.fromPod = map[mesh.Name][]mesh.Membership{}
	w.claimed = map[netip.Addr]bool{}
	pods := podIndex(in.Pods)
	nodes := map[string]*corev1.Node{}
	for _, n := range in.Nodes {
		nodes[n.Name] = n
	}
	services := map[mesh.Name]*corev1.Service{}
	for _, s := range in.Services {
		services[mesh.Name{Namespace: s.Namespace, Name: s.Name}] = s
	}
	sorted := slices.Clone(in.Slices)
	slices.SortFunc(sorted, func(a, b *discoveryv1.EndpointSlice) int {
		return cmp.Or(strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Name, b.Name))
	})
	for _, slice := range sorted {
		svc := services[mesh.Name{Namespace: slice.Namespace, Name: slice.Labels[discoveryv1.LabelServiceName]}]
		if svc == nil || svc.Spec.Type == corev1.ServiceTypeExternalName || slice.Labels[discoveryv1.LabelManagedBy] == ManagedBySelector {
			continue
		}
		m := mesh.Membership{Service: w.settings.serviceName(svc.Namespace, svc.Name), Ports: slicePorts(slice, svc)}
		if len(m.Ports) == 0 && len(tcpPorts(svc)) > 0 {
			continue
		}
		for _, e := range slice.Endpoints {
			w.sliceEndpoint(slice, e, m, pods, nodes)
		}
	}
	slices.SortFunc(w.Endpoints, func(a, b mesh.Workload) int { return strings.Compare(string(a.UID), string(b.UID)) })
	w.Endpoints = slices.CompactFunc(w.Endpoints, func(a, b mesh.Workload) bool { return a.UID == b.UID })
}

// A podSet knows the pods by name, and those with a network of their own by
// address.
type podSet struct {
	names map[mesh.Name]bool
	addrs map[netip.Addr]bool
}

func podIndex(pods []*corev1.Pod) podSet {
	out := podSet{names: map[mesh.Name]bool{}, addrs: map[netip.Addr]bool{}}
	for _, p := range pods {
		if ended(p) {
			continue
		}
		out.names[mesh.Name{Namespace: p.Namespace, Name: p.Name}] = true
		if p.Spec.HostNetwork {
			continue
		}
		for _, a := range PodAddrs(p) {
			out.addrs[a] = true
		}
	}
	return out
}

// slicePorts maps the slice's ports to the service's, by name as kube-proxy
// does.
func slicePorts(slice *discoveryv1.EndpointSlice, svc *corev1.Service) []mesh.Port {
	var out []mesh.Port
	for _, sp := range tcpPorts(svc) {
		for _, p := range slice.Ports {
			tcp := p.Protocol == nil || *p.Protocol == corev1.ProtocolTCP
			if p.Port == nil || !tcp || !validPort(*p.Port) || deref(p.Name) != sp.Name {
				continue
			}
			out = append(out, mesh.Port{Service: uint16(sp.Port), Target: uint16(*p.Port), AppProtocol: appProtocol(sp)})
			break
		}
	}
	return out
}

// sliceEndpoint files one endpoint of a slice: under the pod it is, or as a
// workload of its own.
func (w *World) sliceEndpoint(slice *discoveryv1.EndpointSlice, e discoveryv1.Endpoint, m mesh.Membership, pods podSet, nodes map[string]*corev1.Node) {
	var addrs []netip.Addr
	for _, s := range e.Addresses {
		if a, err := netip.ParseAddr(s); err == nil { // names of an FQDN slice are not followed
			addrs = append(addrs, a.Unmap())
			w.claimed[a.Unmap()] = true
		}
	}
	if t := e.TargetRef; t != nil && t.Kind == "Pod" {
		pod := mesh.Name{Namespace: cmp.Or(t.Namespace, slice.Namespace), Name: t.Name}
		// A slice may only speak for pods of its own namespace by name.
		if pod.Namespace == slice.Namespace && pods.names[pod] {
			w.fromPod[pod] = append(w.fromPod[pod], m)
			return
		}
	}
	for _, a := range addrs {
		if pods.addrs[a] {
			w.fromAddr[a] = append(w.fromAddr[a], m)
			continue
		}
		w.Endpoints = append(w.Endpoints, w.bareEndpoint(slice, e, a, m, nodes[deref(e.NodeName)]))
	}
}

// bareEndpoint is an address that no pod stands behind. It has no identity
// and is outside the mesh.
func (w *World) bareEndpoint(slice *discoveryv1.EndpointSlice, e discoveryv1.Endpoint, a netip.Addr, m mesh.Membership, node *corev1.Node) mesh.Workload {
	out := mesh.Workload{
		UID: mesh.UID(w.settings.Cluster + "/discovery.k8s.io/EndpointSlice/" +
			slice.Namespace + "/" + slice.Name + "/" + a.String()),
		Name:      mesh.Name{Namespace: slice.Namespace, Name: slice.Name},
		Addresses: []netip.Addr{a},
		Network:   w.settings.Network,
		Cluster:   w.settings.Cluster,
		Node:      deref(e.NodeName),
		Locality:  locality(node),
		Transport: mesh.PlainTCP,
		Healthy:   e.Conditions.Ready == nil || *e.Conditions.Ready,
		Services:  []mesh.Membership{m},
	}
	if out.Locality.Zone == "" {
		out.Locality.Zone = deref(e.Zone)
	}
	return out
}

// deref returns what p points to, or the zero value.
func deref[T any](p *T) (v T) {
	if p != nil {
		v = *p
	}
	return v
}
