package waypoint

import (
	"net/netip"
	"strings"

	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/view"
)

// clientAddress returns the address of the client: what the tunnel's Forwarded
// header (RFC 7239) says, if the peer may say so, and else the other end of the
// tunnel. Anybody in the mesh can write the header, so it counts only where it
// says what the peer could also have shown by connecting itself: its own
// address, or that of a workload with the identity that it has proved. (The
// families may differ: a tunnel over IPv4 carries connections to IPv6
// addresses too.)
func clientAddress(v *view.View, peer mesh.Identity, remote netip.AddrPort, forwarded string) netip.AddrPort {
	said, ok := forwardedFor(forwarded)
	switch {
	case !ok:
		return remote
	case said.Addr() == remote.Addr():
		return said
	}
	if w := v.Workload(said.Addr()); w != nil && !w.HostNetwork && !peer.IsZero() && w.Identity == peer {
		return said
	}
	return remote
}

// forwardedFor reads the first element's "for" as an address and a port. Names
// and addresses without a port are nothing that we could use.
func forwardedFor(header string) (netip.AddrPort, bool) {
	first, _, _ := strings.Cut(header, ",")
	for pair := range strings.SplitSeq(first, ";") {
		key, value, ok := strings.Cut(strings.TrimSpace(pair), "=")
		if !ok || !strings.EqualFold(key, "for") {
			continue
		}
		if len(value) >= 2 && value[0] == '"' && value[len(value)-1] == '"' {
			value = value[1 : len(value)-1]
		}
		a, err := netip.ParseAddrPort(value)
		if err != nil || a.Addr().Zone() != "" {
			return netip.AddrPort{}, false
		}
		return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()), true
	}
	return netip.AddrPort{}, false
}
