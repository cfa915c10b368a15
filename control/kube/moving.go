package kube

import (
	"time"

	"github.com/weft-mesh/weft/control/compile"
	"github.com/weft-mesh/weft/mesh"
)

// settle is how long after a service was bound to a waypoint its pods may
// still be called directly. Proxies learn of the binding within a second, and
// what they have begun directly goes on for a while.
const settle = 5 * time.Second

// A mover knows which services were bound to a waypoint lately. Its owner is
// one goroutine.
type mover struct {
	since map[mesh.ServiceName]time.Time
}

// moved notes the services that now has bound to another waypoint than before
// had, and reports whether there are any. What was there at the start is
// settled.
func (m *mover) moved(before, now *compile.World, at time.Time) bool {
	if before == nil {
		return false
	}
	if m.since == nil {
		m.since = map[mesh.ServiceName]time.Time{}
	}
	old := make(map[mesh.ServiceName]mesh.GatewayRef, len(before.Services))
	for _, s := range before.Services {
		old[s.Name] = s.Waypoint
	}
	moved := false
	for _, s := range now.Services {
		switch was, there := old[s.Name]; {
		case s.Waypoint.IsZero():
			delete(m.since, s.Name)
		case there && was != s.Waypoint:
			m.since[s.Name] = at
			moved = true
		}
	}
	return moved
}

// moving returns the services that have not settled, and forgets the others;
// and when the next one will have, or zero.
func (m *mover) moving(now time.Time) (services map[mesh.ServiceName]bool, next time.Time) {
	for s, since := range m.since {
		until := since.Add(settle)
		if !now.Before(until) {
			delete(m.since, s)
			continue
		}
		if services == nil {
			services = map[mesh.ServiceName]bool{}
		}
		services[s] = true
		if next.IsZero() || until.Before(next) {
			next = until
		}
	}
	return services, next
}
