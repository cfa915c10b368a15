package l7

import (
	"sync/atomic"

	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/route"
	"github.com/weft-mesh/weft/mesh/view"
)

// A known is what one View says of a connection and of what it has asked for,
// whatever the request is. Nobody changes it any more.
type known struct {
	view     *view.View
	source   *mesh.Workload // see sourceOf
	service  *mesh.Service
	policies []*mesh.Policy // that protect it
	waypoint *mesh.Waypoint // we
	ends     string         // the connection's addresses, as a line of text has them
	table    *route.Table   // of requests
}

// lookUp asks v; all but the table, which the engine keeps.
func lookUp(v *view.View, f *Facts, waypoint mesh.Name) *known {
	return &known{view: v, source: sourceOf(v, f), service: v.ServiceByName(f.Service),
		policies: v.Targeted(f.Service, waypoint), waypoint: v.Waypoint(waypoint), ends: string(appendEnds(nil, f))}
}

// A memory holds what was known when the last exchange of a connection began,
// and where the last that ended was counted. Its zero value holds nothing. It
// may be used by many goroutines.
type memory struct {
	last    atomic.Pointer[known]
	counted atomic.Pointer[counted]
}

// forget forgets what is of another View than v, which is kept by it else.
func (m *memory) forget(v *view.View) {
	k := m.last.Load()
	if k != nil && k.view == v {
		return
	}
	if k != nil {
		m.last.CompareAndSwap(k, nil)
	}
	if m.counted.Load() != nil { // it points into the old View
		m.counted.Store(nil)
	}
}

// look takes the current View, which all decisions on x read. What it says of
// the connection is looked up only if it is another View than that of the
// exchange before.
func (e *Engine) look(x *Exchange) {
	v := e.cfg.Store.Load()
	k := x.memory.last.Load()
	if k == nil || k.view != v {
		k = lookUp(v, x.Facts, e.cfg.Waypoint)
		k.table = e.table(v.Route(x.Facts.Service, x.Facts.Port, mesh.RouteHTTP))
		x.memory.last.Store(k)
	}
	x.View, x.known = v, k
}
