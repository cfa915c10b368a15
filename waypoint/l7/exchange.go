package l7

import (
	"context"
	"time"

	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/route"
	"github.com/weft-mesh/weft/mesh/view"
	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

// Version is the version of HTTP that a client speaks.
type Version uint8

// The versions. The zero Version is no HTTP: a connection.
const (
	NotHTTP Version = iota
	HTTP10
	HTTP11
	HTTP2
)

// String returns the version as a request line has it.
func (v Version) String() string {
	switch v {
	case HTTP10:
		return "HTTP/1.0"
	case HTTP11:
		return "HTTP/1.1"
	case HTTP2:
		return "HTTP/2"
	}
	return "-"
}

// An Exchange is one request and its response, from the request's head until
// its end is logged; or one connection that is passed through. It is what
// filters, the access log and metrics read.
//
// Lifetime: an Exchange is used again for the next one of its connection.
// Nobody keeps it, or a slice of it, beyond OnEnd. It belongs to the goroutine
// that runs it and has no locks.
type Exchange struct {
	// Facts of the connection, and the one View that all decisions on this
	// exchange read.
	Facts   *Facts
	View    *view.View
	Version Version
	// GRPC is set if the request's content-type says so: then errors are told
	// by grpc-status.
	GRPC bool

	// Request is the head as the client sent it until filters edit it; what is
	// in it when the last has run goes to the endpoint. OriginalPath is the
	// path as it came, before it was normalized: for logs, never for decisions.
	Request      msg.Head
	OriginalPath []byte
	// Response is the head of the final response, of the endpoint or of our
	// own, once there is one: Response.Status is 0 until then. Filters edit it
	// in OnResponse.
	Response msg.Head

	// Service and Port are what was asked for: Facts.Service, or zero.
	Service *mesh.Service
	Port    uint16
	// Matched is the rule that the request met, and Drawn the one of its
	// backends that was drawn: nil before the filter that matches, and Drawn
	// also if there is nothing to draw from.
	Matched route.Result
	Drawn   *route.Backend
	// BackendService and BackendPort are what Drawn names, or what was asked
	// for; BackendService is nil if that does not exist. Policy is theirs: it is
	// nil only before the filter that matches.
	BackendService *mesh.Service
	BackendPort    uint16
	Policy         *mesh.TrafficPolicy
	// Hash of what the policy's HashKey says, and the session, if the request
	// has them: a filter finds out, and the choice of the endpoint follows.
	Hash    uint64
	Hashed  bool
	Session string
	// Endpoint is who was tried last, nil if nobody was.
	Endpoint *Endpoint

	// Start is when the first byte of the request had come, End when the last
	// byte of the response had gone. Sent is when the request's head went to
	// the endpoint for the last time, Answered when its final head came: zero if
	// they did not.
	Start, Sent, Answered, End time.Time
	// Attempts counts how often the request was sent to endpoints.
	Attempts int

	// Flags, and Details in Envoy's words: "via_upstream", "route_not_found".
	Flags   Flags
	Details string
	// Failure says what broke, for the log: "" if nothing did.
	Failure string

	// RequestBytes and ResponseBytes are the bodies', in bytes that came from
	// the client and went to it. The Head ones are of the heads.
	RequestBytes, ResponseBytes         int64
	RequestHeadBytes, ResponseHeadBytes int64
	// RequestMessages and ResponseMessages are counted for gRPC.
	RequestMessages, ResponseMessages int64
	// Trailer is that of the response, if one came; grpc-status is in it, or in
	// the Response without a body.
	Trailer *msg.Head

	// RequestID is the value of x-request-id, once a filter has set it.
	RequestID []byte
	// Scratch is a place of its own for each filter of the chain: what it wants
	// to remember from OnRequest until OnEnd. It is zero when a request begins.
	Scratch [maxFilters]uint64

	ctx     context.Context
	engine  *Engine
	memory  *memory // of the connection
	known   *known  // by View
	cluster *cluster
	// upstream is the version that the endpoint is spoken to in.
	upstream Version
	answer   answer
	marks    marks
	work     work
	// idle is set anew whenever something moves; nil if the client has none.
	idle *deadline
}

// maxFilters bounds the chain.
const maxFilters = 24

// answer is what the proxy says by itself.
type answer struct {
	body string
}

// Context ends when the client is gone or the engine is stopped by force. It is
// for filters that block.
func (x *Exchange) Context() context.Context { return x.ctx }

// now returns the time. It reads one clock, where time.Now reads two: the wall's
// time is that of Start, and how long it was since.
func (x *Exchange) now() time.Time { return x.Start.Add(time.Since(x.Start)) }

// Path returns the path of the request without its query, normalized.
func (x *Exchange) Path() []byte {
	path, _ := cutQuery(x.Request.Path)
	return path
}

// Query returns what follows the first question mark of the request's path, and
// false if there is none.
func (x *Exchange) Query() ([]byte, bool) {
	_, query := cutQuery(x.Request.Path)
	return query, query != nil
}

// cutQuery cuts path at its first question mark. The query is nil if there is
// none.
func cutQuery(path []byte) (before, query []byte) {
	for i, c := range path {
		if c == '?' {
			return path[:i:i], path[i+1:]
		}
	}
	return path, nil
}

// Answer makes the proxy answer the request by itself, with a text/plain body
// unless it is empty. It prepares x.Response, whose fields the filter may add
// to, and returns the verdict to return. For gRPC it says the same with a
// grpc-status.
func (x *Exchange) Answer(status int, body string, flags Flags, details string) Verdict {
	x.Response.Reset()
	x.Response.Status = status
	x.Flags |= flags
	x.Details = details
	x.answer = answer{body: body}
	return Answered
}

// Wait blocks for d, and returns false if the exchange ended before. Only
// filters that said so in Blocks may call it.
func (x *Exchange) Wait(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-x.ctx.Done():
		return false
	}
}

// Protocol returns what metrics call the protocol: "grpc", "http" or "tcp".
func (x *Exchange) Protocol() string {
	switch {
	case x.Version == NotHTTP:
		return "tcp"
	case x.GRPC:
		return "grpc"
	}
	return "http"
}
