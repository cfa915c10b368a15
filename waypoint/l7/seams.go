package l7

import (
	"context"
	"net"

	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

// A Body is what follows a head, read piece by piece.
type Body interface {
	// Next waits until some bytes have come and returns them: at least one, and
	// valid until the next call. io.EOF is the orderly end. Any other error means
	// that what came is a part of a body, and is final.
	Next() ([]byte, error)
	// Trailer returns the trailers after io.EOF; nil if there are none. It is
	// valid as long as the body's connection is the exchange's.
	Trailer() *msg.Head
}

// A client is the client's side of one exchange: the connection of HTTP/1, or
// one stream of HTTP/2. Its methods are called by the exchange's goroutine, and
// Body's by one that sends the request on meanwhile.
type client interface {
	// body returns the body of the request. It is called once. Reading from it
	// is what makes a codec send 100 (Continue), if that is expected.
	body() Body
	// inform sends an interim response (1xx, not 101).
	inform(h *msg.Head) error
	// respond sends the final head, or that of 101, and with it the first piece
	// of the body; end says that there is no more. If h has no body (HEAD,
	// 204, 304), piece is empty and end is true.
	respond(h *msg.Head, piece []byte, end bool) error
	// write sends more of the body. It returns when piece may be used again.
	write(piece []byte) error
	// finish ends the body, with trailers if h is not nil.
	finish(h *msg.Head) error
	// abort makes sure that the client does not take a part of the response
	// for the whole of it.
	abort()
	// tunnel gives the connection (or the stream as one) away, after respond
	// with 101, or 2xx for CONNECT. What has been read ahead is read from it
	// first.
	tunnel() net.Conn
}

// A call is one try: a request on its way to one endpoint. Its methods are
// called by the exchange's goroutine, but for write and finish, which the one
// that sends the body calls, and abort, which anybody may call at any time.
type call interface {
	// send sends the head and with it the first piece of the body; end says
	// that there is no more. It does not keep head or piece.
	send(head *msg.Head, piece []byte, end bool) error
	write(piece []byte) error
	finish(trailer *msg.Head) error
	// receive waits for the next head, of an interim response or of the final
	// one, and fills h.
	receive(h *msg.Head) error
	// body returns the body of the final response. It is called once.
	body() Body
	// abort ends the call: whatever waits in it returns an error.
	abort()
	// close ends the call when nobody uses it any more. whole says that the
	// request was sent to its end and the response read to its end: only then
	// may the connection be used again.
	close(whole bool)
	// fresh reports whether the connection has carried no exchange before. If
	// it has and breaks before the first byte of an answer, its end may have
	// crossed with the request.
	fresh() bool
	// tunnel gives the connection away, after 101 or the 2xx to CONNECT.
	tunnel() net.Conn
}

// A transport carries calls to one endpoint in one version of HTTP. It holds the
// connections to it.
type transport interface {
	// call reserves a connection, or a stream of one, and dials if there is
	// none. ctx bounds that only. The error is one of the try's.
	call(ctx context.Context, x *Exchange) (call, error)
	// close closes the idle connections, and those in use when they become
	// idle.
	close()
}

// observe is for bodies that somebody wants to see pass by.
type observe func(piece []byte)
