package h1

import (
	"bytes"

	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

// The tables of grammar are read only.
var (
	// inTarget are the bytes of a request target: those of RFC 3986, and no
	// fragment. A server may read anything else as it likes.
	inTarget = set(func(c byte) bool {
		return c > 0x20 && c < 0x7f && !bytes.ContainsRune([]byte("#\"<>\\^`{|}"), rune(c))
	})
	inValue = set(msg.IsValue)
	// inHost are the bytes of a host's name.
	inHost = set(func(c byte) bool {
		return c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c == '.' || c == '-' || c == '_'
	})
)

func set(f func(byte) bool) (t [256]bool) {
	for c := range t {
		t[c] = f(byte(c))
	}
	return t
}

// validAuthority reports whether v is a host or an address, and perhaps a port.
// User information is not allowed (RFC 9110 4.2.4), percent-encoding in host
// names neither: nobody compares it.
func validAuthority(v []byte) bool {
	i := 0
	if len(v) > 0 && v[0] == '[' {
		end := bytes.IndexByte(v, ']')
		if end < 3 {
			return false
		}
		for _, c := range v[1:end] {
			hex := c >= '0' && c <= '9' || msg.Lower(c) >= 'a' && msg.Lower(c) <= 'f'
			if !hex && c != ':' && c != '.' {
				return false
			}
		}
		i = end + 1
	} else {
		for i < len(v) && inHost[v[i]] {
			i++
		}
		if i == 0 {
			return false
		}
	}
	if i == len(v) {
		return true
	}
	port := v[i+1:]
	if v[i] != ':' || len(port) == 0 || len(port) > 5 {
		return false
	}
	n := 0
	for _, c := range port {
		if c < '0' || c > '9' {
			return false
		}
		n = n*10 + int(c-'0')
	}
	return n > 0 && n < 1<<16
}

// sameAuthority reports whether two valid authorities are the same, letters
// in any case. One with a port is not one without: who sends both forms means
// to confuse.
func sameAuthority(a, b []byte) bool { return bytes.EqualFold(a, b) }
