package compile

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	networkingv1alpha3 "istio.io/api/networking/v1alpha3"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/weft-mesh/weft/mesh"
)

// labelTunnel with the value http says that a workload outside of the cluster
// speaks HBONE.
const labelTunnel = "networking.istio.io/tunnel"

// A WorkloadEntry is the Kubernetes object of that name, read.
type WorkloadEntry struct {
	Meta
	Labels map[string]string
	Spec   *networkingv1alpha3.WorkloadEntry // what of it could be read
	read   findings
}

// ReadWorkloadEntry reads an object of kind WorkloadEntry of the group
// networking.istio.io, in any version.
func ReadWorkloadEntry(u *unstructured.Unstructured) WorkloadEntry {
	out := WorkloadEntry{Meta: readName(u), Labels: u.GetLabels(), Spec: &networkingv1alpha3.WorkloadEntry{}}
	out.read = readSpecByField(u, out.Spec)
	return out
}

// An entryEndpoint is an endpoint that no pod has to stand behind.
type entryEndpoint struct {
	address  netip.Addr
	host     mesh.Host         // instead of an address
	ports    map[string]uint16 // by the names of the service's ports
	labels   map[string]string
	network  string
	locality mesh.Locality
	capacity *uint32
}

// readEntryEndpoint reads an endpoint that is written at path.
func readEntryEndpoint(f *findings, path string, in *networkingv1alpha3.WorkloadEntry) entryEndpoint {
	out := entryEndpoint{ports: map[string]uint16{}, labels: in.GetLabels(), network: in.GetNetwork()}
	switch a, err := netip.ParseAddr(in.GetAddress()); {
	case err == nil && (a.IsUnspecified() || a.IsLoopback() || a.IsMulticast() || a.Zone() != ""):
		f.bad(path+".address", "is %q, which no host of a network has", in.GetAddress())
	case err == nil:
		out.address = a.Unmap()
	case strings.HasPrefix(in.GetAddress(), "unix://"):
		f.bad(path+".address", "is a socket of a host, which is not supported: want an IP address or a host name")
	case in.GetAddress() == "" || badHost(in.GetAddress(), false) != "":
		f.bad(path+".address", "is %q, want an IP address or a host name", in.GetAddress())
	default:
		out.host = mesh.Host(strings.TrimSuffix(strings.ToLower(in.GetAddress()), "."))
	}
	for _, name := range slices.Sorted(maps.Keys(in.GetPorts())) {
		p := in.GetPorts()[name]
		if p == 0 || p > 65535 {
			f.bad(fmt.Sprintf("%s.ports[%s]", path, name), "is %d, want 1 to 65535", p)
			continue
		}
		out.ports[name] = uint16(p)
	}
	if in.GetLabels()[labelTunnel] == "http" {
		f.bad(path+".labels", "says %s: http, which is not supported yet: nothing is sent there rather than sent in clear", labelTunnel)
	}
	region, rest, _ := strings.Cut(in.GetLocality(), "/")
	zone, subzone, _ := strings.Cut(rest, "/")
	out.locality = mesh.Locality{Region: region, Zone: zone, Subzone: subzone}
	if in.GetWeight() > 0 {
		out.capacity = new(in.GetWeight())
	}
	return out
}

// checkWorkloadEntry reads one object for itself.
func checkWorkloadEntry(we WorkloadEntry) (entryEndpoint, findings) {
	found := slices.Clone(we.read)
	out := readEntryEndpoint(&found, "spec", we.Spec)
	// Those of the object count too; those of the spec go before them.
	set := maps.Clone(we.Labels)
	if set == nil {
		set = map[string]string{}
	}
	maps.Copy(set, we.Spec.GetLabels())
	out.labels = set
	if we.Labels[labelTunnel] == "http" && we.Spec.GetLabels()[labelTunnel] == "" {
		found.bad("metadata.labels", "says %s: http, which is not supported yet: nothing is sent there rather than sent in clear", labelTunnel)
	}
	return out, found
}

// compileEntryEndpoints adds what stands behind the hosts of ServiceEntries, and
// the WorkloadEntries that are selected by them or by Services.
func (w *World) compileEntryEndpoints(entries []*serviceEntry, in Inputs) {
	w.endpointLabels = map[mesh.UID]map[string]string{}
	pods := podIndex(in.Pods)
	for _, e := range entries {
		if e.closed || len(e.services) == 0 {
			continue
		}
		prefix := w.settings.Cluster + "/networking.istio.io/ServiceEntry/" + e.Name.String() + "/"
		for i, p := range e.endpoints {
			uid := mesh.UID(fmt.Sprintf("%s%d/%s", prefix, i, cmp.Or(string(p.host), p.address.String())))
			w.addEntryEndpoint(uid, e.Name, p, e.memberships(p), pods)
		}
		if e.named() && len(e.Spec.GetEndpoints()) == 0 && e.selector == nil {
			for _, s := range e.services {
				p := entryEndpoint{host: s.Host}
				own := slices.DeleteFunc(e.memberships(p), func(m mesh.Membership) bool { return m.Service != s })
				w.addEntryEndpoint(mesh.UID(prefix+string(s.Host)), e.Name, p, own, pods)
			}
		}
	}
	for _, we := range in.WorkloadEntries {
		p, found := checkWorkloadEntry(we)
		var ms []mesh.Membership
		if len(found.of(SeverityError)) == 0 {
			ms = w.entryMemberships(we.Name.Namespace, p)
			uid := mesh.UID(w.settings.Cluster + "/networking.istio.io/WorkloadEntry/" + we.Name.String())
			w.addEntryEndpoint(uid, we.Name, p, ms, pods)
		}
		w.Statuses = append(w.Statuses, workloadEntryStatus(we, found, ms))
	}
	slices.SortFunc(w.Endpoints, func(a, b mesh.Workload) int { return strings.Compare(string(a.UID), string(b.UID)) })
}

func workloadEntryStatus(we WorkloadEntry, found findings, ms []mesh.Membership) Status {
	cond := accepted(found, "nothing is sent there")
	if cond.OK && len(ms) == 0 {
		cond.Message += ", but no Service and no ServiceEntry of its namespace selects it"
	} else if cond.OK {
		var hosts []string
		for _, m := range ms {
			hosts = append(hosts, string(m.Service.Host))
		}
		cond.Message += ", an endpoint of " + some(hosts)
	}
	return Status{Kind: KindWorkloadEntry, Name: we.Name, Generation: we.Generation, Conditions: []Condition{cond}}
}

// memberships returns the services of e with the ports that they have at an
// endpoint.
func (e *serviceEntry) memberships(p entryEndpoint) []mesh.Membership {
	var out []mesh.Membership
	for _, s := range e.services {
		if ports := p.servicePorts(e.ports); len(ports) > 0 {
			out = append(out, mesh.Membership{Service: s, Ports: ports})
		}
	}
	return mergeMemberships(out)
}

// entryMemberships returns the services whose selector matches an endpoint of a
// namespace.
func (w *World) entryMemberships(namespace string, p entryEndpoint) []mesh.Membership {
	var out []mesh.Membership
	for _, s := range w.selectedBy(namespace, p.labels) {
		if ports := p.servicePorts(s.ports); len(ports) > 0 {
			out = append(out, mesh.Membership{Service: s.name, Ports: ports})
		}
	}
	return mergeMemberships(out)
}

// servicePorts returns what the ports of a service are at the endpoint. One that
// is asked for by a name that the endpoint does not have is none.
func (p entryEndpoint) servicePorts(ports []corev1.ServicePort) []mesh.Port {
	var out []mesh.Port
	for _, sp := range ports {
		if target := cmp.Or(p.ports[sp.Name], p.ports[sp.TargetPort.StrVal], numericTarget(sp)); target != 0 {
			out = append(out, mesh.Port{Service: uint16(sp.Port), Target: target, AppProtocol: appProtocol(sp)})
		}
	}
	return out
}

// addEntryEndpoint files an endpoint: under the pod whose address it has, or as
// a workload of its own. That has no identity and is outside of the mesh.
func (w *World) addEntryEndpoint(uid mesh.UID, name mesh.Name, p entryEndpoint, ms []mesh.Membership, pods podSet) {
	if len(ms) == 0 {
		return
	}
	out := mesh.Workload{
		UID: uid, Name: name, Host: p.host,
		Network: cmp.Or(p.network, w.settings.Network), Cluster: w.settings.Cluster, Locality: p.locality,
		Transport: mesh.PlainTCP, Healthy: true, Capacity: p.capacity, Services: ms,
		CanonicalName:     canonicalName(labels.Set(p.labels), mesh.Owner{Name: name.Name}),
		CanonicalRevision: canonicalRevision(labels.Set(p.labels)),
	}
	if p.address.IsValid() {
		w.claimed[p.address] = true
		if pods.addrs[p.address] {
			w.fromAddr[p.address] = append(w.fromAddr[p.address], ms...)
			return
		}
		out.Addresses = []netip.Addr{p.address}
	}
	w.endpointLabels[uid] = p.labels
	w.Endpoints = append(w.Endpoints, out)
}

// labelEndpoints gives endpoints the labels that some TrafficPolicy asks for.
func (w *World) labelEndpoints() {
	for i := range w.Endpoints {
		w.Endpoints[i].Labels = w.asked(w.endpointLabels[w.Endpoints[i].UID])
	}
}
