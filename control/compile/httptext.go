package compile

import "strings"

// What objects have put into the messages of HTTP, checked: a waypoint sends
// nothing that is not in the grammar, and its author should know before.

// framing are header fields of a connection, or of how a message is put on it,
// which waypoints write themselves. Objects may not set them, which notEdited
// tells.
var framing = []string{"connection", "content-length", "expect", "http2-settings", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"}

const notEdited = "is passed over: how messages are framed is the proxies' own matter"

// authority checks what requests are sent on, or redirected, with as their host.
func (f *findings) authority(path, a string) {
	if !validAuthority(a) {
		f.bad(path, "is %q, want a host, with a port if need be", a)
	}
}

// target checks what a path is made of.
func (f *findings) target(path, s string) {
	if !validTarget(s) || strings.Contains(s, "#") {
		f.bad(path, "is %q, and a path has no spaces, control characters, backslashes or #: write them as %%20 and so on", s)
	}
}

// location checks the path that clients are sent to, which may name a part of
// what is there.
func (f *findings) location(path, s string) {
	if !validTarget(s) {
		f.bad(path, "is %q, and a path has no spaces, control characters or backslashes: write them as %%20 and so on", s)
	}
}

// validAuthority reports whether s can be the host of a request (RFC 3986, 3.2,
// without user information).
func validAuthority(s string) bool {
	return validTarget(s) && !strings.ContainsAny(s, "/@?#") && s != ""
}

// validTarget reports whether s can be part of a URI (RFC 3986, 2).
func validTarget(s string) bool {
	for i := range len(s) {
		if b := s[i]; b <= ' ' || b >= 0x7f || b == '\\' {
			return false
		}
	}
	return true
}

// validToken reports whether s can be a header's name or a method (RFC 9110,
// 5.6.2).
func validToken(s string) bool {
	for i := range len(s) {
		b := s[i]
		if b <= ' ' || b >= 0x7f || strings.IndexByte(`"(),/:;<=>?@[\]{}`, b) >= 0 {
			return false
		}
	}
	return s != ""
}

// validFieldValue reports whether s can be a header's value (RFC 9110, 5.5).
func validFieldValue(s string) bool {
	for i := range len(s) {
		if b := s[i]; b < ' ' && b != '\t' || b == 0x7f {
			return false
		}
	}
	return true
}
