package l7

import (
	"strconv"
	"time"

	"github.com/weft-mesh/weft/internal/relay"
	"github.com/weft-mesh/weft/mesh/balance"
	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

// reply passes an answer on. It returns whether the client's connection can
// carry another exchange.
func (e *Engine) reply(x *Exchange, cl client, c call) (keep bool) {
	h := &x.Response
	x.Details = "via_upstream"
	if ms := x.Answered.Sub(x.Sent).Milliseconds(); ms >= 0 {
		var b [20]byte
		msg.SetID(h, msg.XEnvoyUpstreamServiceTime, strconv.AppendInt(b[:0], ms, 10))
	}
	e.respond(x)
	if h.Status == 101 || string(x.Request.Method) == "CONNECT" && h.Status/100 == 2 {
		e.tunnel(x, cl, c)
		return false
	}
	body := c.body()
	var piece []byte
	end := h.Body == msg.NoBody
	var err error
	if !end && body.Ready() {
		piece, err = body.Next()
		if end = isEOF(err); end {
			x.Trailer = body.Trailer()
		} else if err != nil {
			// Nothing was sent yet: better an answer than half of one.
			f := e.interrupted(x, kindOf(err, failedProtocol))
			e.endCall(x, c, outcomeOf(f.kind), false)
			return e.failed(x, cl, f)
		}
	}
	x.work.replied.Store(true)
	x.ResponseBytes = int64(len(piece))
	if err := cl.respond(x, piece, end, x.work.last); err != nil {
		return e.brokenOff(x, cl, c, &tryError{kind: failedClient, cause: err})
	}
	if !end {
		if f := e.stream(x, cl, c, body); f != nil {
			return e.brokenOff(x, cl, c, e.interrupted(x, f))
		}
	}
	return e.finished(x, cl, c)
}

// stream passes on the rest of a body.
func (e *Engine) stream(x *Exchange, cl client, c call, body Body) *tryError {
	if n, ok := e.splice(x, cl, c); ok {
		return n
	}
	for {
		piece, err := body.Next()
		x.ResponseBytes += int64(len(piece))
		x.moved()
		if isEOF(err) {
			x.Trailer = body.Trailer()
			if err := cl.finish(piece, x.Trailer); err != nil {
				return &tryError{kind: failedClient, cause: err}
			}
			return nil
		}
		if err != nil {
			return kindOf(err, closedOr(err))
		}
		if err := cl.write(piece); err != nil {
			return &tryError{kind: failedClient, cause: err}
		}
	}
}

// finished ends an exchange whose response has been passed on. If the request
// is still being sent nobody wants the rest of it.
func (e *Engine) finished(x *Exchange, cl client, c call) (keep bool) {
	whole := true
	if u := x.work.upload; u != nil {
		if !u.over() {
			cl.stop()
			c.abort()
			<-u.done
		}
		whole = u.whole()
	}
	o := balance.Answered(x.Response.Status)
	if x.GRPC {
		o = outcomeOfGRPC(x, o)
	}
	e.endCall(x, c, o, whole)
	return whole && !x.work.last
}

// outcomeOfGRPC looks at grpc-status, which counts instead of the 200 around
// it.
func outcomeOfGRPC(x *Exchange, o balance.Outcome) balance.Outcome {
	code := x.Response.Get(msg.GRPCStatus)
	if code == nil && x.Trailer != nil {
		code = x.Trailer.Get(msg.GRPCStatus)
	}
	switch string(code) {
	case "14": // unavailable
		return balance.GatewayError
	case "2", "4", "13", "15": // unknown, deadline exceeded, internal, data loss
		return balance.ServerError
	}
	return o
}

// brokenOff ends an exchange whose response cannot be finished.
func (e *Engine) brokenOff(x *Exchange, cl client, c call, f *tryError) bool {
	x.work.settle()
	x.Flags |= outcomes[f.kind].flag
	if f.kind == failedClient {
		x.Details = outcomes[f.kind].details
	}
	if f.cause != nil {
		x.Failure = f.cause.Error()
	}
	cl.stop()
	cl.abort()
	e.endCall(x, c, outcomeOf(f.kind), false)
	return false
}

// tunnel joins the client and the endpoint after an upgrade, or after CONNECT.
func (e *Engine) tunnel(x *Exchange, cl client, c call) {
	x.work.settle()
	if err := cl.respond(x, nil, true, false); err != nil {
		e.brokenOff(x, cl, c, &tryError{kind: failedClient, cause: err})
		return
	}
	if x.idle != nil {
		x.idle.clear()
	}
	x.work.calling(nil)
	a, b := cl.tunnel(), c.tunnel()
	var stats relay.Stats
	if err := relay.Copy(x.ctx, a, b, &stats); err != nil {
		x.Failure = err.Error()
	}
	x.RequestBytes += stats.Sent.Load()
	x.ResponseBytes += stats.Received.Load()
	if b := x.Endpoint.balance; b != nil {
		b.End(balance.Success, time.Now())
	}
}

// local sends an answer of our own, which x.Answer has prepared.
func (e *Engine) local(x *Exchange, cl client) (keep bool) {
	h := &x.Response
	body := x.answer.body
	if x.GRPC {
		body = ""
		grpcAnswer(h, x.answer.body)
	}
	head := string(x.Request.Method) == "HEAD"
	bodiless := h.Status == 204 || h.Status == 304
	if body != "" && !bodiless {
		if !h.Has(msg.ContentType) {
			msg.Append(h, "content-type", "text/plain")
		}
		h.Length = int64(len(body))
		if !head {
			h.Body = msg.Sized
		}
	} else if !bodiless {
		h.Length = 0
	}
	e.respond(x)
	var piece []byte
	if h.Body == msg.Sized {
		piece = append(x.Response.Added[len(x.Response.Added):], body...)
	}
	x.ResponseBytes = int64(len(piece))
	x.work.replied.Store(true)
	if err := cl.respond(x, piece, true, x.work.last); err != nil {
		x.Flags |= FlagDownstreamClosed
		x.Failure = err.Error()
		return false
	}
	return !x.work.last
}

// grpcAnswer says with a grpc-status what a status of HTTP says.
func grpcAnswer(h *msg.Head, message string) {
	code := "2"
	switch h.Status {
	case 200:
		return // a filter has said it in gRPC's words
	case 400:
		code = "13"
	case 401:
		code = "16"
	case 403:
		code = "7"
	case 404:
		code = "12"
	case 429, 502, 503, 504:
		code = "14"
	}
	h.Status = 200
	msg.Set(h, "content-type", "application/grpc")
	msg.Set(h, "grpc-status", code)
	if message != "" {
		msg.Set(h, "grpc-message", message)
	}
}
