package hbone

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/weft-mesh/weft/internal/http2"
	"github.com/weft-mesh/weft/mesh"
)

// A Stream is one tunnelled connection. It is a net.Conn with the half-close
// of TCP. All its methods are safe for concurrent use. Its owner must Close or
// Reset it.
type Stream struct {
	link *link
	id   uint32

	reading, writing   sync.Mutex    // one Read and one Write at a time
	readable, writable chan struct{} // wake that one

	// answer is closed when a client's request was answered or has failed;
	// status and openErr do not change after it.
	answer  chan struct{}
	status  int
	openErr error

	// All below is guarded by link.mu.
	isAnswered bool
	headEnd    uint64 // where our HEADERS end in the link's output
	queue      queue
	readErr    error // what Read returns once queue is empty
	writeErr   error
	readClosed bool   // what comes is dropped
	pending    []byte // of the Write that is under way
	inLine     bool   // in link.waiting
	sentEnd    bool
	gotEnd     bool
	closed     bool
	readBy     deadline
	writeBy    deadline
	cancel     context.CancelCauseFunc // server: ends the handler's context
}

func newStream(l *link, id uint32) *Stream {
	return &Stream{
		link: l, id: id,
		readable: make(chan struct{}, 1), writable: make(chan struct{}, 1),
	}
}

// An abortError is why a stream ended before its time. It is ECONNRESET to
// those who ask with errors.Is.
type abortError struct {
	cause   error
	refused bool // the peer certainly did nothing for the stream
}

// Error says why the stream ended.
func (e *abortError) Error() string {
	return fmt.Sprintf("tunnelled connection was aborted: %v", e.cause)
}

// Unwrap returns the cause and ECONNRESET.
func (e *abortError) Unwrap() []error { return []error{e.cause, syscall.ECONNRESET} }

// Peer returns the verified identity at the other end of the tunnel.
func (s *Stream) Peer() mesh.Identity { return s.link.peer }

// LocalAddr returns the address of our end of the tunnel.
func (s *Stream) LocalAddr() net.Addr { return s.link.conn.LocalAddr() }

// RemoteAddr returns the address of the other end of the tunnel, which for a
// request to a server is the sender's and for one of ours the next hop's.
func (s *Stream) RemoteAddr() net.Addr { return s.link.conn.RemoteAddr() }

// Read reads what the peer sent. It returns io.EOF after the peer's orderly
// end and an error that is syscall.ECONNRESET after any other, in both cases
// after what came before.
func (s *Stream) Read(p []byte) (int, error) {
	s.reading.Lock()
	defer s.reading.Unlock()
	if err := s.awaitData(); err != nil {
		return 0, err
	}
	n := s.queue.read(p)
	s.link.tunnel.Consumed(s.id, n)
	s.link.settle()
	s.link.mu.Unlock()
	return n, nil
}

// WriteTo writes what the peer sends to w until its orderly end, without the
// copy that Read makes.
func (s *Stream) WriteTo(w io.Writer) (int64, error) {
	s.reading.Lock()
	defer s.reading.Unlock()
	var total int64
	for {
		if err := s.awaitData(); err == io.EOF {
			return total, nil
		} else if err != nil {
			return total, err
		}
		c := s.queue.take()
		s.link.mu.Unlock()
		n, err := w.Write(c.bytes())
		total += int64(n)
		s.link.mu.Lock()
		s.link.tunnel.Consumed(s.id, c.w-c.r)
		s.link.settle()
		s.link.mu.Unlock()
		c.free()
		if err != nil {
			return total, err
		}
	}
}

// awaitData waits until there is something to read. If it returns nil, link.mu
// is held. The caller holds reading.
func (s *Stream) awaitData() error {
	l := s.link
	for {
		l.mu.Lock()
		switch {
		case s.readClosed:
			l.mu.Unlock()
			return net.ErrClosed
		case s.readBy.past:
			l.mu.Unlock()
			return os.ErrDeadlineExceeded
		case s.queue.n > 0:
			return nil
		case s.readErr != nil:
			defer l.mu.Unlock()
			return s.readErr
		}
		l.mu.Unlock()
		<-s.readable
	}
}

// Write sends p. It returns when all of p is queued behind at most a few
// hundred KiB of other streams' data, so a slow peer slows it down.
func (s *Stream) Write(p []byte) (int, error) {
	s.writing.Lock()
	defer s.writing.Unlock()
	l := s.link
	l.mu.Lock()
	if err := s.mayWrite(); err != nil || len(p) == 0 {
		l.mu.Unlock()
		return 0, err
	}
	n := s.queueNow(p)
	if n < len(p) {
		s.pending = p[n:]
		l.enqueue(s)
	}
	l.settle()
	var err error
	for len(s.pending) > 0 {
		l.mu.Unlock()
		<-s.writable
		l.mu.Lock()
		if err = s.mayWrite(); err != nil && len(s.pending) > 0 {
			break
		}
		err = nil
	}
	n = len(p) - len(s.pending)
	s.pending = nil
	l.mu.Unlock()
	return n, err
}

// TryWrite is Write without its waiting: it sends what of p finds room at once,
// and returns how much that is.
func (s *Stream) TryWrite(p []byte) (int, error) {
	if !s.writing.TryLock() {
		return 0, nil
	}
	defer s.writing.Unlock()
	s.link.mu.Lock()
	defer s.link.mu.Unlock()
	if err := s.mayWrite(); err != nil || len(p) == 0 {
		return 0, err
	}
	n := s.queueNow(p)
	s.link.settle()
	return n, nil
}

// queueNow queues what of p finds room, and returns how much. The caller holds
// link.mu.
func (s *Stream) queueNow(p []byte) int {
	l := s.link
	room := outLimit - len(l.tunnel.Output())
	if room <= 0 || len(l.waiting) > 0 {
		return 0 // others came first
	}
	return l.tunnel.Send(s.id, p[:min(len(p), room)], false)
}

// mayWrite returns why nothing can be written. The caller holds link.mu.
func (s *Stream) mayWrite() error {
	if s.writeErr != nil {
		return s.writeErr
	}
	if s.writeBy.past {
		return os.ErrDeadlineExceeded
	}
	return nil
}

// CloseWrite ends our direction, as a TCP FIN does. A Write under way fails.
func (s *Stream) CloseWrite() error {
	s.link.mu.Lock()
	defer s.link.mu.Unlock()
	if s.writeErr != nil && !s.sentEnd {
		return s.writeErr
	}
	s.endWrite()
	s.link.settle()
	return nil
}

// endWrite sends our END_STREAM, once.
func (s *Stream) endWrite() {
	if s.sentEnd {
		return
	}
	s.sentEnd = true
	s.failWrite(net.ErrClosed)
	s.link.tunnel.Send(s.id, nil, true)
	if s.gotEnd {
		delete(s.link.streams, s.id)
	}
}

// CloseRead drops what the peer has sent and will send. The peer is not told.
func (s *Stream) CloseRead() error {
	s.link.mu.Lock()
	defer s.link.mu.Unlock()
	s.endRead()
	s.link.settle()
	return nil
}

func (s *Stream) endRead() {
	if s.readClosed {
		return
	}
	s.readClosed = true
	s.link.tunnel.Consumed(s.id, s.queue.clear())
	wake(s.readable)
}

// Quiet reports whether nothing has come from the peer that was not read (no
// bytes, no end and no abort), nor the wish that the tunnel be left. Who has kept
// a stream aside finds out so whether to go on with it.
func (s *Stream) Quiet() bool {
	s.link.mu.Lock()
	defer s.link.mu.Unlock()
	return s.queue.n == 0 && s.readErr == nil && s.writeErr == nil && !s.gotEnd && !s.closed && !s.link.tunnel.Draining()
}

// Left reports whether the peer has ended its direction, or the stream: also if
// there is still something to read.
func (s *Stream) Left() bool {
	s.link.mu.Lock()
	defer s.link.mu.Unlock()
	return s.gotEnd || s.readErr != nil || s.writeErr != nil
}

// Close ends both directions. What was written is still delivered; a peer that
// goes on sending is told to stop.
func (s *Stream) Close() error {
	l := s.link
	l.mu.Lock()
	defer l.mu.Unlock()
	if s.closed {
		return nil
	}
	code := http2.Cancel
	if l.tunnel.role == ServerRole {
		code = http2.NoError // RFC 9113 8.1
	}
	if s.writeErr == nil {
		s.endWrite()
	}
	s.drop(code)
	return nil
}

// Reset aborts the connection: the peer sees an error instead of an end, as
// with a TCP RST.
func (s *Stream) Reset() {
	s.link.mu.Lock()
	defer s.link.mu.Unlock()
	s.drop(http2.Cancel)
}

// drop lets go of the stream, and resets it if it is not over. The caller holds
// link.mu.
func (s *Stream) drop(code http2.ErrCode) {
	l := s.link
	s.closed = true
	delete(l.streams, s.id)
	l.tunnel.Reset(s.id, code)
	s.endRead()
	s.failWrite(net.ErrClosed)
	s.readBy.stop()
	s.writeBy.stop()
	l.settle()
}

// failWrite makes the Write under way and all to come fail with err, unless
// they do already.
func (s *Stream) failWrite(err error) {
	if s.writeErr == nil {
		s.writeErr = err
	}
	wake(s.writable)
}

// abort ends the stream for a reason outside it. The caller holds link.mu and
// takes it out of link.streams.
func (s *Stream) abort(cause error, refused bool) {
	err := &abortError{cause: cause, refused: refused}
	if s.readErr == nil {
		s.readErr = err
	}
	wake(s.readable)
	s.failWrite(err)
	if s.answer != nil && !s.isAnswered {
		s.isAnswered, s.openErr = true, err
		close(s.answer)
	}
	if s.cancel != nil {
		s.cancel(err)
	}
}

// SetDeadline sets both deadlines.
func (s *Stream) SetDeadline(t time.Time) error {
	_ = s.SetReadDeadline(t) // neither can fail
	return s.SetWriteDeadline(t)
}

// SetReadDeadline makes Read fail with os.ErrDeadlineExceeded from t on; a
// zero t takes the deadline away.
func (s *Stream) SetReadDeadline(t time.Time) error {
	return s.setDeadline(&s.readBy, t, s.readable)
}

// SetWriteDeadline makes Write fail with os.ErrDeadlineExceeded from t on; a
// zero t takes the deadline away.
func (s *Stream) SetWriteDeadline(t time.Time) error {
	return s.setDeadline(&s.writeBy, t, s.writable)
}

func (s *Stream) setDeadline(d *deadline, t time.Time, waiter chan struct{}) error {
	s.link.mu.Lock()
	defer s.link.mu.Unlock()
	if s.closed {
		return net.ErrClosed
	}
	d.set(&s.link.mu, t, func() { wake(waiter) })
	wake(waiter)
	return nil
}
