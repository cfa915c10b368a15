package h1

import (
	"bytes"

	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

// framing is what fields say that is not of the message but of its way.
type framing struct {
	host      []byte // nil if there is none
	length    int64  // -1 if there is none
	chunked   bool
	expect    bool
	upgrade   []byte
	upgrading bool // the field Connection says so
}

// fields reads the field lines from b[i:] on, where b is h.Lines, and takes out
// those that are not the message's. They are checked to the last byte.
func (p *Parser) fields(h *msg.Head, i int) (framing, error) {
	f := framing{length: -1}
	var nominated, keepAlive bool
	p.Close, p.Continue = false, false
	b := h.Lines
	for b[i] != '\r' {
		if p.Limits.Fields > 0 && len(h.Fields) >= p.Limits.Fields {
			return f, errLarge
		}
		h.Fields = append(h.Fields, msg.Field{})
		field := &h.Fields[len(h.Fields)-1]
		next, err := line(b, i, field)
		if err != nil {
			return f, err
		}
		i = next
		if field.ID != msg.Other {
			v := b[field.Value:field.ValueEnd]
			switch field.ID {
			case msg.Connection:
				field.State = msg.Removed
				err = p.connection(v, &f, &nominated, &keepAlive)
			case msg.Host:
				field.State = msg.Removed
				if f.host != nil || !validAuthority(v) {
					err = errHost
				}
				f.host = v
			default:
				err = f.take(field, v)
			}
			if err != nil {
				return f, err
			}
		} else if lookalike(b[field.Line : field.Line+uint32(field.NameLen)]) {
			return f, errLookalike
		}
	}
	if i+2 != len(b) {
		return f, errField
	}
	if f.chunked && f.length >= 0 {
		return f, errBoth
	}
	if p.Minor == 0 && !keepAlive {
		p.Close = true
	}
	if nominated {
		return f, removeNominated(h)
	}
	return f, nil
}

// line reads the field line at b[i:] into f, which is empty.
func line(b []byte, i int, f *msg.Field) (next int, err error) {
	n := bytes.IndexByte(b[i:], ':')
	if n < 0 {
		return 0, errField
	}
	name := b[i : i+n]
	// Not a token: no name, space before the colon, a folded line, a CR, LF or
	// NUL. What is known is one.
	if f.ID = msg.Identify(name); f.ID == msg.Other && !msg.ValidName(name) {
		return 0, errField
	}
	f.Line, f.NameLen = uint32(i), uint16(n)
	i += n + 1
	for b[i] == ' ' || b[i] == '\t' {
		i++
	}
	f.Value = uint32(i)
	i += msg.ValueLen(b[i:])
	if b[i] != '\r' || b[i+1] != '\n' {
		return 0, errField
	}
	end := i
	for end > int(f.Value) && (b[end-1] == ' ' || b[end-1] == '\t') {
		end--
	}
	f.ValueEnd, f.End = uint32(end), uint32(i+2)
	return i + 2, nil
}

// take reads the fields of framing and takes out what is hop-by-hop.
func (f *framing) take(field *msg.Field, v []byte) error {
	switch field.ID {
	case msg.ContentLength:
		n, ok := length(v)
		if !ok || f.length >= 0 {
			return errLength
		}
		f.length = n
	case msg.TransferEncoding:
		if f.chunked || !msg.EqualFold(v, "chunked") {
			return errCoding
		}
		f.chunked = true
	case msg.Expect:
		if !msg.EqualFold(v, "100-continue") {
			return errExpectation
		}
		f.expect = true
	case msg.Upgrade:
		if f.upgrade != nil {
			return errField
		}
		f.upgrade = v
	case msg.KeepAlive, msg.ProxyConnection, msg.TE, msg.HTTP2Settings:
	default:
		return nil
	}
	field.State = msg.Removed
	return nil
}

// length reads a content-length: digits only, and few enough for an int64.
func length(v []byte) (int64, bool) {
	if len(v) == 0 || len(v) > 18 {
		return 0, false
	}
	var n int64
	for _, c := range v {
		if c < '0' || c > '9' {
			return 0, false
		}
		n = n*10 + int64(c-'0')
	}
	return n, true
}

// connection reads the options of a field Connection.
func (p *Parser) connection(v []byte, f *framing, nominated, keepAlive *bool) error {
	for option := range options(v) {
		switch {
		case msg.EqualFold(option, "close"):
			p.Close = true
		case msg.EqualFold(option, "keep-alive"):
			*keepAlive = true
		case msg.EqualFold(option, "upgrade"):
			f.upgrading = true
		default:
			switch msg.Identify(option) {
			case msg.TE, msg.KeepAlive, msg.ProxyConnection, msg.HTTP2Settings, msg.Trailer:
				// Those are taken out anyway, or do no harm.
			case msg.Host, msg.ContentLength, msg.TransferEncoding, msg.Expect, msg.Authorization, msg.Cookie, msg.Via,
				msg.Forwarded, msg.XForwardedFor, msg.XForwardedProto, msg.XForwardedHost, msg.XForwardedPort,
				msg.XForwardedClientCert, msg.XRequestID:
				// A client must not be able to make us drop what others rely on.
				return errConnection
			default:
				if !msg.ValidName(option) || len(option) > maxOption {
					return errConnection
				}
				*nominated = true
			}
		}
	}
	return nil
}

// maxOption bounds the names that Connection may nominate.
const maxOption = 64

// options ranges over the members of a comma-separated list.
func options(v []byte) func(yield func([]byte) bool) {
	return func(yield func([]byte) bool) {
		for len(v) > 0 {
			one := v
			if i := bytes.IndexByte(v, ','); i >= 0 {
				one, v = v[:i], v[i+1:]
			} else {
				v = nil
			}
			if one = bytes.Trim(one, " \t"); len(one) > 0 && !yield(one) {
				return
			}
		}
	}
}

// removeNominated takes out what the fields Connection nominate.
func removeNominated(h *msg.Head) error {
	for i := range h.Fields {
		if h.Fields[i].ID != msg.Connection {
			continue
		}
		for option := range options(h.Value(&h.Fields[i])) {
			if msg.Identify(option) != msg.Other {
				// What is known and may be nominated is out already.
				continue
			}
			var lower [maxOption]byte
			for k, c := range option {
				lower[k] = msg.Lower(c)
			}
			h.Remove(string(lower[:len(option)]))
		}
	}
	return nil
}

// lookalike reports whether name is that of a field of framing with an
// underscore for a hyphen: there are servers that take one for the other.
func lookalike(name []byte) bool {
	if bytes.IndexByte(name, '_') < 0 {
		return false
	}
	for _, want := range [...]string{"content-length", "transfer-encoding"} {
		if len(name) != len(want) {
			continue
		}
		same := true
		for i := range want {
			c := msg.Lower(name[i])
			if c == '_' {
				c = '-'
			}
			same = same && c == want[i]
		}
		if same {
			return true
		}
	}
	return false
}
