package h1

import (
	"strconv"

	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

// AppendRequest appends the head of a request to an HTTP/1.1 server. A body that
// is streamed is announced as chunked.
func AppendRequest(dst []byte, h *msg.Head) []byte {
	dst = append(dst, h.Method...)
	dst = append(dst, ' ')
	if len(h.Path) == 0 {
		dst = append(dst, h.Authority...) // CONNECT
	} else {
		dst = append(dst, h.Path...)
	}
	dst = append(dst, " HTTP/1.1\r\nhost: "...)
	dst = append(dst, h.Authority...)
	dst = append(dst, "\r\n"...)
	dst = h.AppendLines(dst)
	switch {
	case h.Body == msg.Streamed:
		dst = append(dst, "transfer-encoding: chunked\r\n"...)
	case h.Body == msg.Sized, h.Length == 0:
		dst = appendLength(dst, h.Length)
	case bodyExpected(h.Method):
		dst = append(dst, "content-length: 0\r\n"...)
	}
	dst = appendUpgrade(dst, h)
	return append(dst, "\r\n"...)
}

// bodyExpected reports whether a request without a body says so (RFC 9110 8.6).
func bodyExpected(method []byte) bool {
	switch string(method) {
	case "POST", "PUT", "PATCH":
		return true
	}
	return false
}

func appendLength(dst []byte, n int64) []byte {
	dst = append(dst, "content-length: "...)
	dst = strconv.AppendInt(dst, n, 10)
	return append(dst, "\r\n"...)
}

func appendUpgrade(dst []byte, h *msg.Head) []byte {
	if len(h.Protocol) == 0 {
		return dst
	}
	dst = append(dst, "connection: upgrade\r\nupgrade: "...)
	dst = append(dst, h.Protocol...)
	return append(dst, "\r\n"...)
}

// A Reader of a response is who it is written for.
type Reader struct {
	Minor int  // the version of the request
	Close bool // the connection ends after this response
	// Bodiless is set if the request was HEAD, or a CONNECT that succeeded: the
	// framing is then only what the response declares.
	Bodiless bool
}

// Chunked reports whether a body of h is sent to r in chunks. If it is streamed
// and not in chunks, its end is the connection's.
func (r Reader) Chunked(h *msg.Head) bool { return h.Body == msg.Streamed && r.Minor == 1 }

// AppendResponse appends the head of a response. A body that is streamed is
// announced as chunked to HTTP/1.1 clients; for one of HTTP/1.0 r.Close must be
// set then.
func AppendResponse(dst []byte, h *msg.Head, r Reader) []byte {
	dst = append(dst, "HTTP/1.1 "...)
	dst = strconv.AppendInt(dst, int64(h.Status), 10)
	dst = append(dst, ' ')
	dst = append(dst, Reason(h.Status)...)
	dst = append(dst, "\r\n"...)
	dst = h.AppendLines(dst)
	switch {
	case h.Status < 200 || h.Status == 204:
	case h.Status == 304 || r.Bodiless:
		if h.Length >= 0 {
			dst = appendLength(dst, h.Length)
		}
	case h.Body == msg.Sized:
		dst = appendLength(dst, h.Length)
	case h.Body == msg.NoBody:
		dst = append(dst, "content-length: 0\r\n"...)
	case r.Minor == 1:
		dst = append(dst, "transfer-encoding: chunked\r\n"...)
	}
	switch {
	case len(h.Protocol) > 0:
		dst = appendUpgrade(dst, h)
	case r.Close:
		dst = append(dst, "connection: close\r\n"...)
	case r.Minor == 0 && h.Status >= 200:
		dst = append(dst, "connection: keep-alive\r\n"...)
	}
	return append(dst, "\r\n"...)
}

// Reason returns the phrase that goes with a status.
func Reason(status int) string {
	if status >= 0 && status < len(reasons) && reasons[status] != "" {
		return reasons[status]
	}
	return "Unknown"
}

// reasons are the phrases by status. It is read only.
var reasons = [...]string{
	100: "Continue", 101: "Switching Protocols", 102: "Processing", 103: "Early Hints",
	200: "OK", 201: "Created", 202: "Accepted", 203: "Non-Authoritative Information", 204: "No Content",
	205: "Reset Content", 206: "Partial Content", 207: "Multi-Status", 208: "Already Reported", 226: "IM Used",
	300: "Multiple Choices", 301: "Moved Permanently", 302: "Found", 303: "See Other", 304: "Not Modified",
	305: "Use Proxy", 307: "Temporary Redirect", 308: "Permanent Redirect",
	400: "Bad Request", 401: "Unauthorized", 402: "Payment Required", 403: "Forbidden", 404: "Not Found",
	405: "Method Not Allowed", 406: "Not Acceptable", 407: "Proxy Authentication Required", 408: "Request Timeout",
	409: "Conflict", 410: "Gone", 411: "Length Required", 412: "Precondition Failed", 413: "Payload Too Large",
	414: "URI Too Long", 415: "Unsupported Media Type", 416: "Range Not Satisfiable", 417: "Expectation Failed",
	418: "I'm a teapot", 421: "Misdirected Request", 422: "Unprocessable Entity", 423: "Locked", 424: "Failed Dependency",
	425: "Too Early", 426: "Upgrade Required", 428: "Precondition Required", 429: "Too Many Requests",
	431: "Request Header Fields Too Large", 451: "Unavailable For Legal Reasons",
	500: "Internal Server Error", 501: "Not Implemented", 502: "Bad Gateway", 503: "Service Unavailable",
	504: "Gateway Timeout", 505: "HTTP Version Not Supported", 506: "Variant Also Negotiates", 507: "Insufficient Storage",
	508: "Loop Detected", 510: "Not Extended", 511: "Network Authentication Required",
}
