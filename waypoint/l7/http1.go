package l7

import (
	"context"
	"errors"
	"io"
	"net"
	"sync/atomic"

	"github.com/weft-mesh/weft/waypoint/l7/h1"
	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

// serveHTTP1 serves the requests of one HTTP/1 connection, one after the other:
// a pipelined one is read when the one before it is answered.
func (e *Engine) serveHTTP1(ctx context.Context, c *conn) error {
	d := &http1{conn: c}
	c.onSent = d.putOut
	d.parser.Limits = h1.Limits{Head: e.limits.HeadBytes, Fields: e.limits.HeadFields, Target: e.limits.TargetBytes}
	defer c.end()
	defer d.flush() // the client finds out what became of it
	for {
		if err := d.awaitByte(); err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, errTimedOut) {
				return nil // between two requests anybody may leave
			}
			return err
		}
		x := e.newExchange(ctx, &c.facts, &c.memory)
		keep, err := d.one(x)
		c.run(nil)
		e.putExchange(x)
		if !keep || err != nil {
			return err
		}
		c.release()
	}
}

// http1 is the client's side of the exchanges of one HTTP/1 connection.
type http1 struct {
	*conn
	parser h1.Parser
	reader h1.Reader
	in     http1Body
	x      *Exchange
	// out is what is to be written, in a buffer that is held while it is used.
	outBuf *[bufLen]byte

	chunked bool // the response's body
	served  int
	informs atomic.Bool // 100 (Continue) is due
}

// awaitByte waits for the first byte of a request, in the small buffer. While
// the engine drains it does not wait for ever.
func (d *http1) awaitByte() error {
	if d.r < d.w {
		return d.flush()
	}
	d.idle.set(d.e.limits.Idle)
	d.e.quiet(d.conn)
	err := d.fill()
	d.e.unquiet(d.conn)
	d.idle.clear()
	return err
}

// one serves one request. It returns false if the connection cannot carry
// another one.
func (d *http1) one(x *Exchange) (keep bool, err error) {
	d.x = x
	d.idle.set(d.e.limits.HeadWait)
	n, err := d.head(x)
	d.idle.clear()
	if err != nil {
		return false, d.refuse(x, err)
	}
	d.pin(n)
	x.RequestHeadBytes = int64(n)
	x.Version = HTTP10 + Version(d.parser.Minor)
	d.served++
	d.reader = h1.Reader{Minor: d.parser.Minor, Bodiless: string(x.Request.Method) == "HEAD"}
	d.in.reset(d, &x.Request)
	d.informs.Store(d.parser.Continue && x.Request.Body != msg.NoBody)
	x.idle = &d.idle
	d.run(x)
	x.moved()
	last := d.parser.Close || d.e.limits.Requests > 0 && d.served >= d.e.limits.Requests
	keep = d.e.exchange(x, d, last)
	d.idle.clear()
	return keep && !d.given.Load() && d.in.done, nil
}

// head reads the head of a request.
func (d *http1) head(x *Exchange) (int, error) {
	for {
		n, err := d.parser.Request(&x.Request, d.unread())
		if n > 0 || err != nil {
			return n, err
		}
		if err := d.fill(); err != nil {
			return 0, err
		}
	}
}

// refuse answers what is not a request, or not all of one, and closes.
func (d *http1) refuse(x *Exchange, err error) error {
	d.reader = h1.Reader{Minor: 1, Close: true}
	x.Version = HTTP11
	var syntax *h1.Error
	switch {
	case errors.As(err, &syntax):
		// What was parsed of the head is not to be believed, nor logged.
		x.Request.Reset()
		d.e.reject(x, d, syntax.Status, FlagDownstreamProtocol, "http1.codec_error", syntax.Reason)
		return nil
	case errors.Is(err, errTimedOut):
		x.Request.Reset()
		d.e.reject(x, d, 408, FlagIdle, "request_header_timeout", "the head of the request did not come in time")
		return nil
	case errors.Is(err, io.EOF):
		return nil
	}
	return err
}

// out returns an empty buffer to write from.
func (d *http1) out() []byte {
	if d.outBuf == nil {
		d.outBuf = bufPool.Get().(*[bufLen]byte)
	}
	return d.outBuf[:0]
}

// putOut gives the buffer back.
func (d *http1) putOut() {
	if d.outBuf != nil {
		bufPool.Put(d.outBuf)
		d.outBuf = nil
	}
}

func (d *http1) body() Body { return &d.in }

func (d *http1) inform(h *msg.Head) error {
	if d.reader.Minor == 0 {
		return nil // HTTP/1.0 has no interim responses
	}
	defer d.putOut()
	_, err := d.Write(h1.AppendResponse(d.out(), h, h1.Reader{Minor: 1}))
	return err
}

func (d *http1) respond(x *Exchange, piece []byte, end, closing bool) error {
	h := &x.Response
	d.informs.Store(false)
	if !closing && !d.in.done && x.work.upload == nil && !d.in.drain() {
		closing = true // what is left of the request would be read as the next one
	}
	if string(x.Request.Method) == "CONNECT" && h.Status/100 == 2 {
		d.reader.Bodiless = true
	}
	d.chunked = d.reader.Chunked(h)
	// Without chunks the end of a streamed body is that of the connection. And
	// if the client still sends, it has to be told that nobody listens.
	d.reader.Close = closing || h.Body == msg.Streamed && !d.chunked
	out := h1.AppendResponse(d.out(), h, d.reader)
	x.ResponseHeadBytes = int64(len(out))
	if end {
		defer d.written()
	}
	if !d.chunked {
		if end && len(out)+len(piece) <= cap(out) {
			return d.last(append(out, piece...))
		}
		return d.writeTwo(out, piece)
	}
	if len(out)+len(piece)+32 > cap(out) || end && x.Trailer != nil {
		if _, err := d.Write(out); err != nil {
			return err
		}
		if end {
			return d.finish(piece, x.Trailer)
		}
		return d.write(piece)
	}
	out = h1.AppendChunk(out, piece)
	if end {
		return d.last(h1.AppendLastChunk(out, nil))
	}
	_, err := d.Write(out)
	return err
}

// last writes the end of an answer, which is in the buffer. If the connection
// goes on, the read of the next request sends it: see socket.exchange.
func (d *http1) last(out []byte) error {
	if d.sock != nil && !d.reader.Close && d.settled.Load() {
		d.unsent = out
		return nil
	}
	_, err := d.Write(out)
	return err
}

// written gives the buffer back unless the end of the answer waits in it.
func (d *http1) written() {
	if d.unsent == nil {
		d.putOut()
	}
}

// writeTwo writes out, which is in the buffer, and piece, in one if they fit.
func (d *http1) writeTwo(out, piece []byte) error {
	if len(piece) == 0 || len(out)+len(piece) <= cap(out) {
		_, err := d.Write(append(out, piece...))
		return err
	}
	if d.sock != nil {
		_, err := d.sock.writeTwo(out, piece)
		return err
	}
	return writeAll(d.Conn, nil, out, piece)
}

func (d *http1) write(piece []byte) error {
	if len(piece) == 0 {
		return nil
	}
	if !d.chunked {
		_, err := d.Write(piece)
		return err
	}
	size := h1.AppendChunkSize(d.out(), len(piece))
	if len(size)+len(piece)+2 <= cap(size) {
		_, err := d.Write(append(append(size, piece...), "\r\n"...))
		return err
	}
	return writeAll(d.Conn, nil, size, piece, crlf)
}

// crlf is read only.
var crlf = []byte("\r\n")

func (d *http1) finish(piece []byte, h *msg.Head) error {
	defer d.written()
	if !d.chunked {
		if len(piece) == 0 {
			return nil
		}
		_, err := d.Write(piece)
		return err
	}
	out := d.out()
	if len(piece)+32 > cap(out) {
		if err := d.write(piece); err != nil {
			return err
		}
		piece = nil
	}
	return d.last(h1.AppendLastChunk(h1.AppendChunk(out, piece), h))
}

func (d *http1) stop() { interrupt(d.Conn) }

func (d *http1) abort() { d.reset() }

func (d *http1) tunnel() net.Conn {
	d.given.Store(true)
	_ = d.flush() // whoever reads from the connection finds out
	conn := withUnread(d.Conn, d.unread())
	d.r = d.w
	return conn
}
