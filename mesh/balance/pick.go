package balance

import (
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/weft-mesh/weft/mesh"
)

// A Request is what of a request decides its endpoint. The zero Request leaves
// all to the algorithm.
type Request struct {
	// Hash of what the policy's HashKey says, if there is such a thing in the
	// request: without it, it goes anywhere.
	Hash   uint64
	Hashed bool
	// Session is the Name of the endpoint that has the session, "" if there is
	// none. It is chosen if it may be chosen at all.
	Session string
	// Avoid are endpoints that have been tried. Others go first, if there are.
	Avoid []*Endpoint
	// Farther leaves the levels of those to avoid, if there are others.
	Farther bool
}

// Pick chooses the endpoint for a request, and returns false if there is none
// that may take it; that is so always if the algorithm is passthrough.
func (g *Group) Pick(r Request, now time.Time) (*Endpoint, bool) {
	if t := g.look.Load(); t != 0 && now.UnixNano() >= t {
		g.review(now)
	}
	s := g.set.Load()
	b := &s.policy.Balance
	if b.Algorithm == mesh.Passthrough {
		return nil, false
	}
	if r.Session != "" {
		if e := s.session(r.Session); e != nil && !r.avoids(e) {
			return e, true
		}
	}
	l := s.level(&r, g.rand)
	if l == nil {
		return nil, false
	}
	p := l.pool(&r, g.rand)
	e := p.choose(b, &r, now, g.rand)
	if !r.avoids(e) {
		return e, true
	}
	// Once more, and then whoever is left, near before far.
	for range 4 {
		if e := p.choose(b, &r, now, g.rand); !r.avoids(e) {
			return e, true
		}
	}
	for _, l := range s.levels {
		for _, p := range l.pools {
			start := int(g.rand() % uint64(max(len(p.ready), 1)))
			for i := range p.ready {
				if e := p.ready[(start+i)%len(p.ready)]; !r.avoids(e) {
					return e, true
				}
			}
		}
	}
	return e, true
}

// avoids reports whether e is one of those to avoid.
func (r *Request) avoids(e *Endpoint) bool {
	for _, a := range r.Avoid {
		if a.state == e.state {
			return true
		}
	}
	return false
}

// session returns the endpoint of that session name if it may be chosen.
func (s *set) session(name string) *Endpoint {
	h, ok := parseSession(name)
	if !ok {
		return nil
	}
	e := s.named[h]
	if e == nil || e.state.ejected.Load() {
		return nil
	}
	return e
}

// draw returns the number that decides: of the request if it has one and that
// is to decide, else chance. salt keeps decisions apart.
func (r *Request) draw(rnd func() uint64, salt uint64) uint64 {
	if r.Hashed {
		return mix(r.Hash + salt)
	}
	return rnd()
}

// level returns the level that takes the request, nil if none can.
func (s *set) level(r *Request, rnd func() uint64) *level {
	if len(s.levels) == 1 {
		if s.levels[0].load == 0 {
			return nil
		}
		return &s.levels[0]
	}
	if r.Farther && len(r.Avoid) > 0 {
		for i := range s.levels {
			if l := &s.levels[i]; l.hasReady() && !slices.ContainsFunc(r.Avoid, l.holds) {
				return l
			}
		}
	}
	at := uint32(r.draw(rnd, 1) % loadScale)
	for i := range s.levels {
		l := &s.levels[i]
		if at < l.load {
			return l
		}
		at -= l.load
	}
	return nil
}

func (l *level) hasReady() bool {
	return slices.ContainsFunc(l.pools, func(p *pool) bool { return len(p.ready) > 0 })
}

func (l *level) holds(e *Endpoint) bool {
	for _, p := range l.pools {
		if slices.ContainsFunc(p.members, func(m *Endpoint) bool { return m.state == e.state }) {
			return true
		}
	}
	return false
}

// pool returns the pool that takes the request. A pool whose endpoints fail
// passes its share on as levels do. One at least is ready.
func (l *level) pool(r *Request, rnd func() uint64) *pool {
	if len(l.pools) == 1 {
		return l.pools[0]
	}
	const whole = 1 << 20
	part := func(p *pool) uint64 {
		return p.share * min(whole, whole*14*uint64(len(p.ready))/(10*uint64(len(p.members))))
	}
	var sum uint64
	for _, p := range l.pools {
		sum += part(p)
	}
	at := r.draw(rnd, 2) % sum
	for _, p := range l.pools {
		w := part(p)
		if at < w {
			return p
		}
		at -= w
	}
	panic("balance: shares do not add up")
}

// choose runs the algorithm over the pool, of which one at least is ready.
func (p *pool) choose(b *mesh.Balance, r *Request, now time.Time, rnd func() uint64) *Endpoint {
	if len(p.ready) == 1 {
		return p.ready[0]
	}
	warming := b.Warmup != nil && now.Before(p.warm)
	switch b.Algorithm {
	case mesh.RoundRobin:
		if p.sums == nil && !warming {
			return p.ready[p.turn.next.Add(1)%uint64(len(p.ready))]
		}
		return p.turn.weighted(p.ready, func(e *Endpoint) float64 { return float64(e.weight) * share(b.Warmup, e, now) })
	case mesh.RingHash, mesh.Maglev:
		if r.Hashed && p.hashes != nil {
			if e := p.hashes.find(r, len(p.ready) < len(p.members)); e != nil {
				return e
			}
		}
		return p.random(rnd)
	case mesh.Random:
		return p.random(rnd)
	}
	if warming {
		return p.warmed(b.Warmup, now, rnd)
	}
	return p.leastRequest(rnd)
}

// random draws an endpoint by weight.
func (p *pool) random(rnd func() uint64) *Endpoint {
	if p.sums == nil {
		return p.ready[bounded(rnd(), uint64(len(p.ready)))]
	}
	at := rnd() % p.sums[len(p.sums)-1]
	i, found := slices.BinarySearch(p.sums, at)
	if found {
		i++ // sums[i] is where the next begins
	}
	return p.ready[i]
}

// bounded maps a random number to 0 up to n, without n.
func bounded(r, n uint64) uint64 { return (r >> 32) * n >> 32 }

// leastRequest returns the less busy of two, by weight.
func (p *pool) leastRequest(rnd func() uint64) *Endpoint {
	if p.sums != nil {
		a, b := p.random(rnd), p.random(rnd)
		// 128 bits are not needed: nobody has 2^32 requests and such a weight.
		if uint64(b.state.active.Load())*a.weight < uint64(a.state.active.Load())*b.weight {
			return b
		}
		return a
	}
	r := rnd()
	n := uint64(len(p.ready))
	i := (r >> 32) * n >> 32
	j := (r & math.MaxUint32) * (n - 1) >> 32
	if j >= i {
		j++
	}
	a, b := p.ready[i], p.ready[j]
	if b.state.active.Load() < a.state.active.Load() {
		return b
	}
	return a
}

// warmed is leastRequest while endpoints warm up.
func (p *pool) warmed(w *mesh.Warmup, now time.Time, rnd func() uint64) *Endpoint {
	var sum float64
	for _, e := range p.ready {
		sum += float64(e.weight) * share(w, e, now)
	}
	draw := func() *Endpoint {
		at := float64(rnd()>>11) / (1 << 53) * sum
		for _, e := range p.ready {
			if at -= float64(e.weight) * share(w, e, now); at < 0 {
				return e
			}
		}
		return p.ready[len(p.ready)-1]
	}
	a, b := draw(), draw()
	load := func(e *Endpoint) float64 {
		return float64(e.state.active.Load()) / (float64(e.weight) * share(w, e, now))
	}
	if load(b) < load(a) {
		return b
	}
	return a
}

// share returns which part of its requests an endpoint takes while it warms up.
func share(w *mesh.Warmup, e *Endpoint, now time.Time) float64 {
	if w == nil || w.Duration <= 0 {
		return 1
	}
	age := now.Sub(e.state.since)
	if age >= time.Duration(w.Duration) {
		return 1
	}
	part := max(age.Seconds(), 0) / time.Duration(w.Duration).Seconds()
	if w.Aggression > 0 && w.Aggression != 1 {
		part = math.Pow(part, 1/w.Aggression)
	}
	return min(1, max(part, float64(w.MinimumPercent)/100, 0.01))
}

// A turn is where a rotation has got to.
type turn struct {
	next atomic.Uint64

	mu     sync.Mutex
	credit map[*state]float64 // by smooth weighted rotation
}

func newTurn(start uint64) *turn {
	t := &turn{}
	t.next.Store(start >> 1) // no overflow in the life of a Group
	return t
}

// weighted returns the next of a rotation in which each comes as often as its
// weight says, and as evenly spaced as can be.
func (t *turn) weighted(es []*Endpoint, weight func(*Endpoint) float64) *Endpoint {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.credit == nil {
		t.credit = make(map[*state]float64, len(es))
	}
	var best *Endpoint
	var sum float64
	for _, e := range es {
		w := weight(e)
		sum += w
		t.credit[e.state] += w
		if best == nil || t.credit[e.state] > t.credit[best.state] {
			best = e
		}
	}
	t.credit[best.state] -= sum
	return best
}
