package balance

import (
	"time"

	"github.com/weft-mesh/weft/mesh"
)

// maxEjection bounds an ejection, if the base is not longer.
const maxEjection = 300 * time.Second

// judge counts the outcome of a request, and ejects the endpoint if that was
// one failure in a row too many.
func (g *Group) judge(e *Endpoint, out Outcome, now time.Time) {
	o := g.set.Load().policy.Outlier
	if o == nil || out == Unknown {
		return
	}
	st := e.state
	if out == Success && st.errors.Load()|st.gateway.Load()|st.local.Load() == 0 {
		return // nearly always, and writes nothing
	}
	if !st.count(o, out) || st.ejected.Load() {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.states[st.key] != st || st.ejected.Load() {
		return // forgotten, or somebody else was faster
	}
	s := g.set.Load()
	n := 0
	for _, e := range s.all {
		if e.state.ejected.Load() {
			n++
		}
	}
	if n > 0 && (n+1)*100 > int(o.MaxEjected)*len(s.all) {
		return
	}
	base := time.Duration(o.BaseEjection)
	st.times++
	st.until = now.Add(min(base*time.Duration(st.times), max(base, maxEjection)))
	st.ejected.Store(true)
	g.publish(s)
	g.plan()
}

// count counts an outcome and reports whether that was one too many.
func (st *state) count(o *mesh.Outlier, out Outcome) bool {
	if out != LocalFailure {
		st.local.Store(0) // it answered
	}
	switch out {
	case Success:
		st.errors.Store(0)
		st.gateway.Store(0)
		return false
	case ServerError:
		st.gateway.Store(0)
		return reached(&st.errors, o.Consecutive5xx)
	case LocalFailure:
		if o.SplitLocal {
			return reached(&st.local, o.ConsecutiveLocal)
		}
	}
	some := reached(&st.errors, o.Consecutive5xx)
	return reached(&st.gateway, o.ConsecutiveGateway) || some
}

// reached counts and reports whether the limit is reached; counting starts anew
// then. A limit of 0 is never reached.
func reached(c interface{ Add(uint32) uint32 }, limit uint32) bool {
	n := c.Add(1)
	if limit == 0 || n < limit {
		return false
	}
	c.Add(-n)
	return true
}

// review ends the ejections that are over, and forgives old ones.
func (g *Group) review(now time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	changed := false
	for _, st := range g.states {
		switch {
		case st.ejected.Load():
			if now.Before(st.until) {
				continue
			}
			st.ejected.Store(false)
			st.errors.Store(0)
			st.gateway.Store(0)
			st.local.Store(0)
			changed = true
			st.decays = now.Add(g.interval())
		case st.times > 0 && !now.Before(st.decays):
			// Each interval without an ejection shortens the next one.
			st.times--
			st.decays = now.Add(g.interval())
		}
	}
	if changed {
		g.publish(g.set.Load())
	}
	g.plan()
}

// interval returns how long an endpoint must do well to be forgiven.
func (g *Group) interval() time.Duration {
	if o := g.policy.Outlier; o != nil && o.Interval > 0 {
		return time.Duration(o.Interval)
	}
	return 10 * time.Second
}

// plan notes when review has something to do. The mutex is held.
func (g *Group) plan() {
	var first time.Time
	for _, st := range g.states {
		at := st.decays
		if st.ejected.Load() {
			at = st.until
		} else if st.times == 0 {
			continue
		}
		if first.IsZero() || at.Before(first) {
			first = at
		}
	}
	if first.IsZero() {
		g.look.Store(0)
		return
	}
	g.look.Store(first.UnixNano())
}
