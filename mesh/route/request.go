package route

import "net/netip"

// Fields are the header fields of a request. A head of any version of HTTP
// satisfies it as it is.
type Fields interface {
	// Joined returns the values of the field of that name, which is in lower
	// case, joined with commas, and false if there is none. It may use scratch.
	Joined(name string, scratch []byte) ([]byte, bool)
}

// A Request is what of a request a Table reads. It keeps nothing of it.
type Request struct {
	Method, Scheme []byte
	Authority      []byte // as it was sent: a port and upper case do not count
	Path           []byte // normalized, without the query
	Query          []byte // what follows the question mark
	Fields         Fields // nil is none
	// SourceNamespace is that of the caller's identity; "" is nobody's.
	SourceNamespace string
	// Scratch is room for fields that are sent more than once. It may be nil,
	// and then such fields cost an allocation.
	Scratch []byte
}

// A Connection is what of a connection a Table reads.
type Connection struct {
	SourceNamespace string
	SNI             string     // of its ClientHello; "" is none
	Destination     netip.Addr // that the client asked for
}

// field returns the value of a header field. The pseudo fields of HTTP/2 are
// what they stand for, and Host is the authority.
func (r *Request) field(name string) ([]byte, bool) {
	switch name {
	case "host", ":authority":
		return r.Authority, len(r.Authority) > 0
	case ":method":
		return r.Method, true
	case ":path":
		return r.Path, true
	case ":scheme":
		return r.Scheme, true
	}
	if r.Fields == nil {
		return nil, false
	}
	return r.Fields.Joined(name, r.Scratch)
}

// parameter returns the value of the first query parameter of that name, as it
// is written: percent-encoding is not undone.
func parameter(query []byte, name string) ([]byte, bool) {
	for len(query) > 0 {
		pair := query
		if i := index(query, '&'); i >= 0 {
			pair, query = query[:i], query[i+1:]
		} else {
			query = nil
		}
		key, value := pair, []byte(nil)
		if i := index(pair, '='); i >= 0 {
			key, value = pair[:i], pair[i+1:]
		}
		if len(pair) > 0 && string(key) == name {
			return value, true
		}
	}
	return nil, false
}

func index(b []byte, c byte) int {
	for i, x := range b {
		if x == c {
			return i
		}
	}
	return -1
}

// hostOnly returns an authority without its port.
func hostOnly(authority []byte) []byte {
	for i := len(authority) - 1; i >= 0; i-- {
		switch c := authority[i]; {
		case c == ':':
			return authority[:i]
		case c < '0' || c > '9':
			return authority // "]" of an IPv6 address, or no port
		}
	}
	return authority
}
