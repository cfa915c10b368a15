package ztunnel

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/weft-mesh/weft/internal/testnet"
)

// TestNamePortAnswersNobody: the socket for name queries is bound to port 15053
// of every address, so datagrams of others arrive in it. Only what the pod asks
// a name server is answered.
func TestNamePortAnswersNobody(t *testing.T) {
	s, _ := nameStreet(t)
	score := newCard(t)
	stranger := s.one.host.Pod("stranger", testnet.Routed)
	query := question(t, 1, "cart.shop.svc.cluster.local.", dnsmessage.TypeA)
	for _, to := range []struct{ pod, server netip.Addr }{{s.client.V4, s.outside.V4}, {s.client.V6, s.outside.V6}} {
		asked := s.one.sum("istio_dns_requests_total")
		senders := map[string]net.Conn{}
		for name, h := range map[string]*testnet.Host{
			"the outside": s.outside, "the node": s.one.host.Host, "a pod": stranger.Host,
			"a pod of the mesh": s.server.Host, "itself": s.client.Host,
		} {
			c := connected(t, h, "udp", netip.AddrPortFrom(to.pod, 15053))
			senders[name] = c
			for range 3 {
				if _, err := c.Write(query); err != nil {
					t.Fatal(err)
				}
			}
		}
		// The same query, to a name server, is answered: after all of these.
		c := connected(t, s.client.Host, "udp", netip.AddrPortFrom(to.server, 53))
		var m dnsmessage.Message
		answer, sent := ask(t, c, query)
		if err := m.Unpack(answer); err != nil || len(m.Answers) != 1 {
			t.Fatalf("the pod's own query: %+v, %v", m, err)
		}
		if got := s.one.sum("istio_dns_requests_total") - asked; got < 1 || got > float64(sent) {
			t.Errorf("%v queries were served, want the pod's %d", got, sent)
		}
		for name, c := range senders {
			c.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
			n, err := c.Read(make([]byte, 512))
			for range 3 {
				score.attack("attack.name_port", err != nil)
			}
			if err == nil {
				t.Errorf("%s got an answer of %d bytes from %v", name, n, to.pod)
			}
		}
	}
}
