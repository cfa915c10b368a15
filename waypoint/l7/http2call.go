package l7

import (
	"errors"
	"io"
	"net"

	"github.com/weft-mesh/weft/internal/http2"
	"github.com/weft-mesh/weft/waypoint/l7/h2"
	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

// maxInterim bounds the interim responses that wait to be passed on.
const maxInterim = 16

// http2Call is one exchange with an endpoint over HTTP/2.
type http2Call struct {
	flow  *http2Stream // takes what comes, if it flows; nil if a goroutine receives
	conn  *http2Conn
	s     *h2.Stream
	x     *Exchange
	in    inbox
	first bool // the connection has carried no exchange before
	last  bool // and will carry none after this one

	answered bool // the final head has come; of the reader's

	heads []http2Head // guarded by in.mu: that were not received yet
	text  []byte      // that the response points into
}

// An http2Head is the head of a response.
type http2Head struct {
	fields []http2.Field
	end    bool
}

// Fields implements h2.Sink.
func (c *http2Call) Fields(fields []http2.Field, end bool) error {
	if c.flow != nil {
		return c.flow.answer(fields, end)
	}
	if len(fields) == 0 || fields[0].Name != ":status" || len(fields[0].Value) != 3 {
		if !c.answered {
			return errNoStatus
		}
		c.in.trailers(fields)
		return nil
	}
	if fields[0].Value[0] != '1' {
		c.final(fields)
	}
	c.in.mu.Lock()
	tooMany := len(c.heads) > maxInterim
	c.heads = append(c.heads, http2Head{append([]http2.Field(nil), fields...), end})
	if end {
		c.in.done = true
	}
	c.in.mu.Unlock()
	c.in.come.Broadcast()
	if tooMany {
		return errInterim
	}
	return nil
}

// final notes that the final head has come.
func (c *http2Call) final(fields []http2.Field) {
	c.s.Answered()
	c.answered = true
	if !c.bodiless(fields[0].Value) {
		for _, f := range fields[1:] {
			if n, ok := h2.Length(f); ok {
				c.s.Expect(n)
			}
		}
	}
}

// Why an answer is refused.
var (
	errNoStatus = errors.New("a response without a status")
	errInterim  = errors.New("too many interim responses")
	errEnded    = errors.New("the call was ended here")
)

// bodiless reports whether a response has no body whatever its length says.
func (c *http2Call) bodiless(status string) bool {
	return string(c.x.Request.Method) == "HEAD" || status == "204" || status == "304"
}

// Data implements h2.Sink.
func (c *http2Call) Data(p []byte, end bool) {
	if c.flow != nil {
		c.flow.answerData(p, end)
		return
	}
	c.in.data(p, end)
}

// Reset implements h2.Sink.
func (c *http2Call) Reset(err error) {
	if err == io.EOF { // the rest of the request is of no interest; the answer is whole
		return
	}
	if c.flow != nil {
		c.flow.fail(callError(err))
		return
	}
	c.in.fail(callError(err))
}

// callError says what the end of a stream means.
func callError(err error) *tryError {
	var reset h2.ErrReset
	var broken *http2.StreamError
	var bad *http2.ConnError
	switch {
	case errors.Is(err, h2.ErrRefused):
		return &tryError{kind: failedRefused, cause: err}
	case errors.As(err, &reset):
		return &tryError{kind: failedReset, cause: err}
	case errors.As(err, &broken), errors.As(err, &bad):
		return &tryError{kind: failedProtocol, cause: err}
	}
	return &tryError{kind: failedClosed, cause: err}
}

// sent makes receive fail if the request could not be sent.
func (c *http2Call) sent(err error) error {
	if err == nil || err == io.EOF {
		return nil
	}
	f := callError(err)
	c.in.fail(f)
	return f
}

func (c *http2Call) send(h *msg.Head, piece []byte, end bool) error {
	// A request of gRPC ends in a DATA frame, be it empty: its protocol over
	// HTTP/2 wants that, and servers wait for it.
	last := end && len(piece) == 0 && !c.x.GRPC
	if err := c.s.Head(h, last); err != nil {
		return c.sent(err)
	}
	if c.last {
		c.conn.Drain()
	}
	switch {
	case last, len(piece) == 0 && !end:
		c.conn.FlushSoon()
		return nil
	case end:
		return c.sent(sendEnd(c.s, piece, nil))
	}
	return c.sent(sendPiece(c.s, piece))
}

func (c *http2Call) write(piece []byte) error { return c.sent(sendPiece(c.s, piece)) }

func (c *http2Call) finish(piece []byte, h *msg.Head) error {
	return c.sent(sendEnd(c.s, piece, h))
}

// receive implements call.
func (c *http2Call) receive(h *msg.Head) error {
	c.in.mu.Lock()
	for len(c.heads) == 0 && c.in.err == nil {
		c.in.come.Wait()
	}
	if len(c.heads) == 0 {
		defer c.in.mu.Unlock()
		return c.in.err
	}
	head := c.heads[0]
	c.heads = c.heads[1:]
	c.in.mu.Unlock()
	var err error
	c.text, err = h2.ReadResponse(h, c.text, head.fields, head.end, string(c.x.Request.Method) == "HEAD")
	if err != nil {
		return &tryError{kind: failedProtocol, cause: err}
	}
	return nil
}

func (c *http2Call) body() Body { return &c.in }

func (c *http2Call) abort() {
	f := &tryError{kind: failedOther, cause: errEnded}
	if st := c.flow; st != nil {
		// Who calls has locks.
		st.d.streams.Go(func() { st.fail(f) })
		return
	}
	c.in.fail(f)
	c.s.Reset(http2.Cancel)
	c.conn.FlushSoon()
}

// close implements call.
func (c *http2Call) close(bool) {
	c.s.Reset(http2.Cancel) // nothing, if both sides have ended it
	c.conn.FlushSoon()
}

func (c *http2Call) fresh() bool { return c.first }

func (c *http2Call) tunnel() net.Conn {
	return &streamConn{in: &c.in, s: c.s, local: c.conn.net.LocalAddr(), remote: c.conn.net.RemoteAddr()}
}
