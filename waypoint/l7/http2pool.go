package l7

import (
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/weft-mesh/weft/waypoint/l7/h2"
)

// http2Pool is the transport of HTTP/2: connections to one endpoint, which carry
// many exchanges at once. The next is opened when the others are nearly full.
type http2Pool struct {
	e  *Engine
	ep *Endpoint

	mu      sync.Mutex
	conns   []*http2Conn // guarded by mu
	dialing *http2Dial   // guarded by mu: nil if nobody dials
	closed  bool         // guarded by mu
}

// An http2Conn is one connection to an endpoint.
type http2Conn struct {
	*h2.Conn
	pool *http2Pool
	net  net.Conn
	way  way
	born int64 // by the coarse clock
	used atomic.Int64
}

// An http2Dial is a connection in the making, which others wait for too.
type http2Dial struct {
	done chan struct{}
	err  error // set before done is closed
}

// nearlyFull is the part of the streams at which another connection is opened,
// in percent.
const nearlyFull = 80

// mostStreams bounds those of one connection, if the endpoint allows more.
const mostStreams = 1000

func newHTTP2Transport(e *Engine, ep *Endpoint) transport { return &http2Pool{e: e, ep: ep} }

// call implements transport.
func (p *http2Pool) call(ctx context.Context, x *Exchange) (call, error) {
	c := &http2Call{x: x}
	err := p.reserve(ctx, c)
	if err == errOverflow {
		err = p.ep.cluster.await(ctx, x, nil, func(*http1Call) error { return p.reserve(ctx, c) })
	}
	if err != nil {
		return nil, err
	}
	return c, nil
}

// reserve opens a stream for c, and connects if there is no room for it.
func (p *http2Pool) reserve(ctx context.Context, c *http2Call) error {
	full := false // use connections to their last stream
	for {
		if p.open(c, full) {
			return nil
		}
		if full {
			return errOverflow
		}
		err := p.connect(ctx, c.x)
		switch {
		case errors.Is(err, errOverflow):
			full = true
		case errors.Is(err, context.Canceled) && ctx.Err() == nil && c.x.work.why() == running: // another's
		case err != nil:
			return err
		}
	}
}

// open opens a stream for c on a connection that has room, and reports false if
// none has.
func (p *http2Pool) open(c *http2Call, full bool) bool {
	limits := &c.x.Policy.Connections
	most, percent := mostStreams, nearlyFull
	if limit := int(limits.MaxConcurrentStream); limit > 0 {
		most = min(most, limit)
	}
	if full {
		percent = 100
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	way := wayOf(c.x)
	for _, hc := range p.conns {
		if !hc.way.is(way) {
			continue
		}
		s, err := hc.Open(c, most, percent)
		if err != nil {
			continue
		}
		c.conn, c.s = hc, s
		c.in.init(s)
		n := hc.used.Add(1)
		c.first = n == 1
		if most := limits.MaxRequestsPerConn; most > 0 && n >= int64(most) {
			p.drop(hc)
			c.last = true
		}
		return true
	}
	return false
}

// drop takes hc out of the pool. The mutex is held.
func (p *http2Pool) drop(hc *http2Conn) {
	for i, other := range p.conns {
		if other == hc {
			p.conns = append(p.conns[:i:i], p.conns[i+1:]...)
			return
		}
	}
}

// connect opens a connection, or waits for the one that is being opened.
func (p *http2Pool) connect(ctx context.Context, x *Exchange) error {
	p.mu.Lock()
	if d := p.dialing; d != nil {
		p.mu.Unlock()
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		if !x.work.dialing(cancel) {
			return context.Canceled
		}
		defer x.work.dialed()
		select {
		case <-d.done:
			return d.err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	d := &http2Dial{done: make(chan struct{})}
	p.dialing = d
	p.mu.Unlock()
	hc, err := p.dial(ctx, x)
	p.mu.Lock()
	p.dialing = nil
	if err == nil {
		p.conns = append(p.conns, hc)
	}
	closed := p.closed
	p.mu.Unlock()
	d.err = err
	close(d.done)
	if err == nil && closed {
		hc.Drain()
	}
	return err
}

// dial opens a connection.
func (p *http2Pool) dial(ctx context.Context, x *Exchange) (*http2Conn, error) {
	if !p.ep.cluster.connection() {
		return nil, errOverflow
	}
	conn, err := p.e.dial(ctx, p.ep, x)
	if err != nil {
		p.ep.cluster.disconnected()
		return nil, err
	}
	hc := &http2Conn{pool: p, net: conn, way: wayOf(x), born: p.e.clock.now.Load()}
	hc.Conn = h2.New(conn, h2.Config{List: p.e.limits.HeadBytes, Room: p.ep.cluster.line.call, Ended: func() {
		p.mu.Lock()
		p.drop(hc)
		p.mu.Unlock()
		p.ep.cluster.disconnected()
	}})
	go func() {
		if err := hc.Run(nil); err != nil {
			p.e.log.Debug("connection to endpoint ended", "endpoint", p.ep.Address, "err", err)
		}
	}()
	return hc, nil
}

// spare implements transport. The connection ends a little later.
func (p *http2Pool) spare() bool {
	p.mu.Lock()
	var idle *http2Conn
	for _, hc := range p.conns {
		if _, ok := hc.Idle(); ok {
			idle = hc
			p.drop(hc)
			break
		}
	}
	p.mu.Unlock()
	if idle != nil {
		idle.Drain()
	}
	return false
}

// trim implements transport.
func (p *http2Pool) trim(before int64) {
	idleSince := p.e.clock.base.Add(time.Duration(before))
	most := time.Duration(p.ep.cluster.policy.Load().Connections.MaxDuration)
	now := p.e.clock.now.Load()
	var old []*http2Conn
	p.mu.Lock()
	for _, hc := range p.conns {
		since, idle := hc.Idle()
		if idle && since.Before(idleSince) || most > 0 && time.Duration(now-hc.born) > most {
			old = append(old, hc)
		}
	}
	for _, hc := range old {
		p.drop(hc)
	}
	p.mu.Unlock()
	for _, hc := range old {
		hc.Drain()
	}
}

// close implements transport.
func (p *http2Pool) close() {
	p.mu.Lock()
	old := p.conns
	p.conns, p.closed = nil, true
	p.mu.Unlock()
	for _, hc := range old {
		hc.Drain()
	}
}
