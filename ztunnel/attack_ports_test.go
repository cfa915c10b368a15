package ztunnel

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/weft-mesh/weft/internal/testnet"
)

// TestPortsOfTheProxyLeadNowhere: whoever connects to the ports on which the
// proxy listens inside a pod, or to what would be such a port elsewhere, gets
// no answer and reaches no application. In a pod outside the mesh they are
// ports like any other.
func TestPortsOfTheProxyLeadNowhere(t *testing.T) {
	s := newStreet(t)
	score := newCard(t)
	neighbour := s.two.host.Pod("neighbour", testnet.Bridged)
	serveApp(t, s.server.Host, ":8080")
	ports := []uint16{15001, 15006, 15008, 15053}
	for _, port := range ports {
		serveApp(t, neighbour.Host, fmt.Sprintf(":%d", port))
		if _, err := answers(s.outside.NS, netip.Addr{}, netip.AddrPortFrom(neighbour.V4, port)); err != nil {
			t.Fatalf("port %d of a pod outside the mesh: %v", port, err)
		}
	}
	alias(t, s.server.Host, "192.0.2.50") // an address that the agent does not know
	for _, from := range []struct {
		row   string
		host  *testnet.Host
		addrs []netip.Addr
	}{
		{"attack.own_ports", s.server.Host, []netip.Addr{
			s.server.V4, s.server.V6, netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("::1"), netip.MustParseAddr("192.0.2.50"),
		}},
		{"attack.ports_from_mesh", s.client.Host, []netip.Addr{s.server.V4, s.server.V6}},
		{"attack.ports_from_pod", neighbour.Host, []netip.Addr{s.server.V4, s.server.V6}},
		{"attack.ports_from_outside", s.outside, []netip.Addr{s.server.V4, s.server.V6}},
		{"attack.ports_from_node", s.two.host.Host, []netip.Addr{s.server.V4, s.server.V6}},
		{"attack.ports_of_node", s.server.Host, []netip.Addr{s.two.host.V4, s.two.host.V6, s.one.host.V4, s.one.host.V6}},
	} {
		for _, a := range from.addrs {
			for _, port := range ports {
				saw, err := answers(from.host.NS, netip.Addr{}, netip.AddrPortFrom(a, port))
				score.attack(from.row, err != nil)
				if err == nil {
					t.Errorf("%s: %v port %d answers %q", from.row, a, port, saw)
				}
			}
		}
	}
	eventually(t, "that nothing goes round in the proxies", func() bool {
		return len(s.one.flows.all())+len(s.two.flows.all()) == 0
	})
	// The pod is none the worse.
	if _, err := answers(s.client.NS, netip.Addr{}, netip.AddrPortFrom(s.server.V4, 8080)); err != nil {
		t.Error(err)
	}
}
