package l7

import (
	"errors"
	"io"
	"syscall"

	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

const (
	// spliceFrom is how much of a body must be left for its bytes not to be
	// copied to the proxy and back: a pipe costs some system calls.
	spliceFrom = 256 << 10
	// spliceTurn is how much is moved between two looks at the clock.
	spliceTurn = 256 << 10
)

// splice lets the kernel move the rest of a body, if it has a length and both
// ends are sockets (splice(2)). It returns false if it cannot, and then has done
// nothing.
func (e *Engine) splice(x *Exchange, cl client, c call) (*tryError, bool) {
	d, ok := cl.(*http1)
	u, fromHTTP1 := c.(*http1Call)
	if !ok || !fromHTTP1 || d.sock == nil || u.sock == nil || d.chunked || u.in.kind != msg.Sized || u.in.left < spliceFrom {
		return nil, false
	}
	if u.r < u.w {
		piece, err := u.in.Next() // which does not wait, and is not the end
		if err != nil {
			return kindOf(err, failedProtocol), true
		}
		x.ResponseBytes += int64(len(piece))
		if err := d.write(piece); err != nil {
			return &tryError{kind: failedClient, cause: err}, true
		}
	}
	from := io.LimitedReader{R: u.sock.TCPConn}
	for u.in.left > 0 {
		from.N = min(u.in.left, spliceTurn)
		n, err := d.sock.TCPConn.ReadFrom(&from)
		u.in.left -= n
		x.ResponseBytes += n
		x.moved()
		switch {
		case err != nil && (errors.Is(err, syscall.EPIPE) || d.sock.left()):
			return &tryError{kind: failedClient, cause: err}, true
		case err != nil:
			return kindOf(err, closedOr(err)), true
		case from.N > 0 && u.in.left > 0:
			return kindOf(io.ErrUnexpectedEOF, failedClosed), true
		}
	}
	u.in.done = true
	return nil, true
}
