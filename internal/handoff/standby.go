package handoff

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"sync"
	"time"
)

// Of the ztunnels of one pair, which are two processes of one pod of the
// DaemonSet, one is active and accepts connections. The other has been given
// the same pods and stands by: when the connection of the active one ends, as
// the kernel makes it the moment that the process dies, the agent activates
// the one that stands by. A ztunnel that names no pair is always active.
//
// In a rollout a pair ends as a whole, the active one a moment before the other.
// That one would drain what it accepts in this moment, so it is not activated at
// once while a ztunnel of another pair serves the node.

// electWait is how long a ztunnel that stands by waits for an active one of
// its pair to say that it is there, after it has connected itself. An agent
// that has just started hears of them in any order.
const electWait = time.Second

// patientFactor is how much longer it waits for one of which it knows that it
// lives: that one is late because the node is busy, and two active ones would
// each have connections of their own from then on. It may hang, so there is an
// end to that. So long it also waits for its own end when the active one has left
// and another pair serves the node.
const patientFactor = 10

// watchEvery is how often an active ztunnel is asked whether it still answers.
// It has ServerConfig.AckTimeout for that.
const watchEvery = time.Second

// introduce takes what a hello says of pair and activity.
func (p *proxy) introduce(m message) {
	p.pair, p.active, p.eager, p.twin = m.Pair, m.Active || m.Pair == "", m.Eager, m.Twin
}

// ready notes that p has all pods.
func (s *Server) ready(p *proxy) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p.synced = true
}

// join makes p the newest ztunnel, and active if it wants to be the active one
// of its pair and there is none, neither here nor, as p knows, on its way. told
// reports that p does not know that yet.
func (s *Server) join(p *proxy) (told bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.proxies = append(s.proxies, p)
	if p.eager && !p.active && !p.twin && !s.served(p.pair) {
		p.active, told = true, true
	}
	s.wake()
	return told
}

// served reports whether a pair has an active ztunnel. s.mu is held.
func (s *Server) served(pair string) bool {
	return slices.ContainsFunc(s.proxies, func(p *proxy) bool { return p.active && p.pair == pair })
}

// leave forgets a ztunnel that is gone. If another one is active because of that,
// it is returned: the caller tells it.
func (s *Server) leave(p *proxy) *proxy {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := len(s.proxies)
	s.proxies = slices.DeleteFunc(s.proxies, func(o *proxy) bool { return o == p })
	if len(s.proxies) == n || !p.active {
		s.wake()
		return nil
	}
	heir, late := inherit(s.proxies, p.pair)
	if heir != nil {
		heir.active = true
	}
	if late != nil {
		late.late = true
		select {
		case late.again <- struct{}{}:
		default:
		}
	}
	s.wake()
	return heir
}

// inherit decides who is active now that the active one of a pair has left, of
// proxies, which are left. That is the other one of the pair, unless one that
// has all pods is active: then the other one is late, and has to be elected. With
// no other of the pair, and none that is active and has all pods, it is one that
// is late since the active one of its own pair has left.
func inherit(proxies []*proxy, pair string) (heir, late *proxy) {
	var other, waiting *proxy // the newest
	served := make(map[string]bool)
	serving := false
	for _, p := range proxies {
		if p.active {
			served[p.pair] = true
			serving = serving || p.synced
		}
	}
	for _, p := range proxies {
		switch {
		case p.active || served[p.pair]:
		case p.pair == pair:
			other = p
		case p.late:
			waiting = p
		}
	}
	switch {
	case serving:
		return nil, other
	case other != nil:
		return other, nil
	}
	return waiting, nil
}

// choose makes the newest ztunnel of a pair active if none is, and returns it.
// s.mu is held.
func (s *Server) choose(pair string) *proxy {
	if s.served(pair) {
		return nil
	}
	for _, p := range slices.Backward(s.proxies) {
		if p.pair == pair {
			p.active = true
			return p
		}
	}
	return nil
}

// activate tells p that it is active. One that does not answer is gone soon,
// and then the next is told by whoever sees that.
func (s *Server) activate(ctx context.Context, p *proxy) {
	if p == nil || ctx.Err() != nil { // an agent that stops changes nothing
		return
	}
	start := time.Now()
	if err := p.request(ctx, message{Kind: activate}, Files{}); err != nil {
		if ctx.Err() == nil {
			s.cfg.Log.Error("a ztunnel that stood by was not activated", "instance", p.instance, "error", err)
		}
		p.pipe.conn.Close()
		return
	}
	s.cfg.Log.Info("ztunnel is active", "instance", p.instance, "after", time.Since(start))
}

// elect activates p after a while, unless its pair has an active ztunnel, and
// again when that has left and p was not activated at once.
func (s *Server) elect(ctx context.Context, p *proxy) {
	if p.pair == "" {
		return
	}
	soon := cmp.Or(s.cfg.ElectWait, electWait)
	later := soon * patientFactor
	wait := time.NewTimer(soon)
	defer wait.Stop()
	if p.twin {
		wait.Reset(later)
	}
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.gone:
			return
		case <-p.again:
			wait.Reset(later)
		case <-wait.C:
			s.activate(ctx, s.win(p))
		}
	}
}

// win makes p, or another of its pair, active unless one is, and returns it.
func (s *Server) win(p *proxy) *proxy {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !slices.Contains(s.proxies, p) {
		return nil
	}
	heir := s.choose(p.pair)
	if heir != nil {
		s.wake()
	}
	return heir
}

// watch asks p now and then, while it is the active one of a pair and another
// could be in its place, whether it still answers. One that does not, because it
// hangs or is stopped, is disconnected, and the other takes over.
func (s *Server) watch(ctx context.Context, p *proxy) {
	if p.pair == "" {
		return
	}
	tick := time.NewTicker(cmp.Or(s.cfg.WatchEvery, watchEvery))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.gone:
			return
		case <-tick.C:
		}
		if s.hasStandby(p) && p.request(ctx, message{Kind: activate}, Files{}) != nil {
			return // it was disconnected, or the agent stops
		}
	}
}

// hasStandby reports whether p is active and another could be in its place.
func (s *Server) hasStandby(p *proxy) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return p.active && slices.ContainsFunc(s.proxies, func(o *proxy) bool {
		return !o.active && (o.pair == p.pair || o.late && !s.served(o.pair))
	})
}

// newest returns the active ztunnel that connected last. With none, it is the
// one that connected last: it is about to be active. It may be nil.
func (s *Server) newest() *proxy {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range slices.Backward(s.proxies) {
		if p.active {
			return p
		}
	}
	if len(s.proxies) == 0 {
		return nil
	}
	return s.proxies[len(s.proxies)-1]
}

// passive returns those that stand by, but one.
func (s *Server) passive(but *proxy) []*proxy {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(s.proxies), func(p *proxy) bool { return p.active || p == but })
}

// Connected returns the number of active ztunnels that are connected, and a
// channel that is closed when it, or what Standbys returns, may have changed.
func (s *Server) Connected() (int, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, p := range s.proxies {
		if p.active {
			n++
		}
	}
	return n, s.changed
}

// Standbys returns the number of ztunnels that are connected and stand by.
func (s *Server) Standbys() int { return len(s.passive(nil)) }

// addPassive hands a pod to those that stand by, so that they can serve it at
// once. One that cannot is logged: it is told again when it connects again.
func (s *Server) addPassive(ctx context.Context, pod Pod, f Files, served *proxy) {
	var wg sync.WaitGroup
	for _, p := range s.passive(served) {
		wg.Go(func() {
			err := p.request(ctx, message{Kind: add, Pod: &pod}, f)
			if err != nil && !errors.Is(err, errDisconnected) && ctx.Err() == nil {
				s.cfg.Log.Error("the ztunnel that stands by cannot serve a pod", "instance", p.instance, "pod", pod.Name, "namespace", pod.Namespace, "error", err)
			}
		})
	}
	wg.Wait()
}
