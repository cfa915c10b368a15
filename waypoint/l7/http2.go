package l7

import (
	"context"
	"errors"
	"net"
	"sync"

	"github.com/weft-mesh/weft/internal/http2"
	"github.com/weft-mesh/weft/waypoint/l7/h2"
	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

// serveHTTP2 serves the requests of one HTTP/2 connection, each in a goroutine
// of its own.
func (e *Engine) serveHTTP2(ctx context.Context, c *conn) error {
	d := &http2Server{conn: c, ctx: ctx}
	d.h2 = h2.New(c.Conn, h2.Config{Server: true, Accept: d.accept, List: e.limits.HeadBytes})
	d.rest()
	err := d.h2.Run(c.unread())
	d.streams.Wait()
	e.unquiet(c)
	c.idle.clear()
	c.end()
	switch {
	case c.why.Load() == timedOut:
		return nil // nothing was asked for long
	case c.why.Load() == stopped:
		return errStopped
	}
	return err
}

// http2Server is the client's side of the exchanges of one HTTP/2 connection.
type http2Server struct {
	*conn
	ctx     context.Context
	h2      *h2.Conn
	streams sync.WaitGroup

	mu     sync.Mutex
	busy   int // guarded by mu: streams that run
	served int // guarded by mu
}

// rest notes that the connection has nothing to do.
func (d *http2Server) rest() {
	d.idle.set(d.e.limits.Idle)
	d.e.quiet(d.conn)
}

// begin counts a stream, and end counts it back.
func (d *http2Server) begin() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.busy++; d.busy == 1 {
		d.e.unquiet(d.conn)
		d.idle.clear()
	}
	d.served++
	if limit := d.e.limits.Requests; d.served == limit || d.e.draining.Load() {
		d.h2.Drain()
	}
}

func (d *http2Server) end() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.busy--; d.busy == 0 {
		d.rest()
	}
}

// accept begins an exchange.
func (d *http2Server) accept(s *h2.Stream, fields []http2.Field, end, tooLarge bool) (h2.Sink, error) {
	e := d.e
	st := &http2Stream{d: d, s: s, room: roomPool.Get().(*http2Room)}
	st.in.init(s)
	st.in.buf = st.room.body
	x := e.newExchange(d.ctx, &d.facts, &d.memory)
	st.x = x
	x.Version = HTTP2
	status := 0
	if tooLarge {
		x.Request.Reset()
		status = 431
	} else {
		var err error
		if st.room.request, err = h2.ReadRequest(&x.Request, st.room.request, fields, end); err != nil {
			e.putExchange(x)
			roomPool.Put(st.room)
			return nil, err
		}
		status = d.tooMuch(x)
	}
	if x.Request.Length >= 0 {
		s.Expect(x.Request.Length)
	}
	x.RequestHeadBytes = int64(len(x.Request.Lines))
	if end {
		st.in.data(nil, true)
	}
	if x.Request.Body != msg.NoBody {
		st.informs = msg.EqualFold(x.Request.Get(msg.Expect), "100-continue")
	}
	x.Request.RemoveID(msg.Expect)
	st.idle = deadline{clock: e.clock, passed: st.silent}
	x.idle = &st.idle
	d.begin()
	d.streams.Add(1)
	e.clock.watch(&st.idle)
	x.moved()
	if status != 0 || !st.begin(end) {
		go st.run(status)
	}
	return st, nil
}

// tooMuch returns the status for a head over the limits, 0 if it is not.
func (d *http2Server) tooMuch(x *Exchange) int {
	switch l := &d.e.limits; {
	case len(x.Request.Path) > l.TargetBytes:
		return 414
	case len(x.Request.Fields) > l.HeadFields:
		return 431
	}
	return 0
}

// http2Stream is the client's side of one exchange over HTTP/2.
//
// An exchange with an endpoint over HTTP/2 flows, if nothing in it has to wait:
// it has no goroutine, and the goroutines that read the two connections move
// what comes from one to the other. As soon as something has to wait, or goes
// wrong, a goroutine takes it over.
type http2Stream struct {
	d       *http2Server
	s       *h2.Stream
	x       *Exchange
	room    *http2Room
	in      inbox
	idle    deadline
	informs bool // 100 (Continue) is due

	begun   bool    // the filters were asked,
	decided bool    // all that had to be,
	verdict Verdict // and this is what they say

	mu     sync.Mutex         // before those of the connections
	phase  phase              // guarded by mu
	cancel context.CancelFunc // guarded by mu: of x's context, nil if that is the connection's

	// While the exchange flows, mu guards x and these.
	call    http2Call
	ended   bool // the request has ended
	keeps   bool // in has all that came of the body, for another try
	interim int

	asks, says messageCounter // of whoever reads, and whoever writes
}

// A phase says who has an exchange.
type phase uint8

const (
	owned   phase = iota // a goroutine: run, rescue or outlast
	flowing              // whoever has the mutex
	gone                 // nobody any more
)

// http2Room is the memory for the texts of one exchange.
type http2Room struct {
	request, response, trailers []byte
	body                        []byte   // what has come of the request's
	trailer                     msg.Head // what the trailers of the response are in
}

// roomPool holds rooms that no exchange needs.
var roomPool = sync.Pool{New: func() any { return new(http2Room) }}

// run serves the exchange, as far as begin has not; a status is that to refuse
// it with.
func (st *http2Stream) run(status int) {
	e, x := st.d.e, st.x
	st.withContext()
	switch {
	case status != 0:
		e.reject(x, st, status, FlagDownstreamProtocol, "http2.codec_error", "the head is too large")
	case !st.begun:
		e.exchange(x, st, false)
	default:
		if !st.decided {
			st.verdict, _ = e.ask(x, true)
		}
		e.conclude(x, st, st.verdict)
	}
	st.leave()
}

// withContext gives the exchange a context of its own, which ends when the
// client leaves.
func (st *http2Stream) withContext() {
	ctx, cancel := context.WithCancel(st.d.ctx)
	st.x.ctx = ctx
	st.mu.Lock()
	defer st.mu.Unlock()
	st.cancel = cancel
	switch st.x.work.why() {
	case clientGone, streamIdle, engineStopped:
		cancel()
	}
}

// leave ends what run, or the flow, has done.
func (st *http2Stream) leave() {
	st.mu.Lock()
	st.giveBack()
	st.mu.Unlock()
	st.s.Conn().FlushSoon()
	st.d.streams.Done()
}

// giveBack ends the exchange and gives back what it has. The mutex is held.
func (st *http2Stream) giveBack() {
	e := st.d.e
	st.phase = gone
	e.clock.forget(&st.idle)
	if st.cancel != nil {
		st.cancel()
	}
	st.s.Release() // and what of the request nobody has read
	e.putExchange(st.x)
	st.room.body = st.in.takeBuffer()
	roomPool.Put(st.room)
	st.d.end()
}

// interrupt ends the exchange, if it still runs.
func (st *http2Stream) interrupt(why reason) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.phase != gone {
		st.x.work.interrupt(why)
		if st.cancel != nil {
			st.cancel()
		}
	}
}

// silent is called when nothing has moved for too long.
func (st *http2Stream) silent() {
	st.mu.Lock()
	replied := st.phase != gone && st.x.work.replied.Load()
	st.mu.Unlock()
	st.interrupt(streamIdle)
	st.in.fail(errTimedOut)
	if replied {
		st.s.Reset(http2.InternalError) // as abort does: either may be first
		st.s.Conn().FlushSoon()
	}
}

// Fields implements h2.Sink: trailers have come.
func (st *http2Stream) Fields(fields []http2.Field, _ bool) error {
	st.in.trailers(fields)
	st.flowEnd()
	return nil
}

// Data implements h2.Sink.
func (st *http2Stream) Data(p []byte, end bool) {
	if !st.flowData(p, end) {
		st.in.data(p, end)
	}
}

// Reset implements h2.Sink.
func (st *http2Stream) Reset(err error) {
	why := clientGone
	if st.d.why.Load() == stopped {
		why = engineStopped
	}
	st.in.fail(err)
	st.interrupt(why)
}

func (st *http2Stream) body() Body { return st }

// Next implements Body.
func (st *http2Stream) Next() ([]byte, error) {
	if err := st.inform100(); err != nil {
		return nil, err
	}
	piece, err := st.in.Next()
	st.asked(piece)
	return piece, err
}

// asked and said count the messages of gRPC.
func (st *http2Stream) asked(piece []byte) {
	if st.x.GRPC {
		st.x.RequestMessages += st.asks.count(piece)
	}
}

func (st *http2Stream) said(piece []byte) {
	if st.x.GRPC {
		st.x.ResponseMessages += st.says.count(piece)
	}
}

// Ready implements Body.
func (st *http2Stream) Ready() bool { return st.in.Ready() }

// Trailer implements Body.
func (st *http2Stream) Trailer() *msg.Head { return st.in.Trailer() }

// whole waits for a body of n bytes and returns it in one piece.
func (st *http2Stream) whole(n int) ([]byte, error) {
	if err := st.inform100(); err != nil {
		return nil, err
	}
	piece, err := st.in.whole(n)
	st.asked(piece)
	return piece, err
}

// inform100 lets a client that waits for it send the body.
func (st *http2Stream) inform100() error {
	if !st.informs {
		return nil
	}
	st.informs = false
	if st.in.Ready() {
		return nil
	}
	var h msg.Head
	h.Reset()
	h.Status = 100
	return st.inform(&h)
}

func (st *http2Stream) inform(h *msg.Head) error {
	err := st.s.Head(h, false)
	st.s.Conn().FlushSoon()
	return err
}

func (st *http2Stream) respond(x *Exchange, piece []byte, end, _ bool) error {
	h := &x.Response
	if h.Status == 101 {
		return errors.New("an upgrade, which HTTP/2 does not have")
	}
	connected := string(x.Request.Method) == "CONNECT" && h.Status/100 == 2
	if h.Status == 204 || connected {
		h.Length = -1
	}
	trailer := x.Trailer
	last := end && len(piece) == 0 && trailer == nil && !connected
	if err := st.s.Head(h, last); err != nil {
		return err
	}
	if last || connected || len(piece) == 0 && !end {
		st.s.Conn().FlushSoon()
		return nil
	}
	if end {
		return st.finish(piece, trailer)
	}
	return st.write(piece)
}

func (st *http2Stream) write(piece []byte) error {
	st.said(piece)
	return sendPiece(st.s, piece)
}

func (st *http2Stream) finish(piece []byte, h *msg.Head) error {
	st.said(piece)
	if err := sendEnd(st.s, piece, h); err != nil {
		return err
	}
	return st.s.Sent()
}

// sendPiece sends a piece of a body, and waits where too much is queued.
func sendPiece(s *h2.Stream, piece []byte) error {
	if err := s.Wait(); err != nil {
		return err
	}
	err := s.Data(piece, false)
	s.Conn().FlushSoon()
	return err
}

// sendEnd sends the last piece of a body, and trailers.
func sendEnd(s *h2.Stream, piece []byte, h *msg.Head) error {
	if err := s.Wait(); err != nil {
		return err
	}
	var err error
	if h == nil {
		err = s.Data(piece, true)
	} else {
		if len(piece) > 0 {
			err = s.Data(piece, false)
		}
		if err == nil {
			err = s.Trailers(h)
		}
	}
	s.Conn().FlushSoon()
	return err
}

func (st *http2Stream) stop() {
	st.in.fail(errStopped)
	st.s.Discard()
	st.s.Conn().FlushSoon()
}

func (st *http2Stream) abort() {
	st.in.fail(errStopped)
	st.s.Reset(http2.InternalError)
	st.s.Conn().FlushSoon()
}

func (st *http2Stream) tunnel() net.Conn {
	return &streamConn{in: &st.in, s: st.s, local: st.d.LocalAddr(), remote: st.d.RemoteAddr()}
}
