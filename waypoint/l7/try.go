package l7

import (
	"errors"
	"io"
	"net"
	"os"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/balance"
	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

// staleTries bounds how often a request is sent again because the connection
// that was used had been closed by the endpoint at the same moment.
const staleTries = 3

// try sends the request to one endpoint and waits for the head of its answer,
// which is in x.Response then. A call is returned with a failure only if that is
// an answer which the route would rather not have.
func (e *Engine) try(x *Exchange, cl client) (call, *tryError) {
	w := &x.work
	ep, f := e.pick(x)
	if f != nil {
		return nil, f
	}
	x.Endpoint = ep
	x.Attempts++
	e.countAttempt(x)
	w.beginTry(x, tryTimeoutOf(x))
	if ep.balance != nil {
		ep.balance.Begin()
	}
	for stale := 0; ; stale++ {
		c, f := e.tryOnce(x, cl, ep)
		if f == nil {
			w.endTry()
			if r := x.Matched.Rule.Spec.Retry; retriableAnswer(r, &x.Response) {
				if ep.balance != nil {
					w.tried = append(w.tried, ep.balance)
				}
				return c, &tryError{kind: failedStatus}
			}
			return c, nil
		}
		if f.kind == failedClosed && stale < staleTries && c != nil && !c.fresh() && idempotent(x.Request.Method) && w.whole {
			w.calling(nil)
			c.close(false)
			continue
		}
		f = e.interrupted(x, f)
		if c != nil {
			e.endCall(x, c, outcomeOf(f.kind), false)
		} else if ep.balance != nil {
			ep.balance.End(outcomeOf(f.kind), x.now())
		}
		if ep.balance != nil {
			w.tried = append(w.tried, ep.balance)
		}
		return nil, f
	}
}

// tryTimeoutOf returns the bound of one try.
func tryTimeoutOf(x *Exchange) time.Duration {
	var d time.Duration
	if r := x.Matched.Rule.Spec.Retry; r != nil {
		d = time.Duration(r.PerTryTimeout)
	}
	if x.Drawn != nil {
		if b := time.Duration(x.Drawn.Spec.Timeout); b > 0 && (d == 0 || b < d) {
			d = b
		}
	}
	return d
}

// outcomeOf says what a failure tells about the endpoint.
func outcomeOf(kind failed) balance.Outcome {
	switch kind {
	case failedClient, failedRequest, failedIdle, failedStopped, failedOverflow:
		return balance.Unknown
	case failedTimeout, failedTry:
		return balance.GatewayError // as a 504 would be
	}
	return balance.LocalFailure
}

// countAttempt tells the endpoint which attempt it sees.
func (e *Engine) countAttempt(x *Exchange) {
	var b [8]byte
	msg.SetID(&x.Request, msg.XEnvoyAttemptCount, strconv.AppendInt(b[:0], int64(x.Attempts), 10))
}

// tryOnce sends the request over one connection. If it returns a call with a
// failure, the call is still open.
func (e *Engine) tryOnce(x *Exchange, cl client, ep *Endpoint) (call, *tryError) {
	w := &x.work
	c, err := ep.over(x.upstream).call(x.ctx, x)
	if err != nil {
		return nil, kindOf(err, failedConnect)
	}
	w.calling(c)
	x.Sent = x.now()
	x.Answered = time.Time{}
	sendErr := e.sendHead(x, cl, c)
	for {
		if err := c.receive(&x.Response); err != nil {
			if u := w.upload; u != nil && u.over() && u.clientErr != nil {
				return c, requestFailed(u.clientErr)
			}
			if sendErr != nil {
				err = sendErr
			}
			return c, kindOf(err, closedOr(err))
		}
		if s := x.Response.Status; s >= 200 || s == 101 {
			break
		}
		if x.Response.Status == 100 {
			continue // we have told the client so ourselves, if it wanted to know
		}
		if err := cl.inform(&x.Response); err != nil {
			return c, &tryError{kind: failedClient, cause: err}
		}
	}
	x.Answered = x.now()
	return c, nil
}

// closedOr tells the end of a connection from its reset.
func closedOr(err error) failed {
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE),
		errors.Is(err, net.ErrClosed), errors.Is(err, io.ErrClosedPipe), errors.Is(err, os.ErrDeadlineExceeded):
		return failedClosed
	}
	return failedReset
}

// sendHead sends the head with what of the body there is, and begins to send
// the rest. An error is not the end: there may be an answer all the same.
func (e *Engine) sendHead(x *Exchange, cl client, c call) error {
	w := &x.work
	if w.trailer != nil {
		if err := c.send(&x.Request, w.piece, false); err != nil {
			return err
		}
		return c.finish(nil, w.trailer)
	}
	if w.whole {
		return c.send(&x.Request, w.piece, true)
	}
	if w.upload == nil {
		err := c.send(&x.Request, w.piece, false)
		if err == nil {
			w.upload = e.beginUpload(x, cl.body(), c)
		}
		return err
	}
	// The upload of an earlier try is over, and has kept what came so far.
	var kept []byte
	if w.kept != nil {
		kept = w.kept[:w.keptLen]
	}
	if err := c.send(&x.Request, kept, false); err != nil {
		return err
	}
	if w.upload.ended.Load() {
		return c.finish(nil, cl.body().Trailer())
	}
	w.upload = e.beginUpload(x, cl.body(), c)
	return nil
}

// An upload sends the rest of a request's body while its answer is awaited.
type upload struct {
	done  chan struct{}
	ended atomic.Bool // the body has come to its end, which is sent now or was
	// These are set before done is closed.
	clientErr error // the client's fault
	callErr   error // the endpoint's
}

// over reports whether the upload has ended.
func (u *upload) over() bool {
	select {
	case <-u.done:
		return true
	default:
		return false
	}
}

// whole reports whether the whole body was sent.
func (u *upload) whole() bool { return u.over() && u.clientErr == nil && u.callErr == nil }

func (e *Engine) beginUpload(x *Exchange, body Body, c call) *upload {
	u := &upload{done: make(chan struct{})}
	go func() {
		defer close(u.done)
		for {
			piece, err := body.Next()
			x.RequestBytes += int64(len(piece))
			x.work.keep(x, piece)
			x.moved()
			if isEOF(err) {
				u.ended.Store(true)
				u.callErr = c.finish(piece, body.Trailer())
				return
			}
			if err != nil {
				u.clientErr = err
				c.abort() // the answer to half a request is none
				return
			}
			if u.callErr = c.write(piece); u.callErr != nil {
				return
			}
		}
	}()
	return u
}

func isEOF(err error) bool { return err == io.EOF }

// keep remembers a piece of the body for another try.
func (w *work) keep(x *Exchange, piece []byte) {
	if w.lost {
		return
	}
	limit := min(x.engine.limits.Gather, bigLen)
	wanted := x.Matched.Rule.Spec.Retry != nil || x.marks.mirrors != 0
	if !wanted || w.keptLen+len(piece) > limit {
		w.lost = true
		return
	}
	if w.kept == nil {
		w.kept = bigPool.Get().(*[bigLen]byte)
	}
	w.keptLen += copy(w.kept[w.keptLen:], piece)
}

// moved notes that something has moved.
func (x *Exchange) moved() {
	if x.idle != nil {
		x.idle.set(x.engine.limits.StreamIdle)
	}
}

// endCall ends a call that has been sent.
func (e *Engine) endCall(x *Exchange, c call, o balance.Outcome, whole bool) {
	w := &x.work
	w.calling(nil)
	if u := w.upload; u != nil && !u.over() {
		c.abort()
		<-u.done
	}
	c.close(whole)
	if b := x.Endpoint.balance; b != nil {
		b.End(o, x.now())
	}
}

// pick chooses the endpoint for the next try.
func (e *Engine) pick(x *Exchange) (*Endpoint, *tryError) {
	if ep := x.work.picked; ep != nil {
		x.work.picked = nil
		return ep, nil
	}
	if b := x.Drawn; b != nil && b.Spec.Unroutable != "" {
		return nil, &tryError{kind: failedNoCluster, cause: errors.New(b.Spec.Unroutable)}
	}
	c := x.cluster
	if c == nil {
		return nil, &tryError{kind: failedNoCluster}
	}
	if p := x.Policy; p.Broken != "" {
		return nil, &tryError{kind: failedNoCluster, cause: errors.New(p.Broken)}
	}
	if s := x.BackendService; x.Policy.Balance.Algorithm == mesh.Passthrough || s != nil && s.Mode == mesh.BalancePassthrough {
		if !x.Facts.Destination.IsValid() {
			return nil, &tryError{kind: failedNoHealthy}
		}
		return c.passthrough(x.View, x.Facts.Destination), nil
	}
	r := balance.Request{Hash: x.Hash, Hashed: x.Hashed, Session: x.Session}
	if retry := x.Matched.Rule.Spec.Retry; retry != nil && x.Attempts > 0 {
		r.Farther = retry.RemoteLocalities
		if !retry.PreviousHosts {
			r.Avoid = x.work.tried
		}
	}
	b, ok := c.group.Pick(r, x.recent())
	if !ok {
		return nil, &tryError{kind: failedNoHealthy}
	}
	ep := c.endpoint(b)
	if ep == nil {
		return nil, &tryError{kind: failedNoHealthy}
	}
	return ep, nil
}

// recent returns a time that is recent enough for choices.
func (x *Exchange) recent() time.Time {
	if x.Attempts == 0 {
		return x.Start
	}
	return x.now()
}
