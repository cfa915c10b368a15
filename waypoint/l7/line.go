package l7

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/weft-mesh/weft/mesh/balance"
)

// A line is where requests wait while a service's endpoints bear as many
// connections as its policy allows. The limit is for all endpoints together, so
// whatever becomes free at any of them is told to who has waited longest. The
// zero line is empty.
type line struct {
	waiting atomic.Int32 // how many places there are, to be read without the mutex

	mu     sync.Mutex // below those of pools and connections
	places []*place   // guarded by mu; who came first is first
}

// A place is one request's in a line.
type place struct {
	pool *http1Pool // whose connections it can take over; nil if none's
	way  way        // that such a connection must have taken
	// called gets one value when the place is taken out of the line: a
	// connection to take over, or nil for something else to try again for.
	called chan *http1Call
}

// join queues up: at the head, if the place was called already.
func (l *line) join(p *place, called bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if called {
		l.places = slices.Insert(l.places, 0, p)
	} else {
		l.places = append(l.places, p)
	}
	l.waiting.Add(1)
}

// call tells the first in line that a connection or a stream may have become
// free.
func (l *line) call() {
	if l.waiting.Load() == 0 {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.places) > 0 {
		l.serve(nil)
	}
}

// give gives an idle connection to the first in line, and reports false if that
// has no use for it.
func (l *line) give(c *http1Call) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.places) == 0 || l.places[0].pool != c.pool || !l.places[0].way.is(c.way) {
		return false
	}
	l.serve(c)
	return true
}

// serve calls the first place. The mutex is held.
func (l *line) serve(c *http1Call) {
	l.places[0].called <- c
	l.places = slices.Delete(l.places, 0, 1)
	l.waiting.Add(-1)
}

// leave gives up a place. What it was called for goes to the next.
func (l *line) leave(p *place) {
	l.mu.Lock()
	at := slices.Index(l.places, p)
	if at >= 0 {
		l.places = slices.Delete(l.places, at, at+1)
		l.waiting.Add(-1)
	}
	l.mu.Unlock()
	if at >= 0 {
		return
	}
	if c := <-p.called; c != nil {
		c.pool.put(c)
	} else {
		l.call()
	}
}

// await makes attempts, when something has become free, until one fails with
// another error than errOverflow or none. It gets the connection to take over, if
// there is one, which it does not refuse. Await fails with errOverflow if as many
// requests wait as may, and with that of ctx.
func (c *cluster) await(ctx context.Context, x *Exchange, pool *http1Pool, attempt func(*http1Call) error) error {
	if !c.group.Breaker.Take(balance.Pending) {
		return errOverflow
	}
	defer c.group.Breaker.Release(balance.Pending)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	p := &place{pool: pool, way: wayOf(x), called: make(chan *http1Call, 1)}
	for called := false; ; called = true {
		c.line.join(p, called) // first, so that nothing is missed
		if err := attempt(nil); err != errOverflow {
			c.line.leave(p)
			if pool == nil {
				c.line.call() // a connection of HTTP/2 may have room for more
			}
			return err
		}
		if !x.work.dialing(cancel) {
			cancel()
		}
		select {
		case given := <-p.called:
			x.work.dialed()
			if given != nil {
				return attempt(given)
			}
		case <-ctx.Done():
			x.work.dialed()
			c.line.leave(p)
			return ctx.Err()
		}
	}
}

// connection counts one more connection, and reports false if there may not be
// one more. An idle one to another endpoint gives way.
func (c *cluster) connection() bool {
	return c.group.Breaker.Take(balance.Connections) || c.spare() && c.group.Breaker.Take(balance.Connections)
}

// disconnected gives back what connection has counted.
func (c *cluster) disconnected() {
	c.group.Breaker.Release(balance.Connections)
	c.line.call()
}

// spare closes an idle connection, and reports false if there is none that is
// closed by now.
func (c *cluster) spare() bool {
	for _, ep := range *c.endpoints.Load() {
		closed := false
		ep.links.each(func(t transport) { closed = closed || t.spare() })
		if closed {
			return true
		}
	}
	return false
}
