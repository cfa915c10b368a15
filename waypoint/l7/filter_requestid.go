package l7

import (
	"encoding/binary"

	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

// requestID gives each request a name that logs of all its hops have. One that
// a client has given is kept: so it is the same from the first hop on. The
// headers of traces pass as they are.
type requestID struct {
	Pass
	e *Engine
}

// OnRequest names the request.
func (f *requestID) OnRequest(x *Exchange) Verdict {
	if id := x.Request.Get(msg.XRequestID); len(id) > 0 {
		x.RequestID = id
		return Continue
	}
	x.Request.RemoveID(msg.XRequestID)
	var b [36]byte
	msg.AppendID(&x.Request, msg.XRequestID, appendUUID(b[:0], f.e.rand(), f.e.rand()))
	x.RequestID = x.Request.Get(msg.XRequestID)
	return Continue
}

// appendUUID appends a UUID of version 4 (RFC 9562 5.4).
func appendUUID(dst []byte, high, low uint64) []byte {
	var b [16]byte
	binary.BigEndian.PutUint64(b[:], high)
	binary.BigEndian.PutUint64(b[8:], low)
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	const digits = "0123456789abcdef"
	var text [36]byte
	at := 0
	for i, c := range b {
		if i == 4 || i == 6 || i == 8 || i == 10 {
			text[at] = '-'
			at++
		}
		text[at], text[at+1] = digits[c>>4], digits[c&15]
		at += 2
	}
	return append(dst, text[:]...)
}
