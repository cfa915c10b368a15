package l7

import (
	"maps"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/balance"
	"github.com/weft-mesh/weft/mesh/view"
)

// A clusterKey names the endpoints that are chosen among: those of a service's
// port, or of a subset of them, or one workload by itself.
type clusterKey struct {
	service  mesh.ServiceName
	subset   string
	port     uint16
	workload mesh.UID
}

// A cluster keeps what is known of such endpoints from one request to the next:
// how busy they are, how they did, and the connections to them.
type cluster struct {
	e      *Engine
	key    clusterKey
	logged string // what lines of the log call it, for requests
	group  *balance.Group
	policy atomic.Pointer[mesh.TrafficPolicy] // never nil
	line   line                               // of requests that wait for a connection

	current atomic.Pointer[view.View] // what the endpoints were taken from

	mu        sync.Mutex
	endpoints atomic.Pointer[map[balance.Key]*Endpoint] // written under mu
	direct    map[netip.AddrPort]*Endpoint              // guarded by mu: those that nobody chose
}

// cluster returns the cluster of that key, up to date with v.
func (e *Engine) cluster(k clusterKey, v *view.View) *cluster {
	c := (*e.clusters.Load())[k]
	if c == nil {
		c = e.newCluster(k)
	}
	if c.current.Load() != v {
		c.refresh(v)
	}
	return c
}

// newCluster adds a cluster to the map, which is copied: it changes seldom and
// is read for each request.
func (e *Engine) newCluster(k clusterKey) *cluster {
	e.clusterMu.Lock()
	defer e.clusterMu.Unlock()
	old := *e.clusters.Load()
	if c := old[k]; c != nil {
		return c
	}
	c := &cluster{e: e, key: k, logged: string(appendKey(nil, k, HTTP11)), group: balance.NewGroup(e.cfg.Self, e.rand), direct: map[netip.AddrPort]*Endpoint{}}
	c.policy.Store(&mesh.TrafficPolicy{})
	c.endpoints.Store(&map[balance.Key]*Endpoint{})
	next := maps.Clone(old)
	next[k] = c
	e.clusters.Store(&next)
	return c
}

// forget closes clusters and takes them out of the map.
func (e *Engine) forget(gone []clusterKey) {
	if len(gone) == 0 {
		return
	}
	e.clusterMu.Lock()
	defer e.clusterMu.Unlock()
	next := maps.Clone(*e.clusters.Load())
	for _, k := range gone {
		next[k].close()
		delete(next, k)
	}
	e.clusters.Store(&next)
}

// refresh takes the endpoints from v.
func (c *cluster) refresh(v *view.View) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.current.Load() == v {
		return
	}
	s, candidates := c.candidates(v)
	p := v.TrafficPolicy(c.key.service, c.key.subset, c.key.port)
	if p == nil {
		p = &mesh.TrafficPolicy{}
	}
	c.policy.Store(p)
	c.group.Update(s, p, candidates, time.Now())
	old := *c.endpoints.Load()
	next := make(map[balance.Key]*Endpoint, len(candidates))
	for _, b := range c.group.Endpoints() {
		k := b.Key()
		ep := old[k]
		if ep == nil || ep.balance != b {
			l := &links{}
			if ep != nil {
				l = ep.links
			}
			address, _ := balance.Address(b.Workload, netip.IPv4Unspecified())
			ep = newEndpoint(b.Workload, netip.AddrPortFrom(address, b.Port))
			ep.balance, ep.cluster, ep.links = b, c, l
		}
		next[k] = ep
	}
	c.endpoints.Store(&next)
	c.current.Store(v)
	for k, ep := range old {
		if next[k] == nil {
			ep.links.each(transport.close)
		}
	}
}

// candidates returns the service and those that may be its endpoints.
func (c *cluster) candidates(v *view.View) (*mesh.Service, []balance.Candidate) {
	if c.key.workload != "" {
		w := v.ByUID(c.key.workload)
		if w == nil {
			return nil, nil
		}
		// Who asks for this very workload gets it, ready or not.
		return &mesh.Service{AllowUnhealthy: true}, []balance.Candidate{{Workload: w, Port: c.key.port}}
	}
	s := v.ServiceByName(c.key.service)
	if s == nil {
		return nil, nil
	}
	var list []balance.Candidate
	for _, ep := range v.Endpoints(c.key.service) {
		for _, p := range ep.Ports {
			if p.Service == c.key.port {
				list = append(list, balance.Candidate{Workload: ep.Workload, Port: p.Target})
			}
		}
	}
	return s, list
}

// endpoint returns the Endpoint of what the group has chosen, nil if it has
// just gone.
func (c *cluster) endpoint(b *balance.Endpoint) *Endpoint { return (*c.endpoints.Load())[b.Key()] }

// passthrough returns an Endpoint for an address that was asked for.
func (c *cluster) passthrough(v *view.View, to netip.AddrPort) *Endpoint {
	c.mu.Lock()
	defer c.mu.Unlock()
	ep := c.direct[to]
	if w := v.Workload(to.Addr()); ep == nil || ep.Workload != w {
		l := &links{}
		if ep != nil {
			l = ep.links
		}
		ep = newEndpoint(w, to)
		ep.cluster, ep.links = c, l
		c.direct[to] = ep
	}
	return ep
}

// trim closes connections that nobody has used for long.
func (c *cluster) trim(now int64) {
	idle := time.Duration(c.policy.Load().Connections.IdleHTTP)
	if idle <= 0 {
		idle = time.Hour
	}
	before := now - int64(idle)
	for _, ep := range *c.endpoints.Load() {
		ep.links.each(func(t transport) { t.trim(before) })
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, ep := range c.direct {
		ep.links.each(func(t transport) { t.trim(before) })
	}
}

// gone reports whether v does not have what the cluster is for.
func (c *cluster) gone(v *view.View) bool {
	if c.key.workload != "" {
		return v.ByUID(c.key.workload) == nil
	}
	return v.ServiceByName(c.key.service) == nil
}

// close closes the connections of all endpoints.
func (c *cluster) close() {
	for _, ep := range *c.endpoints.Load() {
		ep.links.each(transport.close)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, ep := range c.direct {
		ep.links.each(transport.close)
	}
}
