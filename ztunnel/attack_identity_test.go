package ztunnel

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/weft-mesh/weft/internal/testnet"
	"github.com/weft-mesh/weft/mesh"
)

// renamed is the same namespace, with the same addresses, as another pod.
func renamed(p *testnet.Pod, name string) *testnet.Pod {
	h := *p.Host
	h.Name = name
	return &testnet.Pod{Host: &h, Node: p.Node, Veth: p.Veth, Interface: p.Interface}
}

// forget removes a workload from the View and returns it.
func (w *world) forget(name string) (was mesh.Workload) {
	w.change(func(w *world) {
		var kept []mesh.Workload
		for _, x := range w.ws {
			if x.Name.Name == name {
				was = x
				continue
			}
			kept = append(kept, x)
		}
		w.ws = kept
	})
	return was
}

// TestSourceAddressIsNoIdentity: a pod that takes another's address as its
// source is still who it is.
func TestSourceAddressIsNoIdentity(t *testing.T) {
	s := newStreet(t)
	score := newCard(t)
	serveApp(t, s.server.Host, ":8080")
	friend := s.one.host.Pod("friend", testnet.Routed)
	s.one.enrol(friend)
	s.setPolicies(allowOnly("friends", "friend"))
	for _, a := range []netip.Addr{friend.V4, friend.V6} {
		s.client.Run("ip", "addr", "add", netip.PrefixFrom(a, a.BitLen()).String(), "dev", "lo")
	}
	for _, way := range [][3]netip.Addr{{friend.V4, s.client.V4, s.server.V4}, {friend.V6, s.client.V6, s.server.V6}} {
		to := netip.AddrPortFrom(way[2], 8080)
		if _, err := answers(friend.NS, way[0], to); err != nil {
			t.Errorf("the friend itself is not let in: %v", err)
		}
		for range 3 {
			for _, src := range []netip.Addr{way[0], way[1], {}} {
				saw, err := answers(s.client.NS, src, to)
				score.attack("attack.identity_by_address", err != nil)
				if err == nil {
					t.Errorf("let in from %v: %q", src, saw)
				}
			}
		}
	}
	for _, l := range s.two.log.lines() {
		if strings.Contains(l, "sa/friend") && strings.Contains(l, "denied") {
			t.Errorf("a refused connection counts as the friend's: %s", l)
		}
	}
}

// TestIdentityEndsWithItsPod: another pod in the same namespace, with the same
// addresses, is another. Whoever believes that the old one is still there talks
// to nobody, and the new one has nothing of the old one's.
func TestIdentityEndsWithItsPod(t *testing.T) {
	s := newStreet(t)
	score := newCard(t)
	serveApp(t, s.server.Host, ":8080")
	serveApp(t, s.client.Host, ":8080")
	s.setPolicies(allowOnly("server", "server"), allowOnly("client", "client"))
	families := [][2]netip.Addr{{s.client.V4, s.server.V4}, {s.client.V6, s.server.V6}}
	talk := func(row string, blocked bool) {
		t.Helper()
		for _, f := range families {
			// As a server, and as a client, which has tunnels to the peer open.
			for name, way := range map[string]func() (string, error){
				"to it":   func() (string, error) { return answers(s.client.NS, netip.Addr{}, netip.AddrPortFrom(f[1], 8080)) },
				"from it": func() (string, error) { return answers(s.server.NS, netip.Addr{}, netip.AddrPortFrom(f[0], 8080)) },
			} {
				saw, err := way()
				if blocked {
					score.attack(row, err != nil)
				}
				if blocked == (err == nil) {
					t.Errorf("%s, %s by %v: %q, %v", row, name, f[1], saw, err)
				}
			}
		}
	}
	talk("before", false)

	s.two.Del("uid-server")
	if err := s.capturedServer.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}
	next := renamed(s.server, "next")
	s.two.enrol(next)
	nextWorkload := s.forget("next") // the control plane is late: the address is still the old pod's
	for range 3 {
		talk("attack.identity_reused", true)
	}
	s.forget("server")
	s.change(func(w *world) { w.ws = append(w.ws, nextWorkload) })
	for range 3 {
		for _, f := range families {
			saw, err := answers(s.server.NS, netip.Addr{}, netip.AddrPortFrom(f[0], 8080))
			score.attack("attack.identity_reused", err != nil)
			if err == nil {
				t.Errorf("the next pod is let in as the one before: %q", saw)
			}
		}
	}
	// As itself it is welcome.
	s.setPolicies(allowOnly("client", "client"), allowOnly("next", "next"))
	talk("as itself", false)
	s.two.logged(`direction="inbound"`, `dst.identity="spiffe://cluster.local/ns/shop/sa/next"`)
	s.one.logged(`direction="inbound"`, `src.identity="spiffe://cluster.local/ns/shop/sa/next"`)
}
