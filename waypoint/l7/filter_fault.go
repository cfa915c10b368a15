package l7

import (
	"strconv"
	"time"

	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

// fault delays and answers a share of the requests, for tests of resilience.
// The route's timeout and retries begin after it.
type fault struct {
	Pass
	e *Engine
}

// Blocks reports whether the request may be delayed.
func (*fault) Blocks(x *Exchange) bool {
	f := faultOf(x)
	return f != nil && f.Delay != nil
}

func faultOf(x *Exchange) *mesh.Fault {
	if x.Matched.Rule == nil {
		return nil
	}
	return x.Matched.Rule.Spec.Fault
}

// OnRequest draws, delay and answer each for itself.
func (f *fault) OnRequest(x *Exchange) Verdict {
	spec := faultOf(x)
	if spec == nil {
		return Continue
	}
	if d := spec.Delay; d != nil && f.hits(d.PerMillion) {
		x.Flags |= FlagDelay
		if !x.Wait(time.Duration(d.For)) {
			return Close
		}
	}
	if a := spec.Abort; a != nil && f.hits(a.PerMillion) {
		return abort(x, a)
	}
	return Continue
}

// hits draws whether this request is one of so many in a million.
func (f *fault) hits(perMillion uint32) bool {
	return perMillion > 0 && f.e.rand()%1_000_000 < uint64(perMillion)
}

// abort answers. A status of gRPC is told to other clients as the status of
// HTTP that stands for it.
func abort(x *Exchange, a *mesh.FaultAbort) Verdict {
	const body, details = "fault filter abort", "fault_filter_abort"
	if a.GRPCStatus == nil {
		status := a.Status
		if status == 0 {
			status = 503
		}
		return x.Answer(status, body, FlagAbort, details)
	}
	code := *a.GRPCStatus
	if !x.GRPC {
		return x.Answer(statusOfGRPC(code), body, FlagAbort, details)
	}
	v := x.Answer(200, body, FlagAbort, details)
	msg.Set(&x.Response, "content-type", "application/grpc")
	msg.Set(&x.Response, "grpc-status", strconv.Itoa(code))
	msg.Set(&x.Response, "grpc-message", body)
	return v
}

// statusOfGRPC returns the status of HTTP that stands for one of gRPC.
func statusOfGRPC(code int) int {
	switch code {
	case 0:
		return 200
	case 1:
		return 499
	case 3, 9, 11:
		return 400
	case 4:
		return 504
	case 5:
		return 404
	case 6, 10:
		return 409
	case 7:
		return 403
	case 8:
		return 429
	case 12:
		return 501
	case 14:
		return 503
	case 16:
		return 401
	}
	return 500
}
