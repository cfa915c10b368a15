package l7

import (
	"time"
)

// clientHello reads the server name out of the ClientHello that a connection
// begins with, and leaves it unread. It returns false if it begins with
// something else.
func (c *conn) clientHello(wait time.Duration) (name string, ok bool) {
	err := c.sniff(func(b []byte) bool {
		_, st := serverName(b)
		return st != helloShort
	}, wait)
	if err != nil {
		return "", false
	}
	name, st := serverName(c.unread())
	return name, st == helloRead
}

// helloState is how far a ClientHello was understood.
type helloState uint8

const (
	helloShort helloState = iota // more bytes are needed
	helloOther                   // it is none
	helloRead
)

// maxHello bounds a ClientHello: 16 KiB of the handshake's bytes, which may be
// spread over records.
const maxHello = 16 << 10

// serverName returns the server name in a ClientHello (RFC 8446 4.1.2, RFC 6066
// 3), "" if it has none.
func serverName(b []byte) (string, helloState) {
	var hello []byte
	for len(hello) < 4 || len(hello) < 4+length24(hello[1:]) {
		if len(b) > 0 && b[0] != 22 {
			return "", helloOther
		}
		if len(b) < 5 {
			return "", helloShort
		}
		n := int(b[3])<<8 | int(b[4])
		if b[1] != 3 || n == 0 || n > maxHello || len(hello)+n > maxHello {
			return "", helloOther
		}
		if len(b) < 5+n {
			return "", helloShort
		}
		hello = append(hello, b[5:5+n]...)
		b = b[5+n:]
		if hello[0] != 1 {
			return "", helloOther
		}
	}
	return nameOf(hello[4 : 4+length24(hello[1:])])
}

func length24(b []byte) int { return int(b[0])<<16 | int(b[1])<<8 | int(b[2]) }

// nameOf reads the body of a ClientHello.
func nameOf(b []byte) (string, helloState) {
	r := vectors{b: b, ok: true}
	r.skip(2 + 32) // version and random
	r.vector(1)    // session ID
	r.vector(2)    // cipher suites
	r.vector(1)    // compression methods
	if len(r.b) == 0 && r.ok {
		return "", helloRead
	}
	ext := vectors{b: r.vector(2), ok: r.ok}
	for ext.ok && len(ext.b) > 0 {
		kind := ext.number(2)
		data := ext.vector(2)
		if kind != 0 || !ext.ok {
			continue
		}
		list := vectors{b: data, ok: true}
		names := vectors{b: list.vector(2), ok: list.ok}
		for names.ok && len(names.b) > 0 {
			kind := names.number(1)
			name := names.vector(2)
			if names.ok && kind == 0 {
				return lowerName(name), helloRead
			}
		}
		if !names.ok {
			return "", helloOther
		}
	}
	if !ext.ok {
		return "", helloOther
	}
	return "", helloRead
}

func lowerName(b []byte) string {
	s := make([]byte, len(b))
	for i, c := range b {
		if c >= 'A' && c <= 'Z' {
			c += 'a' - 'A'
		}
		s[i] = c
	}
	return string(s)
}

// vectors reads what TLS writes: numbers, and bytes with their number before
// them. After the first that is cut short nothing is read any more.
type vectors struct {
	b  []byte
	ok bool
}

func (v *vectors) skip(n int) []byte {
	if !v.ok || len(v.b) < n {
		v.ok, v.b = false, nil
		return nil
	}
	s := v.b[:n]
	v.b = v.b[n:]
	return s
}

func (v *vectors) number(size int) int {
	n := 0
	for _, c := range v.skip(size) {
		n = n<<8 | int(c)
	}
	return n
}

func (v *vectors) vector(size int) []byte { return v.skip(v.number(size)) }
