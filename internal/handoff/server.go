package handoff

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"
)

// ServerConfig is what a Server needs.
type ServerConfig struct {
	// Path is where the socket is made. A file that is there is replaced: the
	// caller makes sure that one agent runs.
	Path string
	Log  *slog.Logger

	// Snapshot returns every pod that is captured now. It is called when a
	// ztunnel has connected; the Server closes the files. A pod must be out of
	// it before Del is called for that pod, and in it before Add is.
	Snapshot func() []Entry
	// OnHold is told of each pod that a connecting ztunnel serves already,
	// before Snapshot is called for it. It owns the files. It is called by one
	// connection at a time. Nil closes them.
	OnHold func(Pod, Files)
	// OnHoldEnd is told that a ztunnel has reported all that it serves. Nil is
	// nobody.
	OnHoldEnd func(instance string)

	// ElectWait is how long a ztunnel that stands by waits for the active one
	// of its pair to connect, before it is made active. 0 is a second.
	ElectWait time.Duration
	// WatchEvery is how often an active ztunnel of a pair is asked whether it
	// still answers. 0 is a second.
	WatchEvery time.Duration
	// AckTimeout is how long ztunnel may take to answer; one that takes longer
	// is disconnected. 0 is 5 seconds.
	AckTimeout time.Duration
}

// A Server is the agent's side. Make it with NewServer, then call Run.
type Server struct {
	cfg ServerConfig

	holds sync.Mutex // one connection reports holds at a time

	mu      sync.Mutex
	proxies []*proxy      // oldest first
	changed chan struct{} // closed when proxies change
}

// NewServer returns a server that does nothing until Run.
func NewServer(cfg ServerConfig) *Server {
	cfg.AckTimeout = cmp.Or(cfg.AckTimeout, 5*time.Second)
	return &Server{cfg: cfg, changed: make(chan struct{})}
}

// Run accepts ztunnels until ctx ends, and then closes their connections. It
// fails when the socket cannot be made or breaks.
func (s *Server) Run(ctx context.Context) error {
	l, err := listen(s.cfg.Path)
	if err != nil {
		return fmt.Errorf("open handoff socket: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	defer l.Close()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	for {
		c, err := l.AcceptUnix()
		if ctx.Err() != nil {
			if err == nil {
				c.Close()
			}
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept on handoff socket: %w", err)
		}
		wg.Go(func() { s.serve(ctx, c) })
	}
}

// listen makes the socket under another name and moves it into place, so that
// it never exists with wider permissions than it should.
func listen(path string) (*net.UnixListener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(filepath.Dir(path), ".handoff")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	made := filepath.Join(dir, "s")
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: made, Net: "unixpacket"})
	if err != nil {
		return nil, err
	}
	// The file stays at exit: by then a successor may have put its own there.
	l.SetUnlinkOnClose(false)
	if err := errors.Join(os.Chmod(made, 0o600), os.Rename(made, path)); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// serve greets one ztunnel, tells it the snapshot and keeps it until its
// connection ends.
func (s *Server) serve(ctx context.Context, c *net.UnixConn) {
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	if err := checkPeer(c); err != nil {
		s.cfg.Log.Error("a connection to the handoff socket was refused", "error", err)
		return
	}
	p := newProxy(c, s.cfg.AckTimeout)
	if err := s.greet(p); err != nil {
		if ctx.Err() == nil {
			s.cfg.Log.Error("a ztunnel could not be greeted", "instance", p.instance, "error", err)
		}
		return
	}
	s.cfg.Log.Info("ztunnel connected", "instance", p.instance)

	p.turn <- struct{}{} // until the snapshot is through, adds and dels wait
	activated := s.join(p)
	var wg sync.WaitGroup
	wg.Go(func() { s.elect(ctx, p) })
	wg.Go(func() { s.watch(ctx, p) })
	wg.Go(func() {
		defer func() { <-p.turn }()
		err := s.snapshot(p, activated)
		switch {
		case err == nil:
			s.ready(p)
		case ctx.Err() == nil:
			s.cfg.Log.Error("the pods of this node could not be handed to ztunnel: its connection is closed, it will be told again when it is back", "instance", p.instance, "error", err)
			c.Close()
		}
	})
	err := p.readAcks()
	close(p.gone)
	s.activate(ctx, s.leave(p)) // before anything else: connections wait for it
	wg.Wait()
	if ctx.Err() == nil {
		s.cfg.Log.Warn("ztunnel disconnected", "instance", p.instance, "error", err)
	}
}

// greet reads the hello and the holds of a ztunnel.
func (s *Server) greet(p *proxy) error {
	p.pipe.conn.SetReadDeadline(time.Now().Add(s.cfg.AckTimeout))
	m, f, err := p.pipe.receive()
	if err != nil {
		return err
	}
	f.Close()
	if m.Kind != hello {
		return fmt.Errorf("ztunnel begins with %q, want hello", m.Kind)
	}
	p.instance, p.dns = m.Instance, m.DNS
	p.introduce(m)
	if m.Version != Version {
		err := fmt.Errorf("ztunnel speaks version %d of the handoff, this agent version %d: run both from one release", m.Version, Version)
		p.pipe.conn.SetWriteDeadline(time.Now().Add(s.cfg.AckTimeout))
		return errors.Join(err, p.pipe.send(message{Kind: refuse, Error: err.Error()}, Files{}))
	}
	s.holds.Lock()
	defer s.holds.Unlock()
	for {
		p.pipe.conn.SetReadDeadline(time.Now().Add(s.cfg.AckTimeout))
		m, f, err := p.pipe.receive()
		switch {
		case err != nil:
			return err
		case m.Kind == hold && s.cfg.OnHold != nil:
			s.cfg.OnHold(*m.Pod, f)
		case m.Kind == hold:
			f.Close()
		case m.Kind == holdEnd:
			p.pipe.conn.SetReadDeadline(time.Time{})
			if s.cfg.OnHoldEnd != nil {
				s.cfg.OnHoldEnd(p.instance)
			}
			return nil
		default:
			f.Close()
			return fmt.Errorf("ztunnel sends %q among what it holds", m.Kind)
		}
	}
}

// snapshot sends every pod, and before them, with activated, that the ztunnel
// is active. A pod that it cannot serve is logged and does not keep the others
// from it. The caller has p.turn.
func (s *Server) snapshot(p *proxy, activated bool) error {
	if activated {
		if err := p.ask(message{Kind: activate}, Files{}); err != nil {
			return err
		}
	}
	var entries []Entry
	if s.cfg.Snapshot != nil {
		entries = s.cfg.Snapshot()
	}
	var broken error
	for _, e := range entries {
		if broken == nil {
			err := p.ask(message{Kind: add, Pod: &e.Pod}, e.Files)
			if errors.Is(err, errDisconnected) {
				broken = err
			} else if err != nil {
				s.cfg.Log.Error("ztunnel cannot serve a captured pod: its traffic stops", "pod", e.Pod.Name, "namespace", e.Pod.Namespace, "error", err)
			}
		}
		e.Files.Close()
	}
	if broken != nil {
		return broken
	}
	return p.ask(message{Kind: snapshotEnd, Pairs: true}, Files{})
}

func (s *Server) wake() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// ServesDNS reports whether the ztunnel to which pods are added takes the
// sockets for name queries. It may change when what Connected reports does.
// While it is false, name queries must not be captured: nobody answers them.
func (s *Server) ServesDNS() bool {
	p := s.newest()
	return p != nil && p.dns
}

// Add hands a pod to the newest active ztunnel and returns when it has
// acknowledged that it serves it; those that stand by are given it as well.
// The files stay the caller's. When the active one goes away meanwhile, the
// next one is asked; with none left, the error is ErrNoProxy.
func (s *Server) Add(ctx context.Context, pod Pod, f Files) error {
	if err := pod.Validate(); err != nil {
		return fmt.Errorf("hand pod to ztunnel: %w", err)
	}
	for {
		p := s.newest()
		if p == nil {
			return fmt.Errorf("hand pod %s/%s to ztunnel: %w", pod.Namespace, pod.Name, ErrNoProxy)
		}
		err := p.request(ctx, message{Kind: add, Pod: &pod}, f)
		if errors.Is(err, errDisconnected) && ctx.Err() == nil {
			s.activate(ctx, s.leave(p)) // it is on its way out
			continue
		}
		if err != nil {
			return fmt.Errorf("hand pod %s/%s to ztunnel: %w", pod.Namespace, pod.Name, err)
		}
		s.addPassive(ctx, pod, f, p)
		return nil
	}
}

// Del tells every ztunnel that a pod is no longer captured, and returns when
// all have acknowledged that they accept no more of its connections.
func (s *Server) Del(ctx context.Context, uid string) error {
	if err := validUID(uid); err != nil {
		return fmt.Errorf("take pod from ztunnel: %w", err)
	}
	s.mu.Lock()
	all := slices.Clone(s.proxies)
	s.mu.Unlock()
	errs := make([]error, len(all))
	var wg sync.WaitGroup
	for i, p := range all {
		wg.Go(func() {
			err := p.request(ctx, message{Kind: del, UID: uid}, Files{})
			if err != nil && !errors.Is(err, errDisconnected) {
				errs[i] = fmt.Errorf("take pod %s from ztunnel %s: %w", uid, p.instance, err)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// errDisconnected says that a ztunnel went away before it answered.
var errDisconnected = errors.New("ztunnel disconnected before it answered")

// proxy is one connected ztunnel.
type proxy struct {
	instance string
	dns      bool // takes the sockets for name queries
	pair     string
	active   bool          // it accepts connections, or is being told to; guarded by Server.mu once it has joined
	eager    bool          // wants to be the active one of its pair
	twin     bool          // knows that an active one of its pair lives
	synced   bool          // has all pods; guarded by Server.mu
	late     bool          // was not activated at once when the active one of its pair left; guarded by Server.mu
	again    chan struct{} // full when it is to be elected because of that
	timeout  time.Duration
	acks     chan message
	gone     chan struct{} // closed when nobody reads its answers any more

	turn chan struct{} // full while a request is under way; guards the fields below
	pipe *pipe
	seq  uint64
}

func newProxy(c *net.UnixConn, timeout time.Duration) *proxy {
	return &proxy{
		timeout: timeout,
		acks:    make(chan message),
		gone:    make(chan struct{}),
		again:   make(chan struct{}, 1),
		turn:    make(chan struct{}, 1),
		pipe:    newPipe(c),
	}
}

// readAcks passes the answers on until the connection ends.
func (p *proxy) readAcks() error {
	for {
		m, f, err := p.pipe.receive()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		f.Close()
		if m.Kind != ack {
			return fmt.Errorf("ztunnel sends %q, want ack", m.Kind)
		}
		timeout := time.NewTimer(p.timeout)
		select {
		case p.acks <- m:
			timeout.Stop()
		case <-timeout.C:
			return fmt.Errorf("ztunnel answers %d, which nobody asked", m.Seq)
		}
	}
}

// request asks when it is this request's turn. Once it has asked it waits for
// the answer even when ctx ends, at most p.timeout: a request with an unknown
// end would have to be asked again of a new connection.
func (p *proxy) request(ctx context.Context, m message, f Files) error {
	select {
	case p.turn <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-p.turn }()
	return p.ask(m, f)
}

// ask sends m and waits for its answer. The caller has p.turn. A ztunnel that
// does not answer in time, or answers something else, is disconnected.
func (p *proxy) ask(m message, f Files) error {
	p.seq++
	m.Seq = p.seq
	if !p.dns {
		f.Listeners[DNS4], f.Listeners[DNS6] = nil, nil
	}
	p.pipe.conn.SetWriteDeadline(time.Now().Add(p.timeout))
	if err := p.pipe.send(m, f); err != nil {
		p.pipe.conn.Close()
		return fmt.Errorf("%w: %v", errDisconnected, err)
	}
	timeout := time.NewTimer(p.timeout)
	defer timeout.Stop()
	select {
	case a := <-p.acks:
		if a.Seq != m.Seq {
			p.pipe.conn.Close()
			return fmt.Errorf("%w: it answered %d when asked %d", errDisconnected, a.Seq, m.Seq)
		}
		if a.Error != "" {
			return errors.New(a.Error)
		}
		return nil
	case <-p.gone:
		return errDisconnected
	case <-timeout.C:
		p.pipe.conn.Close()
		return fmt.Errorf("%w: it took longer than %v", errDisconnected, p.timeout)
	}
}
