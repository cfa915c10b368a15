package waypoint

import (
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/weft-mesh/weft/hbone"
	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/view"
	"github.com/weft-mesh/weft/waypoint/l7"
)

// bind returns what a peer's tunnel asks for, if it is bound to the waypoint of
// Gateway self. lately says which services were so a moment ago, which counts
// as well. The error says why a request is refused.
func bind(v *view.View, self mesh.Name, lately func(mesh.ServiceName) bool, peer mesh.Identity, a hbone.Authority) (l7.Facts, error) {
	if !v.Synced() {
		return l7.Facts{}, fmt.Errorf("nothing is known of the mesh yet: the control service has not been reached since the start")
	}
	w := v.Waypoint(self)
	if w == nil {
		return l7.Facts{}, fmt.Errorf("the waypoint %s is not known to the control service", self)
	}
	f := l7.Facts{Port: a.Port, Destination: a.AddrPort()}
	if a.Host != "" {
		f.Destination = netip.AddrPort{}
	}
	if s := service(v, peer, a); s != nil {
		f.Service = s.Name
		switch {
		case !fronts(v, w, s.Waypoint) && !lately(s.Name):
			return l7.Facts{}, fmt.Errorf("service %s is not bound to this waypoint", s.Name)
		case !slices.ContainsFunc(s.Ports, func(p mesh.Port) bool { return p.Service == a.Port }):
			return l7.Facts{}, fmt.Errorf("service %s has no port %d", s.Name, a.Port)
		}
		return f, nil
	}
	if a.Host != "" {
		return l7.Facts{}, fmt.Errorf("there is no service %s for namespace %s", a.Host, peer.Namespace)
	}
	switch t := v.Workload(a.Addr); {
	case t == nil:
		return l7.Facts{}, fmt.Errorf("%v is no service and no workload", a.Addr)
	case !fronts(v, w, t.Waypoint):
		return l7.Facts{}, fmt.Errorf("workload %s is not bound to this waypoint", t.UID)
	default:
		f.Workload = t.UID
	}
	return f, nil
}

// service returns the service that an authority names to peer, or nil: by one of
// its virtual addresses, by an external one that is nobody else's, or by name.
func service(v *view.View, peer mesh.Identity, a hbone.Authority) *mesh.Service {
	if a.Host != "" {
		return v.Resolve(peer.Namespace, mesh.Host(a.Host))
	}
	if s := v.Service(a.Addr); s != nil {
		return s
	}
	if w := v.Workload(a.Addr); w == nil || w.HostNetwork {
		return v.External(a.AddrPort())
	}
	return nil
}

// fronts reports whether ref names the waypoint w.
func fronts(v *view.View, w *mesh.Waypoint, ref mesh.GatewayRef) bool {
	switch {
	case ref.IsZero() || w.Service == mesh.ServiceName{}:
		return false
	case ref.Service != mesh.ServiceName{}:
		return ref.Service == w.Service
	}
	s := v.Service(ref.Address)
	return s != nil && s.Name == w.Service
}

// bound returns the services that are bound to the waypoint of Gateway self.
func bound(v *view.View, self mesh.Name) map[mesh.ServiceName]bool {
	w := v.Waypoint(self)
	if w == nil {
		return nil
	}
	names := make(map[mesh.ServiceName]bool)
	for s := range v.Services() {
		if fronts(v, w, s.Waypoint) {
			names[s.Name] = true
		}
	}
	return names
}

// recent remembers services for a while after they were unbound. Its zero value
// remembers none.
type recent struct {
	mu    sync.Mutex
	bound map[mesh.ServiceName]bool
	until map[mesh.ServiceName]time.Time
}

// update takes over which services are bound at now.
func (r *recent) update(bound map[mesh.ServiceName]bool, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.until == nil {
		r.until = make(map[mesh.ServiceName]time.Time)
	}
	for n, t := range r.until {
		if bound[n] || now.After(t) {
			delete(r.until, n)
		}
	}
	for n := range r.bound {
		if !bound[n] {
			r.until[n] = now.Add(afterlife)
		}
	}
	r.bound = bound
}

// has reports whether a service was bound lately.
func (r *recent) has(n mesh.ServiceName) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	t, ok := r.until[n]
	return ok && time.Now().Before(t)
}
