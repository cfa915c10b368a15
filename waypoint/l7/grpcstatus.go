package l7

import (
	"strconv"
	"time"

	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

// grpcStatusOf returns the grpc-status of x's answer, or -1 if there is none
// that is known: it is in the trailer, or in a head without a body.
func grpcStatusOf(x *Exchange) int8 {
	code := x.Response.Get(msg.GRPCStatus)
	if code == nil && x.Trailer != nil {
		code = x.Trailer.Get(msg.GRPCStatus)
	}
	n := int8(0)
	for _, c := range code {
		if c < '0' || c > '9' || n > 1 {
			return -1
		}
		n = n*10 + int8(c-'0')
	}
	if len(code) == 0 || n > 16 {
		return -1
	}
	return n
}

// overdue reports whether the time is over that the client of x has given the
// call.
func overdue(x *Exchange, now time.Time) bool {
	d, ok := grpcTimeout(x.Request.Get(msg.GRPCTimeout))
	return ok && now.Sub(x.Start) >= d
}

// grpcTimeout reads a grpc-timeout: at most 8 digits and a unit (the gRPC
// protocol over HTTP/2, "Timeout").
func grpcTimeout(s []byte) (d time.Duration, ok bool) {
	if len(s) < 2 || len(s) > 9 {
		return 0, false
	}
	last := len(s) - 1
	n, err := strconv.ParseUint(string(s[:last]), 10, 32)
	if err != nil {
		return 0, false
	}
	switch s[last] {
	case 'n':
		d = time.Nanosecond
	case 'u':
		d = time.Microsecond
	case 'm':
		d = time.Millisecond
	case 'S':
		d = time.Second
	case 'M':
		d = time.Minute
	case 'H':
		d = time.Hour
	default:
		return 0, false
	}
	return time.Duration(n) * d, true
}
