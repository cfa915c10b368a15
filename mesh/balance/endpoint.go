package balance

import (
	"sync/atomic"
	"time"

	"github.com/weft-mesh/weft/mesh"
)

// A Key names an endpoint: what is remembered of it lasts as long as the
// Group has an endpoint of that Key.
type Key struct {
	UID  mesh.UID
	Port uint16
}

// An Endpoint is a workload at one port, as a Group chooses it. Its fields do
// not change; what a Group learns of it later is in another Endpoint of the
// same Key. Its methods may be called at any time from any goroutine, also
// after the Group has forgotten it.
type Endpoint struct {
	Workload *mesh.Workload
	Port     uint16

	weight uint64 // at least 1
	state  *state
	group  *Group
}

// state is what is remembered of an endpoint. Counters are atomic; the rest is
// under the Group's mutex.
type state struct {
	key    Key
	active atomic.Int64
	since  time.Time // when it was first ready, for warm-up; atomic by being set before it is published

	errors, gateway, local atomic.Uint32 // in a row

	ejected atomic.Bool
	until   time.Time // of the ejection
	times   uint32    // ejections that count for the length of the next
	decays  time.Time // when times is to be lowered
}

// Key returns the name of the endpoint.
func (e *Endpoint) Key() Key { return e.state.key }

// Name returns what session cookies and headers call the endpoint. It tells
// nobody what the endpoint is.
func (e *Endpoint) Name() string { return sessionName(e.state.key) }

// Active returns how many requests are at the endpoint.
func (e *Endpoint) Active() int { return int(e.state.active.Load()) }

// Ejected reports whether the endpoint has failed too often and takes no
// requests for a while.
func (e *Endpoint) Ejected() bool { return e.state.ejected.Load() }

// Begin counts a request that goes to the endpoint. End must follow.
func (e *Endpoint) Begin() { e.state.active.Add(1) }

// End notes that a request that Begin has counted is over, and how it went.
func (e *Endpoint) End(o Outcome, now time.Time) {
	e.state.active.Add(-1)
	e.group.judge(e, o, now)
}

// Fail notes that no connection to the endpoint could be made, where Begin has
// not counted a request.
func (e *Endpoint) Fail(now time.Time) { e.group.judge(e, LocalFailure, now) }

// An Outcome is how a request at an endpoint went.
type Outcome uint8

// The outcomes. The zero Outcome says nothing about the endpoint: the client
// went away, or it was stopped here.
const (
	Unknown      Outcome = iota
	Success              // an answer below 500, or of a gRPC status that is not the server's fault
	ServerError          // 5xx, but not those of a gateway
	GatewayError         // 502, 503, 504
	LocalFailure         // no connection, a reset, no answer in time
)

// Answered returns the Outcome of an answer with that status.
func Answered(status int) Outcome {
	switch {
	case status == 502, status == 503, status == 504:
		return GatewayError
	case status >= 500:
		return ServerError
	case status >= 100:
		return Success
	}
	return Unknown
}
