package hbone

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync"
	"time"

	"github.com/weft-mesh/weft/hbone/record"
	"github.com/weft-mesh/weft/internal/http2"
	"github.com/weft-mesh/weft/mesh"
)

const (
	// outLimit bounds what waits for the tunnel's socket. Streams that have
	// more to send take turns.
	outLimit = 256 << 10
	// turn is what a waiting stream may add at once.
	turn = 64 << 10
	// flushPatience is how long a peer may take to read our last words.
	flushPatience = time.Second
	// partPatience is how long a peer may take to read the last bytes of a tunnel
	// that ends in order.
	partPatience = 5 * time.Second
)

// A link drives one Tunnel over a connection: run reads, one goroutine writes
// all that is queued at once, and a timer keeps the peer honest. Streams and
// pool call it from any goroutine.
type link struct {
	conn   *record.Conn
	peer   mesh.Identity
	now    func() time.Time
	handle func(id uint32, authority string, h Header) // server: called with mu held
	// patience is partPatience; tests on a busy machine have more.
	patience time.Duration
	idle     time.Duration // client: unused for so long, it ends; 0 is never
	proof    time.Time     // until when the peer's certificate is good; guarded by mu

	deaf chan struct{} // closed when nothing is read any more
	kick chan struct{} // tells the writer to look
	done chan struct{} // closed when the link has ended

	mu      sync.Mutex
	tunnel  *Tunnel
	streams map[uint32]*Stream
	waiting []*Stream // with data that did not fit; they take turns
	spare   []byte
	taken   uint64 // bytes that the writer has taken
	timer   *time.Timer
	timerAt time.Time
	unused  time.Time // since when there is no stream
	ended   bool
	flush   bool  // the writer sends what is queued before it closes
	err     error // why it ended; nil when it was in order
	// writeErr is why nothing can be written any more. The link ends when the
	// reader has heard what else there is.
	writeErr error
}

func newLink(conn *record.Conn, peer mesh.Identity, role Role, l Limits) (*link, error) {
	now := time.Now()
	t, err := NewTunnel(role, l, now)
	if err != nil {
		return nil, err
	}
	k := &link{
		conn: conn, peer: peer, now: time.Now,
		deaf: make(chan struct{}), kick: make(chan struct{}, 1), done: make(chan struct{}),
		tunnel: t, streams: make(map[uint32]*Stream), unused: now, patience: partPatience,
	}
	if chain := conn.ConnectionState().PeerCertificates; len(chain) > 0 {
		k.proof = chain[0].NotAfter
	}
	return k, nil
}

// run drives the link until it ends, closes the connection and returns why:
// nil if the peer closed an unused tunnel or the end was asked for.
func (l *link) run() error {
	var wg sync.WaitGroup
	wg.Go(l.writeLoop)
	l.mu.Lock()
	l.arm()
	l.mu.Unlock()
	l.readLoop()
	close(l.deaf)
	wg.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// readLoop feeds the tunnel until the link ends, and if that was in order until the
// peer ends it as well.
func (l *link) readLoop() {
	for {
		p, readErr := l.conn.Next()
		l.mu.Lock()
		if l.ended {
			parting := l.parting()
			l.mu.Unlock()
			if readErr != nil || !parting {
				return
			}
			continue
		}
		if len(p) > 0 {
			if err := l.tunnel.Receive(l.now(), p, l); err != nil {
				l.end(err, true)
			} else {
				l.settle()
			}
		}
		if readErr != nil {
			l.endRead(readErr)
		}
		ended := l.ended && !l.parting()
		l.mu.Unlock()
		if ended || readErr != nil {
			return
		}
	}
}

// parting reports whether the link has ended in order: then the last bytes of its
// streams may still be on their way. The caller holds mu.
func (l *link) parting() bool { return l.flush && l.err == nil && l.writeErr == nil }

// part says the last word, and waits for the peer's: what that sends to a socket
// that is closed resets the connection (RFC 1122 4.2.2.13), which takes from the
// peer what it has not received.
func (l *link) part() {
	if l.conn.CloseWrite() != nil {
		return
	}
	// A failure means that the connection is closed already.
	_ = l.conn.SetReadDeadline(time.Now().Add(l.patience))
	<-l.deaf
}

// endRead ends the link because nothing more can be read. The caller holds mu.
func (l *link) endRead(err error) {
	var alert tls.AlertError
	cutOff := !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) || l.tunnel.Streams() > 0
	switch {
	case errors.As(err, &alert):
		l.end(fmt.Errorf("the peer ended the tunnel: %w", err), false)
	case l.writeErr != nil:
		l.end(fmt.Errorf("write to the tunnel: %w", l.writeErr), false)
	case cutOff:
		l.end(fmt.Errorf("read from the tunnel: %w", err), false)
	default:
		l.end(nil, false)
	}
}

// writeLoop sends what is queued, as much at once as there is, until the link
// ends. It closes the connection.
func (l *link) writeLoop() {
	for {
		l.mu.Lock()
		l.fill()
		ended, parting := l.ended, l.ended && l.parting()
		var out []byte
		if len(l.tunnel.Output()) > 0 && (!ended || l.flush) {
			out = l.tunnel.TakeOutput(l.spare)
			l.spare = nil
			l.taken += uint64(len(out))
		}
		l.mu.Unlock()
		if len(out) > 0 {
			_, err := l.conn.Write(out)
			l.mu.Lock()
			l.spare = out[:0]
			if err != nil {
				l.writeErr, parting = err, false
			}
			l.mu.Unlock()
			if err != nil && !ended {
				// The peer may have said why, and the reader is about to hear
				// it: with TLS 1.3 that is how a refused certificate shows.
				_ = l.conn.SetReadDeadline(time.Now().Add(flushPatience))
				<-l.done
				continue
			}
		}
		if parting {
			l.part()
		}
		if ended {
			// Closing again what end has closed is harmless, and a write that
			// fails now is of no interest to anyone.
			_ = l.conn.Close()
			return
		}
		if len(out) == 0 {
			<-l.kick
			// What goroutines have to say that are ready to run goes with the same
			// write, and in the same records.
			runtime.Gosched()
		}
	}
}

// fill lets the waiting streams add to the output in turn.
func (l *link) fill() {
	for len(l.waiting) > 0 && len(l.tunnel.Output()) < outLimit {
		s := l.waiting[0]
		l.waiting[0] = nil
		if l.waiting = l.waiting[1:]; len(l.waiting) == 0 {
			l.waiting = nil
		}
		s.inLine = false
		n := l.tunnel.Send(s.id, s.pending[:min(len(s.pending), turn)], false)
		s.pending = s.pending[n:]
		switch {
		case len(s.pending) == 0:
			wake(s.writable)
		case n > 0:
			l.enqueue(s)
		} // or else it has no window, and Writable puts it back
	}
}

// enqueue puts a stream with pending data in line.
func (l *link) enqueue(s *Stream) {
	if !s.inLine && len(s.pending) > 0 {
		s.inLine = true
		l.waiting = append(l.waiting, s)
	}
}

// settle does what any change of the tunnel may have made due. The caller
// holds mu.
func (l *link) settle() {
	if l.ended {
		return
	}
	switch n := l.tunnel.Streams(); {
	case n > 0:
		l.unused = time.Time{}
	case l.unused.IsZero():
		l.unused = l.now()
	}
	if l.tunnel.Finished() {
		l.end(nil, true)
		return
	}
	if len(l.tunnel.Output()) > 0 || len(l.waiting) > 0 {
		wake(l.kick)
	}
	l.arm()
}

// arm sets the timer for what the tunnel, or its being unused, makes due next.
// The caller holds mu.
func (l *link) arm() {
	if l.ended {
		return
	}
	at := l.tunnel.Deadline()
	if l.idle > 0 && !l.unused.IsZero() {
		at = earlier(at, l.unused.Add(l.idle))
	}
	if !l.proof.IsZero() {
		at = earlier(at, l.proof)
	}
	switch {
	case at.Equal(l.timerAt):
	case l.timer == nil:
		l.timer = time.AfterFunc(at.Sub(l.now()), l.tick)
	default:
		l.timer.Reset(at.Sub(l.now()))
	}
	l.timerAt = at
}

// tick runs when the timer fires.
func (l *link) tick() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended {
		return
	}
	now := l.now()
	l.timerAt = time.Time{}
	if err := l.tunnel.Tick(now); err != nil {
		l.end(err, true)
		return
	}
	if l.idle > 0 && !l.unused.IsZero() && now.Sub(l.unused) >= l.idle {
		l.tunnel.Shutdown(now)
	}
	if !l.proof.IsZero() && !now.Before(l.proof) {
		// Who the peer is has been proved until now. What is open goes on;
		// what is new needs a new proof.
		l.proof = time.Time{}
		l.tunnel.Shutdown(now)
	}
	if !l.unused.IsZero() {
		l.spare = nil // it may have grown with a load that is over
	}
	l.settle()
}

// shutdown begins a graceful end.
func (l *link) shutdown() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.ended {
		l.tunnel.Shutdown(l.now())
		l.settle()
	}
}

// abort ends the link now.
func (l *link) abort(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.end(err, false)
	_ = l.conn.NetConn().Close() // also of one that parts
}

// end ends the link and all its streams. With flush the writer still sends
// what is queued, for as long as flushPatience. The caller holds mu.
func (l *link) end(err error, flush bool) {
	if l.ended {
		return
	}
	l.ended, l.err, l.flush = true, err, flush
	l.tunnel.Close()
	if l.timer != nil {
		l.timer.Stop()
	}
	cause := err
	if cause == nil {
		cause = errTunnelEnded
	}
	for id, s := range l.streams {
		// What the writer has not taken, and will not take any more, the peer
		// has never seen.
		s.abort(cause, !flush && s.headEnd > l.taken)
		delete(l.streams, id)
	}
	l.waiting = nil
	close(l.done)
	wake(l.kick)
	if flush {
		// A failure means that the connection is closed already.
		patience := flushPatience
		if l.parting() {
			patience = l.patience
		}
		_ = l.conn.SetWriteDeadline(time.Now().Add(patience))
		return
	}
	_ = l.conn.NetConn().Close()
}

// connect asks for a connection, and waits for the answer or the end of ctx.
// The error is ErrDraining or ErrStreamLimit if the link takes no stream, a
// *StatusError if the peer refused, or an *abortError.
func (l *link) connect(ctx context.Context, authority string, h Header) (*Stream, error) {
	l.mu.Lock()
	if l.ended {
		l.mu.Unlock()
		return nil, ErrDraining
	}
	id, err := l.tunnel.Connect(authority, h)
	if err != nil {
		l.mu.Unlock()
		return nil, err
	}
	s := newStream(l, id)
	s.answer = make(chan struct{})
	s.headEnd = l.taken + uint64(len(l.tunnel.Output()))
	l.streams[id] = s
	l.settle()
	l.mu.Unlock()

	select {
	case <-s.answer:
	case <-ctx.Done():
		s.Reset()
		return nil, context.Cause(ctx)
	}
	if s.openErr != nil {
		return nil, s.openErr
	}
	if s.status/100 != 2 {
		return nil, &StatusError{Code: s.status}
	}
	return s, nil
}

// Requested, Answered, Data, Ended, Aborted and Writable are the Events of the
// tunnel. They are called with mu held.

// Requested hands a request to the server.
func (l *link) Requested(id uint32, authority string, h Header) { l.handle(id, authority, h) }

// Answered ends the wait of connect.
func (l *link) Answered(id uint32, status int, _ Header) {
	s := l.streams[id]
	if s == nil {
		return
	}
	s.status = status
	if status/100 != 2 {
		delete(l.streams, id)
	}
	close(s.answer)
	s.isAnswered = true
}

// Data queues p for the stream's reader.
func (l *link) Data(id uint32, p []byte) {
	s := l.streams[id]
	if s == nil || s.readClosed {
		l.tunnel.Consumed(id, len(p))
		return
	}
	s.queue.write(p)
	wake(s.readable)
}

// Ended tells the stream's reader.
func (l *link) Ended(id uint32) {
	s := l.streams[id]
	if s == nil {
		return
	}
	s.gotEnd = true
	if s.readErr == nil {
		s.readErr = io.EOF
	}
	wake(s.readable)
	if s.sentEnd {
		delete(l.streams, id)
	}
}

// Aborted tells the stream's reader, writer and owner. A server that is done
// with us resets the stream with NO_ERROR, but ends its direction before
// (RFC 9113 8.1); without that end it has cut us short.
func (l *link) Aborted(id uint32, err *http2.StreamError, refused bool) {
	s := l.streams[id]
	if s == nil {
		return
	}
	delete(l.streams, id)
	s.abort(err, refused)
}

// Writable puts streams that waited for window back in line.
func (l *link) Writable(id uint32) {
	if id != 0 {
		if s := l.streams[id]; s != nil {
			l.enqueue(s)
		}
		return
	}
	for _, s := range l.streams {
		l.enqueue(s)
	}
}

// wake signals c, which has room for one signal and one waiter.
func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
