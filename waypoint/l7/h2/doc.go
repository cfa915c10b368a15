// Package h2 speaks HTTP/2 (RFC 9113) at the level of frames, as the server of
// clients and as the client of endpoints.
//
// A connection has one goroutine that reads, Conn.Run. It calls the Sinks of
// streams with what has come, and they do not wait. What is to be sent is
// queued under the connection's mutex by whoever has it, and one write takes
// what has gathered: whoever flushes while nobody writes does it, and never
// waits for the peer, for what does not fit into the socket is left to a
// goroutine of the connection. So the reader of one connection may feed
// another, and one that stalls holds up nobody.
//
// Memory is bounded by flow control: a stream's window is opened again when
// its bytes have left, and not when they have come.
package h2
