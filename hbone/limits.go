package hbone

import (
	"math"
	"time"

	"github.com/weft-mesh/weft/internal/http2"
)

// Limits bound what one tunnel may use. Every zero field means its default.
type Limits struct {
	// StreamWindow is what a peer may send on a new stream before anyone has
	// read it: 256 KiB, and at least 64 KiB. It doubles up to MaxStreamWindow
	// (4 MiB) as often as a whole window has been read while not more than half
	// of one was unread: so only streams whose reader keeps up get more.
	StreamWindow, MaxStreamWindow int
	// ConnWindow is what a peer may send on the whole tunnel before we have
	// received it: 16 MiB. It is given back on receipt, not when it is read,
	// so that a stalled stream cannot stall its neighbours.
	ConnWindow int
	// QueueLimit bounds the received and unread bytes of all streams of a
	// tunnel: 64 MiB. Over it the tunnel is not given back its window until
	// some are read. One tunnel never holds more than QueueLimit and
	// ConnWindow together.
	QueueLimit int
	// MaxFrame is the largest frame taken from a peer: 1 MiB.
	MaxFrame int
	// MaxStreams is how many streams may be open at once: 200 towards a
	// server, 100 from a client.
	MaxStreams int
	// MaxHeaderList bounds a header list by the measure of RFC 9113 6.5.2:
	// 64 KiB towards a server, 16 KiB towards a client.
	MaxHeaderList int
	// A PING is sent PingInterval (10 s) after the answer to the last one, and
	// the tunnel is dead when PingTimeout (20 s) passes without an answer.
	PingInterval, PingTimeout time.Duration
}

// withDefaults returns l with its zero fields filled in and the others brought
// into the range that the protocol allows.
func (l Limits) withDefaults(r Role) Limits {
	server := r == ServerRole
	l.StreamWindow = pick(l.StreamWindow, 256<<10, http2.InitialWindow, http2.MaxWindow)
	l.MaxStreamWindow = pick(l.MaxStreamWindow, 4<<20, l.StreamWindow, http2.MaxWindow)
	l.ConnWindow = pick(l.ConnWindow, 16<<20, http2.InitialWindow, http2.MaxWindow)
	l.QueueLimit = pick(l.QueueLimit, 64<<20, 1, math.MaxInt)
	l.MaxFrame = pick(l.MaxFrame, 1<<20, http2.MinFrameSize, http2.MaxFrameSize)
	l.MaxStreams = pick(l.MaxStreams, choose(server, 200, 100), 1, 1<<20)
	l.MaxHeaderList = pick(l.MaxHeaderList, choose(server, 64<<10, 16<<10), 1<<10, 1<<20)
	l.PingInterval = pick(l.PingInterval, 10*time.Second, time.Millisecond, math.MaxInt64)
	l.PingTimeout = pick(l.PingTimeout, 20*time.Second, time.Millisecond, math.MaxInt64)
	return l
}

// pick returns v, or def if v is zero, moved into the range lo to hi.
func pick[T int | time.Duration](v, def, lo, hi T) T {
	if v == 0 {
		v = def
	}
	return min(max(v, lo), hi)
}

func choose(cond bool, yes, no int) int {
	if cond {
		return yes
	}
	return no
}
