package l7

import (
	"sync"
	"time"

	"github.com/weft-mesh/weft/mesh/view"
)

// clients are the connections that are served.
type clients struct {
	mu  sync.Mutex
	all map[*conn]struct{} // guarded by mu
}

func (s *clients) add(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.all == nil {
		s.all = map[*conn]struct{}{}
	}
	s.all[c] = struct{}{}
}

func (s *clients) remove(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.all, c)
}

// quiet notes that c waits for a request, and unquiet that one has come.
func (e *Engine) quiet(c *conn)   { c.quietly.Store(true) }
func (e *Engine) unquiet(c *conn) { c.quietly.Store(false) }

// closeQuiet lets connections on which nothing happens end.
func (s *clients) closeQuiet() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.all {
		if c.quietly.Load() {
			c.why.CompareAndSwap(notInterrupted, timedOut)
			interrupt(c.Conn)
		}
	}
}

// lookAfter looks which clients have left while they were served, and lets go of
// Views before v. It reports whether any is being served.
func (s *clients) lookAfter(now int64, v *view.View) (serving bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.all {
		c.memory.forget(v)
		if c.lookAfter(now) {
			serving = true
		}
	}
	return serving
}

// An exchange is looked at first when it has lasted firstLook, and then ever
// more rarely, but every lastLook at least: a request that is answered at once
// must not cost a system call for it.
const (
	firstLook = tick
	lastLook  = time.Second
)

// run notes which exchange is under way, nil for none. What interrupts it from
// outside must not meet another one instead.
func (c *conn) run(x *Exchange) {
	c.runMu.Lock()
	c.running = x
	c.since = c.e.clock.now.Load()
	c.lookAt = c.since + int64(firstLook)
	c.runMu.Unlock()
}

// interruptRunning ends what the exchange under way waits for at the endpoint.
func (c *conn) interruptRunning(why reason) {
	c.runMu.Lock()
	defer c.runMu.Unlock()
	if c.running != nil {
		c.running.work.interrupt(why)
	}
}

// lookAfter ends the exchange under way if its client has left. As long as the
// request is still read, that finds out by itself. It reports whether one is
// under way.
func (c *conn) lookAfter(now int64) bool {
	c.runMu.Lock()
	defer c.runMu.Unlock()
	if c.running == nil {
		return false
	}
	if now < c.lookAt || !c.settled.Load() {
		return true
	}
	c.lookAt = now + min(now-c.since, int64(lastLook))
	if c.left() {
		c.running.work.interrupt(clientGone)
	}
	return true
}

// left reports whether the client has ended its direction, or the connection.
func (c *conn) left() bool {
	if c.sock != nil {
		return c.sock.left()
	}
	s, ok := c.Conn.(interface{ Left() bool }) // such as a stream of a tunnel
	return ok && s.Left()
}
