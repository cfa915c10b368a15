package hbone

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/weft-mesh/weft/identity"
	"github.com/weft-mesh/weft/mesh"
	"golang.org/x/sync/semaphore"
)

// A Target says which tunnel a connection goes through. Two connections share
// a tunnel only if all of it is equal.
type Target struct {
	// Owner is the pod on whose behalf the tunnel is made. Its tunnels are
	// never used for another, though the identity were the same.
	Owner string
	// Source is who we are to the peer.
	Source mesh.Identity
	// Peers are the identities that may answer; the order does not matter.
	Peers []mesh.Identity
	// Address is where the tunnel goes, port included.
	Address netip.AddrPort
}

// key is a Target that can be compared.
type key struct {
	owner   string
	source  mesh.Identity
	peers   string
	address netip.AddrPort
}

func (t Target) key() key {
	peers := make([]string, len(t.Peers))
	for i, p := range t.Peers {
		peers[i] = p.String()
	}
	slices.Sort(peers)
	return key{t.Owner, t.Source, strings.Join(slices.Compact(peers), " "), t.Address}
}

// A PoolConfig says how a Pool makes tunnels.
type PoolConfig struct {
	// Dial makes the TCP connection of a tunnel. ctx ends with the dial
	// timeout or the pool.
	Dial func(ctx context.Context, t Target) (net.Conn, error)
	// TLS returns the configuration that presents t.Source and demands one of
	// t.Peers with VerifyConnection, as identity.ClientTLS does.
	TLS func(t Target) (*tls.Config, error)
	// Peer returns who the peer is; nil is identity.PeerIdentity.
	Peer PeerFunc
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
	// Handshakes is as in ServerConfig.
	Handshakes *semaphore.Weighted
	// Limits bound each tunnel.
	Limits Limits
}

// A Pool keeps tunnels to peers and opens connections through them. It is safe
// for concurrent use. Use NewPool; Close ends it.
type Pool struct {
	cfg    PoolConfig
	ctx    context.Context // of all dials
	cancel context.CancelCauseFunc
	wg     sync.WaitGroup // dials and links

	mu      sync.Mutex
	closed  bool
	entries map[key]*entry
}

// entry is what the pool has for one key. An entry with neither links nor a
// dial is removed. It is guarded by Pool.mu.
type entry struct {
	links []*link // the oldest first
	dial  *dial   // under way
}

// dial is the one attempt of many waiters.
type dial struct {
	done   chan struct{} // closed when it has ended
	link   *link         // this and err are set before
	err    error
	cancel context.CancelCauseFunc
}

// A StatusError is a peer's refusal.
type StatusError struct{ Code int }

// Error says what the peer answered.
func (e *StatusError) Error() string {
	return fmt.Sprintf("the peer refused the connection with status %d", e.Code)
}

var (
	errPoolClosed = errors.New("the pool of tunnels is closed")
	errOwnerGone  = errors.New("the pod that the tunnel was made for is gone")
)

// maxTries bounds how often one request is sent: once more for a stale tunnel,
// and once more for a new one whose limits we have yet to learn.
const maxTries = 3

// NewPool returns a pool for cfg.
func NewPool(cfg PoolConfig) *Pool {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Handshakes == nil {
		cfg.Handshakes = newHandshakes()
	}
	cfg.Peer = cfg.Peer.orIdentity()
	cfg.IdleTimeout = pick(cfg.IdleTimeout, 5*time.Minute, time.Millisecond, 24*time.Hour)
	cfg.DialTimeout = pick(cfg.DialTimeout, 10*time.Second, time.Millisecond, time.Hour)
	cfg.Limits.MaxStreams = pick(cfg.MaxStreams, 100, 1, 1<<20)
	p := &Pool{cfg: cfg, entries: make(map[key]*entry)}
	p.ctx, p.cancel = context.WithCancelCause(context.Background())
	return p
}

// Connect opens a connection to authority through a tunnel to t. It returns
// when the peer has accepted. The caller owns the stream.
//
// The error is a *StatusError if the peer refused. A request for which the peer
// certainly did nothing, because the tunnel was stale, going away or full, is
// tried again on another; nothing else is tried twice, least of all a handshake
// with a wrong peer.
func (p *Pool) Connect(ctx context.Context, t Target, authority string, h Header) (*Stream, error) {
	k := t.key()
	for tries := 1; ; {
		l, fresh, err := p.link(ctx, k, t)
		if err != nil {
			return nil, fmt.Errorf("connect to %s through %v: %w", authority, t.Address, err)
		}
		s, err := l.connect(ctx, authority, h)
		var aborted *abortError
		switch {
		case err == nil:
			return s, nil
		case errors.Is(err, ErrStreamLimit), errors.Is(err, ErrDraining) && !fresh:
			continue // others filled it, or it ended, since we chose it
		case errors.Is(err, ErrDraining):
			err = l.cause()
		case errors.As(err, &aborted) && fresh && l.useless():
			err = l.cause() // not a stale tunnel, but a peer that does not want us
		case errors.As(err, &aborted) && aborted.refused && tries < maxTries:
			tries++
			continue
		}
		return nil, fmt.Errorf("connect to %s through %v: %w", authority, t.Address, err)
	}
}

// link returns a tunnel that has room, and whether it was made while this call
// waited.
func (p *Pool) link(ctx context.Context, k key, t Target) (l *link, fresh bool, err error) {
	var made *link // by the dial that was waited for
	for {
		p.mu.Lock()
		if p.closed {
			p.mu.Unlock()
			return nil, false, errPoolClosed
		}
		e := p.entries[k]
		if e == nil {
			e = &entry{}
			p.entries[k] = e
		}
		if l := e.withRoom(); l != nil {
			p.mu.Unlock()
			return l, made != nil, nil
		}
		if made != nil && made.useless() {
			p.mu.Unlock()
			return nil, false, made.cause() // dialing on would go on for ever
		}
		if e.dial == nil {
			p.startDial(ctx, k, t, e)
		}
		d := e.dial
		p.mu.Unlock()
		select {
		case <-d.done:
		case <-ctx.Done():
			return nil, false, context.Cause(ctx)
		}
		if d.err != nil {
			return nil, false, d.err
		}
		made = d.link
	}
}

// withRoom returns the oldest tunnel that would take a stream now, or nil.
func (e *entry) withRoom() *link {
	for _, l := range e.links {
		if l.hasRoom() {
			return l
		}
	}
	return nil
}

// hasRoom reports whether the link would take a stream now.
func (l *link) hasRoom() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return !l.ended && !l.tunnel.Draining() && !l.tunnel.Full()
}

// useless reports whether a new link will take no stream at all.
func (l *link) useless() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.ended || l.tunnel.Draining() || l.tunnel.Full() && l.tunnel.Streams() == 0
}

// cause returns why a link takes no streams.
func (l *link) cause() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		return l.err
	}
	return errors.New("the peer takes no connections on a new tunnel")
}

// startDial makes a tunnel for all who wait for one. It goes on when ctx ends:
// others may be waiting. The caller holds p.mu.
func (p *Pool) startDial(ctx context.Context, k key, t Target, e *entry) {
	d := &dial{done: make(chan struct{})}
	// The values of the first waiter's ctx, but the life of the pool.
	dctx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	d.cancel = cancel
	stop := context.AfterFunc(p.ctx, func() { cancel(errPoolClosed) })
	e.dial = d
	p.wg.Go(func() {
		l, err := p.dial(dctx, t)
		stop()
		p.mu.Lock()
		if err == nil && dctx.Err() != nil {
			err = context.Cause(dctx) // cancelled as it succeeded
			l.abort(err)
		}
		e.dial = nil
		if l != nil {
			e.links = append(e.links, l)
		}
		p.forget(k, e)
		p.mu.Unlock()
		cancel(nil)
		d.link, d.err = l, err
		close(d.done)
		if l != nil {
			p.serve(k, t, e, l)
		}
	})
}

// dial makes a tunnel.
func (p *Pool) dial(ctx context.Context, t Target) (*link, error) {
	if p.cfg.Dial == nil || p.cfg.TLS == nil {
		return nil, errors.New("the pool has no way to dial")
	}
	cfg, err := p.cfg.TLS(t)
	if err != nil {
		return nil, err
	}
	tcp, cancel := context.WithTimeout(ctx, p.cfg.DialTimeout)
	defer cancel()
	c, err := p.cfg.Dial(tcp, t)
	if err != nil {
		return nil, err
	}
	conn, peer, err := shake(ctx, c, tlsConfig(cfg), ClientRole, p.cfg.DialTimeout, p.cfg.Handshakes, p.cfg.Peer)
	if err != nil {
		return nil, err
	}
	if !slices.Contains(t.Peers, peer) {
		// The TLS configuration has checked this. It is checked again because
		// nothing else stands between a wrong peer and the application.
		Secured{Conn: conn}.Discard(c)
		return nil, fmt.Errorf("%w: got %v, want one of %v", identity.ErrWrongPeer, peer, t.Peers)
	}
	l, err := newLink(conn, peer, ClientRole, p.cfg.Limits)
	if err != nil {
		Secured{Conn: conn}.Discard(c)
		return nil, err
	}
	l.idle = p.cfg.IdleTimeout
	return l, nil
}

// serve drives a tunnel to its end and takes it out of the pool.
func (p *Pool) serve(k key, t Target, e *entry, l *link) {
	err := l.run()
	p.mu.Lock()
	e.links = slices.DeleteFunc(e.links, func(o *link) bool { return o == l })
	p.forget(k, e)
	p.mu.Unlock()
	if err != nil && !errors.Is(err, errOwnerGone) && !errors.Is(err, errPoolClosed) {
		p.cfg.Log.Info("tunnel ended", "address", t.Address, "source", t.Source, "peer", l.peer, "error", err)
	}
}

// forget removes an entry that holds nothing. The caller holds p.mu.
func (p *Pool) forget(k key, e *entry) {
	if len(e.links) == 0 && e.dial == nil && p.entries[k] == e {
		delete(p.entries, k)
	}
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
	for _, l := range e.links {
		l.abort(cause)
	}
}

// Run waits for the end of ctx and then closes the pool.
func (p *Pool) Run(ctx context.Context) error {
	<-ctx.Done()
	p.Close()
	return nil
}

// Close aborts every tunnel and dial, and waits until they have ended. Connect
// fails from then on.
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
