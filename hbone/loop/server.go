package loop

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"

	"github.com/weft-mesh/weft/hbone"
	"github.com/weft-mesh/weft/internal/http2"
	"github.com/weft-mesh/weft/mesh"
)

// A ServerConfig says how a Server takes tunnels.
type ServerConfig struct {
	// Shake is the server's part before the first byte of a tunnel: its TLS,
	// Peer, Handshakes, HandshakeTimeout, Ready, MaxHandshakes and Limits
	// count, the rest does not.
	Shake hbone.ServerConfig
	// Handle is called in a goroutine of its own for every request. It calls
	// Accept or Reject once; a request that it leaves unanswered is reset when
	// it returns.
	Handle func(r *Request)
	// Begin, if it is not nil, is called first, by the event loop: it does not
	// block. It answers the request and returns nil, or returns what does the
	// rest in the place of Handle.
	Begin func(r *Request) (rest func())
	// Log takes what went wrong on tunnels; nil discards it.
	Log *slog.Logger
}

// A Server takes tunnels for one identity. Use Engine.NewServer.
type Server struct {
	engine *Engine
	cfg    ServerConfig
	shake  *hbone.Server
	work   sync.WaitGroup // tunnels and handlers

	mu      sync.Mutex
	ending  bool
	aborted error
	tunnels map[*tunnel]struct{}
}

// NewServer returns a server for cfg.
func (e *Engine) NewServer(cfg ServerConfig) *Server {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Server{engine: e, cfg: cfg, shake: hbone.NewServer(cfg.Shake), tunnels: make(map[*tunnel]struct{})}
}

// Serve runs the handshake over c, which it owns, and returns when the tunnel
// is an event loop's, or with an error. The end of ctx ends the handshake, not
// the tunnel.
func (s *Server) Serve(ctx context.Context, c *net.TCPConn) error {
	if s.cfg.Handle == nil && s.cfg.Begin == nil {
		_ = c.Close() // there is nothing to lose yet
		return errors.New("serve tunnel: no handler")
	}
	secured, err := s.shake.Handshake(ctx, c)
	if err != nil {
		return fmt.Errorf("serve tunnel: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.aborted != nil {
		secured.Discard(c)
		return fmt.Errorf("serve tunnel: %w", s.aborted)
	}
	s.work.Add(1)
	t, err := s.engine.pick().newTunnel(c, secured, false, 0, s)
	if err != nil {
		s.work.Done()
		return fmt.Errorf("serve tunnel: %w", err)
	}
	s.tunnels[t] = struct{}{}
	if s.ending {
		t.loop.post(work{kind: workShutdown, tunnel: t})
	}
	return nil
}

// Shutdown tells the peers of all tunnels, and of those to come, to go
// elsewhere. Open connections go on; a tunnel without any ends.
func (s *Server) Shutdown() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ending = true
	for t := range s.tunnels {
		t.loop.post(work{kind: workShutdown, tunnel: t})
	}
}

// Abort ends all tunnels with what is open in them, and takes no more.
func (s *Server) Abort(cause error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ending, s.aborted = true, cause
	for t := range s.tunnels {
		t.loop.post(work{kind: workEnd, tunnel: t, err: cause})
	}
}

// Wait returns when every tunnel has ended, with what was in it, and every
// Handle has returned. No Serve may begin meanwhile.
func (s *Server) Wait() { s.work.Wait() }

// Tunnels returns how many tunnels are open.
func (s *Server) Tunnels() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.tunnels)
}

func (s *Server) limits() hbone.Limits { return s.cfg.Shake.Limits }

func (s *Server) requested(r *Request) {
	var err error
	if r.Authority, err = hbone.ParseAuthority(r.text); err != nil {
		s.cfg.Log.Debug("request refused", "peer", *r.Peer, "error", err)
		_ = r.Reject(400) // 400 is a status that refuses
		return
	}
	if s.cfg.Begin == nil {
		s.handle(r, func() { s.cfg.Handle(r) })
		return
	}
	if rest := s.cfg.Begin(r); rest != nil {
		s.handle(r, rest)
		return
	}
	r.abandon()
}

// handle does the work for a request in a goroutine of its own.
func (s *Server) handle(r *Request, work func()) {
	s.work.Go(func() {
		defer r.abandon()
		work()
	})
}

func (s *Server) over(t *tunnel, err error) {
	s.mu.Lock()
	delete(s.tunnels, t)
	s.mu.Unlock()
	if err != nil {
		s.cfg.Log.Debug("a tunnel ended", "peer", t.peer, "from", t.remote, "error", err)
	}
	s.work.Done()
}

// A Request is a peer's wish for a connection.
type Request struct {
	Authority hbone.Authority
	Header    hbone.Header   // as the peer says; not verified
	Peer      *mesh.Identity // as TLS has verified; it does not change
	// Remote and Local are the ends of the tunnel's TCP connection.
	Remote, Local netip.AddrPort

	tunnel   *tunnel
	id       uint32
	text     string // Authority as it came
	answered bool   // the handler's

	// The loop's.
	early *queue // what came before the answer
	ended bool   // and the end
	gone  bool   // the peer has reset the stream, or the tunnel has ended
}

// errAnswered is returned for a second answer.
var errAnswered = errors.New("the request was answered before")

// Accept grants the request: the connection goes on between the stream and fd,
// the descriptor of a connected TCP socket, as c. fd is the engine's from then
// on, and owner hears of c's end, which is at once if the peer has gone
// meanwhile.
func (r *Request) Accept(c *Conn, fd int, owner Owner) {
	c.owner, c.fd = owner, int32(fd)
	l := r.tunnel.loop
	if r.answered {
		abortSocket(c.fd)
		c.over(errAnswered)
		return
	}
	r.answered = true
	c.loop.Store(l)
	w := work{kind: workAnswer, req: r, conn: c, status: 200}
	if !l.post(w) {
		w.refuse()
	}
}

// Reject refuses the request with an HTTP status of 400 to 599.
func (r *Request) Reject(status int) error {
	if status < 400 || status > 599 {
		return fmt.Errorf("reject: status %d does not refuse anything", status)
	}
	if r.answered {
		return errAnswered
	}
	r.answered = true
	r.tunnel.loop.post(work{kind: workAnswer, req: r, status: status})
	return nil
}

// abandon resets a request that was left unanswered.
func (r *Request) abandon() {
	if !r.answered {
		r.answered = true
		r.tunnel.loop.post(work{kind: workAnswer, req: r})
	}
}

// errPeerGone is why a connection ends before it began.
var errPeerGone = &resetError{"the tunnelled connection", errors.New("the peer has gone before it was accepted")}

// answer does what the handler has decided.
func (l *eventLoop) answer(r *Request, c *Conn, status int) {
	t := r.tunnel
	if !t.ended {
		l.touch(t)
		t.core.Release()
	}
	if r.gone || t.ended {
		if c != nil {
			abortSocket(c.fd)
			c.over(errPeerGone)
		}
		return
	}
	t.requests.Delete(r.id)
	switch {
	case c != nil:
		c.flags |= connOpen
		c.queue, r.early = r.early, nil
		t.load.Add(1)
		if !l.adopt(c, t, r.id) {
			return
		}
		t.core.Answer(r.id, status, hbone.Header{})
		if c.queue != nil {
			l.drainQueue(c)
		}
		if r.ended && !c.is(connDead) {
			c.flags |= connPeerEnd
			l.passEnd(c)
		}
		return
	case status == 0:
		t.core.Reset(r.id, http2.InternalError)
	default:
		t.core.Answer(r.id, status, hbone.Header{})
	}
	l.dropEarly(r)
}

// hold keeps data that came before the answer.
func (r *Request) hold(p []byte) {
	l := r.tunnel.loop
	if r.early == nil {
		r.early = l.store.queue()
	}
	r.early.write(&l.store, p)
	l.unread(r.tunnel, len(p))
}

// forgetRequest drops a request whose stream is gone.
func (l *eventLoop) forgetRequest(r *Request) {
	r.gone = true
	r.tunnel.requests.Delete(r.id)
	l.dropEarly(r)
}

func (l *eventLoop) dropEarly(r *Request) {
	if r.early == nil {
		return
	}
	n := r.early.clear(&l.store)
	l.store.release(r.early)
	r.early = nil
	l.unread(r.tunnel, -n)
	r.tunnel.core.Consumed(r.id, n)
}

func addrPort(a net.Addr) netip.AddrPort {
	if t, ok := a.(*net.TCPAddr); ok {
		ap := t.AddrPort()
		return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
	}
	return netip.AddrPort{}
}
