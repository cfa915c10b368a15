package l7

import (
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/weft-mesh/weft/internal/http2"
	"github.com/weft-mesh/weft/waypoint/l7/h2"
	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

// An inbox holds what of a body has come on a stream, until somebody takes it.
// The stream's window bounds it.
type inbox struct {
	s *h2.Stream

	mu      sync.Mutex
	come    sync.Cond // on mu
	buf     []byte    // guarded by mu: has come
	taken   []byte    // guarded by mu: what Next has returned last
	owed    int       // guarded by mu: bytes of taken to be credited
	done    bool      // guarded by mu: nothing follows
	err     error     // guarded by mu
	trailer *msg.Head // guarded by mu
}

func (b *inbox) init(s *h2.Stream) {
	b.s = s
	b.come.L = &b.mu
}

// takeBuffer takes the memory of a body that nobody wants any more, unless it
// is large.
func (b *inbox) takeBuffer() []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	buf := b.buf[:0]
	b.buf = nil
	if cap(buf) > maxKeptBuffer {
		return nil
	}
	return buf
}

// maxKeptBuffer bounds the memory that waits for the next body.
const maxKeptBuffer = 4 << 10

// data takes a piece.
func (b *inbox) data(p []byte, end bool) {
	b.mu.Lock()
	b.buf = append(b.buf, p...)
	b.done = end
	b.mu.Unlock()
	b.come.Broadcast()
}

// trailers takes them, and with them the end.
func (b *inbox) trailers(fields []http2.Field) {
	h := &msg.Head{}
	h2.ReadTrailers(h, nil, fields)
	b.mu.Lock()
	b.trailer, b.done = h, true
	b.mu.Unlock()
	b.come.Broadcast()
}

// fail ends the body before its end.
func (b *inbox) fail(err error) {
	b.mu.Lock()
	if b.err == nil && !b.done {
		b.err = err
	}
	b.mu.Unlock()
	b.come.Broadcast()
}

// Ready implements Body.
func (b *inbox) Ready() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.buf) > 0 || b.done || b.err != nil
}

// Trailer implements Body.
func (b *inbox) Trailer() *msg.Head {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.trailer
}

// Next implements Body. What was returned before has left by now, so the sender
// may send as much again.
func (b *inbox) Next() ([]byte, error) {
	b.mu.Lock()
	owed := b.owed
	b.owed = 0
	if owed > 0 {
		b.mu.Unlock()
		b.s.Credit(owed)
		b.s.Conn().FlushSoon()
		b.mu.Lock()
	}
	defer b.mu.Unlock()
	for len(b.buf) == 0 && !b.done && b.err == nil {
		b.come.Wait()
	}
	switch {
	case len(b.buf) > 0:
		b.buf, b.taken = b.taken[:0], b.buf
		b.owed = len(b.taken)
		if b.done {
			return b.taken, io.EOF
		}
		return b.taken, nil
	case b.done:
		return nil, io.EOF
	}
	return nil, b.err
}

// whole waits for all of n bytes, and returns them.
func (b *inbox) whole(n int) ([]byte, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for !b.done && b.err == nil {
		b.come.Wait()
	}
	if !b.done {
		return nil, b.err
	}
	b.buf, b.taken = b.taken[:0], b.buf
	b.owed = len(b.taken)
	return b.taken, nil
}

// streamConn is a stream as a connection, after CONNECT.
type streamConn struct {
	in            *inbox
	s             *h2.Stream
	rest          []byte
	err           error
	local, remote net.Addr
}

// Read implements net.Conn.
func (c *streamConn) Read(p []byte) (int, error) {
	for len(c.rest) == 0 {
		if c.err != nil {
			return 0, c.err
		}
		c.rest, c.err = c.in.Next()
	}
	n := copy(p, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}

// Write implements net.Conn.
func (c *streamConn) Write(p []byte) (int, error) {
	if err := sendPiece(c.s, p); err != nil {
		return 0, err
	}
	return len(p), nil
}

// CloseWrite ends the direction.
func (c *streamConn) CloseWrite() error { return sendEnd(c.s, nil, nil) }

// Close implements net.Conn. What was not ended is cut.
func (c *streamConn) Close() error {
	c.in.fail(net.ErrClosed)
	c.s.Reset(http2.Cancel)
	c.s.Conn().FlushSoon()
	return nil
}

// Reset cuts the stream.
func (c *streamConn) Reset() { _ = c.Close() } // it does not fail

// LocalAddr implements net.Conn.
func (c *streamConn) LocalAddr() net.Addr { return c.local }

// RemoteAddr implements net.Conn.
func (c *streamConn) RemoteAddr() net.Addr { return c.remote }

// SetDeadline implements net.Conn, for deadlines that have passed: they cut the
// stream. Others are ignored.
func (c *streamConn) SetDeadline(t time.Time) error {
	if !t.IsZero() && !t.After(time.Now()) {
		c.in.fail(os.ErrDeadlineExceeded)
		c.s.Reset(http2.Cancel)
		c.s.Conn().FlushSoon()
	}
	return nil
}

// SetReadDeadline is SetDeadline for reads.
func (c *streamConn) SetReadDeadline(t time.Time) error {
	if !t.IsZero() && !t.After(time.Now()) {
		c.in.fail(os.ErrDeadlineExceeded)
	}
	return nil
}

// SetWriteDeadline is SetDeadline.
func (c *streamConn) SetWriteDeadline(t time.Time) error { return c.SetDeadline(t) }
