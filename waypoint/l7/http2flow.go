package l7

import (
	"strconv"
	"time"

	"github.com/weft-mesh/weft/internal/http2"
	"github.com/weft-mesh/weft/mesh/balance"
	"github.com/weft-mesh/weft/waypoint/l7/h2"
	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

// begin lets the exchange flow, if it can. It is called by the goroutine that
// reads the client's connection; end says that the request has no body. If it
// returns false a goroutine is to go on from where it has come to.
func (st *http2Stream) begin(end bool) bool {
	e, x := st.d.e, st.x
	if e.noFlow {
		return false
	}
	now := st.d.h2.Now()
	x.work.last = e.draining.Load()
	st.begun = true
	if st.verdict = e.begin(x, now); st.verdict != Continue {
		st.decided = true
		return false
	}
	st.verdict, st.decided = e.ask(x, false)
	if !st.decided || st.verdict != Continue || !st.simple() {
		return false
	}
	ep, f := e.pick(x)
	if f != nil {
		return false // and will again
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	st.call = http2Call{flow: st, x: x}
	breaker := &x.cluster.group.Breaker
	if !breaker.Take(balance.Requests) {
		x.work.picked = ep
		return false // and will be told so again
	}
	if pool, ok := ep.over(HTTP2).(*http2Pool); !ok || !pool.open(&st.call, false) {
		x.work.picked = ep
		breaker.Release(balance.Requests)
		return false
	}
	st.send(ep, now, end)
	return true
}

// simple reports whether all that is to be done with the request can be done as
// it comes.
func (st *http2Stream) simple() bool {
	x := st.x
	return x.upstream == HTTP2 && x.cluster != nil && x.marks.mirrors == 0 && !st.informs &&
		len(x.Request.Protocol) == 0 && string(x.Request.Method) != "CONNECT"
}

// send begins the first try. The mutex is held.
func (st *http2Stream) send(ep *Endpoint, now time.Time, end bool) {
	e, x, c := st.d.e, st.x, &st.call
	w := &x.work
	st.phase, st.ended = flowing, end
	w.beginRoute(x, time.Duration(x.Matched.Rule.Spec.Timeout))
	x.Endpoint = ep
	x.Attempts++
	e.countAttempt(x)
	w.beginTry(x, tryTimeoutOf(x))
	if ep.balance != nil {
		ep.balance.Begin()
	}
	w.calling(c)
	x.Sent = now
	st.keeps = st.x.Matched.Rule.Spec.Retry != nil
	c.s.From(st.s)
	st.s.From(c.s)
	last := end && !x.GRPC // see http2Call.send
	err := c.s.Head(&x.Request, last)
	if err == nil && end && !last {
		err = c.s.Data(nil, true)
	}
	if c.last {
		c.conn.Drain()
	}
	st.d.h2.Dirty(c.conn.Conn)
	if err != nil {
		st.breakOff(callError(err))
	}
}

// flowData passes a piece of the request on, and returns false if it does not
// flow.
func (st *http2Stream) flowData(p []byte, end bool) bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.phase != flowing {
		return false
	}
	x, c := st.x, &st.call
	x.RequestBytes += int64(len(p))
	st.asked(p)
	x.moved()
	st.keep(p, end)
	st.ended = end
	if c.s.Data(p, end) != nil {
		st.s.Credit(len(p)) // what has ended the call comes by another way
		return true
	}
	st.d.h2.Dirty(c.conn.Conn)
	return true
}

// keep remembers a piece for another try. The mutex is held.
func (st *http2Stream) keep(p []byte, end bool) {
	w := &st.x.work
	if w.replied.Load() {
		return // there will be none
	}
	if !st.keeps || st.x.RequestBytes > int64(st.d.e.limits.Gather) {
		w.lost = w.lost || len(p) > 0
		return
	}
	st.in.data(p, end)
}

// flowEnd passes the trailers of the request on, if it flows.
func (st *http2Stream) flowEnd() {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.phase != flowing {
		return
	}
	st.ended = true
	if st.call.s.Trailers(st.in.Trailer()) == nil {
		st.d.h2.Dirty(st.call.conn.Conn)
	}
}

// answer takes a head, or the trailers, from the endpoint. It is called by the
// goroutine that reads the endpoint's connection.
func (st *http2Stream) answer(fields []http2.Field, end bool) error {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.phase != flowing {
		return nil
	}
	x, c, up := st.x, &st.call, st.call.conn.Conn
	if len(fields) == 0 || fields[0].Name != ":status" || len(fields[0].Value) != 3 {
		if !c.answered {
			return errNoStatus
		}
		st.room.trailers = h2.ReadTrailers(&st.room.trailer, st.room.trailers, fields)
		x.Trailer = &st.room.trailer
		if err := st.s.Trailers(x.Trailer); err != nil {
			st.breakOff(&tryError{kind: failedClient, cause: err})
			return nil
		}
		up.Dirty(st.d.h2)
		st.end(up.Now())
		return nil
	}
	final := fields[0].Value[0] != '1'
	if final {
		c.final(fields)
	}
	var err error
	if st.room.response, err = h2.ReadResponse(&x.Response, st.room.response, fields, end, string(x.Request.Method) == "HEAD"); err != nil {
		st.breakOff(&tryError{kind: failedProtocol, cause: err})
		return nil
	}
	if !final {
		return st.interimHead(up)
	}
	x.Answered = up.Now()
	x.work.endTry()
	if retriableAnswer(x.Matched.Rule.Spec.Retry, &x.Response) {
		f := &tryError{kind: failedStatus}
		if st.d.e.again(x, f) {
			if x.cluster.group.Breaker.Take(balance.Retries) {
				st.spill()
				go st.rescue(f, true)
				return nil
			}
			x.Flags |= FlagOverflow
		}
	}
	st.reply(up)
	return nil
}

// interimHead passes an interim response on. The mutex is held.
func (st *http2Stream) interimHead(up *h2.Conn) error {
	if st.x.Response.Status == 100 {
		return nil // the client waits for none
	}
	if st.interim++; st.interim > maxInterim {
		return errInterim
	}
	if err := st.s.Head(&st.x.Response, false); err != nil {
		st.breakOff(&tryError{kind: failedClient, cause: err})
		return nil
	}
	up.Dirty(st.d.h2)
	return nil
}

// reply passes the final head on. The mutex is held.
func (st *http2Stream) reply(up *h2.Conn) {
	x := st.x
	h := &x.Response
	x.Details = "via_upstream"
	if ms := x.Answered.Sub(x.Sent).Milliseconds(); ms >= 0 {
		var b [20]byte
		msg.SetID(h, msg.XEnvoyUpstreamServiceTime, strconv.AppendInt(b[:0], ms, 10))
	}
	st.d.e.respond(x)
	if h.Status == 204 {
		h.Length = -1
	}
	last := h.Body == msg.NoBody
	x.work.replied.Store(true)
	x.moved()
	if err := st.s.Head(h, last); err != nil {
		st.breakOff(&tryError{kind: failedClient, cause: err})
		return
	}
	up.Dirty(st.d.h2)
	if last {
		st.end(x.Answered)
	}
}

// answerData passes a piece of the answer on.
func (st *http2Stream) answerData(p []byte, end bool) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.phase != flowing {
		return // the call's end opens the window again
	}
	x, up := st.x, st.call.conn.Conn
	x.ResponseBytes += int64(len(p))
	st.said(p)
	x.moved()
	if err := st.s.Data(p, end); err != nil {
		st.breakOff(&tryError{kind: failedClient, cause: err})
		return
	}
	up.Dirty(st.d.h2)
	if end {
		st.end(up.Now())
	}
}

// end ends an exchange whose answer has come to its end: now, unless a part
// of it waits for the client. The mutex is held.
func (st *http2Stream) end(now time.Time) {
	if st.s.Queued() > 0 {
		st.phase = owned
		go st.outlast()
		return
	}
	st.finished(now)
	st.giveBack()
	st.d.streams.Done()
}

// finished is Engine.finished for what has flowed.
func (st *http2Stream) finished(now time.Time) {
	e, x, c := st.d.e, st.x, &st.call
	o := balance.Answered(x.Response.Status)
	if x.GRPC {
		o = outcomeOfGRPC(x, o)
	}
	x.work.settle()
	c.s.Reset(http2.Cancel) // nothing, if both sides have ended it
	if b := x.Endpoint.balance; b != nil {
		b.End(o, now)
	}
	x.cluster.group.Breaker.Release(balance.Requests)
	e.endAt(x, now)
}

// outlast waits until the client has taken the last of an answer.
func (st *http2Stream) outlast() {
	e, x := st.d.e, st.x
	if err := st.s.Sent(); err != nil {
		e.brokenOff(x, st, &st.call, e.interrupted(x, &tryError{kind: failedClient, cause: err}))
		x.cluster.group.Breaker.Release(balance.Requests)
		e.end(x)
	} else {
		st.finished(time.Now())
		st.call.conn.FlushSoon()
	}
	st.leave()
}

// fail ends the flow.
func (st *http2Stream) fail(f *tryError) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.phase == flowing {
		st.breakOff(f)
	}
}

// breakOff ends the flow; a goroutine does what is left. The mutex is held.
func (st *http2Stream) breakOff(f *tryError) {
	st.spill()
	go st.rescue(f, false)
}

// spill makes what comes from the client wait for a goroutine, from now on. The
// mutex is held.
func (st *http2Stream) spill() {
	st.phase = owned
	st.s.From(nil)
	st.call.s.From(nil)
}

// rescue goes on with an exchange whose flow was ended by f: with another try,
// an answer of our own, or the end of what the client has got a part of.
// retrying says that the breaker has let in another try.
func (st *http2Stream) rescue(f *tryError, retrying bool) {
	e, x, c := st.d.e, st.x, &st.call
	w := &x.work
	breaker := &x.cluster.group.Breaker
	st.withContext()
	st.asks = messageCounter{}
	switch {
	case w.replied.Load():
		e.brokenOff(x, st, c, e.interrupted(x, f))
	case st.stale(f):
		w.calling(nil)
		c.close(false)
		// Nobody has counted this try.
		x.Attempts--
		x.Endpoint.balance.End(balance.Unknown, time.Now())
		w.picked, w.rewound = x.Endpoint, true
		e.tries(x, st, nil, false)
	default:
		o := balance.Answered(x.Response.Status)
		if f.kind != failedStatus {
			f = e.interrupted(x, f)
			o = outcomeOf(f.kind)
		}
		e.endCall(x, c, o, false)
		if b := x.Endpoint.balance; b != nil {
			w.tried = append(w.tried, b)
		}
		w.rewound = true
		e.tries(x, st, f, retrying)
	}
	breaker.Release(balance.Requests)
	e.end(x)
	st.leave()
}

// stale reports whether f may be because the endpoint had closed its connection
// before the request came.
func (st *http2Stream) stale(f *tryError) bool {
	x := st.x
	return f.kind == failedClosed && !st.call.fresh() && idempotent(x.Request.Method) && st.ended && !x.work.lost &&
		x.Endpoint.balance != nil && x.work.why() == running
}

// A messageCounter counts the messages of gRPC in a body that comes in pieces:
// each has five bytes of a head, the last four of which are its length.
type messageCounter struct {
	head uint8 // bytes of the head at hand
	size uint32
	left uint32 // of the message at hand
}

// count takes a piece, and returns how many messages have begun in it.
func (m *messageCounter) count(p []byte) (n int64) {
	for len(p) > 0 {
		if m.left > 0 {
			k := min(int(m.left), len(p))
			p, m.left = p[k:], m.left-uint32(k)
			continue
		}
		if m.head > 0 {
			m.size = m.size<<8 | uint32(p[0])
		}
		p = p[1:]
		if m.head++; m.head == 5 {
			n++
			m.head, m.left, m.size = 0, m.size, 0
		}
	}
	return n
}
