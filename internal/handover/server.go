package handover

import (
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

	"github.com/weft-mesh/weft/internal/pack"
)

// ServerConfig is what a Server needs.
type ServerConfig struct {
	Path  string   // of the socket; a file that is there is replaced
	Parts []uint32 // versions of parts that this process gives, the best first
	Log   *slog.Logger
}

// A Server is the side that gives connections away. Make it with NewServer,
// then call Run.
type Server struct {
	cfg ServerConfig

	mu    sync.Mutex
	heirs []*Heir       // that are ready, the newest last
	ready chan struct{} // closed and replaced when heirs change
}

// NewServer returns a server that does nothing until Run.
func NewServer(cfg ServerConfig) *Server {
	return &Server{cfg: cfg, ready: make(chan struct{})}
}

// Run accepts successors until ctx ends, and closes their connections then. It
// fails when the socket cannot be made or breaks.
func (s *Server) Run(ctx context.Context) error {
	l, err := listen(s.cfg.Path)
	if err != nil {
		return fmt.Errorf("open handover socket: %w", err)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = l.Close() }) // nothing is written to it
	defer stop()
	defer l.Close()
	slots := make(chan struct{}, 8) // more is not a rollout
	for {
		c, err := l.AcceptUnix()
		if ctx.Err() != nil {
			if err == nil {
				_ = c.Close() // it was told nothing
			}
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept on handover socket: %w", err)
		}
		select {
		case slots <- struct{}{}:
		default:
			_ = c.Close() // as above
			continue
		}
		wg.Go(func() {
			defer func() { <-slots }()
			s.serve(ctx, c)
		})
	}
}

// listen makes the socket under another name and moves it into place, so that
// it never exists with wider permissions than it should.
func listen(path string) (*net.UnixListener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	// The kubelet makes a hostPath directory with 0755. The socket's own mode
	// and the check of the peer hold without this.
	_ = os.Chmod(filepath.Dir(path), 0o700)
	dir, err := os.MkdirTemp(filepath.Dir(path), ".handover")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	made := filepath.Join(dir, "s")
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: made, Net: "unixpacket"})
	if err != nil {
		return nil, err
	}
	// The file stays at exit: by then a successor has put its own there.
	l.SetUnlinkOnClose(false)
	if err := errors.Join(os.Chmod(made, 0o600), os.Rename(made, path)); err != nil {
		_ = l.Close() // the error is the one that matters
		return nil, err
	}
	return l, nil
}

// serve keeps one successor until its connection or ctx ends.
func (s *Server) serve(ctx context.Context, c *net.UnixConn) {
	defer c.Close()
	if err := checkPeer(c); err != nil {
		s.cfg.Log.Error("a connection to the handover socket was refused", "error", err)
		return
	}
	h := &Heir{pipe: newPipe(c), answers: make(chan message, 1), gone: make(chan struct{})}
	if err := s.greet(h); err != nil {
		if !errors.Is(err, io.EOF) {
			s.cfg.Log.Warn("a successor cannot take connections: they will drain", "instance", h.Instance, "error", err)
		}
		return
	}
	stop := context.AfterFunc(ctx, func() { _ = c.Close() }) // it reads the end
	defer stop()
	if m, err := h.pipe.receive(time.Time{}); err != nil || m.kind != ready {
		m.close()
		return // it has given up, or it was never one
	}
	s.cfg.Log.Info("a successor is ready to take connections", "instance", h.Instance)
	s.join(h)
	h.watch()
	s.leave(h)
}

// greet agrees on versions.
func (s *Server) greet(h *Heir) error {
	m, err := h.pipe.receive(time.Now().Add(stepTimeout))
	if err != nil {
		return err
	}
	var g hi
	if m.kind != hello {
		return fmt.Errorf("it begins with a message of kind %d", m.kind)
	}
	if err := pack.Read(m.text, g.pack); err != nil {
		// A later version may say more than we can read.
		err = fmt.Errorf("the greeting cannot be read: %w", err)
		return errors.Join(err, h.pipe.send(message{kind: refuse, text: []byte(err.Error())}))
	}
	h.Greeting = g.Greeting
	if h.Version, err = choose(s.cfg.Parts, g); err != nil {
		return errors.Join(err, h.pipe.send(message{kind: refuse, text: []byte(err.Error())}))
	}
	return h.pipe.send(message{kind: welcome, text: pack.Write((&welcomeText{h.Version}).pack)})
}

func (s *Server) join(h *Heir) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.heirs = append(s.heirs, h)
	s.wake()
}

func (s *Server) leave(h *Heir) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, o := range s.heirs {
		if o == h {
			s.heirs = append(s.heirs[:i:i], s.heirs[i+1:]...)
			break
		}
	}
	s.wake()
}

func (s *Server) wake() {
	close(s.ready)
	s.ready = make(chan struct{})
}

// Heir returns the successor that is ready, of several the one with the highest
// rank and of those the newest, or nil, and a channel that is closed when the
// answer may be another.
func (s *Server) Heir() (*Heir, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var best *Heir
	for _, h := range s.heirs {
		if best == nil || h.Rank >= best.Rank {
			best = h
		}
	}
	return best, s.ready
}

// An Heir is a successor that is ready. Its methods are called by one goroutine
// at a time.
type Heir struct {
	Greeting
	Version uint32 // of the parts

	pipe    *pipe
	answers chan message
	gone    chan struct{} // closed when the connection is of no use any more
	once    sync.Once
}

// errHeirGone says that the successor is not there any more.
var errHeirGone = errors.New("the successor is gone")

// watch reads the answers until the connection ends.
func (h *Heir) watch() {
	for {
		m, err := h.pipe.receive(time.Time{})
		if err != nil {
			h.end()
			return
		}
		m.close() // no answer has any
		select {
		case h.answers <- m:
		case <-h.gone:
			return
		default: // nobody has asked twice
			h.end()
			return
		}
	}
}

// end ends the connection.
func (h *Heir) end() {
	h.once.Do(func() {
		close(h.gone)
		_ = h.pipe.c.Close() // nothing is on its way
	})
}

// Give offers a part, and returns nil if it is the successor's from then on,
// which may have gone already: the caller must not touch it any more. After an
// error it is the caller's as before; ErrDeclined says that the next part may be
// taken. files stay the caller's, who closes its own. text is the caller's to
// clear.
func (h *Heir) Give(text []byte, files []int) error {
	if len(text) > MaxText || len(files) > MaxPartFiles {
		return fmt.Errorf("%w: it has %d bytes and %d files", ErrDeclined, len(text), len(files))
	}
	if err := h.listens(); err != nil {
		return err
	}
	err := h.give(text, files)
	if err != nil && !errors.Is(err, ErrDeclined) {
		h.end() // which tells the successor, if it is there, to let go
	}
	return err
}

// Ahead sends something that belongs to the part which is given next, at most
// MaxAhead bytes. It does not wait for the successor, which forgets it if it
// declines the part. text is the caller's to clear.
func (h *Heir) Ahead(text []byte) error {
	if len(text) > MaxAhead {
		return fmt.Errorf("send ahead: it has %d bytes", len(text))
	}
	if err := h.listens(); err != nil || len(text) == 0 {
		return err
	}
	err := h.pipe.send(message{kind: ahead, text: text})
	if err != nil {
		h.end()
	}
	return err
}

// Settle waits until the successor has read what was sent ahead. A part that is
// given before would wait for that.
func (h *Heir) Settle() error {
	if err := h.listens(); err != nil {
		return err
	}
	m, err := h.ask(message{kind: ahead})
	if err == nil && m.kind != ready {
		err = fmt.Errorf("the successor answers with a message of kind %d", m.kind)
	}
	if err != nil {
		h.end()
	}
	return err
}

// ask sends a message and waits for the answer.
func (h *Heir) ask(m message) (answer message, err error) {
	if err := h.pipe.send(m); err != nil {
		return message{}, err
	}
	patience := time.NewTimer(stepTimeout)
	defer patience.Stop()
	select {
	case <-h.gone:
		return message{}, errHeirGone
	case <-patience.C:
		return message{}, fmt.Errorf("the successor does not answer within %v", stepTimeout)
	case m := <-h.answers:
		return m, nil
	}
}

// listens reports, as an error, why nothing may be sent to the successor.
func (h *Heir) listens() error {
	select {
	case <-h.gone:
		return errHeirGone
	case <-h.answers:
		h.end()
		return errors.New("the successor answers what it was not asked")
	default:
		return nil
	}
}

func (h *Heir) give(text []byte, files []int) error {
	c, err := newClaim()
	if err != nil {
		return fmt.Errorf("%w: %w", ErrDeclined, err)
	}
	defer c.close()
	m, err := h.ask(message{kind: part, text: text, files: append(slices.Clip(files), c.fd)})
	if !c.take() {
		// The successor has gone on with it, whatever it says, or whether it
		// still can say anything.
		if err != nil || m.kind != taken {
			h.end()
		}
		return nil
	}
	switch {
	case err != nil:
		return err
	case m.kind == declined:
		return fmt.Errorf("%w: %.200q", ErrDeclined, m.text)
	}
	return fmt.Errorf("the successor answers with a message of kind %d, and has not taken the part", m.kind)
}

// ErrDeclined says that the successor did not want a part.
var ErrDeclined = errors.New("the successor does not take it")

// Done tells the successor that it has all.
func (h *Heir) Done() error {
	select {
	case <-h.gone:
		return errHeirGone
	default:
	}
	err := h.pipe.send(message{kind: done})
	h.end() // nothing follows
	return err
}
