package l7

import (
	"context"
	"errors"
	"time"

	"github.com/weft-mesh/weft/mesh/balance"
	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

// newExchange returns an Exchange for the next request of a connection, whose
// Facts and memory it has and nothing else.
func (e *Engine) newExchange(ctx context.Context, facts *Facts, m *memory) *Exchange {
	x := e.exchanges.Get().(*Exchange)
	x.engine, x.ctx, x.Facts, x.memory = e, ctx, facts, m
	x.Port = facts.Port
	return x
}

// putExchange takes back an Exchange that is over.
func (e *Engine) putExchange(x *Exchange) {
	x.work.reset()
	x.Request.Reset()
	x.Response.Reset()
	req, resp, w := x.Request.Added, x.Response.Added, &x.work
	*x = Exchange{work: work{tried: w.tried, timer: nil}}
	x.Request.Added, x.Response.Added = req, resp
	e.exchanges.Put(x)
}

// exchange runs one exchange, from the request's head to the end of its
// response. last says that the connection is not to carry another one. It
// returns whether it can.
func (e *Engine) exchange(x *Exchange, cl client, last bool) (keep bool) {
	x.work.last = last || e.draining.Load()
	return e.conclude(x, cl, e.request(x))
}

// conclude does what the filters have decided.
func (e *Engine) conclude(x *Exchange, cl client, v Verdict) (keep bool) {
	switch v {
	case Continue:
		keep = e.forward(x, cl)
	case Close:
		cl.abort()
	default:
		keep = e.local(x, cl)
	}
	e.end(x)
	return keep
}

// reject answers what is no request: no filter sees it before its end.
func (e *Engine) reject(x *Exchange, cl client, status int, flag Flags, details, failure string) {
	x.Start = time.Now()
	e.look(x)
	x.work.last = true
	x.Failure = failure
	x.Answer(status, "", flag, details)
	e.local(x, cl)
	e.end(x)
}

// request decides on a request: it takes the View, and asks the filters. It
// does not wait unless one of them Blocks.
func (e *Engine) request(x *Exchange) Verdict {
	v := e.begin(x, time.Now())
	if v == Continue {
		v, _ = e.ask(x, true)
	}
	return v
}

// begin prepares a request for the filters.
func (e *Engine) begin(x *Exchange, now time.Time) Verdict {
	x.Start = now
	e.look(x)
	x.OriginalPath = x.Request.Path
	x.Request.Scheme = schemeHTTP
	if x.Facts.Scheme == "https" {
		x.Request.Scheme = schemeHTTPS
	}
	if len(x.Request.Authority) == 0 { // HTTP/1.0 without a host
		msg.SetAuthority(&x.Request, x.Facts.Service.Host)
	}
	x.GRPC = isGRPC(x.Request.Get(msg.ContentType))
	path, ok := normalizePath(x.Request.Path, nil)
	if !ok {
		x.work.last = true // who sends such is not to be trusted with the next
		return x.Answer(400, "", FlagDownstreamProtocol, "path_normalization_failed")
	}
	x.Request.Path = path
	return Continue
}

// ask asks the filters, from the first that was not asked yet. If they may not
// wait it stops before one that Blocks, and reports that not all have decided.
func (e *Engine) ask(x *Exchange, wait bool) (v Verdict, decided bool) {
	for i := x.work.reached; i < len(e.filters); i++ {
		if !wait && i < len(e.blockers) && e.blockers[i] != nil && e.blockers[i].Blocks(x) {
			return Refuse, false
		}
		x.work.reached = i + 1
		if v := e.filters[i].OnRequest(x); v != Continue {
			if v == Refuse {
				x.Answer(500, "", 0, "filter_refused")
			}
			return v, true
		}
	}
	return Continue, true
}

// respond lets the filters see the response's head before it goes out.
func (e *Engine) respond(x *Exchange) {
	for i := x.work.reached - 1; i >= 0; i-- {
		e.filters[i].OnResponse(x)
	}
}

// end lets the filters see how it went.
func (e *Engine) end(x *Exchange) { e.endAt(x, x.now()) }

// endAt is end for who knows the time.
func (e *Engine) endAt(x *Exchange, now time.Time) {
	x.work.settle()
	x.End = now
	for _, f := range e.filters {
		f.OnEnd(x)
	}
}

// The schemes are read only.
var (
	schemeHTTP  = []byte("http")
	schemeHTTPS = []byte("https")
)

// isGRPC reports whether a content-type is gRPC's.
func isGRPC(contentType []byte) bool {
	const want = "application/grpc"
	if len(contentType) < len(want) || !msg.EqualFold(contentType[:len(want)], want) {
		return false
	}
	return len(contentType) == len(want) || contentType[len(want)] == '+' || contentType[len(want)] == ';'
}

// forward sends a request to an endpoint, or to several one after the other,
// and passes the answer on.
func (e *Engine) forward(x *Exchange, cl client) (keep bool) {
	if f := e.ready(x, cl); f != nil {
		return e.failed(x, cl, f)
	}
	if x.marks.mirrors != 0 && x.work.whole {
		e.mirrors.begin(x, x.work.piece)
	}
	breaker := &x.cluster.group.Breaker
	if !breaker.Take(balance.Requests) {
		return e.failed(x, cl, errOverflow)
	}
	defer breaker.Release(balance.Requests)
	x.work.beginRoute(x, time.Duration(x.Matched.Rule.Spec.Timeout))
	return e.tries(x, cl, nil, false)
}

// tries sends a request until there is an answer, and passes that on. f is how
// a try has failed that was made already, nil if there was none. retrying says
// that the breaker has let in another one.
func (e *Engine) tries(x *Exchange, cl client, f *tryError, retrying bool) (keep bool) {
	breaker := &x.cluster.group.Breaker
	defer func() {
		if retrying {
			breaker.Release(balance.Retries)
		}
	}()
	for {
		var c call
		if f == nil {
			if f = e.rewind(x, cl); f != nil {
				return e.failed(x, cl, f)
			}
			if c, f = e.try(x, cl); f == nil {
				return e.reply(x, cl, c)
			}
		}
		again := e.again(x, f)
		if again && !retrying {
			if retrying = breaker.Take(balance.Retries); !retrying {
				x.Flags |= FlagOverflow
				again = false
			}
		}
		if !again && c != nil {
			return e.reply(x, cl, c) // it is an answer, if not a good one
		}
		if c != nil {
			e.endCall(x, c, balance.Answered(x.Response.Status), false)
		}
		if !again {
			return e.failed(x, cl, f)
		}
		if !e.pause(x) {
			return e.failed(x, cl, e.interrupted(x, f))
		}
		f = nil
	}
}

// rewind makes the body ready once more, from its begin, if the first try was
// made without ready.
func (e *Engine) rewind(x *Exchange, cl client) *tryError {
	w := &x.work
	if !w.rewound {
		return nil
	}
	w.rewound = false
	x.RequestBytes, x.RequestMessages = 0, 0
	return e.ready(x, cl)
}

// again decides whether a failed try is followed by another.
func (e *Engine) again(x *Exchange, f *tryError) bool {
	r := x.Matched.Rule.Spec.Retry
	w := &x.work
	if f.kind != failedStatus && !retriable(r, f.kind, x.GRPC) || r == nil {
		return false
	}
	if w.lost {
		return false // the body is gone
	}
	if u := w.upload; u != nil {
		if u.ended.Load() {
			<-u.done
		}
		if !u.over() || u.clientErr != nil {
			return false // the body is still coming, or never will
		}
	}
	if x.Attempts > r.Attempts {
		if r.Attempts > 0 {
			x.Flags |= FlagRetriesExhausted
		}
		return false
	}
	return true
}

// pause waits before another try. It returns false if there is no point in one
// any more.
func (e *Engine) pause(x *Exchange) bool {
	d := backoff(x.Matched.Rule.Spec.Retry, x.Attempts, e.rand())
	ctx, cancel := context.WithCancel(x.ctx)
	defer cancel()
	if !x.work.dialing(cancel) && x.work.why() != tryTimeout {
		return false
	}
	defer x.work.dialed()
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// interrupted returns the failure that stands for why the exchange was
// interrupted, or f if it was not.
func (e *Engine) interrupted(x *Exchange, f *tryError) *tryError {
	switch x.work.why() {
	case routeTimeout:
		return &tryError{kind: failedTimeout, cause: f}
	case tryTimeout:
		return &tryError{kind: failedTry, cause: f}
	case streamIdle:
		return &tryError{kind: failedIdle, cause: f}
	case clientGone:
		return &tryError{kind: failedClient, cause: f}
	case engineStopped:
		return &tryError{kind: failedStopped, cause: f}
	}
	if x.ctx.Err() != nil {
		return &tryError{kind: failedStopped, cause: f}
	}
	return f
}

// failed answers for a request that could not be served.
func (e *Engine) failed(x *Exchange, cl client, f *tryError) bool {
	x.work.settle()
	o := &outcomes[f.kind]
	x.Flags |= o.flag
	if f.cause != nil {
		x.Failure = f.cause.Error()
	}
	if f.kind == failedClient {
		x.Details = o.details
		cl.abort()
		return false
	}
	if f.kind == failedRequest {
		x.work.last = true
	}
	if (f.kind == failedReset || f.kind == failedClosed) && x.GRPC && overdue(x, time.Now()) {
		// Servers of gRPC give up at the client's deadline, and may be faster
		// with that than the client.
		x.Answer(200, "", 0, o.details)
		msg.Set(&x.Response, "content-type", "application/grpc")
		msg.Set(&x.Response, "grpc-status", "4")
		msg.Set(&x.Response, "grpc-message", "deadline exceeded")
		return e.local(x, cl)
	}
	x.Answer(o.status, o.body, 0, o.details)
	if f.kind == failedOverflow {
		msg.Append(&x.Response, "x-envoy-overloaded", "true")
	}
	return e.local(x, cl)
}

// ready makes what of the body is there ready to be sent with the head: all of
// it if it is small.
func (e *Engine) ready(x *Exchange, cl client) *tryError {
	w := &x.work
	h := &x.Request
	switch {
	case h.Body == msg.NoBody:
		w.whole = true
		return nil
	case h.Body == msg.Sized && h.Length <= int64(e.limits.Gather):
		if g, ok := cl.body().(interface{ whole(int) ([]byte, error) }); ok {
			piece, err := g.whole(int(h.Length))
			if err != nil {
				return requestFailed(err)
			}
			w.piece, w.whole = piece, true
			x.RequestBytes = h.Length
			return nil
		}
	}
	if !cl.body().Ready() {
		return nil
	}
	piece, err := cl.body().Next()
	w.whole = isEOF(err)
	if err != nil && !w.whole {
		return requestFailed(err)
	}
	w.piece = piece
	x.RequestBytes = int64(len(piece))
	if w.whole {
		w.trailer = cl.body().Trailer()
		return nil
	}
	w.keep(x, piece)
	return nil
}

// requestFailed says what an error of the request's body means.
func requestFailed(err error) *tryError {
	kind := failedClient
	var s interface {
		error
		Malformed() bool
	}
	switch {
	case errors.Is(err, errTimedOut):
		kind = failedIdle
	case errors.Is(err, errStopped):
		kind = failedStopped
	case errors.As(err, &s) && s.Malformed():
		kind = failedRequest
	}
	return &tryError{kind: kind, cause: err}
}
