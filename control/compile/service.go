package compile

import (
	"maps"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/weft-mesh/weft/mesh"
)

// annotationDistribution is Istio's older way to write
// spec.trafficDistribution; the field wins over it. A ServiceEntry has no such
// field.
const annotationDistribution = "networking.istio.io/traffic-distribution"

// A labelPair is a label with its value, of the objects of a namespace.
type labelPair struct{ namespace, key, value string }

// rarest returns the pair of the service's selector that the fewest selectors
// share. A pod is held against the services that are filed under its labels,
// and those that all services have in common would be of no help.
func rarest(s *corev1.Service, shared map[labelPair]int) labelPair {
	var best labelPair
	for _, k := range slices.Sorted(maps.Keys(s.Spec.Selector)) {
		p := labelPair{s.Namespace, k, s.Spec.Selector[k]}
		if best == (labelPair{}) || shared[p] < shared[best] {
			best = p
		}
	}
	return best
}

// A selectingService is a service whose endpoints are the pods it selects.
type selectingService struct {
	name     mesh.ServiceName
	selector labels.Selector
	ports    []corev1.ServicePort // TCP only
}

// compileServices fills Services and the index of selectors.
func (w *World) compileServices(in []*corev1.Service) {
	w.selecting = map[labelPair][]selectingService{}
	shared := map[labelPair]int{} // by how many selectors
	for _, s := range in {
		for k, v := range s.Spec.Selector {
			shared[labelPair{s.Namespace, k, v}]++
		}
	}
	balanced := loadBalanced(in)
	for _, s := range in {
		if s.Spec.Type == corev1.ServiceTypeExternalName {
			continue // a DNS alias: there is nothing to send to at this level
		}
		w.Services = append(w.Services, w.service(s, balanced))
		w.origins[w.settings.serviceName(s.Namespace, s.Name)] = origin{KindService, mesh.Name{Namespace: s.Namespace, Name: s.Name}, s.Labels}
		if len(s.Spec.Selector) == 0 {
			continue
		}
		at := rarest(s, shared)
		w.selecting[at] = append(w.selecting[at], selectingService{
			name:     w.settings.serviceName(s.Namespace, s.Name),
			selector: labels.SelectorFromSet(s.Spec.Selector),
			ports:    tcpPorts(s),
		})
	}
	slices.SortFunc(w.Services, func(a, b mesh.Service) int {
		return strings.Compare(a.Name.String(), b.Name.String())
	})
}

// serviceName returns the key of a Kubernetes service.
func (s Settings) serviceName(namespace, name string) mesh.ServiceName {
	return mesh.ServiceName{Namespace: namespace, Host: mesh.Host(name + "." + namespace + ".svc." + s.Domain)}
}

// service compiles one service, without its endpoints.
func (w *World) service(s *corev1.Service, balanced map[netip.Addr]bool) mesh.Service {
	out := mesh.Service{
		Name:           w.settings.serviceName(s.Namespace, s.Name),
		ShortName:      s.Name,
		AllowUnhealthy: s.Spec.PublishNotReadyAddresses,
		IPFamilies:     ipFamilies(s.Spec.IPFamilies),
		Canonical:      true,

		ExternalAddresses: externalAddresses(s, balanced),
	}
	ips := s.Spec.ClusterIPs
	if len(ips) == 0 {
		ips = []string{s.Spec.ClusterIP}
	}
	for _, ip := range ips {
		a, err := netip.ParseAddr(ip)
		if err != nil {
			continue // "None" of a headless service, or not allocated yet
		}
		a = a.Unmap()
		out.VIPs = append(out.VIPs, mesh.VIP{Network: w.settings.Network, Prefix: netip.PrefixFrom(a, a.BitLen())})
	}
	for _, p := range tcpPorts(s) {
		port := mesh.Port{Service: uint16(p.Port), AppProtocol: appProtocol(p)}
		// Without a selector the slices say which port, and a named port is
		// looked up in each pod: both differ by endpoint.
		if len(s.Spec.Selector) > 0 {
			port.Target = numericTarget(p)
		}
		out.Ports = append(out.Ports, port)
	}
	out.Preferences, out.Mode = distribution(s)
	return out
}

// ingressAddresses returns the addresses that a load balancer has given to the
// service, by whether what goes to them must go through the load balancer
// itself (ipMode Proxy, KEP-1860).
func ingressAddresses(s *corev1.Service, through bool) []netip.Addr {
	if s.Spec.Type != corev1.ServiceTypeLoadBalancer {
		return nil
	}
	var out []netip.Addr
	for _, i := range s.Status.LoadBalancer.Ingress {
		a, err := netip.ParseAddr(i.IP) // it may have a host name only
		if err == nil && through == (deref(i.IPMode) == corev1.LoadBalancerIPModeProxy) {
			out = append(out, a.Unmap().WithZone(""))
		}
	}
	return out
}

// loadBalanced returns the addresses that load balancers have given to any
// service.
func loadBalanced(in []*corev1.Service) map[netip.Addr]bool {
	out := map[netip.Addr]bool{}
	for _, s := range in {
		for _, a := range slices.Concat(ingressAddresses(s, true), ingressAddresses(s, false)) {
			out[a] = true
		}
	}
	return out
}

// externalAddresses returns the addresses at which the service is reached from
// outside, sorted. Anybody who may write a service can claim any address in
// spec.externalIPs (CVE-2020-8554), so there it does not get one that a load
// balancer has given to a service.
func externalAddresses(s *corev1.Service, balanced map[netip.Addr]bool) []netip.Addr {
	out := ingressAddresses(s, false)
	for _, ip := range s.Spec.ExternalIPs {
		a, err := netip.ParseAddr(ip)
		if a = a.Unmap().WithZone(""); err == nil && !balanced[a] {
			out = append(out, a)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}

// tcpPorts returns the service's TCP ports, in the order of the object. UDP
// and SCTP are not the mesh's.
func tcpPorts(s *corev1.Service) []corev1.ServicePort {
	var out []corev1.ServicePort
	for _, p := range s.Spec.Ports {
		if (p.Protocol == "" || p.Protocol == corev1.ProtocolTCP) && validPort(p.Port) {
			out = append(out, p)
		}
	}
	return out
}

func validPort(p int32) bool { return p > 0 && p <= 65535 }

// numericTarget returns the target port when it is the same for every
// endpoint, else 0.
func numericTarget(p corev1.ServicePort) uint16 {
	switch {
	case p.TargetPort.Type == intstr.String && p.TargetPort.StrVal != "":
		return 0
	case validPort(p.TargetPort.IntVal):
		return uint16(p.TargetPort.IntVal)
	}
	return uint16(p.Port) // unset: the same as the service's
}

// appProtocol returns what is spoken on the port, from spec.appProtocol or
// else the port name's first part, or "" when neither is known.
func appProtocol(p corev1.ServicePort) string {
	if p.AppProtocol != nil {
		return knownProtocol(*p.AppProtocol)
	}
	first, _, _ := strings.Cut(p.Name, "-")
	return knownProtocol(first)
}

// knownProtocol folds the spellings of a protocol into ours.
func knownProtocol(s string) string {
	switch strings.ToLower(s) {
	case "http", "kubernetes.io/ws":
		return "http"
	case "http2", "h2c", "kubernetes.io/h2c":
		return "http2"
	case "grpc":
		return "grpc"
	case "tcp":
		return "tcp"
	case "https", "tls", "kubernetes.io/wss":
		return "tls"
	}
	return ""
}

// ipFamilies returns the families that the service's name should resolve to.
func ipFamilies(fs []corev1.IPFamily) string {
	v4, v6 := slices.Contains(fs, corev1.IPv4Protocol), slices.Contains(fs, corev1.IPv6Protocol)
	switch {
	case v4 && v6:
		return "dual"
	case v4:
		return "ipv4"
	case v6:
		return "ipv6"
	}
	return ""
}

// distribution returns the service's wish for near endpoints. A value that is
// not known is no wish.
func distribution(s *corev1.Service) ([]mesh.Preference, mesh.BalanceMode) {
	// A policy, not a wish: it never leaves the node (KEP-2086).
	if p := s.Spec.InternalTrafficPolicy; p != nil && *p == corev1.ServiceInternalTrafficPolicyLocal {
		return []mesh.Preference{mesh.PreferNode}, mesh.BalanceStrict
	}
	if ps := near(deref(s.Spec.TrafficDistribution)); ps != nil {
		return ps, mesh.BalanceFailover
	}
	if ps := near(s.Annotations[annotationDistribution]); ps != nil {
		return ps, mesh.BalanceFailover
	}
	return nil, mesh.BalanceAny
}

// near returns the preferences that a word for a traffic distribution stands
// for. PreferClose is the older name of PreferSameZone (KEP-3015).
func near(wish string) []mesh.Preference {
	zone := []mesh.Preference{mesh.PreferNetwork, mesh.PreferRegion, mesh.PreferZone}
	switch strings.ToLower(wish) {
	case "prefersamezone", "preferclose":
		return zone
	case "prefersamenode":
		return append(zone, mesh.PreferSubzone, mesh.PreferNode)
	}
	return nil
}
