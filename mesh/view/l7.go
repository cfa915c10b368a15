package view

import (
	"cmp"
	"iter"
	"slices"
	"strings"

	"github.com/weft-mesh/weft/mesh"
)

// L7 is what only proxies of requests know: routes, traffic policies, and the
// waypoints. Of several objects with the same key the last one counts. Nobody
// may change them any more. Who makes a View after each change hands over the
// same pointer for what did not change, so that something made from an object
// (compiled expressions, say) may be kept by its pointer.
type L7 struct {
	Routes          []*mesh.Route
	TrafficPolicies []*mesh.TrafficPolicy
	Waypoints       []*mesh.Waypoint
}

// A trafficKey names a TrafficPolicy.
type trafficKey struct {
	service mesh.ServiceName
	subset  string
	port    uint16
}

// WithL7 is Of with what proxies of requests know besides.
func WithL7(version string, ws []*mesh.Workload, ss []*mesh.Service, ps []*mesh.Policy, l L7) *View {
	v := Of(version, ws, ss, ps)
	v.byRoute = byKey(l.Routes, func(r *mesh.Route) mesh.RouteKey { return r.RouteKey })
	v.byTraffic = byKey(l.TrafficPolicies, func(p *mesh.TrafficPolicy) trafficKey {
		return trafficKey{p.Service, p.Subset, p.Port}
	})
	v.byWaypoint = byKey(l.Waypoints, func(w *mesh.Waypoint) mesh.Name { return w.Name })
	v.routes = sorted(v.byRoute, func(a, b *mesh.Route) int {
		return cmp.Or(compareServices(a.Service, b.Service), cmp.Compare(a.Port, b.Port), cmp.Compare(a.Protocol, b.Protocol))
	})
	v.traffic = sorted(v.byTraffic, func(a, b *mesh.TrafficPolicy) int {
		return cmp.Or(compareServices(a.Service, b.Service), strings.Compare(a.Subset, b.Subset), cmp.Compare(a.Port, b.Port))
	})
	v.waypoints = sorted(v.byWaypoint, func(a, b *mesh.Waypoint) int { return a.Name.Compare(b.Name) })
	return v
}

// indexTargets fills the index of policies by what they protect.
func (v *View) indexTargets() {
	v.targeted = map[mesh.Target][]*mesh.Policy{}
	for _, p := range v.policies {
		if p.Scope != mesh.ScopeTarget {
			continue
		}
		for _, t := range p.Targets {
			if at := v.targeted[t]; len(at) == 0 || at[len(at)-1] != p {
				v.targeted[t] = append(at, p)
			}
		}
	}
}

// Route returns the route for requests (or connections, as p says) to a port of
// a service: the one for that port, else the one for all its other ports, else
// nil. A service without one is served as if everything went to it.
func (v *View) Route(service mesh.ServiceName, port uint16, p mesh.RouteProtocol) *mesh.Route {
	if r := v.byRoute[mesh.RouteKey{Service: service, Port: port, Protocol: p}]; r != nil {
		return r
	}
	return v.byRoute[mesh.RouteKey{Service: service, Protocol: p}]
}

// TrafficPolicy returns how a port of a service (or a subset of it) is reached:
// by the policy for that port, else by the one for all its other ports, else
// nil. A whole service without one has the defaults; a subset without one does
// not exist.
func (v *View) TrafficPolicy(service mesh.ServiceName, subset string, port uint16) *mesh.TrafficPolicy {
	if p := v.byTraffic[trafficKey{service, subset, port}]; p != nil {
		return p
	}
	return v.byTraffic[trafficKey{service, subset, 0}]
}

// Targeted returns the policies of ScopeTarget that protect a service behind a
// waypoint: those whose target is either of them, sorted by name. Either may
// be zero. A policy with a zero target is one of which nobody could read what it
// protects: it is always among them.
func (v *View) Targeted(service mesh.ServiceName, waypoint mesh.Name) []*mesh.Policy {
	own := v.targeted[mesh.Target{Service: service}]
	all := v.targeted[mesh.Target{Waypoint: waypoint}]
	unread := v.targeted[mesh.Target{}]
	switch {
	case len(all)+len(unread) == 0:
		return slices.Clip(own)
	case len(own)+len(unread) == 0:
		return slices.Clip(all)
	}
	both := slices.Concat(own, all, unread)
	slices.SortFunc(both, func(a, b *mesh.Policy) int { return a.Name.Compare(b.Name) })
	return slices.Compact(both)
}

// Waypoint returns the waypoint of the Gateway n, or nil.
func (v *View) Waypoint(n mesh.Name) *mesh.Waypoint { return v.byWaypoint[n] }

// Waypoints returns all waypoints, sorted by name.
func (v *View) Waypoints() iter.Seq[*mesh.Waypoint] { return slices.Values(v.waypoints) }

// Routes returns all routes, sorted by service, port and protocol.
func (v *View) Routes() iter.Seq[*mesh.Route] { return slices.Values(v.routes) }

// TrafficPolicies returns all traffic policies, sorted by service, subset and
// port.
func (v *View) TrafficPolicies() iter.Seq[*mesh.TrafficPolicy] { return slices.Values(v.traffic) }
