package hbone

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// An Authority is the target of a tunnelled connection: an address or, where
// the sender knows only a name, a host. Exactly one of Addr and Host is set.
// The zero Authority is no target.
type Authority struct {
	Addr netip.Addr
	Host string // lower case
	Port uint16
}

// ParseAuthority reads "ip:port", "[v6]:port" or "host:port" as an :authority
// of CONNECT must be (RFC 9113 8.5). It is strict: the port is 1 to 65535 in
// plain decimal, an IPv6 address is in brackets and has no zone and is not an
// IPv4 address in disguise, and a host is made of DNS labels and does not look
// like a number. Two texts for one target would be two answers from policy.
func ParseAuthority(s string) (Authority, error) {
	i := strings.LastIndexByte(s, ':')
	if i < 0 {
		return Authority{}, fmt.Errorf("parse authority %.80q: want host:port", s)
	}
	host, portText := s[:i], s[i+1:]
	port, err := strconv.ParseUint(portText, 10, 16)
	if err != nil || port == 0 || strconv.FormatUint(port, 10) != portText {
		return Authority{}, fmt.Errorf("parse authority %.80q: want a port of 1 to 65535", s)
	}
	a := Authority{Port: uint16(port)}
	if inner, ok := strings.CutPrefix(host, "["); ok {
		inner, ok = strings.CutSuffix(inner, "]")
		addr, err := netip.ParseAddr(inner)
		if !ok || err != nil || !addr.Is6() || addr.Is4In6() || addr.Zone() != "" {
			return Authority{}, fmt.Errorf("parse authority %.80q: want an IPv6 address in brackets", s)
		}
		a.Addr = addr
		return a, nil
	}
	if addr, err := netip.ParseAddr(host); err == nil && addr.Is4() {
		a.Addr = addr
		return a, nil
	}
	if !validHost(host) {
		return Authority{}, fmt.Errorf("parse authority %.80q: want ip:port, [v6]:port or host:port", s)
	}
	a.Host = strings.ToLower(host)
	return a, nil
}

// validHost reports whether s is a DNS name. A last label of digits is
// refused: "10.1" and "010.0.0.1" are addresses to some resolvers.
func validHost(s string) bool {
	if s == "" || len(s) > 253 {
		return false
	}
	labels := strings.Split(s, ".")
	for _, l := range labels {
		if l == "" || len(l) > 63 || l[0] == '-' || l[len(l)-1] == '-' {
			return false
		}
		for i := range len(l) {
			switch c := l[i]; {
			case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '_':
			default:
				return false
			}
		}
	}
	last := labels[len(labels)-1]
	return last[0] < '0' || last[0] > '9'
}

// String returns the text for the wire.
func (a Authority) String() string {
	if a.Host != "" {
		return a.Host + ":" + strconv.Itoa(int(a.Port))
	}
	return a.AddrPort().String()
}

// AddrPort returns the target as a socket address; it is not valid when the
// target is a host.
func (a Authority) AddrPort() netip.AddrPort { return netip.AddrPortFrom(a.Addr, a.Port) }
