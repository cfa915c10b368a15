package compile

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	networkingv1alpha3 "istio.io/api/networking/v1alpha3"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/weft-mesh/weft/mesh"
)

// A ServiceEntry is the Kubernetes object of that name, read.
type ServiceEntry struct {
	Meta
	Labels map[string]string
	Spec   *networkingv1alpha3.ServiceEntry // what of it could be read
	// Given are the addresses that its status says were given to its hosts.
	Given []HostAddress
	read  findings
}

// A HostAddress is an address that was given to a host of a ServiceEntry that
// has none of its own.
type HostAddress struct {
	Host    mesh.Host  `json:"host"`
	Address netip.Addr `json:"value"`
}

// ReadServiceEntry reads an object of kind ServiceEntry of the group
// networking.istio.io, in any version.
func ReadServiceEntry(u *unstructured.Unstructured) ServiceEntry {
	out := ServiceEntry{Meta: readName(u), Labels: u.GetLabels(), Spec: &networkingv1alpha3.ServiceEntry{}}
	out.read = readSpecByField(u, out.Spec)
	given, _, _ := unstructured.NestedSlice(u.Object, "status", "addresses")
	for _, g := range given {
		m, _ := g.(map[string]any)
		host, _ := m["host"].(string)
		value, _ := m["value"].(string)
		if a, err := netip.ParseAddr(value); err == nil && host != "" {
			out.Given = append(out.Given, HostAddress{mesh.Host(host), a})
		}
	}
	return out
}

// An origin is the object that a service was made of.
type origin struct {
	kind   string // KindService or KindServiceEntry
	name   mesh.Name
	labels map[string]string
}

// String returns the origin as users know it: "Service shop/cart".
func (o origin) String() string { return o.kind + " " + o.name.String() }

// A serviceEntry is one object on its way to services, of which each of its
// hosts is one.
type serviceEntry struct {
	ServiceEntry
	found     findings
	hosts     []mesh.Host
	addresses []netip.Prefix
	ports     []corev1.ServicePort // those of TCP
	endpoints []entryEndpoint
	selector  labels.Selector // of pods and WorkloadEntries; nil selects none
	closed    bool            // it cannot be followed, and has no endpoints

	services []mesh.ServiceName // those made of it
	given    []HostAddress
}

// entryPart is a part of a ServiceEntry without which the rest means what it
// says.
var entryPart = regexp.MustCompile(`^spec\.(hosts|addresses|ports|endpoints)\[\d+\]`)

// checkServiceEntry reads one object for itself.
func (s Settings) checkServiceEntry(se ServiceEntry) *serviceEntry {
	e := &serviceEntry{ServiceEntry: se, found: slices.Clone(se.read)}
	e.readHosts(s)
	e.readPorts()
	e.readAddresses()
	e.readResolution()
	if w := se.Spec.GetWorkloadSelector(); w != nil {
		e.readSelector(w.GetLabels())
	}
	for i, in := range se.Spec.GetEndpoints() {
		path := fmt.Sprintf("spec.endpoints[%d]", i)
		out := readEntryEndpoint(&e.found, path, in)
		if se.Spec.GetResolution() == networkingv1alpha3.ServiceEntry_STATIC && out.host != "" {
			e.found.bad(path+".address", "is %q, want an IP address, because spec.resolution is STATIC", in.GetAddress())
		}
		if e.found.brokenAt(path) == "" {
			e.endpoints = append(e.endpoints, out)
		}
	}
	for _, f := range e.found {
		e.closed = e.closed || f.Severity == SeverityError && !entryPart.MatchString(f.Path)
	}
	return e
}

func (e *serviceEntry) readHosts(s Settings) {
	if len(e.Spec.GetHosts()) == 0 {
		e.found.bad("spec.hosts", "is empty: name the hosts that are meant")
	}
	for i, h := range e.Spec.GetHosts() {
		path := fmt.Sprintf("spec.hosts[%d]", i)
		if why := badHost(h, true); why != "" || h == "*" {
			e.found.bad(path, "is %q, %s", h, cmp.Or(why, "which is every host there is: name a domain, as *.example.com"))
			continue
		}
		// A short name is a name of its own here, and no service's.
		host := mesh.Host(strings.TrimSuffix(strings.ToLower(h), "."))
		if slices.Contains(e.hosts, host) {
			e.found.bad(path, "is %q, which is there twice", h)
			continue
		}
		e.hosts = append(e.hosts, host)
	}
}

func (e *serviceEntry) readPorts() {
	if len(e.Spec.GetPorts()) == 0 {
		e.found.bad("spec.ports", "is empty: name the ports that the hosts have")
	}
	numbers, names := map[uint32]bool{}, map[string]bool{}
	for i, p := range e.Spec.GetPorts() {
		path := fmt.Sprintf("spec.ports[%d]", i)
		target := cmp.Or(p.GetTargetPort(), p.GetNumber())
		switch {
		case p.GetNumber() == 0 || p.GetNumber() > 65535:
			e.found.bad(path+".number", "is %d, want 1 to 65535", p.GetNumber())
		case target > 65535:
			e.found.bad(path+".targetPort", "is %d, want 1 to 65535", target)
		case numbers[p.GetNumber()]:
			e.found.bad(path+".number", "is %d, which is there twice", p.GetNumber())
		case p.GetName() != "" && names[p.GetName()]:
			e.found.bad(path+".name", "is %q, which is there twice", p.GetName())
		case strings.EqualFold(p.GetProtocol(), "UDP"):
			e.found.warn(path+".protocol", "is UDP, which the mesh does not carry: it goes where it would go without it")
			continue
		}
		numbers[p.GetNumber()], names[p.GetName()] = true, true
		if e.found.brokenAt(path) != "" {
			continue
		}
		out := corev1.ServicePort{Name: p.GetName(), Port: int32(p.GetNumber()), TargetPort: intstr.FromInt32(int32(target)), Protocol: corev1.ProtocolTCP}
		if p.GetProtocol() != "" {
			out.AppProtocol = new(entryProtocol(p.GetProtocol()))
		}
		e.ports = append(e.ports, out)
	}
}

// entryProtocol returns what is spoken on a port by its protocol.
func entryProtocol(protocol string) string {
	switch p := strings.ToLower(protocol); p {
	case "grpc-web":
		return "http"
	case "mongo", "mysql", "redis":
		return "tcp"
	default:
		return p
	}
}

func (e *serviceEntry) readAddresses() {
	for i, text := range e.Spec.GetAddresses() {
		path := fmt.Sprintf("spec.addresses[%d]", i)
		p, err := netip.ParsePrefix(text)
		if a, no := netip.ParseAddr(text); no == nil && a.Zone() == "" {
			p, err = netip.PrefixFrom(a.Unmap(), a.Unmap().BitLen()), nil
		}
		switch a := p.Addr(); {
		case err != nil:
			e.found.bad(path, "is %q, want an IP address, or a range of them as 192.0.2.0/24", text)
		case a.Is4In6() || a.IsUnspecified() || a.IsLoopback() || a.IsLinkLocalUnicast() || a.IsMulticast():
			e.found.bad(path, "is %q, which no host of a network has", text)
		case !p.IsSingleIP() && e.named():
			e.found.bad(path, "is the range %q, which only a ServiceEntry with resolution NONE or STATIC can have", text)
		default:
			e.addresses = append(e.addresses, p.Masked())
		}
	}
}

// named reports whether endpoints may be known by name.
func (e *serviceEntry) named() bool {
	r := e.Spec.GetResolution()
	return r != networkingv1alpha3.ServiceEntry_NONE && r != networkingv1alpha3.ServiceEntry_STATIC
}

// readResolution checks what says where the endpoints are.
func (e *serviceEntry) readResolution() {
	n, sel := len(e.Spec.GetEndpoints()), e.Spec.GetWorkloadSelector() != nil
	if n > 0 && sel {
		e.found.bad("spec", "has both endpoints and workloadSelector, of which it can have one")
	}
	switch r := e.Spec.GetResolution(); r {
	case networkingv1alpha3.ServiceEntry_NONE:
		if n > 0 || sel {
			e.found.bad("spec.resolution", "is NONE, which goes to the address that was asked for, and has no endpoints: want STATIC or DNS")
		}
		if len(e.Spec.GetAddresses()) == 0 {
			e.found.warn("spec.addresses", "is empty and spec.resolution is NONE, so nobody can tell which connections are meant: they go where they would go without the object, around waypoints too")
		}
	case networkingv1alpha3.ServiceEntry_STATIC:
		if n == 0 && !sel {
			e.found.bad("spec.resolution", "is STATIC, and there are neither endpoints nor a workloadSelector")
		}
	case networkingv1alpha3.ServiceEntry_DNS, networkingv1alpha3.ServiceEntry_DNS_ROUND_ROBIN:
		if r == networkingv1alpha3.ServiceEntry_DNS_ROUND_ROBIN && n > 1 {
			e.found.bad("spec.endpoints", "has %d entries, want at most one, because spec.resolution is DNS_ROUND_ROBIN", n)
		}
		if n == 0 && !sel && slices.ContainsFunc(e.hosts, wildcard) {
			e.found.bad("spec.resolution", "is %v, and a host with a star cannot be looked up: name the hosts, or give endpoints", r)
		}
	default:
		e.found.bad("spec.resolution", "is %v, which is not supported yet: want NONE, STATIC, DNS or DNS_ROUND_ROBIN", r)
	}
}

func wildcard(h mesh.Host) bool { return strings.HasPrefix(string(h), "*") }

func (e *serviceEntry) readSelector(set map[string]string) {
	if len(set) == 0 {
		e.found.bad("spec.workloadSelector.labels", "is empty, and would select everything in the namespace")
		return
	}
	if _, err := readSelector(set); err != nil {
		e.found.bad("spec.workloadSelector.labels", "cannot be on a pod: %v", err)
		return
	}
	e.selector = labels.SelectorFromSet(set)
}

// object returns e as far as it is like a Service.
func (e *serviceEntry) object() *corev1.Service {
	return &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: e.Name.Namespace, Name: e.Name.Name, Labels: e.Labels},
		Spec:       corev1.ServiceSpec{Ports: e.ports},
	}
}

// compileServiceEntries adds the hosts of ServiceEntries to the services, the
// oldest object first, and what stands behind them to the endpoints.
func (w *World) compileServiceEntries(in Inputs) {
	w.entries, w.entryHosts = map[mesh.Name]*serviceEntry{}, map[mesh.Host][]mesh.ServiceName{}
	objects := slices.Clone(in.ServiceEntries)
	slices.SortFunc(objects, func(a, b ServiceEntry) int {
		return cmp.Or(a.Created.Compare(b.Created), a.Name.Compare(b.Name))
	})
	owners := w.addressOwners(in.Pods)
	var all []*serviceEntry
	for _, se := range objects {
		e := w.settings.checkServiceEntry(se)
		w.entries[se.Name] = e
		all = append(all, e)
		owners.check(e)
	}
	giver := newGiver(w.Services, all)
	for _, e := range all {
		w.addEntry(e, giver)
	}
	slices.SortFunc(w.Services, func(a, b mesh.Service) int { return strings.Compare(a.Name.String(), b.Name.String()) })
	for _, s := range w.Services {
		if w.origins[s.Name].kind == KindServiceEntry {
			w.entryHosts[s.Name.Host] = append(w.entryHosts[s.Name.Host], s.Name)
		}
	}
	w.compileEntryEndpoints(all, in)
}

// addEntry adds the services of one ServiceEntry.
func (w *World) addEntry(e *serviceEntry, giver *giver) {
	own := origin{KindServiceEntry, e.Name, e.Labels}
	bound, _ := w.bind(e.Name.Namespace, e.Labels, true)
	for _, host := range e.hosts {
		name := mesh.ServiceName{Namespace: e.Name.Namespace, Host: host}
		if of, taken := w.origins[name]; taken {
			e.found.bad("spec.hosts", "names %s, which is that of %s already", host, of)
			continue
		}
		w.origins[name] = own
		e.services = append(e.services, name)
		s := mesh.Service{Name: name, ShortName: e.Name.Name, SubjectAltNames: e.Spec.GetSubjectAltNames(), Private: private(e.Spec.GetExportTo())}
		for _, p := range e.addresses {
			s.VIPs = append(s.VIPs, mesh.VIP{Network: w.settings.Network, Prefix: p})
		}
		if e.wantsAddress(bound != (binding{})) {
			for _, a := range giver.give(e, host) {
				e.given = append(e.given, HostAddress{host, a})
				s.VIPs = append(s.VIPs, mesh.VIP{Network: w.settings.Network, Prefix: netip.PrefixFrom(a, a.BitLen())})
			}
		}
		for _, p := range e.ports {
			s.Ports = append(s.Ports, mesh.Port{Service: uint16(p.Port), Target: e.target(p), AppProtocol: appProtocol(p)})
		}
		if e.Spec.GetResolution() == networkingv1alpha3.ServiceEntry_NONE && !e.closed {
			s.Mode = mesh.BalancePassthrough
		} else if ps := near(e.Annotations[annotationDistribution]); ps != nil {
			s.Preferences, s.Mode = ps, mesh.BalanceFailover
		}
		w.Services = append(w.Services, s)
		if e.selector != nil && !e.closed {
			set := e.Spec.GetWorkloadSelector().GetLabels()
			k := slices.Min(slices.Collect(maps.Keys(set)))
			at := labelPair{e.Name.Namespace, k, set[k]}
			w.selecting[at] = append(w.selecting[at], selectingService{name: name, selector: e.selector, ports: e.ports})
		}
	}
	if e.names() && bound == (binding{}) && !e.closed {
		then := "its hosts are reached as without the object"
		if len(e.addresses) > 0 {
			then = "connections to spec.addresses are refused"
		}
		e.found.warn("spec.resolution", "is %v: only waypoints look names up, and none is in front of it (label it, or its namespace, istio.io/use-waypoint): %s", e.Spec.GetResolution(), then)
	}
}

// private reports whether an object is for its own namespace only.
func private(exportTo []string) bool { return len(exportTo) == 1 && exportTo[0] == "." }

// target returns the port behind a port when it is the same for every
// endpoint, else 0.
func (e *serviceEntry) target(p corev1.ServicePort) uint16 {
	differs := e.selector != nil || slices.ContainsFunc(e.endpoints, func(x entryEndpoint) bool { return x.ports[p.Name] != 0 })
	if differs {
		return 0
	}
	return numericTarget(p)
}

// names reports whether some endpoint is known by its name only.
func (e *serviceEntry) names() bool {
	return e.named() && (len(e.Spec.GetEndpoints()) == 0 && e.selector == nil ||
		slices.ContainsFunc(e.endpoints, func(x entryEndpoint) bool { return x.host != "" }))
}

// status tells what became of the object. bound is whether it is behind the
// waypoint that it names, if it names one.
func (e *serviceEntry) status(bound Condition) Status {
	out := Status{Kind: KindServiceEntry, Name: e.Name, Generation: e.Generation, HostAddresses: e.given,
		Conditions: []Condition{accepted(e.found, "what is concerned is not followed; connections to a host without an endpoint are refused")}}
	if bound.Type != "" {
		out.Conditions = append(out.Conditions, bound)
	}
	return out
}
