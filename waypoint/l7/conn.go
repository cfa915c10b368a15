package l7

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// A conn is the connection of a client, with what was read from it and is not
// used yet. It is read by one goroutine at a time.
type conn struct {
	net.Conn
	sock   *socket // Conn, nil if it is none
	e      *Engine
	facts  Facts
	memory memory

	buf  []byte // buf[r:w] is unread
	r, w int
	// buf[:pinned] is what the exchange's request points into.
	pinned int
	big    *[bigLen]byte // buf, if small is not
	// kept are earlier buffers that the exchange's request points into.
	kept []*[bigLen]byte

	// idle ends what takes too long: the wait for a request or for its head, and
	// an exchange in which nothing moves.
	idle    deadline
	given   atomic.Bool // somebody else closes the connection
	quietly atomic.Bool // no exchange is under way
	settled atomic.Bool // all of the request has been read
	runMu   sync.Mutex
	running *Exchange // guarded by runMu: that is under way, nil between two
	since   int64     // guarded by runMu: by the coarse clock
	lookAt  int64     // guarded by runMu: when to look whether the client is there
	// why is set when a deadline has passed or the engine is stopped.
	why atomic.Int32

	// unsent is the end of an answer, which the read of the next request sends;
	// onSent is called when it has gone.
	unsent []byte
	onSent func()

	small [smallLen]byte
}

// Why a connection was interrupted.
const (
	notInterrupted int32 = iota
	timedOut
	stopped
)

var (
	errTimedOut = errors.New("nothing came for too long")
	errStopped  = errors.New("the proxy is stopping")
)

func newConn(e *Engine, c net.Conn, facts Facts) *conn {
	cn := &conn{Conn: c, sock: newSocket(c), e: e, facts: facts}
	cn.buf = cn.small[:]
	cn.idle = deadline{clock: e.clock, passed: cn.tooSlow}
	return cn
}

// Read implements net.Conn.
func (c *conn) Read(p []byte) (int, error) {
	if c.sock == nil {
		return c.Conn.Read(p)
	}
	if out := c.unsent; out != nil {
		c.unsent = nil
		return c.sock.exchange(out, nil, p, c.onSent, nil)
	}
	return c.sock.Read(p)
}

// Write implements net.Conn.
func (c *conn) Write(p []byte) (int, error) {
	if c.sock != nil {
		return c.sock.Write(p)
	}
	return c.Conn.Write(p)
}

// flush sends what is unsent, if no read follows that does.
func (c *conn) flush() error {
	out := c.unsent
	if out == nil {
		return nil
	}
	c.unsent = nil
	_, err := c.sock.Write(out)
	c.onSent()
	return err
}

// tooSlow ends what waits for the client, and for the endpoint. An exchange whose
// response has begun ends with it, for the client may be what it waits for.
func (c *conn) tooSlow() {
	c.why.CompareAndSwap(notInterrupted, timedOut)
	c.runMu.Lock()
	begun := c.running != nil && c.running.work.replied.Load()
	c.runMu.Unlock()
	if begun {
		cut(c.Conn)
	} else {
		interrupt(c.Conn)
	}
	c.interruptRunning(streamIdle)
}

// unread returns what was read and is not used yet.
func (c *conn) unread() []byte { return c.buf[c.r:c.w] }

// fill reads more bytes behind the unread ones, which stay where they are if
// there is room for more and are moved to a larger buffer if not. It fails with
// io.ErrShortBuffer when the largest is full.
func (c *conn) fill() error {
	if c.r == c.w {
		c.r, c.w = c.pinned, c.pinned
	}
	if c.w == len(c.buf) {
		if err := c.grow(); err != nil {
			return err
		}
	}
	n, err := c.Read(c.buf[c.w:])
	c.w += n
	if n > 0 {
		return nil
	}
	return c.readError(err)
}

// readError says what an error of a read means.
func (c *conn) readError(err error) error {
	switch {
	case err == nil:
		return io.ErrNoProgress
	case c.why.Load() == timedOut:
		return errTimedOut
	case c.why.Load() == stopped:
		return errStopped
	}
	return err
}

// grow moves what is unread to a new buffer. The old one is kept until release:
// a head may point into it.
func (c *conn) grow() error {
	if c.r == 0 && len(c.buf) == bigLen {
		return io.ErrShortBuffer
	}
	next := bigPool.Get().(*[bigLen]byte)
	c.w = copy(next[:], c.unread())
	c.r, c.pinned = 0, 0
	if c.big != nil {
		c.kept = append(c.kept, c.big)
	}
	c.big, c.buf = next, next[:]
	return nil
}

// release gives back the buffers that no message needs any more, after an
// exchange. What is unread stays.
func (c *conn) release() {
	for _, b := range c.kept {
		bigPool.Put(b)
	}
	clear(c.kept)
	c.kept, c.pinned = c.kept[:0], 0
	to := c.buf
	if c.w-c.r <= smallLen {
		to = c.small[:]
	}
	c.w = copy(to, c.unread())
	c.r = 0
	if c.big != nil && len(to) == smallLen {
		bigPool.Put(c.big)
		c.big, c.buf = nil, to
	}
}

// pin keeps the first n unread bytes, which it uses up, until release.
func (c *conn) pin(n int) {
	c.r += n
	c.pinned = c.r
}

// need reads until n bytes are unread, in one piece.
func (c *conn) need(n int) error {
	if c.r+n > len(c.buf) {
		if err := c.grow(); err != nil {
			return err
		}
	}
	for c.w-c.r < n {
		if err := c.fill(); err != nil {
			return err
		}
	}
	return nil
}

// end gives back all buffers. Nothing may point into them any more.
func (c *conn) end() {
	c.r, c.w = 0, 0
	c.release()
}

// reset ends the connection so that the client sees an error, if it knows how.
func (c *conn) reset() {
	c.given.Store(true)
	reset(c.Conn)
}

func reset(c net.Conn) {
	if rs, ok := c.(interface{ Reset() }); ok {
		rs.Reset()
		return
	}
	if t, ok := c.(*net.TCPConn); ok {
		_ = t.SetLinger(0) // it fails on a closed one only
	}
	_ = c.Close() // as above
}

// CloseWrite ends the direction to the client, if the connection can.
func (c *conn) CloseWrite() error {
	if hc, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return hc.CloseWrite()
	}
	return nil
}

// A replay is a connection of which something was read before: that comes
// first.
type replay struct {
	net.Conn
	first []byte
}

// withUnread returns conn with first in front of what is read from it.
func withUnread(conn net.Conn, first []byte) net.Conn {
	if len(first) == 0 {
		return conn
	}
	return &replay{Conn: conn, first: append([]byte(nil), first...)}
}

// Read returns what was read before, then what comes.
func (r *replay) Read(p []byte) (int, error) {
	if len(r.first) > 0 {
		n := copy(p, r.first)
		r.first = r.first[n:]
		return n, nil
	}
	return r.Conn.Read(p)
}

// CloseWrite passes a half-close on.
func (r *replay) CloseWrite() error {
	if hc, ok := r.Conn.(interface{ CloseWrite() error }); ok {
		return hc.CloseWrite()
	}
	return nil
}

// Reset passes an abort on.
func (r *replay) Reset() { reset(r.Conn) }

// writeAll writes parts as one, if the connection can gather.
func writeAll(c net.Conn, scratch []byte, parts ...[]byte) error {
	n := 0
	for _, p := range parts {
		n += len(p)
	}
	if n <= cap(scratch) {
		scratch = scratch[:0]
		for _, p := range parts {
			scratch = append(scratch, p...)
		}
		_, err := c.Write(scratch)
		return err
	}
	if s, ok := c.(*socket); ok {
		if len(parts) == 2 {
			_, err := s.writeTwo(parts[0], parts[1])
			return err
		}
		c = s.TCPConn
	}
	if _, ok := c.(*net.TCPConn); ok {
		bufs := make(net.Buffers, 0, len(parts))
		bufs = append(bufs, parts...)
		_, err := bufs.WriteTo(c)
		return err
	}
	for _, p := range parts {
		if len(p) == 0 {
			continue
		}
		if _, err := c.Write(p); err != nil {
			return err
		}
	}
	return nil
}

// sniff waits until the client has said something, or until it has certainly
// left the first word to the server.
func (c *conn) sniff(enough func([]byte) bool, wait time.Duration) error {
	end := time.Now().Add(wait)
	if err := c.SetReadDeadline(end); err != nil {
		return err
	}
	for !enough(c.unread()) {
		if err := c.fill(); err != nil {
			if c.why.Load() == notInterrupted && isTimeout(err) {
				break
			}
			return err
		}
	}
	return c.SetReadDeadline(time.Time{})
}

func isTimeout(err error) bool {
	var t net.Error
	return errors.As(err, &t) && t.Timeout()
}
