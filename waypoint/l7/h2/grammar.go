package h2

import (
	"bytes"
	"strings"

	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

// inTarget are the bytes of a path and query, as the codec of HTTP/1 has them.
// It is read only.
var inTarget = func() (t [256]bool) {
	for c := 0x21; c < 0x7f; c++ {
		t[c] = strings.IndexByte("#\"<>\\^`{|}", byte(c)) < 0
	}
	return t
}()

// validAuthority reports whether v is a host or an address, and perhaps a port,
// by the grammar that the codec of HTTP/1 has.
func validAuthority(v []byte) bool {
	rest := v
	if len(v) > 0 && v[0] == '[' {
		end := bytes.IndexByte(v, ']')
		if end < 3 {
			return false
		}
		for _, c := range v[1:end] {
			if l := msg.Lower(c); !(l >= '0' && l <= '9' || l >= 'a' && l <= 'f' || l == ':' || l == '.') {
				return false
			}
		}
		rest = v[end+1:]
	} else {
		i := 0
		for i < len(v) && inHost(v[i]) {
			i++
		}
		if i == 0 {
			return false
		}
		rest = v[i:]
	}
	if len(rest) == 0 {
		return true
	}
	if rest[0] != ':' || len(rest) < 2 || len(rest) > 6 {
		return false
	}
	n := 0
	for _, c := range rest[1:] {
		if c < '0' || c > '9' {
			return false
		}
		n = n*10 + int(c-'0')
	}
	return n > 0 && n < 1<<16
}

func inHost(c byte) bool {
	l := msg.Lower(c)
	return l >= 'a' && l <= 'z' || l >= '0' && l <= '9' || l == '.' || l == '-' || l == '_'
}
