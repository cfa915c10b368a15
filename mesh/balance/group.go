package balance

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/weft-mesh/weft/mesh"
)

// A Group chooses among the endpoints of a service's (or a subset's) port, by
// its TrafficPolicy. Make one with NewGroup and tell it of its endpoints with
// Update. It is for concurrent use.
type Group struct {
	// Breaker counts what goes to the endpoints. Update sets its limits.
	Breaker Breaker

	self mesh.Workload
	rand func() uint64
	set  atomic.Pointer[set] // never nil
	look atomic.Int64        // when an ejection ends or decays, in Unix ns; 0 is never

	mu     sync.Mutex // above what follows, and who stores set
	policy *mesh.TrafficPolicy
	states map[Key]*state
}

// A set is what a Group chooses from: it never changes, but for the turns of
// its pools.
type set struct {
	policy *mesh.TrafficPolicy
	levels []level // nearest first
	all    []*Endpoint
	named  map[uint64]*Endpoint // by session name: routes have sessions too, which no policy tells of
}

// A level holds endpoints that are equally preferred.
type level struct {
	pools []*pool
	load  uint32 // share of the requests, of loadScale
}

// A pool holds the endpoints of a level among which the algorithm chooses: of
// one locality if each has its share, else all of the level.
type pool struct {
	share   uint64 // of the level's requests
	members []*Endpoint
	ready   []*Endpoint // that may be chosen now
	sums    []uint64    // of weights of ready, up to and with each; nil if all are equal
	hashes  *hashes     // over members
	warm    time.Time   // no member warms up after this; zero is never
	turn    *turn
}

// NewGroup returns a Group without endpoints. self is the workload that asks;
// what is near is near to it. rnd is the source of chance, for concurrent use.
func NewGroup(self mesh.Workload, rnd func() uint64) *Group {
	g := &Group{self: self, rand: rnd, states: map[Key]*state{}, policy: &mesh.TrafficPolicy{}}
	g.set.Store(&set{policy: g.policy})
	return g
}

// Update replaces the endpoints by those of cs that may take requests: healthy
// (or s allows others), with a capacity, with the policy's labels, and as near
// as s says in mode strict. What is remembered of those that stay is kept. p
// may be nil, for the defaults. Nothing that is given may change any more.
func (g *Group) Update(s *mesh.Service, p *mesh.TrafficPolicy, cs []Candidate, now time.Time) {
	if p == nil {
		p = &mesh.TrafficPolicy{}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	old := g.set.Load()
	before := make(map[Key]*Endpoint, len(old.all))
	for _, e := range old.all {
		before[e.state.key] = e
	}
	next := &set{policy: p}
	states := make(map[Key]*state, len(cs))
	for _, c := range cs {
		if !eligible(s, p, &g.self, c) {
			continue
		}
		k := Key{c.Workload.UID, c.Port}
		if states[k] != nil {
			continue
		}
		e := before[k]
		if e == nil || e.Workload != c.Workload {
			st := g.states[k]
			if st == nil {
				st = &state{key: k, since: now}
			}
			e = &Endpoint{Workload: c.Workload, Port: c.Port, weight: capacity(c.Workload), state: st, group: g}
		}
		states[k] = e.state
		next.all = append(next.all, e)
	}
	if p.Outlier == nil {
		for _, st := range states {
			st.ejected.Store(false)
		}
	}
	g.states, g.policy = states, p
	g.Breaker.set(p)
	next.levels = g.levels(s, p, next.all)
	next.prepare(old, g.rand)
	g.publish(next)
	g.plan()
}

// eligible reports whether c may be an endpoint at all.
func eligible(s *mesh.Service, p *mesh.TrafficPolicy, self *mesh.Workload, c Candidate) bool {
	if s == nil || p.Broken != "" {
		return false
	}
	lowest, ok := lowest(s)
	if !ok || rank(s, self, c) < lowest {
		return false
	}
	for k, v := range p.Labels {
		if c.Workload.Labels[k] != v {
			return false
		}
	}
	return true
}

// prepare makes the tables of the pools, or takes those of old.
func (n *set) prepare(old *set, rnd func() uint64) {
	b := &n.policy.Balance
	pools := map[string]*pool{}
	same := func(p *pool) *pool { return nil }
	if old.policy.Balance.Algorithm == b.Algorithm && old.policy.Balance.RingSize == b.RingSize && old.policy.Balance.TableSize == b.TableSize {
		for _, l := range old.levels {
			for _, p := range l.pools {
				pools[p.fingerprint()] = p
			}
		}
		same = func(p *pool) *pool { return pools[p.fingerprint()] }
	}
	n.named = make(map[uint64]*Endpoint, len(n.all))
	for _, e := range n.all {
		n.named[sessionHash(e.state.key)] = e
	}
	for _, l := range n.levels {
		for _, p := range l.pools {
			p.turn = newTurn(rnd())
			if o := same(p); o != nil {
				p.hashes, p.turn = o.hashes.over(p.members), o.turn
			} else {
				p.hashes = newHashes(b, p.members)
			}
			if b.Warmup != nil {
				for _, e := range p.members {
					if end := e.state.since.Add(time.Duration(b.Warmup.Duration)); end.After(p.warm) {
						p.warm = end
					}
				}
			}
		}
	}
}

// fingerprint is equal for pools whose tables are equal.
func (p *pool) fingerprint() string {
	var b []byte
	for _, e := range p.members {
		b = append(b, e.state.key.UID...)
		b = append(b, 0, byte(e.Port), byte(e.Port>>8), byte(e.weight), byte(e.weight>>8), byte(e.weight>>16), byte(e.weight>>24))
	}
	return string(b)
}

// publish makes n what is chosen from, with the endpoints that are ejected left
// out. The mutex is held.
func (g *Group) publish(n *set) {
	panicking := false
	if o := n.policy.Outlier; o != nil && len(n.all) > 0 {
		healthy := 0
		for _, e := range n.all {
			if !e.state.ejected.Load() {
				healthy++
			}
		}
		panicking = healthy*100 < int(o.MinHealthPercent)*len(n.all)
	}
	fresh := &set{policy: n.policy, all: n.all, named: n.named, levels: make([]level, len(n.levels))}
	for i, l := range n.levels {
		fresh.levels[i].pools = make([]*pool, len(l.pools))
		for j, p := range l.pools {
			q := *p
			q.ready, q.sums = p.members, nil
			if !panicking {
				q.ready = without(p.members)
			}
			q.sums = sums(q.ready)
			fresh.levels[i].pools[j] = &q
		}
	}
	spread(fresh.levels)
	g.set.Store(fresh)
}

// without returns the members that are not ejected: members itself if none is.
func without(members []*Endpoint) []*Endpoint {
	for i, e := range members {
		if !e.state.ejected.Load() {
			continue
		}
		ready := append([]*Endpoint(nil), members[:i]...)
		for _, e := range members[i+1:] {
			if !e.state.ejected.Load() {
				ready = append(ready, e)
			}
		}
		return ready
	}
	return members
}

// sums returns the running sums of weights, nil if all weights are equal.
func sums(es []*Endpoint) []uint64 {
	equal := true
	for _, e := range es {
		equal = equal && e.weight == es[0].weight
	}
	if equal {
		return nil
	}
	list := make([]uint64, len(es))
	var sum uint64
	for i, e := range es {
		sum += e.weight
		list[i] = sum
	}
	return list
}

// Endpoints returns all endpoints, those that are ejected included. Read only.
func (g *Group) Endpoints() []*Endpoint { return g.set.Load().all }

// Ready returns how many endpoints may be chosen now, and of how many.
func (g *Group) Ready() (ready, of int) {
	s := g.set.Load()
	for _, l := range s.levels {
		for _, p := range l.pools {
			ready += len(p.ready)
		}
	}
	return ready, len(s.all)
}
