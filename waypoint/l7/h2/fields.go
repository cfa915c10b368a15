package h2

import (
	"errors"
	"strings"

	"github.com/weft-mesh/weft/internal/http2"
	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

// Why a head is refused. The stream is reset then, with PROTOCOL_ERROR.
var (
	errPseudo    = errors.New("pseudo fields that do not belong in the message")
	errMethod    = errors.New("malformed method")
	errScheme    = errors.New("a scheme that is not http or https")
	errPath      = errors.New("malformed path")
	errAuthority = errors.New("missing or malformed authority")
	errMismatch  = errors.New("host differs from the authority")
	errLength    = errors.New("malformed or repeated content-length")
	errLookalike = errors.New("a field that looks like one of framing")
	errStatus    = errors.New("malformed status")
)

// A text is what the lines of a head are made in. Its room is made before, so
// what points into it stays good.
type text struct {
	h   *msg.Head
	buf []byte
}

// begin makes room for all of fields.
func begin(h *msg.Head, buf []byte, fields []http2.Field) text {
	h.Reset()
	n := 0
	for _, f := range fields {
		n += len(f.Name) + len(f.Value) + 4
	}
	if cap(buf) < n {
		buf = make([]byte, 0, max(n, 1<<10))
	}
	return text{h, buf[:0]}
}

// value adds what is no field, and returns it.
func (t *text) value(v string) []byte {
	from := len(t.buf)
	t.buf = append(t.buf, v...)
	return t.buf[from:len(t.buf):len(t.buf)]
}

// field adds a field.
func (t *text) field(id msg.ID, name, value string) {
	line := uint32(len(t.buf))
	t.buf = append(t.buf, name...)
	t.buf = append(t.buf, ": "...)
	start := uint32(len(t.buf))
	t.buf = append(t.buf, value...)
	end := uint32(len(t.buf))
	t.buf = append(t.buf, "\r\n"...)
	t.h.Fields = append(t.h.Fields, msg.Field{Line: line, NameLen: uint16(len(name)), Value: start, ValueEnd: end, End: end + 2, ID: id})
}

// ReadRequest fills h from the head of a request, whose text it copies into buf
// (or a larger one, which it returns). end says that there is no body.
//
// What it takes is what the codec of HTTP/1 takes too: so a request means the
// same whichever way it came, and whichever way it goes on.
func ReadRequest(h *msg.Head, buf []byte, fields []http2.Field, end bool) ([]byte, error) {
	t := begin(h, buf, fields)
	for len(fields) > 0 && fields[0].IsPseudo() {
		v := t.value(fields[0].Value)
		switch fields[0].Name {
		case ":method":
			h.Method = v
		case ":scheme":
			h.Scheme = v
		case ":path":
			h.Path = v
		case ":authority":
			h.Authority = v
		default:
			return t.buf, errPseudo
		}
		fields = fields[1:]
	}
	host, err := t.rest(fields)
	if err == nil && h.Length > 0 && end {
		err = errLength
	}
	if err == nil {
		err = checkRequest(h, host)
	}
	h.Lines = t.buf
	h.Body = bodyOf(h.Length, end)
	return t.buf, err
}

func bodyOf(length int64, end bool) msg.BodyKind {
	switch {
	case end || length == 0:
		return msg.NoBody
	case length > 0:
		return msg.Sized
	}
	return msg.Streamed
}

// rest adds the regular fields. The text of host is in the buffer, and is no
// field any more; nil if there is none.
func (t *text) rest(fields []http2.Field) (host []byte, err error) {
	h := t.h
	cookies := 0
	for _, f := range fields {
		id := msg.Identify(f.Name)
		switch id {
		case msg.Host:
			if host != nil {
				return nil, errAuthority
			}
			host = append(t.value(f.Value), []byte{}...)
			continue
		case msg.ContentLength:
			n, ok := parseLength(f.Value)
			if !ok || h.Length >= 0 {
				return nil, errLength
			}
			h.Length = n
			continue
		case msg.Cookie:
			if cookies++; cookies > 1 {
				continue
			}
			if all, several := joinCookies(fields); several {
				f.Value = all
			}
		case msg.Other:
			if strings.IndexByte(f.Name, '_') >= 0 {
				switch strings.ReplaceAll(f.Name, "_", "-") {
				case "content-length", "transfer-encoding":
					return nil, errLookalike
				}
			}
		}
		t.field(id, f.Name, f.Value)
	}
	return host, nil
}

// joinCookies joins the crumbs of a cookie (RFC 9113 8.2.3).
func joinCookies(fields []http2.Field) (string, bool) {
	var b strings.Builder
	n := 0
	for _, f := range fields {
		if f.Name != "cookie" {
			continue
		}
		if n++; n > 1 {
			b.WriteString("; ")
		}
		b.WriteString(f.Value)
	}
	return b.String(), n > 1
}

// checkRequest checks the first line that the request would have in HTTP/1.
func checkRequest(h *msg.Head, host []byte) error {
	if len(h.Method) == 0 {
		return errMethod
	}
	for _, c := range h.Method {
		if !msg.IsToken(c) {
			return errMethod
		}
	}
	switch {
	case h.Authority == nil:
		h.Authority = host
	case host != nil && !strings.EqualFold(string(host), string(h.Authority)):
		return errMismatch
	}
	if !validAuthority(h.Authority) {
		return errAuthority
	}
	if string(h.Method) == "CONNECT" {
		if h.Scheme != nil || h.Path != nil { // RFC 9113 8.5
			return errPseudo
		}
		return nil
	}
	if s := string(h.Scheme); s != "http" && s != "https" {
		return errScheme
	}
	if len(h.Path) == 0 || h.Path[0] != '/' && !(string(h.Path) == "*" && string(h.Method) == "OPTIONS") {
		return errPath
	}
	for _, c := range h.Path {
		if !inTarget[c] {
			return errPath
		}
	}
	return nil
}

// ReadResponse fills h from the head of a response, interim or final. bodiless
// says that none of its kind has a body, for the request was HEAD.
func ReadResponse(h *msg.Head, buf []byte, fields []http2.Field, end, bodiless bool) ([]byte, error) {
	t := begin(h, buf, fields)
	if len(fields) == 0 || fields[0].Name != ":status" || len(fields) > 1 && fields[1].IsPseudo() {
		return t.buf, errPseudo
	}
	v := fields[0].Value
	if len(v) != 3 || v[0] < '1' || v[0] > '5' || v[1] < '0' || v[1] > '9' || v[2] < '0' || v[2] > '9' {
		return t.buf, errStatus
	}
	h.Status = int(v[0]-'0')*100 + int(v[1]-'0')*10 + int(v[2]-'0')
	if h.Status == 101 || h.Status < 200 && end { // RFC 9113 8.6, 8.1
		return t.buf, errStatus
	}
	host, err := t.rest(fields[1:])
	if err == nil && host != nil {
		err = errAuthority
	}
	h.Lines = t.buf
	h.Body = bodyOf(h.Length, end)
	if bodiless || h.Status == 204 || h.Status == 304 || h.Status < 200 {
		h.Body = msg.NoBody
	} else if err == nil && end && h.Length > 0 {
		err = errLength
	}
	return t.buf, err
}

// ReadTrailers fills h from trailers. Those of framing, and of routing, are left
// out: whoever reads them after the body must not believe them.
func ReadTrailers(h *msg.Head, buf []byte, fields []http2.Field) []byte {
	t := begin(h, buf, fields)
	for _, f := range fields {
		id := msg.Identify(f.Name)
		switch id {
		case msg.Host, msg.ContentLength, msg.TransferEncoding, msg.Trailer, msg.TE, msg.Authorization, msg.Cookie, msg.SetCookie,
			msg.XForwardedFor, msg.XForwardedProto, msg.XForwardedHost, msg.XForwardedClientCert:
			continue
		}
		t.field(id, f.Name, f.Value)
	}
	h.Lines = t.buf
	return t.buf
}

// Length returns what a field says of the length of a body, and false if it is
// not the one that does.
func Length(f http2.Field) (int64, bool) {
	if f.Name != "content-length" {
		return 0, false
	}
	return parseLength(f.Value)
}

func parseLength(s string) (int64, bool) {
	if s == "" || len(s) > 18 {
		return 0, false
	}
	n := int64(0)
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return 0, false
		}
		n = n*10 + int64(s[i]-'0')
	}
	return n, true
}
