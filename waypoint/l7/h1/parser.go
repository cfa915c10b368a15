package h1

import (
	"bytes"

	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

// Limits bound a head. 0 is no bound.
type Limits struct {
	Head   int // bytes of it
	Fields int // how many
	Target int // bytes of a request target
}

// A Parser reads the heads that come on one connection in one direction. Its
// zero value is ready, without limits.
//
// Request and Response are given all bytes from the beginning of a head on,
// again with more of them as long as they return 0. Then they return the
// length of the head, and the message's Head points into the bytes that were
// given last.
type Parser struct {
	Limits Limits

	// What the last head said of its connection, not of the message:

	Minor      int  // HTTP/1.0 or 1.1
	Close      bool // there is nothing after this message
	Continue   bool // the client waits for 100 before it sends the body
	UntilClose bool // the response's body ends with the connection

	scanned int // up to here whole lines have been found
}

// head returns the length of the head at the beginning of b, or 0 if it has not
// come to its end. A line that ends otherwise than with CRLF is refused as soon
// as it is seen: who sends such may wait for an answer.
func (p *Parser) head(b []byte) (int, error) {
	for at := p.scanned; ; {
		i := bytes.IndexByte(b[at:], '\n')
		if i < 0 {
			p.scanned = at
			if p.Limits.Head > 0 && len(b) >= p.Limits.Head {
				return 0, errLarge
			}
			return 0, nil
		}
		if i == 0 || b[at+i-1] != '\r' {
			return 0, errLineEnd
		}
		at += i + 1
		if i == 1 { // an empty line
			if at == 2 {
				return 0, errLineEnd // nothing before it: not a head
			}
			p.scanned = 0
			if p.Limits.Head > 0 && at > p.Limits.Head {
				return 0, errLarge
			}
			return at, nil
		}
	}
}

// Request reads a request's head. Its scheme is not in it (but in an absolute
// target, where it says nothing that could be believed), so h.Scheme is left
// nil for the caller to set.
//
// A target in absolute form must name the same host as the field does, and
// becomes one in origin form (RFC 9112 3.2.2).
func (p *Parser) Request(h *msg.Head, b []byte) (int, error) {
	n, err := p.head(b)
	if n == 0 {
		return 0, err
	}
	b = b[:n]
	h.Reset()
	h.Lines = b
	i := 0
	for msg.IsToken(b[i]) {
		i++
	}
	if i == 0 || i > 32 || b[i] != ' ' {
		return 0, errLine
	}
	h.Method = b[:i:i]
	i++
	from := i
	for inTarget[b[i]] {
		i++
	}
	target := b[from:i:i]
	if len(target) == 0 || b[i] != ' ' || n-i < 11 {
		return 0, errLine
	}
	if p.Limits.Target > 0 && len(target) > p.Limits.Target {
		return 0, errLongTarget
	}
	v := b[i+1 : i+11]
	if string(v[:7]) != "HTTP/1." || v[7] != '0' && v[7] != '1' || v[8] != '\r' || v[9] != '\n' {
		return 0, errLine
	}
	p.Minor = int(v[7] - '0')
	f, err := p.fields(h, i+11)
	if err != nil {
		return 0, err
	}
	if err := setTarget(h, target, f.host, p.Minor); err != nil {
		return 0, err
	}
	p.Continue = f.expect && p.Minor == 1
	switch {
	case f.chunked && p.Minor == 0:
		return 0, errCoding
	case f.chunked:
		h.Body = msg.Streamed
	case f.length > 0:
		h.Body = msg.Sized
	}
	h.Length = f.length
	// A body before the other protocol's first byte is allowed, and nobody has
	// it: the request stays one of HTTP. The upgrade to HTTP/2 in clear is dead
	// (RFC 9113 3.1) and would carry requests past the engine.
	if f.upgrade != nil && f.upgrading && h.Body == msg.NoBody && p.Minor == 1 && !isH2C(f.upgrade) {
		h.Protocol = f.upgrade
	}
	return n, nil
}

func isH2C(protocol []byte) bool {
	return len(protocol) >= 3 && msg.EqualFold(protocol[:3], "h2c") || bytes.Contains(protocol, []byte("h2c"))
}

// setTarget fills in what the target and the field Host say.
func setTarget(h *msg.Head, target, host []byte, minor int) error {
	if host == nil && minor == 1 {
		return errHost
	}
	switch {
	case string(h.Method) == "CONNECT":
		if !validAuthority(target) || bytes.LastIndexByte(target, ':') < 0 {
			return errTarget
		}
		if host != nil && !sameAuthority(host, target) {
			return errMismatch
		}
		h.Authority = target
	case target[0] == '/':
		h.Authority, h.Path = host, target
	case len(target) == 1 && target[0] == '*' && string(h.Method) == "OPTIONS":
		h.Authority, h.Path = host, target
	default:
		return absolute(h, target, host)
	}
	return nil
}

// absolute fills in a target in absolute form.
func absolute(h *msg.Head, target, host []byte) error {
	i := bytes.Index(target, []byte("://"))
	if i < 0 || !msg.EqualFold(target[:i], "http") && !msg.EqualFold(target[:i], "https") {
		return errTarget
	}
	rest := target[i+3:]
	end := bytes.IndexAny(rest, "/?")
	if end < 0 {
		end = len(rest)
	}
	authority, path := rest[:end:end], rest[end:]
	if !validAuthority(authority) {
		return errTarget
	}
	if host != nil && !sameAuthority(host, authority) {
		return errMismatch
	}
	h.Authority = authority
	switch {
	case len(path) == 0 && string(h.Method) == "OPTIONS":
		msg.SetPath(h, "*")
	case len(path) == 0:
		msg.SetPath(h, "/")
	case path[0] == '?':
		msg.SetPath(h, "/"+string(path))
	default:
		h.Path = path
	}
	return nil
}

// Response reads a response's head, of a request with the given method.
func (p *Parser) Response(h *msg.Head, b []byte, method []byte) (int, error) {
	n, err := p.head(b)
	if n == 0 {
		return 0, err
	}
	b = b[:n]
	h.Reset()
	h.Lines = b
	if n < 16 || string(b[:7]) != "HTTP/1." || b[7] != '0' && b[7] != '1' || b[8] != ' ' {
		return 0, errStatusLine
	}
	p.Minor = int(b[7] - '0')
	for _, c := range b[9:12] {
		if c < '0' || c > '9' {
			return 0, errStatusLine
		}
		h.Status = h.Status*10 + int(c-'0')
	}
	if h.Status < 100 || h.Status > 599 || b[12] != ' ' && b[12] != '\r' {
		return 0, errStatusLine
	}
	i := 12
	for msg.IsValue(b[i]) {
		i++
	}
	if b[i] != '\r' || b[i+1] != '\n' {
		return 0, errStatusLine
	}
	f, err := p.fields(h, i+2)
	if err != nil {
		return 0, err
	}
	if f.chunked && p.Minor == 0 {
		return 0, errCoding // RFC 9112 6.1: others take it for a body until the connection ends
	}
	p.frame(h, f, method)
	if f.upgrade != nil && (h.Status == 101 || h.Status == 426) {
		h.Protocol = f.upgrade
	}
	return n, nil
}

// frame finds out what the body of a response is (RFC 9112 6.3).
func (p *Parser) frame(h *msg.Head, f framing, method []byte) {
	p.UntilClose = false
	h.Length = f.length
	switch {
	case h.Status < 200, h.Status == 204, string(method) == "CONNECT" && h.Status < 300:
		// There is no body. A sender that announces one here may send one, and
		// it would be read as the next response.
		if f.chunked || f.length > 0 {
			p.Close = true
		}
		h.Length = -1
	case string(method) == "HEAD", h.Status == 304:
	case f.chunked:
		h.Body = msg.Streamed
	case f.length > 0:
		h.Body = msg.Sized
	case f.length < 0:
		h.Body = msg.Streamed
		p.UntilClose, p.Close = true, true
	}
}
