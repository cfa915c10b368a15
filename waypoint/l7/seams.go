package l7

import (
	"context"
	"net"

	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

// A Body is what follows a head, read piece by piece.
type Body interface {
	// Next waits until some bytes have come and returns them, valid until the
	// next call. io.EOF is the orderly end, and may come together with the last
	// bytes. Any other error means that what came is a part of a body; it is
	// final.
	Next() ([]byte, error)
	// Ready reports whether Next returns without waiting. A body may say no
	// although it would.
	Ready() bool
	// Trailer returns the trailers after io.EOF; nil if there are none. It is
	// valid until the exchange ends.
	Trailer() *msg.Head
}

// A client is the client's side of one exchange: the connection of HTTP/1, or
// one stream of HTTP/2. Its methods are called by the exchange's goroutine; but
// the body's by one that sends the request on meanwhile, and stop and abort by
// anybody at any time.
type client interface {
	// body returns the body of the request; it is the same one at each call.
	// Reading from it is what makes a codec send 100 (Continue), if the client
	// expects it.
	body() Body
	// inform sends an interim response (1xx, not 101).
	inform(h *msg.Head) error
	// respond sends the final head, or that of 101, and with it the first piece
	// of the body; end says that there is no more. If the response has no body
	// (HEAD, 204, 304), piece is empty and end is true. closing asks to end the
	// connection with this response, where that is a thing to ask for.
	respond(x *Exchange, piece []byte, end, closing bool) error
	// write sends more of the body. It does not keep piece.
	write(piece []byte) error
	// finish ends the body, after a last piece, with trailers if h is not nil.
	finish(piece []byte, h *msg.Head) error
	// stop makes body().Next return an error: the rest of the request is of no
	// interest, and the client is told so if its version knows how.
	stop()
	// abort makes sure that the client does not take a part of the response
	// for the whole of it, and makes whatever waits in the client return.
	abort()
	// tunnel gives the connection (or the stream as one) away, after respond
	// with 101, or 2xx for CONNECT. What has been read ahead is read from it
	// first.
	tunnel() net.Conn
}

// A call is one try: a request on its way to one endpoint. Its methods are
// called by the exchange's goroutine, but for write and finish, which the one
// that sends the body calls, and abort, which anybody may call until close.
type call interface {
	// send sends the head and with it the first piece of the body; end says
	// that there is no more. It keeps neither.
	send(head *msg.Head, piece []byte, end bool) error
	// write sends more of the body. It does not keep piece.
	write(piece []byte) error
	// finish ends the body, after a last piece, with trailers if h is not nil.
	finish(piece []byte, h *msg.Head) error
	// receive waits for the next head, of an interim response or of the final
	// one, and fills h. What h points into is valid until close.
	receive(h *msg.Head) error
	// body returns the body of the final response; it is the same one at each
	// call.
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
	// tunnel gives the connection away, after 101 or the 2xx to CONNECT. Close
	// is not called then.
	tunnel() net.Conn
}

// A transport carries calls to one endpoint in one version of HTTP. It holds the
// connections to it.
type transport interface {
	// call reserves a connection, or a stream of one, and dials if there is
	// none. ctx bounds that only. An error may be a *tryError that says what to
	// make of it; else it was no connection.
	call(ctx context.Context, x *Exchange) (call, error)
	// trim closes connections that have been idle since before the given
	// nanoseconds of the coarse clock.
	trim(before int64)
	// spare closes an idle connection, if there is one, to make room for
	// another endpoint's, and reports whether the room is there already.
	spare() bool
	// close closes the idle connections, and those in use when they become
	// idle.
	close()
}
