package l7

import "github.com/weft-mesh/weft/waypoint/l7/msg"

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
