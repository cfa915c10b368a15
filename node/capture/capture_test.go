package capture

import (
	"net/netip"
	"testing"

	"github.com/weft-mesh/weft/internal/testnet"
)

func TestOutboundIsCaptured(t *testing.T) {
	for name, kind := range map[string]testnet.Kind{"routed": testnet.Routed, "bridged": testnet.Bridged} {
		t.Run(name, func(t *testing.T) {
			s := newStage(t, kind)
			_, x := s.captured(Mode{New: true})
			for _, to := range []*testnet.Host{s.peer.Host, s.outside} {
				startApp(t, to, ":8080")
				eachFamily(t, func(t *testing.T, addr func(*testnet.Host) netip.Addr) {
					dst := netip.AddrPortFrom(addr(to), 8080)
					k, err := connect(s.pod.Host, dst)
					if err != nil {
						t.Fatal(err)
					}
					if err := k.echo("hello"); err != nil {
						t.Fatal(err)
					}
					if got := addrPort(k.RemoteAddr()); got != dst {
						t.Errorf("the app believes that it speaks to %v, want %v", got, dst)
					}
					got, ok := x.last("out")
					if !ok || got.local != dst || got.remote != addrPort(k.LocalAddr()) {
						t.Errorf("the proxy accepted %+v, want local %v and remote %v", got, dst, k.LocalAddr())
					}
					if k.client.Addr() != addr(s.pod.Host) {
						t.Errorf("the server sees %v, want the pod's address %v", k.client, addr(s.pod.Host))
					}
					if k.client == addrPort(k.LocalAddr()) {
						t.Errorf("the server sees the app's own socket %v: it was not captured", k.client)
					}
				})
			}
		})
	}
}

func TestInboundIsCaptured(t *testing.T) {
	for name, kind := range map[string]testnet.Kind{"routed": testnet.Routed, "bridged": testnet.Bridged} {
		t.Run(name, func(t *testing.T) {
			s := newStage(t, kind)
			_, x := s.captured(Mode{New: true})
			startApp(t, s.pod.Host, ":8080")
			for _, from := range []*testnet.Host{s.peer.Host, s.outside} {
				eachFamily(t, func(t *testing.T, addr func(*testnet.Host) netip.Addr) {
					dst := netip.AddrPortFrom(addr(s.pod.Host), 8080)
					k, err := connect(from, dst)
					if err != nil {
						t.Fatal(err)
					}
					if err := k.echo("hello"); err != nil {
						t.Fatal(err)
					}
					got, ok := x.last("in")
					if !ok || got.local != dst || got.remote != addrPort(k.LocalAddr()) {
						t.Errorf("the proxy accepted %+v, want local %v and remote %v", got, dst, k.LocalAddr())
					}
					if k.client.Addr() != addr(from) || k.server != dst {
						t.Errorf("the app sees %v from %v, want %v from %v", k.server, k.client, dst, addr(from))
					}
				})
			}
		})
	}
}
