// Package view is one proxy's picture of the mesh: an immutable value with
// indexes for every question a proxy asks, and a Store that swaps it.
package view

import (
	"cmp"
	"iter"
	"net/netip"
	"slices"
	"strings"

	"github.com/weft-mesh/weft/mesh"
)

// A View is what a proxy knows at one moment. It never changes, so a decision
// that reads one View is consistent. The zero View knows nothing; its Synced
// is false, and "not found" in it must not be taken for "outside the mesh".
// What its methods return belongs to the View: read it only.
type View struct {
	version   string
	workloads []*mesh.Workload // sorted by UID
	services  []*mesh.Service  // sorted by name
	policies  []*mesh.Policy   // sorted by name

	byUID     map[mesh.UID]*mesh.Workload
	byName    map[mesh.Name]*mesh.Workload
	byAddress map[netip.Addr]*mesh.Workload

	byService map[mesh.ServiceName]*mesh.Service
	byHost    map[mesh.Host][]*mesh.Service // by namespace
	byVIP     map[netip.Prefix]*mesh.Service
	external  map[netip.AddrPort]*mesh.Service
	vipBits   [2][]int // prefix lengths in use, longest first; IPv4, IPv6
	endpoints map[mesh.ServiceName][]Endpoint

	byPolicy map[mesh.Name]*mesh.Policy
	global   []*mesh.Policy
	wide     map[string][]*mesh.Policy // by namespace: the global ones, then its own
	targeted map[mesh.Target][]*mesh.Policy

	routes    []*mesh.Route         // sorted by key, as the two below
	traffic   []*mesh.TrafficPolicy // of services and subsets
	waypoints []*mesh.Waypoint

	byRoute    map[mesh.RouteKey]*mesh.Route
	byTraffic  map[trafficKey]*mesh.TrafficPolicy
	byWaypoint map[mesh.Name]*mesh.Waypoint
}

// An Endpoint is a workload behind a service.
type Endpoint struct {
	Workload *mesh.Workload
	Ports    []mesh.Port // what the service's ports are on this workload
}

// New indexes a picture of the mesh. It takes over its slices: the caller must
// not change them, nor what they refer to, any more. Of several objects with
// the same key the last one counts. An empty version makes a View that is not
// synced.
func New(version string, ws []mesh.Workload, ss []mesh.Service, ps []mesh.Policy) *View {
	return Of(version, pointers(ws), pointers(ss), pointers(ps))
}

// pointers returns a pointer to each element of list.
func pointers[T any](list []T) []*T {
	ps := make([]*T, len(list))
	for i := range list {
		ps[i] = &list[i]
	}
	return ps
}

// Of is New for objects that several Views share: who makes a View after each
// change need not copy what did not change. Nobody may change them any more.
func Of(version string, ws []*mesh.Workload, ss []*mesh.Service, ps []*mesh.Policy) *View {
	v := &View{version: version}
	v.byUID = byKey(ws, func(w *mesh.Workload) mesh.UID { return w.UID })
	v.byService = byKey(ss, func(s *mesh.Service) mesh.ServiceName { return s.Name })
	v.byPolicy = byKey(ps, func(p *mesh.Policy) mesh.Name { return p.Name })
	v.workloads = sorted(v.byUID, func(a, b *mesh.Workload) int { return strings.Compare(string(a.UID), string(b.UID)) })
	v.services = sorted(v.byService, func(a, b *mesh.Service) int { return compareServices(a.Name, b.Name) })
	v.policies = sorted(v.byPolicy, func(a, b *mesh.Policy) int { return a.Name.Compare(b.Name) })
	v.indexWorkloads()
	v.indexServices()
	v.indexPolicies()
	v.indexTargets()
	return v
}

// byKey maps each key to the last element of list that has it.
func byKey[K comparable, T any](list []*T, key func(*T) K) map[K]*T {
	m := make(map[K]*T, len(list))
	for _, t := range list {
		m[key(t)] = t
	}
	return m
}

// sorted returns the values of m in order.
func sorted[K comparable, T any](m map[K]*T, compare func(a, b *T) int) []*T {
	list := make([]*T, 0, len(m))
	for _, t := range m {
		list = append(list, t)
	}
	slices.SortFunc(list, compare)
	return list
}

func compareServices(a, b mesh.ServiceName) int {
	return cmp.Or(strings.Compare(a.Namespace, b.Namespace), strings.Compare(string(a.Host), string(b.Host)))
}

// indexWorkloads fills the indexes of workloads and endpoints, in the order of
// UIDs, so that equal input gives an equal View.
func (v *View) indexWorkloads() {
	v.byName = make(map[mesh.Name]*mesh.Workload, len(v.workloads))
	v.byAddress = make(map[netip.Addr]*mesh.Workload, len(v.workloads))
	v.endpoints = make(map[mesh.ServiceName][]Endpoint, len(v.services))
	for _, w := range v.workloads {
		if old := v.byName[w.Name]; old == nil || isPod(w) && !isPod(old) {
			v.byName[w.Name] = w
		}
		for _, a := range w.Addresses {
			if a = key(a); !a.IsValid() {
				continue
			}
			if old := v.byAddress[a]; old == nil || owns(w, old) {
				v.byAddress[a] = w
			}
		}
		for i := range w.Services {
			m := &w.Services[i]
			v.endpoints[m.Service] = append(v.endpoints[m.Service], Endpoint{Workload: w, Ports: m.Ports})
		}
	}
}

// owns reports whether an address that w and old both claim is w's. Pods of
// the host network share the node's address: a workload with an address of its
// own goes before them. Of the rest (an address that is used again before its
// last owner was removed) one that is reached over HBONE goes first: its
// identity is verified, so if the choice was wrong, the connection fails
// instead of going out in clear.
func owns(w, old *mesh.Workload) bool {
	if w.HostNetwork != old.HostNetwork {
		return !w.HostNetwork
	}
	if (w.Transport == mesh.HBONE) != (old.Transport == mesh.HBONE) {
		return w.Transport == mesh.HBONE
	}
	return w.Healthy && !old.Healthy
}

// isPod reports whether w's UID is that of a pod: cluster//Pod/namespace/name.
func isPod(w *mesh.Workload) bool { return strings.Contains(string(w.UID), "//Pod/") }

// key returns a as it is indexed: unmapped, without a zone.
func key(a netip.Addr) netip.Addr { return a.Unmap().WithZone("") }

// indexServices fills the indexes of services. Of two that claim the same
// virtual address or host, the first by name has it.
func (v *View) indexServices() {
	v.byHost = make(map[mesh.Host][]*mesh.Service, len(v.services))
	v.external = make(map[netip.AddrPort]*mesh.Service)
	v.byVIP = make(map[netip.Prefix]*mesh.Service, len(v.services))
	for _, s := range v.services {
		v.byHost[s.Name.Host] = append(v.byHost[s.Name.Host], s)
		for _, a := range s.ExternalAddresses {
			for _, p := range s.Ports {
				if at := netip.AddrPortFrom(key(a), p.Service); v.external[at] == nil {
					v.external[at] = s
				}
			}
		}
		for _, vip := range s.VIPs {
			if !vip.Prefix.IsValid() {
				continue
			}
			p := vip.Prefix.Masked()
			if v.byVIP[p] != nil {
				continue
			}
			v.byVIP[p] = s
			bits := &v.vipBits[family(p.Addr())]
			if !slices.Contains(*bits, p.Bits()) {
				*bits = append(*bits, p.Bits())
			}
		}
	}
	for _, bits := range v.vipBits {
		slices.SortFunc(bits, func(a, b int) int { return b - a })
	}
}

func family(a netip.Addr) int {
	if a.Is4() {
		return 0
	}
	return 1
}

// indexPolicies fills the indexes of policies.
func (v *View) indexPolicies() {
	own := map[string][]*mesh.Policy{}
	for _, p := range v.policies {
		switch p.Scope {
		case mesh.ScopeGlobal:
			v.global = append(v.global, p)
		case mesh.ScopeNamespace:
			own[p.Name.Namespace] = append(own[p.Name.Namespace], p)
		}
	}
	v.wide = make(map[string][]*mesh.Policy, len(own))
	for ns, ps := range own {
		v.wide[ns] = slices.Concat(v.global, ps)
	}
}

// Version returns what the maker of the View called it; it is empty as long as
// nothing is known.
func (v *View) Version() string { return v.version }

// Synced reports whether the View is complete, so that what is not found in it
// is not in the mesh.
func (v *View) Synced() bool { return v.version != "" }

// Workload returns the workload with address a, or nil. An IPv4 address may be
// in its IPv6-mapped form.
func (v *View) Workload(a netip.Addr) *mesh.Workload { return v.byAddress[key(a)] }

// ByUID returns the workload u, or nil.
func (v *View) ByUID(u mesh.UID) *mesh.Workload { return v.byUID[u] }

// ByName returns the workload of that namespace and name, or nil. If several
// have it, a pod goes first, then the lowest UID.
func (v *View) ByName(n mesh.Name) *mesh.Workload { return v.byName[n] }

// Service returns the service whose virtual address a is, or nil. Of several
// ranges that hold a, the narrowest counts.
func (v *View) Service(a netip.Addr) *mesh.Service {
	a = key(a)
	if !a.IsValid() {
		return nil
	}
	for _, bits := range v.vipBits[family(a)] {
		p, err := a.Prefix(bits)
		if err != nil {
			continue
		}
		if s := v.byVIP[p]; s != nil {
			return s
		}
	}
	return nil
}

// ServiceByName returns the service n, or nil.
func (v *View) ServiceByName(n mesh.ServiceName) *mesh.Service { return v.byService[n] }

// ByHost returns the service with host name h, or nil. If several namespaces
// have one, that of the first by name.
func (v *View) ByHost(h mesh.Host) *mesh.Service {
	if ss := v.byHost[h]; len(ss) > 0 {
		return ss[0]
	}
	return nil
}

// External returns the service that has a's address as an external one and a's
// port, or nil. The address may be somebody else's at other ports.
func (v *View) External(a netip.AddrPort) *mesh.Service {
	return v.external[netip.AddrPortFrom(key(a.Addr()), a.Port())]
}

// Resolve returns the service that the host name h means to workloads of a
// namespace, or nil: their own one, else the canonical one, else the first by
// namespace, none of them private to another namespace. A service whose host
// is *.example.com has all names below example.com, except those that another
// one names more closely.
func (v *View) Resolve(namespace string, h mesh.Host) *mesh.Service {
	if s := v.pick(namespace, h); s != nil {
		return s
	}
	for rest := string(h); ; {
		_, below, ok := strings.Cut(rest, ".")
		if !ok || below == "" {
			return nil
		}
		if s := v.pick(namespace, mesh.Host("*."+below)); s != nil {
			return s
		}
		rest = below
	}
}

// pick is Resolve for one entry of the index.
func (v *View) pick(namespace string, h mesh.Host) *mesh.Service {
	var best *mesh.Service
	for _, s := range v.byHost[h] {
		switch {
		case s.Name.Namespace == namespace:
			return s
		case s.Private:
		case best == nil, s.Canonical && !best.Canonical:
			best = s
		}
	}
	return best
}

// Endpoints returns the workloads that list service n, sorted by UID. They may
// be there before the service is.
func (v *View) Endpoints(n mesh.ServiceName) []Endpoint { return v.endpoints[n] }

// PoliciesFor returns the policies that apply to w: those of the whole mesh,
// of its namespace, and those it lists; and the names of the listed ones that
// are not here, for which the caller must deny. If w is nil or v is not
// synced, a missing policy without a name stands for all that is not known.
func (v *View) PoliciesFor(w *mesh.Workload) (ps []*mesh.Policy, missing []mesh.Name) {
	if w == nil || !v.Synced() {
		return nil, []mesh.Name{{}}
	}
	ps, ok := v.wide[w.Name.Namespace]
	if !ok {
		ps = v.global
	}
	ps = slices.Clip(ps) // appending must copy
	for _, n := range w.Policies {
		switch p := v.byPolicy[n]; {
		case p == nil:
			missing = append(missing, n)
		case !slices.Contains(ps, p):
			ps = append(ps, p)
		}
	}
	return ps, missing
}

// Policy returns the policy n, or nil.
func (v *View) Policy(n mesh.Name) *mesh.Policy { return v.byPolicy[n] }

// Workloads returns all workloads, sorted by UID.
func (v *View) Workloads() iter.Seq[*mesh.Workload] { return slices.Values(v.workloads) }

// Services returns all services, sorted by name.
func (v *View) Services() iter.Seq[*mesh.Service] { return slices.Values(v.services) }

// Policies returns all policies, sorted by name.
func (v *View) Policies() iter.Seq[*mesh.Policy] { return slices.Values(v.policies) }
