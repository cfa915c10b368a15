package l7

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"strconv"
	"time"

	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/balance"
	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

// session finds out what of a request decides its endpoint: its session, or
// what consistent hashing goes by. It makes the cookies of both.
type session struct {
	Pass
	e *Engine
}

// OnRequest reads the request.
func (s *session) OnRequest(x *Exchange) Verdict {
	if spec := sessionOf(x); spec != nil {
		x.Session = string(sessionValue(x, spec))
	}
	if x.Policy != nil && x.Policy.Balance.Hash != nil {
		s.hash(x, x.Policy.Balance.Hash)
	}
	return Continue
}

// sessionOf returns the rule's session, else the policy's.
func sessionOf(x *Exchange) *mesh.Session {
	if r := x.Matched.Rule; r != nil && r.Spec.Session != nil {
		return r.Spec.Session
	}
	if x.Policy != nil {
		return x.Policy.Session
	}
	return nil
}

func sessionValue(x *Exchange, spec *mesh.Session) []byte {
	if spec.Cookie != "" {
		return cookie(&x.Request, spec.Cookie)
	}
	return x.Request.Lookup(spec.Header)
}

// hash sets x.Hash, if the request has what it is made of.
func (s *session) hash(x *Exchange, k *mesh.HashKey) {
	switch {
	case k.Header != "":
		if v, ok := x.Request.Joined(k.Header, nil); ok {
			x.Hash, x.Hashed = balance.Hash(v), true
		}
	case k.Cookie != nil:
		v := cookie(&x.Request, k.Cookie.Name)
		if v == nil && k.Cookie.Generate {
			x.marks.cookie = hex.AppendEncode(nil, binary.BigEndian.AppendUint64(nil, s.e.rand()))
			v = x.marks.cookie
		}
		if v != nil {
			x.Hash, x.Hashed = balance.Hash(v), true
		}
	case k.SourceIP:
		if a := x.Facts.Source.Addr(); a.IsValid() {
			b := a.Unmap().As16()
			x.Hash, x.Hashed = balance.Hash(b[:]), true
		}
	case k.Query != "":
		query, _ := x.Query()
		if v, ok := parameter(query, k.Query); ok {
			x.Hash, x.Hashed = balance.Hash(v), true
		}
	}
}

// OnResponse gives the client what it has to send with its next request.
func (s *session) OnResponse(x *Exchange) {
	if x.marks.cookie != nil {
		if k := x.Policy.Balance.Hash; k != nil && k.Cookie != nil {
			msg.Append(&x.Response, "set-cookie", hashCookie(k.Cookie, x.marks.cookie))
		}
	}
	spec := sessionOf(x)
	if spec == nil || x.Endpoint == nil || x.Endpoint.balance == nil {
		return
	}
	name := x.Endpoint.balance.Name()
	if name == x.Session {
		return
	}
	if spec.Cookie == "" {
		msg.Set(&x.Response, spec.Header, name)
		return
	}
	b := append(append([]byte(spec.Cookie), '='), name...)
	b = appendCookie(b, spec.Path, time.Duration(spec.Lifetime))
	msg.Append(&x.Response, "set-cookie", append(b, "; HttpOnly"...))
}

func hashCookie(c *mesh.HashCookie, value []byte) []byte {
	b := append(append([]byte(c.Name), '='), value...)
	b = appendCookie(b, c.Path, time.Duration(c.TTL))
	for _, a := range c.Attributes {
		b = append(append(b, "; "...), a.Name...)
		if a.Value != "" {
			b = append(append(b, '='), a.Value...)
		}
	}
	return append(b, "; HttpOnly"...)
}

// appendCookie appends the attributes of a cookie. One that lives for 0 ends
// with the browser.
func appendCookie(b []byte, path string, life time.Duration) []byte {
	if life > 0 {
		b = strconv.AppendInt(append(b, "; Max-Age="...), int64((life+time.Second-1)/time.Second), 10)
	}
	if path != "" {
		b = append(append(b, "; Path="...), path...)
	}
	return b
}

// cookie returns the value of the first cookie of that name, or nil.
func cookie(h *msg.Head, name string) []byte {
	for i := range h.Fields {
		f := &h.Fields[i]
		if f.ID != msg.Cookie || !f.Live() {
			continue
		}
		for rest, more := h.Value(f), true; more; {
			var pair []byte
			pair, rest, more = bytes.Cut(rest, []byte{';'})
			key, value, ok := bytes.Cut(bytes.TrimSpace(pair), []byte{'='})
			if ok && string(key) == name {
				return bytes.Trim(value, `"`)
			}
		}
	}
	return nil
}

// parameter returns the value of the first query parameter of that name.
func parameter(query []byte, name string) ([]byte, bool) {
	for more := len(query) > 0; more; {
		var pair []byte
		pair, query, more = bytes.Cut(query, []byte{'&'})
		if key, value, _ := bytes.Cut(pair, []byte{'='}); string(key) == name && len(pair) > 0 {
			return value, true
		}
	}
	return nil, false
}
