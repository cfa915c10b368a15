package l7

import (
	"context"
	"net"
	"sync"
	"time"
)

// http1Pool is the transport of HTTP/1: connections to one endpoint, each of
// which carries one exchange at a time. The one that was used last is used
// next, so that those too many grow old.
type http1Pool struct {
	e  *Engine
	ep *Endpoint

	mu     sync.Mutex
	idle   []*http1Call // guarded by mu; the youngest last
	closed bool         // guarded by mu
}

// call implements transport.
func (p *http1Pool) call(ctx context.Context, x *Exchange) (call, error) {
	c, err := p.reserve(ctx, x)
	if err == errOverflow {
		err = p.ep.cluster.await(ctx, x, p, func(given *http1Call) (err error) {
			if c = given; given == nil {
				c, err = p.reserve(ctx, x)
			}
			return err
		})
	}
	if err != nil {
		return nil, err
	}
	c.begin(x)
	return c, nil
}

// reserve takes an idle connection, or dials.
func (p *http1Pool) reserve(ctx context.Context, x *Exchange) (*http1Call, error) {
	for {
		c := p.take()
		if c == nil {
			return p.dial(ctx, x)
		}
		if c.usable(p) && c.way.is(wayOf(x)) {
			return c, nil
		}
		c.end()
	}
}

// take returns the idle connection that was used last, or nil.
func (p *http1Pool) take() *http1Call {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := len(p.idle)
	if n == 0 {
		return nil
	}
	c := p.idle[n-1]
	p.idle[n-1] = nil
	p.idle = p.idle[:n-1]
	return c
}

// dial opens a connection.
func (p *http1Pool) dial(ctx context.Context, x *Exchange) (*http1Call, error) {
	if !p.ep.cluster.connection() {
		return nil, errOverflow
	}
	conn, err := p.e.dial(ctx, p.ep, x)
	if err != nil {
		p.ep.cluster.disconnected()
		return nil, err
	}
	c := &http1Call{pool: p, conn: conn, way: wayOf(x), born: p.e.clock.now.Load()}
	c.parser.Limits.Head = p.e.limits.HeadBytes
	c.parser.Limits.Fields = 4 * p.e.limits.HeadFields
	if c.sock = newSocket(conn); c.sock != nil {
		c.conn, c.onSent, c.onRoom = c.sock, c.putOut, c.room
	}
	return c, nil
}

// put keeps c for later, or gives it to who waits for one.
func (p *http1Pool) put(c *http1Call) {
	c.since = p.e.clock.now.Load()
	p.mu.Lock()
	closed := p.closed
	if !closed && p.ep.cluster.line.waiting.Load() > 0 {
		if p.ep.cluster.line.give(c) {
			p.mu.Unlock()
			return
		}
		closed = true // another endpoint may have it in its stead
	}
	if !closed {
		p.idle = append(p.idle, c)
	}
	p.mu.Unlock()
	if closed {
		c.end()
	}
}

// spare implements transport.
func (p *http1Pool) spare() bool {
	p.mu.Lock()
	var c *http1Call
	if len(p.idle) > 0 {
		c = p.idle[0]
		p.idle = append([]*http1Call(nil), p.idle[1:]...)
	}
	p.mu.Unlock()
	if c != nil {
		c.end()
	}
	return c != nil
}

// trim implements transport.
func (p *http1Pool) trim(before int64) {
	var old []*http1Call
	p.mu.Lock()
	n := 0
	for n < len(p.idle) && p.idle[n].since < before {
		n++
	}
	if n > 0 {
		old = append(old, p.idle[:n]...)
		p.idle = append([]*http1Call(nil), p.idle[n:]...)
	}
	p.mu.Unlock()
	for _, c := range old {
		c.end()
	}
}

// close implements transport.
func (p *http1Pool) close() {
	p.mu.Lock()
	old := p.idle
	p.idle, p.closed = nil, true
	p.mu.Unlock()
	for _, c := range old {
		c.end()
	}
}

// dial opens a connection to an endpoint for an exchange.
func (e *Engine) dial(ctx context.Context, ep *Endpoint, x *Exchange) (net.Conn, error) {
	within := time.Duration(x.Policy.Connections.ConnectFor)
	if within <= 0 {
		within = 10 * time.Second
	}
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	if !x.work.dialing(cancel) {
		return nil, context.Canceled
	}
	defer x.work.dialed()
	return e.cfg.Dialer.Dial(ctx, ep.target(x))
}
