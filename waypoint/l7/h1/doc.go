// Package h1 is the HTTP/1.1 codec (RFC 9112) without I/O: it reads heads and
// chunks from bytes that somebody has received, and writes them to bytes that
// somebody will send.
//
// It is strict, because a proxy that reads a message differently from who is
// behind it can be made to pass on requests that nobody has checked. What the
// RFC lets a recipient repair or guess is refused here, and nothing of the
// framing is passed on as it came: it is always made anew.
package h1
