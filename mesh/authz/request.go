package authz

import (
	"bytes"
	"net/netip"
	"slices"
	"strings"

	"github.com/weft-mesh/weft/mesh"
)

// ofRequest reports whether m asks for what is known of requests only.
func ofRequest(m *mesh.Match) bool {
	return len(m.Methods)+len(m.NotMethods)+len(m.Hosts)+len(m.NotHosts)+len(m.Paths)+len(m.NotPaths)+
		len(m.Headers)+len(m.RemoteIPs)+len(m.NotRemoteIPs) > 0
}

// request reports whether the fields of m that are about requests hold.
func (e *evaluation) request(m *mesh.Match) bool {
	r := e.HTTP
	if !fits(m.Methods, m.NotMethods, func(s mesh.StringMatch) bool { return text(s, r.Method) }) ||
		!fits(m.Hosts, m.NotHosts, func(s mesh.StringMatch) bool { return host(s, r.Host) }) ||
		!fits(m.Paths, m.NotPaths, func(s mesh.StringMatch) bool { return path(s, e.path) }) ||
		!fits(m.RemoteIPs, m.NotRemoteIPs, func(p netip.Prefix) bool { return contains(p, e.remote) }) {
		return false
	}
	for i := range m.Headers {
		if !e.header(&m.Headers[i]) {
			return false
		}
	}
	return true
}

// requestNotUnderstood is notUnderstood for the fields that are about requests.
func (e *evaluation) requestNotUnderstood(m *mesh.Match) bool {
	strangePath := func(s mesh.StringMatch) bool {
		return strange(s) && (s.Kind != mesh.MatchTemplate || mesh.ValidTemplate(s.Value) != nil)
	}
	strangeHeader := func(h mesh.HeaderMatch) bool {
		return h.Name == "" || h.Name[0] == ':' && h.Name != ":authority" && h.Name != ":method" || slices.ContainsFunc(h.Values, strange) || slices.ContainsFunc(h.NotValues, strange)
	}
	invalid := func(p netip.Prefix) bool { return !p.IsValid() }
	return e.HTTP == nil ||
		slices.ContainsFunc(m.Methods, strange) || slices.ContainsFunc(m.NotMethods, strange) ||
		slices.ContainsFunc(m.Hosts, strange) || slices.ContainsFunc(m.NotHosts, strange) ||
		slices.ContainsFunc(m.Paths, strangePath) || slices.ContainsFunc(m.NotPaths, strangePath) ||
		slices.ContainsFunc(m.Headers, strangeHeader) ||
		slices.ContainsFunc(m.RemoteIPs, invalid) || slices.ContainsFunc(m.NotRemoteIPs, invalid) ||
		!e.remote.IsValid() && len(m.RemoteIPs)+len(m.NotRemoteIPs) > 0
}

// host compares an authority without regard to case, as it was sent and also
// without its port and the final dot of its name: these do not make it another
// host.
func host(m mesh.StringMatch, authority []byte) bool {
	return textFold(m, authority) || textFold(m, bare(authority))
}

// bare returns an authority without its port and the final dot of its name.
func bare(authority []byte) []byte {
	if i := bytes.LastIndexByte(authority, ':'); i > bytes.LastIndexByte(authority, ']') {
		authority = authority[:i]
	}
	return bytes.TrimSuffix(authority, []byte{'.'})
}

// textFold is text without regard to the case of ASCII letters.
func textFold(m mesh.StringMatch, s []byte) bool {
	n := len(m.Value)
	switch {
	case len(s) == 0:
		return false
	case m.Kind == mesh.MatchPresence:
		return true
	case m.Kind == mesh.MatchExact:
		return len(s) == n && equalFold(s, m.Value)
	case len(s) < n:
		return false
	case m.Kind == mesh.MatchPrefix:
		return equalFold(s[:n], m.Value)
	case m.Kind == mesh.MatchSuffix:
		return equalFold(s[len(s)-n:], m.Value)
	}
	return false
}

// equalFold compares texts of the same length.
func equalFold(a []byte, b string) bool {
	for i, c := range a {
		if lower(c) != lower(b[i]) {
			return false
		}
	}
	return true
}

func lower(c byte) byte {
	if 'A' <= c && c <= 'Z' {
		return c + 'a' - 'A'
	}
	return c
}

// path compares a path.
func path(m mesh.StringMatch, p []byte) bool {
	if m.Kind == mesh.MatchTemplate {
		return len(p) > 0 && fitsTemplate(m.Value, p)
	}
	return text(m, p)
}

// fitsTemplate compares a path with a template, segment by segment. {*} is one
// segment that is not empty, and {**} what any number of segments leaves,
// slashes included; it is the last operator.
func fitsTemplate(template string, p []byte) bool {
	for {
		want, rest, more := strings.Cut(template, "/")
		if want == "{**}" {
			if !more {
				return true
			}
			// The rest is literal: it is the end, after a slash.
			return string(p) == rest || len(p) > len(rest) && p[len(p)-len(rest)-1] == '/' && string(p[len(p)-len(rest):]) == rest
		}
		segment, next, further := bytes.Cut(p, []byte{'/'})
		if want == "{*}" && len(segment) == 0 || want != "{*}" && string(segment) != want || more != further {
			return false
		}
		if !more {
			return true
		}
		template, p = rest, next
	}
}

// header reports whether a condition on a field holds. A field that was sent
// more than once may be read as one list or one by one: what allows has to hold
// in every reading, and what forbids holds in any.
func (e *evaluation) header(h *mesh.HeaderMatch) bool {
	if h.Name == "host" || h.Name == ":authority" {
		return fits(h.Values, h.NotValues, func(s mesh.StringMatch) bool { return host(s, e.HTTP.Host) })
	}
	var value []byte
	switch {
	case h.Name == ":method":
		value = e.HTTP.Method
	case e.HTTP.Fields != nil:
		value, _ = e.HTTP.Fields.Joined(h.Name, e.HTTP.Scratch)
	}
	some := func(s mesh.StringMatch) bool { return text(s, value) || parts(s, value, true) }
	every := func(s mesh.StringMatch) bool { return text(s, value) && !parts(s, value, false) }
	if e.unknown { // it denies
		return fits(h.Values, nil, some) && fits(nil, h.NotValues, every)
	}
	return fits(h.Values, nil, every) && fits(nil, h.NotValues, some)
}

// parts reports whether there is an element of a list of several that compares
// as wanted.
func parts(m mesh.StringMatch, list []byte, want bool) bool {
	for more := bytes.IndexByte(list, ',') >= 0; more; {
		var part []byte
		part, list, more = bytes.Cut(list, []byte{','})
		if text(m, bytes.Trim(part, " \t")) == want {
			return true
		}
	}
	return false
}
