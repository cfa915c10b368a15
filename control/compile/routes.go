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
func (w *World) finishRoutes() {
	for key, d := range w.drafts {
		if len(d.gateway) == 0 && key.Protocol != mesh.RouteHTTP {
			// Connections that no VirtualService has a rule for go where they
			// would go without it.
			d.istio = append(d.istio, mesh.Rule{Backends: []mesh.Backend{{Service: key.Service, Port: key.Port, Weight: 1}}})
		}
		w.Routes = append(w.Routes, mesh.Route{RouteKey: key, Rules: slices.Concat(d.gateway, d.istio)})
	}
	w.drafts = nil
	slices.SortFunc(w.Routes, func(a, b mesh.Route) int { return compareRouteKey(a.RouteKey, b.RouteKey) })
}

func compareRouteKey(a, b mesh.RouteKey) int {
	return cmp.Or(
		strings.Compare(a.Service.String(), b.Service.String()),
		cmp.Compare(a.Port, b.Port),
		cmp.Compare(a.Protocol, b.Protocol),
	)
}
