package hbone

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/weft-mesh/weft/hbone/record"
	"github.com/weft-mesh/weft/internal/http2"
	"github.com/weft-mesh/weft/mesh"
	"golang.org/x/sync/semaphore"
)

// A ServerConfig says how a Server takes tunnels.
type ServerConfig struct {
	// TLS demands the certificate of every peer and verifies it with
	// VerifyConnection, as identity.ServerTLS does. Without it no tunnel is
	// taken.
	TLS *tls.Config
	// Peer returns who the peer is; nil is identity.PeerIdentity.
	Peer PeerFunc
	// Handle is called in a goroutine of its own for every request. It calls
	// Accept or Reject once; a request that it leaves unanswered, and a
	// stream that it leaves open, are reset when it returns. ctx ends when the
	// connection is aborted or the server's patience with it is over.
	Handle func(ctx context.Context, r *Request)
	// Log takes what went wrong on tunnels; nil discards it.
	Log *slog.Logger
	// Handshakes bounds how many handshakes compute at once. It may be shared
	// with other servers and pools. nil means half of the processors.
	Handshakes *semaphore.Weighted
	// HandshakeTimeout is 10 s if it is zero.
	HandshakeTimeout time.Duration
	// Ready is waited for before each handshake, at most HandshakeTimeout: a
	// handshake that waits itself, for a certificate for example, keeps others
	// from theirs. nil is always ready.
	Ready func(ctx context.Context) error
	// MaxHandshakes is how many connections may be waiting for the end of
	// their handshake: 1024 if it is zero. More are closed. Anybody can open
	// such connections, and each costs a descriptor of the process.
	MaxHandshakes int
	// DrainTimeout is how long open streams may go on when the server ends: 5 s
	// if it is zero.
	DrainTimeout time.Duration
	// Limits bound each tunnel.
	Limits Limits
}

// A Server takes tunnels. It holds no connections of its own: each is served
// by a call of ServeConn. Use NewServer.
type Server struct {
	cfg      ServerConfig
	patience time.Duration // of its links
	shaking  atomic.Int64  // connections that have proved nothing yet
}

// NewServer returns a server for cfg.
func NewServer(cfg ServerConfig) *Server {
	cfg.TLS = tlsConfig(cfg.TLS)
	cfg.Peer = cfg.Peer.orIdentity()
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Handshakes == nil {
		cfg.Handshakes = newHandshakes()
	}
	cfg.HandshakeTimeout = pick(cfg.HandshakeTimeout, 10*time.Second, time.Millisecond, time.Hour)
	cfg.MaxHandshakes = pick(cfg.MaxHandshakes, 1024, 1, math.MaxInt)
	cfg.DrainTimeout = pick(cfg.DrainTimeout, 5*time.Second, time.Millisecond, 24*time.Hour)
	return &Server{cfg: cfg, patience: partPatience}
}

// errDrained is why streams end that outlive the drain.
var errDrained = errors.New("the server is ending and the connection did not end in time")

// ServeConn serves the tunnel on c, which it owns, until the peer closes it or
// ctx ends. When ctx ends the peer is told to go elsewhere, open streams have
// until the drain timeout, and then are aborted. ServeConn returns when every
// Handle has. The error is nil if the tunnel ended in order.
func (s *Server) ServeConn(ctx context.Context, c net.Conn) error {
	if s.cfg.Handle == nil {
		_ = c.Close() // there is nothing to lose yet
		return errors.New("serve tunnel: no handler")
	}
	conn, peer, err := s.shake(ctx, c)
	if err != nil {
		return fmt.Errorf("serve tunnel: %w", err)
	}
	l, err := newLink(conn, peer, ServerRole, s.cfg.Limits)
	if err != nil {
		Secured{Conn: conn}.Discard(c)
		return fmt.Errorf("serve tunnel: %w", err)
	}
	l.patience = s.patience
	var wg sync.WaitGroup
	work, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cancel(nil)
	l.handle = func(id uint32, authority string, h Header) {
		s.request(work, &wg, l, id, authority, h)
	}
	wg.Go(func() { s.drain(ctx, l) })
	err = l.run()
	wg.Wait()
	if err != nil {
		return fmt.Errorf("serve tunnel of %v: %w", peer, err)
	}
	return nil
}

// errTooMany is why a connection is closed before its handshake.
var errTooMany = errors.New("as many handshakes are under way as may be")

// shake finds out who is at the other end of c, which it closes if it fails.
func (s *Server) shake(ctx context.Context, c net.Conn) (*record.Conn, mesh.Identity, error) {
	defer s.shaking.Add(-1)
	if s.shaking.Add(1) > int64(s.cfg.MaxHandshakes) {
		_ = c.Close() // there is nothing to lose yet
		return nil, mesh.Identity{}, errTooMany
	}
	if s.cfg.Ready != nil {
		ready, cancel := context.WithTimeout(ctx, s.cfg.HandshakeTimeout)
		err := s.cfg.Ready(ready)
		cancel()
		if err != nil {
			_ = c.Close() // as above
			return nil, mesh.Identity{}, fmt.Errorf("not ready: %w", err)
		}
	}
	return shake(ctx, c, s.cfg.TLS, ServerRole, s.cfg.HandshakeTimeout, s.cfg.Handshakes, s.cfg.Peer)
}

// drain waits for the end of ctx and then ends the link in order, if it can.
func (s *Server) drain(ctx context.Context, l *link) {
	select {
	case <-l.done:
		return
	case <-ctx.Done():
	}
	l.shutdown()
	patience := time.NewTimer(s.cfg.DrainTimeout)
	defer patience.Stop()
	select {
	case <-l.done:
	case <-patience.C:
		l.abort(errDrained)
	}
}

// request starts the work for one request. link.mu is held.
func (s *Server) request(ctx context.Context, wg *sync.WaitGroup, l *link, id uint32, authority string, h Header) {
	target, err := ParseAuthority(authority)
	if err != nil {
		s.cfg.Log.Debug("request refused", "peer", l.peer, "error", err)
		l.tunnel.Answer(id, 400, Header{})
		l.tunnel.Release()
		return
	}
	st := newStream(l, id)
	ctx, st.cancel = context.WithCancelCause(ctx)
	l.streams[id] = st
	r := &Request{
		Authority: target, Header: h, Peer: l.peer,
		Remote: addrPort(l.conn.RemoteAddr()), Local: addrPort(l.conn.LocalAddr()),
		stream: st,
	}
	wg.Go(func() {
		defer st.cancel(nil)
		defer r.finish()
		s.cfg.Handle(ctx, r)
	})
}

// addrPort returns a as a socket address, or none if it is of another kind.
func addrPort(a net.Addr) netip.AddrPort {
	if t, ok := a.(*net.TCPAddr); ok {
		ap := t.AddrPort()
		return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
	}
	return netip.AddrPort{}
}

// A Request is a peer's wish for a connection.
type Request struct {
	Authority Authority
	Header    Header        // as the peer says; not verified
	Peer      mesh.Identity // as TLS has verified
	// Remote and Local are the ends of the tunnel's TCP connection.
	Remote, Local netip.AddrPort

	stream   *Stream
	answered bool // guarded by link.mu
}

// errAnswered is returned for a second answer.
var errAnswered = errors.New("the request was answered before")

// Accept grants the request. Call it when the connection onwards stands. The
// error says that the peer has gone meanwhile.
func (r *Request) Accept(h Header) (*Stream, error) {
	for _, v := range []string{h.Forwarded, h.Baggage, h.Traceparent, h.Network} {
		if !http2.ValidValue(v) {
			return nil, fmt.Errorf("accept: a header value has bytes that HTTP does not allow: %.80q", v)
		}
	}
	if err := r.answer(200, h); err != nil {
		return nil, err
	}
	return r.stream, nil
}

// Reject refuses the request with an HTTP status of 400 to 599. The error says
// that the peer has gone meanwhile.
func (r *Request) Reject(status int) error {
	if status < 400 || status > 599 {
		return fmt.Errorf("reject: status %d does not refuse anything", status)
	}
	return r.answer(status, Header{})
}

func (r *Request) answer(status int, h Header) error {
	st, l := r.stream, r.stream.link
	l.mu.Lock()
	defer l.mu.Unlock()
	if r.answered {
		return errAnswered
	}
	r.answered = true
	if l.streams[st.id] != st {
		return st.writeErr
	}
	st.isAnswered = true
	l.tunnel.Answer(st.id, status, h)
	if status != 200 {
		st.drop(http2.NoError)
	}
	l.settle()
	return nil
}

// finish ends what the handler has left open.
func (r *Request) finish() {
	l := r.stream.link
	l.mu.Lock()
	defer l.mu.Unlock()
	if !r.stream.closed {
		code := http2.Cancel
		if !r.answered {
			code = http2.InternalError
		}
		r.stream.drop(code)
	}
	l.tunnel.Release()
	l.settle()
}
