package compile

import (
	"cmp"
	"slices"
	"strings"

	"github.com/weft-mesh/weft/mesh"
)

// A routeDraft gathers the rules of one route while the objects of both APIs
// add theirs.
type routeDraft struct {
	gateway []mesh.Rule // of the Gateway API, in its order of precedence
	istio   []mesh.Rule // of VirtualServices, the oldest first
}

// draft returns the draft of a route, made if there was none.
func (w *World) draft(key mesh.RouteKey) *routeDraft {
	d := w.drafts[key]
	if d == nil {
		d = &routeDraft{}
		w.drafts[key] = d
	}
	return d
}

// finishRoutes makes the drafts Routes. Where both APIs have rules for one
// port, those of the Gateway API go first: they were written for this service,
// and what they do not match is left to the VirtualServices.
//
// Clients that no route of the Gateway API is for go where they would go
// without it: to the service itself, if there is no VirtualService either.
// Connections do so too where a VirtualService has no rule for them.
func (w *World) finishRoutes() {
	for key, d := range w.drafts {
		if onlyConsumers(d.gateway) && (key.Protocol != mesh.RouteHTTP || len(d.gateway) > 0 && len(d.istio) == 0) {
			itself := mesh.Rule{Backends: []mesh.Backend{{Service: key.Service, Port: key.Port, Weight: 1}}}
			if key.Protocol == mesh.RouteHTTP {
				itself.Name, itself.Retry = "default", gatewayRetry()
			}
			d.istio = append(d.istio, itself)
		}
		w.Routes = append(w.Routes, mesh.Route{RouteKey: key, Rules: slices.Concat(d.gateway, d.istio)})
	}
	w.drafts = nil
	slices.SortFunc(w.Routes, func(a, b mesh.Route) int { return compareRouteKey(a.RouteKey, b.RouteKey) })
}

// onlyConsumers reports whether all rules are for clients of one namespace.
func onlyConsumers(rules []mesh.Rule) bool {
	return !slices.ContainsFunc(rules, func(r mesh.Rule) bool {
		return len(r.Matches) == 0 || slices.ContainsFunc(r.Matches, func(m mesh.RequestMatch) bool { return len(m.SourceNamespaces) == 0 })
	})
}

func compareRouteKey(a, b mesh.RouteKey) int {
	return cmp.Or(
		strings.Compare(a.Service.String(), b.Service.String()),
		cmp.Compare(a.Port, b.Port),
		cmp.Compare(a.Protocol, b.Protocol),
	)
}
