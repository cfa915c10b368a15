package l7

import (
	"io"
	"net"
	"time"

	"github.com/weft-mesh/weft/waypoint/l7/h1"
	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

// http1Call is one connection to an endpoint, and the exchange that it carries.
type http1Call struct {
	pool *http1Pool
	conn net.Conn
	sock *socket // conn, nil if it is none
	// unsent is a request that the read of the answer sends, its head and its
	// body.
	unsent [2][]byte
	onSent func()        // putOut,
	onRoom func() []byte // and room
	parser h1.Parser
	way    way
	born   int64 // by the coarse clock
	since  int64 // idle since then
	used   int   // exchanges so far

	x       *Exchange
	outBuf  *[bufLen]byte
	chunked bool // the request's body
	bodied  bool // there is a body

	buf  []byte // buf[r:w] is unread
	r, w int
	// inBuf is the buffer that buf is part of at first; bigBuf the one of
	// larger heads and bodies. The response's head points into the first.
	inBuf  *[bufLen]byte
	bigBuf *[bigLen]byte
	// pinned is where the head ends, if it is in bigBuf.
	pinned int
	in     http1Answer
}

// usable reports whether an idle connection can carry another exchange: it is
// not closed, and its peer has said nothing since the last one. A response that
// nobody has asked for would be taken for the answer to the next request.
func (c *http1Call) usable(p *http1Pool) bool {
	if c.pool.ep.cluster.tooOld(c) {
		return false
	}
	if c.sock == nil {
		return c.usablePiped()
	}
	return c.sock.silent()
}

// usablePiped is usable for what has no descriptor, such as the streams of a
// tunnel.
func (c *http1Call) usablePiped() bool {
	if s, ok := c.conn.(interface{ Quiet() bool }); ok {
		return s.Quiet()
	}
	return true
}

// begin prepares for an exchange.
func (c *http1Call) begin(x *Exchange) {
	c.x = x
	c.used++
	c.chunked, c.bodied = false, false
}

func (c *http1Call) fresh() bool { return c.used == 1 }

func (c *http1Call) out() []byte {
	if c.outBuf == nil {
		c.outBuf = bufPool.Get().(*[bufLen]byte)
	}
	return c.outBuf[:0]
}

func (c *http1Call) putOut() {
	if c.outBuf != nil {
		bufPool.Put(c.outBuf)
		c.outBuf = nil
	}
}

func (c *http1Call) send(h *msg.Head, piece []byte, end bool) error {
	c.bodied = h.Body != msg.NoBody
	c.chunked = h.Body == msg.Streamed
	out := h1.AppendRequest(c.out(), h)
	if !c.chunked {
		if len(out)+len(piece) <= cap(out) {
			out, piece = append(out, piece...), nil
		}
		if end && c.sock != nil {
			c.unsent = [2][]byte{out, piece}
			return nil
		}
		if len(piece) == 0 {
			_, err := c.conn.Write(out)
			return err
		}
		return writeAll(c.conn, nil, out, piece)
	}
	if len(out)+len(piece)+32 <= cap(out) {
		out = h1.AppendChunk(out, piece)
		if end {
			out = h1.AppendLastChunk(out, nil)
		}
		_, err := c.conn.Write(out)
		return err
	}
	if _, err := c.conn.Write(out); err != nil {
		return err
	}
	if end {
		return c.finish(piece, nil)
	}
	return c.write(piece)
}

func (c *http1Call) write(piece []byte) error {
	if len(piece) == 0 {
		return nil
	}
	if !c.chunked {
		_, err := c.conn.Write(piece)
		return err
	}
	size := h1.AppendChunkSize(c.out(), len(piece))
	if len(size)+len(piece)+2 <= cap(size) {
		_, err := c.conn.Write(append(append(size, piece...), "\r\n"...))
		return err
	}
	return writeAll(c.conn, nil, size, piece, crlf)
}

func (c *http1Call) finish(piece []byte, h *msg.Head) error {
	defer c.putOut()
	if !c.chunked {
		if len(piece) == 0 {
			return nil
		}
		_, err := c.conn.Write(piece)
		return err
	}
	out := c.out()
	if len(piece)+32 > cap(out) {
		if err := c.write(piece); err != nil {
			return err
		}
		piece = nil
	}
	_, err := c.conn.Write(h1.AppendLastChunk(h1.AppendChunk(out, piece), h))
	return err
}

// receive implements call.
func (c *http1Call) receive(h *msg.Head) error {
	if c.buf == nil && c.unsent[0] == nil {
		c.room()
	}
	for {
		if c.w > c.r {
			n, err := c.parser.Response(h, c.buf[c.r:c.w], c.x.Request.Method)
			if err != nil {
				return &tryError{kind: failedProtocol, cause: err}
			}
			if n > 0 {
				c.r += n
				if c.bigBuf != nil {
					c.pinned = c.r
				}
				c.in.reset(c, h)
				return nil
			}
		}
		if c.buf != nil && c.w == len(c.buf) {
			c.larger()
		}
		n, err := c.read()
		c.w += n
		if n == 0 && err != nil {
			if err == io.EOF && c.w > c.r {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
	}
}

// read reads from the connection, after it has sent what is unsent.
func (c *http1Call) read() (int, error) {
	if c.unsent[0] == nil {
		return c.conn.Read(c.buf[c.w:])
	}
	out := c.unsent
	c.unsent = [2][]byte{}
	if c.buf != nil {
		return c.sock.exchange(out[0], out[1], c.buf[c.w:], c.onSent, nil)
	}
	return c.sock.exchange(out[0], out[1], nil, c.onSent, c.onRoom)
}

// room makes room for the head of an answer.
func (c *http1Call) room() []byte {
	c.inBuf = bufPool.Get().(*[bufLen]byte)
	c.buf, c.r, c.w = c.inBuf[:], 0, 0
	return c.buf
}

// larger moves a head that is not whole to a large buffer. The parser has
// refused it before that one is full.
func (c *http1Call) larger() {
	if c.bigBuf == nil {
		c.bigBuf = bigPool.Get().(*[bigLen]byte)
	}
	c.w = copy(c.bigBuf[:], c.buf[c.r:c.w])
	c.r = 0
	c.buf = c.bigBuf[:]
}

func (c *http1Call) body() Body { return &c.in }

// abort makes reads and writes return. The connection is closed by close.
func (c *http1Call) abort() { cut(c.conn) }

// close implements call.
func (c *http1Call) close(whole bool) {
	whole = whole && c.in.done && !c.parser.Close && c.r == c.w
	c.drop()
	if !whole || c.pool.ep.cluster.tooOld(c) {
		c.end()
		return
	}
	c.pool.put(c)
}

// drop gives the buffers back.
func (c *http1Call) drop() {
	c.putOut()
	c.x, c.unsent = nil, [2][]byte{}
	c.buf, c.r, c.w, c.pinned = nil, 0, 0, 0
	if c.inBuf != nil {
		bufPool.Put(c.inBuf)
		c.inBuf = nil
	}
	if c.bigBuf != nil {
		bigPool.Put(c.bigBuf)
		c.bigBuf = nil
	}
	c.in = http1Answer{}
}

// end closes the connection.
func (c *http1Call) end() {
	c.pool.ep.cluster.disconnected()
	_ = c.conn.Close() // nothing of interest is left in it
}

func (c *http1Call) tunnel() net.Conn {
	conn := c.conn
	if c.sock != nil {
		conn = c.sock.TCPConn // which is relayed within the kernel
	}
	conn = withUnread(conn, c.buf[c.r:c.w])
	c.drop()
	c.pool.ep.cluster.disconnected()
	return conn
}

// http1Answer is the body of a response of HTTP/1.
type http1Answer struct {
	c          *http1Call
	kind       msg.BodyKind
	left       int64
	untilClose bool
	chunks     h1.Chunks
	done       bool
	err        error
}

func (b *http1Answer) reset(c *http1Call, h *msg.Head) {
	*b = http1Answer{c: c, kind: h.Body, left: h.Length, untilClose: c.parser.UntilClose, done: h.Body == msg.NoBody}
}

// Ready reports whether something is there.
func (b *http1Answer) Ready() bool { return b.done || b.err != nil || b.c.r < b.c.w }

// Trailer returns what came after the last chunk.
func (b *http1Answer) Trailer() *msg.Head { return b.chunks.Trailer() }

// Next implements Body.
func (b *http1Answer) Next() ([]byte, error) {
	for {
		switch {
		case b.err != nil:
			return nil, b.err
		case b.done:
			return nil, io.EOF
		}
		c := b.c
		if c.r == c.w {
			if err := b.more(); err != nil {
				return nil, err
			}
		}
		if b.untilClose {
			piece := c.buf[c.r:c.w]
			c.r = c.w
			return piece, nil
		}
		piece, used, err := decode(b.kind, &b.left, &b.chunks, c.buf[c.r:c.w])
		c.r += used
		switch {
		case err == io.EOF:
			b.done = true
		case err != nil:
			b.err = &tryError{kind: failedProtocol, cause: err}
			err = nil
		}
		if len(piece) > 0 {
			return piece, err
		}
	}
}

// more reads into a large buffer, except where the end is near.
func (b *http1Answer) more() error {
	c := b.c
	// A small rest goes behind the head in its buffer.
	if b.kind != msg.Sized || b.left > int64(len(c.buf)-c.w) {
		if c.bigBuf == nil {
			c.bigBuf = bigPool.Get().(*[bigLen]byte)
			c.buf = c.bigBuf[:]
		}
		c.r, c.w = c.pinned, c.pinned
	}
	n, err := c.conn.Read(c.buf[c.w:])
	c.w += n
	switch {
	case n > 0:
		return nil
	case err == io.EOF && b.untilClose:
		b.done = true
		return io.EOF
	case err == io.EOF:
		err = io.ErrUnexpectedEOF
	case err == nil:
		err = io.ErrNoProgress
	}
	b.err = err
	return err
}

// tooOld reports whether the policy ends the connection's life.
func (c *cluster) tooOld(h *http1Call) bool {
	p := &c.policy.Load().Connections
	if p.MaxRequestsPerConn > 0 && h.used >= int(p.MaxRequestsPerConn) {
		return true
	}
	return p.MaxDuration > 0 && time.Duration(h.pool.e.clock.now.Load()-h.born) > time.Duration(p.MaxDuration)
}
