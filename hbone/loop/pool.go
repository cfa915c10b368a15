package loop

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/hbone"
	"github.com/weft-mesh/weft/identity"
	"github.com/weft-mesh/weft/mesh"
)

// A PoolConfig says how a Pool makes tunnels.
type PoolConfig struct {
	// Dial makes the TCP connection of a tunnel. ctx ends with the dial
	// timeout or the pool.
	Dial func(ctx context.Context, t hbone.Target) (*net.TCPConn, error)
	// TLS returns the configuration that presents t.Source and demands one of
	// t.Peers with VerifyConnection, as identity.ClientTLS does.
	TLS func(t hbone.Target) (*tls.Config, error)
	// Peer returns who the peer is; nil is identity.PeerIdentity.
	Peer hbone.PeerFunc
	// Log takes what went wrong on tunnels; nil discards it.
	Log *slog.Logger
	// MaxStreams is how many connections share a tunnel: 100 if it is zero.
	MaxStreams int
	// IdleTimeout is how long an unused tunnel is kept: 5 minutes if it is
	// zero.
	IdleTimeout time.Duration
	// DialTimeout bounds the TCP connection and the handshake, each: 10 s if
	// it is zero.
	DialTimeout time.Duration
	// AnswerTimeout is how long a peer may take to answer a request: 20 s if
	// it is zero.
	AnswerTimeout time.Duration
	// Handshakes bounds how many handshakes compute at once; nil means half of
	// the processors.
	Handshakes *semaphore.Weighted
	// Limits bound each tunnel.
	Limits hbone.Limits
}

// A Pool keeps tunnels to peers and sends connections through them. It is safe
// for concurrent use. Use Engine.NewPool; Close ends it.
type Pool struct {
	engine *Engine
	cfg    PoolConfig
	ctx    context.Context // of all dials
	cancel context.CancelCauseFunc
	wg     sync.WaitGroup // dials, tunnels, and connections that are tried again

	openings sync.Pool // of *opening, all zero

	mu      sync.Mutex
	closed  bool
	entries map[key]*entry
}

// key is a Target that can be compared.
type key struct {
	owner   string
	source  mesh.Identity
	peer    mesh.Identity // if there is only one, as there mostly is
	peers   string        // if there are more
	address netip.AddrPort
}

func keyOf(t hbone.Target) key {
	k := key{owner: t.Owner, source: t.Source, address: t.Address}
	if len(t.Peers) == 1 {
		k.peer = t.Peers[0]
		return k
	}
	peers := make([]string, len(t.Peers))
	for i, p := range t.Peers {
		peers[i] = p.String()
	}
	slices.Sort(peers)
	k.peers = strings.Join(slices.Compact(peers), " ")
	return k
}

// entry is what the pool has for one key. An entry with neither tunnels nor a
// dial is removed. It is guarded by Pool.mu, but for what does not change.
type entry struct {
	pool    *Pool
	key     key
	target  hbone.Target
	tunnels []*tunnel // the oldest first
	dial    *dial     // under way
	narrow  bool      // the peer would not have one more tunnel
}

// dial is the one attempt of many waiters.
type dial struct {
	done   chan struct{} // closed when it has ended
	made   *tunnel       // this and err are set before
	err    error
	cancel context.CancelCauseFunc
}

// opening is a connection that the peer has not answered. Its memory is used
// again: it is several times what the connection has when it is idle.
type opening struct {
	pool      *Pool
	target    hbone.Target
	authority string
	header    hbone.Header
	deadline  time.Time
	tries     int32
	dials     int32  // that came to nothing because the peer was on its way out
	sent      uint64 // where our HEADERS end in the tunnel's output
}

// free takes o back, which nobody has any more.
func (o *opening) free() {
	p := o.pool
	*o = opening{}
	p.openings.Put(o)
}

var (
	errPoolClosed = errors.New("the pool of tunnels is closed")
	errOwnerGone  = errors.New("the pod that the tunnel was made for is gone")
)

// maxTries bounds how often one request is sent: once more for a tunnel that was
// stale or cut off, and once more for a new one whose limits we have yet to
// learn.
const maxTries = 3

// NewPool returns a pool for cfg.
func (e *Engine) NewPool(cfg PoolConfig) *Pool {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Handshakes == nil {
		cfg.Handshakes = hbone.NewHandshakes()
	}
	set := func(d *time.Duration, def time.Duration) {
		if *d <= 0 {
			*d = def
		}
	}
	set(&cfg.IdleTimeout, 5*time.Minute)
	set(&cfg.DialTimeout, 10*time.Second)
	set(&cfg.AnswerTimeout, 20*time.Second)
	if cfg.MaxStreams <= 0 {
		cfg.MaxStreams = 100
	}
	cfg.Limits.MaxStreams = cfg.MaxStreams
	p := &Pool{engine: e, cfg: cfg, entries: make(map[key]*entry)}
	p.ctx, p.cancel = context.WithCancelCause(context.Background())
	return p
}

// Connect sends the connection c, whose application's end is fd, the descriptor
// of a connected TCP socket, to authority through a tunnel to t. It returns when
// c is on its way through a tunnel, which may have to be made before: then fd is
// the engine's, and owner hears whether the peer accepts, and of the end. If it
// returns an error fd is still the caller's, and owner hears nothing, and c may
// be tried again. With a ctx that has ended it does not wait: c goes on its way
// if there is a tunnel, and else one is made meanwhile.
//
// The error that ends c is a *hbone.StatusError if the peer refused. A request
// for which the peer certainly did nothing, because the tunnel was stale, going
// away or full, is tried again on another, and so is one that it left
// unanswered when it hung up, as a killed proxy does: none of the application's
// bytes leave before the answer, so all that its service can have seen twice is
// a connection without any. A handshake that the peer has cut off is tried once
// more. Nothing else is tried twice, least of all a handshake with a wrong peer.
func (p *Pool) Connect(ctx context.Context, t hbone.Target, authority string, h hbone.Header, c *Conn, fd int, owner Owner) error {
	c.owner, c.fd = owner, int32(fd)
	op, _ := p.openings.Get().(*opening)
	if op == nil {
		op = new(opening)
	}
	*op = opening{pool: p, target: t, authority: authority, header: h, deadline: time.Now().Add(p.cfg.AnswerTimeout)}
	c.opening = op
	if err := p.send(ctx, c); err != nil {
		return fmt.Errorf("connect to %s through %v: %w", authority, t.Address, err)
	}
	return nil
}

// send gives c to a tunnel that has room.
func (p *Pool) send(ctx context.Context, c *Conn) error {
	op := c.opening
	k := keyOf(op.target)
	var made *tunnel // by the dial that was waited for last
	for {
		if cause := c.Cause(); cause != nil {
			return cause
		}
		p.mu.Lock()
		if p.closed {
			p.mu.Unlock()
			return errPoolClosed
		}
		e := p.entries[k]
		if e == nil {
			e = &entry{pool: p, key: k, target: op.target}
			p.entries[k] = e
		}
		if t := e.withRoom(); t != nil {
			if l := e.another(t); l != nil {
				p.startDial(ctx, op.target, e, l) // for those that come after
			}
			t.load.Add(1)
			c.loop.Store(t.loop)
			p.wg.Add(1)
			// Behind the tunnel itself, which was posted before.
			ok := t.loop.post(work{kind: workConnect, tunnel: t, conn: c})
			p.mu.Unlock()
			if !ok {
				p.wg.Done()
				c.loop.Store(nil)
				return errStopped
			}
			return nil
		}
		if err := made.useless(); err != nil {
			if op.dials++; op.dials > 1 {
				p.mu.Unlock()
				return err
			}
		}
		if e.dial == nil {
			p.startDial(ctx, op.target, e, nil)
		}
		d := e.dial
		p.mu.Unlock()
		select {
		case <-d.done:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		// Dialing on would go on for ever. Once is for a peer whose process ends
		// just now: the next connection is its successor's.
		if made = d.made; d.err != nil {
			if op.dials++; op.dials > 1 || !cutOff(d.err) {
				return d.err
			}
		}
	}
}

// cutOff reports whether a peer has hung up before it has said anything about
// this end. It has done nothing for it then.
func cutOff(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE)
}

// useless returns why a new tunnel takes no connection at all, or nil if it
// does, has moved to another process, or there is none.
func (t *tunnel) useless() error {
	if t == nil || t.move.Load() {
		return nil
	}
	if why := t.why.Load(); why != nil {
		return why.err
	}
	if t.gone.Load() || t.room.Load() == 0 {
		return errors.New("the peer takes no connections on a new tunnel")
	}
	return nil
}

// withRoom returns the oldest tunnel that would take a connection now and whose
// loop keeps up, so that those made in a rush fall out of use when it is over.
// If none of their loops does, it is the one with the fewest connections. It is
// nil if none has room.
func (e *entry) withRoom() *tunnel {
	var least *tunnel
	for _, t := range e.tunnels {
		switch load := t.load.Load(); {
		case t.gone.Load() || load >= t.room.Load():
		case !t.loop.saturated():
			return t
		case least == nil || load < least.load.Load():
			least = t
		}
	}
	return least
}

// another returns the loop for one more tunnel to the peer, beside t, which
// withRoom has chosen: nil while loops keep up, or if no other does. A peer has
// one tunnel on each loop at the most for this.
func (e *entry) another(t *tunnel) *eventLoop {
	if e.narrow || e.dial != nil || !t.loop.saturated() || t.load.Load() == 0 {
		return nil
	}
	return e.pool.engine.rested(int(e.pool.engine.next.Add(1)-1), e.tunnels)
}

// startDial makes a tunnel for all who wait for one, on a loop, or on any if
// that is nil. It goes on when ctx ends: others may be waiting. The caller holds
// p.mu.
func (p *Pool) startDial(ctx context.Context, t hbone.Target, e *entry, on *eventLoop) {
	d := &dial{done: make(chan struct{})}
	// The values of the first waiter's ctx, but the life of the pool.
	dctx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	d.cancel = cancel
	stop := context.AfterFunc(p.ctx, func() { cancel(errPoolClosed) })
	e.dial = d
	p.wg.Go(func() {
		defer cancel(nil)
		c, secured, err := p.dial(dctx, t)
		stop()
		p.mu.Lock()
		defer p.mu.Unlock()
		if err == nil && dctx.Err() != nil {
			err = context.Cause(dctx) // cancelled as it succeeded
			secured.Discard(c)
		}
		if err == nil {
			p.wg.Add(1)
			l := on
			if l == nil {
				l = p.engine.pick()
			}
			var made *tunnel
			if made, err = l.newTunnel(c, secured, true, p.cfg.IdleTimeout, e); err == nil {
				e.tunnels = append(e.tunnels, made)
				d.made = made
			} else {
				p.wg.Done()
			}
		}
		e.dial, e.narrow = nil, e.narrow || on != nil && err != nil
		p.forget(e)
		d.err = err
		close(d.done)
	})
}

// dial connects and shakes hands.
func (p *Pool) dial(ctx context.Context, t hbone.Target) (*net.TCPConn, hbone.Secured, error) {
	if p.cfg.Dial == nil || p.cfg.TLS == nil {
		return nil, hbone.Secured{}, errors.New("the pool has no way to dial")
	}
	cfg, err := p.cfg.TLS(t)
	if err != nil {
		return nil, hbone.Secured{}, err
	}
	tcp, cancel := context.WithTimeout(ctx, p.cfg.DialTimeout)
	defer cancel()
	c, err := p.cfg.Dial(tcp, t)
	if err != nil {
		return nil, hbone.Secured{}, err
	}
	s, err := hbone.Handshake(ctx, c, cfg, p.cfg.DialTimeout, p.cfg.Handshakes, p.cfg.Peer)
	if err != nil {
		return nil, hbone.Secured{}, err
	}
	if !slices.Contains(t.Peers, s.Peer) {
		// The TLS configuration has checked this. It is checked again because
		// nothing else stands between a wrong peer and the application.
		s.Discard(c)
		return nil, hbone.Secured{}, fmt.Errorf("%w: got %v, want one of %v", identity.ErrWrongPeer, s.Peer, t.Peers)
	}
	return c, s, nil
}

// forget removes an entry that holds nothing. The caller holds p.mu.
func (p *Pool) forget(e *entry) {
	if len(e.tunnels) == 0 && e.dial == nil && p.entries[e.key] == e {
		delete(p.entries, e.key)
	}
}

func (e *entry) limits() hbone.Limits { return e.pool.cfg.Limits }

// requested is never called: nobody asks a client.
func (e *entry) requested(*Request) {}

func (e *entry) over(t *tunnel, err error) {
	p := e.pool
	p.wg.Go(func() { // not on the loop: the pool's lock may be held for a post to it
		p.mu.Lock()
		e.tunnels = slices.DeleteFunc(e.tunnels, func(o *tunnel) bool { return o == t })
		p.forget(e)
		p.mu.Unlock()
		if err != nil && !errors.Is(err, errOwnerGone) && !errors.Is(err, errPoolClosed) {
			p.cfg.Log.Info("tunnel ended", "address", e.key.address, "source", e.key.source, "peer", t.peer, "error", err)
		}
	})
	p.wg.Done()
}

// CloseOwner aborts the tunnels and dials of a pod that is gone.
func (p *Pool) CloseOwner(owner string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for k, e := range p.entries {
		if k.owner == owner {
			e.abort(errOwnerGone)
		}
	}
}

// abort ends all of an entry. The caller holds Pool.mu.
func (e *entry) abort(cause error) {
	if e.dial != nil {
		e.dial.cancel(cause)
	}
	for _, t := range e.tunnels {
		t.gone.Store(true)
		t.loop.post(work{kind: workEnd, tunnel: t, err: cause})
	}
}

// Close aborts every tunnel and dial, and waits until they have ended. Connect
// fails from then on. The engine must be running, or have ended.
func (p *Pool) Close() {
	p.mu.Lock()
	p.closed = true
	for _, e := range p.entries {
		e.abort(errPoolClosed)
	}
	p.mu.Unlock()
	p.cancel(errPoolClosed)
	p.wg.Wait()
}

// connect begins a connection on t.
func (l *eventLoop) connect(c *Conn, t *tunnel) {
	op := c.opening
	defer op.pool.wg.Done()
	if t.ended {
		t.load.Add(-1)
		cause := t.closeErr
		if cause == nil {
			cause = errEnded
		}
		l.retry(c, &resetError{"the tunnel ended", cause}, t.greeted)
		return
	}
	l.touch(t)
	id, err := t.core.Connect(op.authority, op.header)
	switch {
	case errors.Is(err, hbone.ErrStreamLimit):
		t.load.Add(-1)
		t.settle(l.now)
		op.tries-- // the peer was not even asked
		l.retry(c, err, t.room.Load() > 0)
		return
	case err != nil:
		t.load.Add(-1)
		l.retry(c, err, errors.Is(err, hbone.ErrDraining))
		return
	}
	op.sent = t.core.Taken() + uint64(len(t.core.Output()))
	t.opening++
	if l.adopt(c, t, id) {
		l.wakeAt(op.deadline)
	}
}

// bounce takes a connection, for which the peer did nothing, from its tunnel to
// try it on another.
func (l *eventLoop) bounce(c *Conn, cause error) {
	t := c.tunnel
	l.touch(t)
	if c.is(connWatched) {
		_ = unix.EpollCtl(l.ep, unix.EPOLL_CTL_DEL, int(c.fd), nil) // it is there
	}
	op := c.opening
	t.core.Reset(c.id, 0)
	l.dropConn(c)
	c.opening, c.tunnel, c.flags = op, nil, 0
	l.retry(c, cause, true)
}

// retry sends a connection that no tunnel has through another, or ends it.
func (l *eventLoop) retry(c *Conn, cause error, again bool) {
	op := c.opening
	c.loop.Store(nil)
	if op.tries++; op.tries >= maxTries || !again || c.Cause() != nil {
		abortSocket(c.fd)
		c.over(cause)
		return
	}
	op.pool.wg.Go(func() {
		ctx, cancel := context.WithDeadlineCause(op.pool.ctx, op.deadline, errNoAnswer)
		defer cancel()
		if err := op.pool.send(ctx, c); err != nil {
			abortSocket(c.fd)
			c.over(err)
		}
	})
}
