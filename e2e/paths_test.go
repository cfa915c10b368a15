package e2e

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/weft-mesh/weft/e2e/wire"
)

// Every way to address a server, on both nodes and in both families, reaches
// it through the mesh: the server sees the client's own address, and ztunnel's
// log both identities.
func TestEveryWayToAddressAServer(t *testing.T) {
	c4, c6 := addresses(t, meshed, "client")
	for _, server := range []string{"near", "far"} {
		p4, p6 := addresses(t, meshed, server)
		s4, s6 := clusterIPs(t, meshed, server)
		rows := []struct {
			name, host, port string
			client           []netip.Addr
		}{
			{"pod address IPv4", p4.String(), "8080", []netip.Addr{c4}},
			{"pod address IPv6", p6.String(), "8080", []netip.Addr{c6}},
			{"ClusterIP IPv4", s4.String(), "80", []netip.Addr{c4, c6}},
			{"ClusterIP IPv6", s6.String(), "80", []netip.Addr{c4, c6}},
			{"service name", server, "80", []netip.Addr{c4, c6}},
			{"headless service name", server + "-headless." + meshed + ".svc.cluster.local", "8080", []netip.Addr{c4, c6}},
		}
		for _, r := range rows {
			t.Run(server+" by "+r.name, func(t *testing.T) {
				got := try(t, meshed, "client", "get", "http://"+net.JoinHostPort(r.host, r.port)+"/")
				if !got.OK || got.Server != server {
					t.Fatalf("got %+v, want an answer of %s", got, server)
				}
				from, err := netip.ParseAddrPort(got.Remote)
				if err != nil {
					t.Fatal(err)
				}
				for _, want := range r.client {
					if from.Addr() == want {
						return
					}
				}
				t.Errorf("the server saw %v, want one of %v", from, r.client)
			})
		}
		t.Run(server+" in the access log", func(t *testing.T) {
			wantLog(t, "spiffe://cluster.local/ns/meshed/sa/client", "spiffe://cluster.local/ns/meshed/sa/"+server)
		})
	}
}

// wantLog waits for a line of ztunnel's log that names both identities as
// seen by the server's node.
func wantLog(t *testing.T, from, to string) {
	t.Helper()
	eventually(t, patience, func() error {
		log := kubectl(t, "logs", "-n", "weft-system", "-l", "app=ztunnel", "-c", "istio-proxy", "--tail=2000")
		for line := range strings.Lines(log) {
			if strings.Contains(line, `src.identity="`+from+`"`) && strings.Contains(line, `dst.identity="`+to+`"`) && strings.Contains(line, `direction="inbound"`) {
				return nil
			}
		}
		return fmt.Errorf("no inbound line from %s to %s", from, to)
	})
}

// Between the nodes nothing but TLS 1.3 to port 15008 is seen of meshed pods,
// and the same request outside the mesh is seen in clear: so the watch works.
func TestOnlyTLSOnTheWire(t *testing.T) {
	marker := []byte("an-order-in-clear")
	for _, ns := range []string{meshed, outside} {
		t.Run(ns, func(t *testing.T) {
			var addrs []netip.Addr
			for _, p := range []string{"client", "far"} {
				v4, v6 := addresses(t, ns, p)
				addrs = append(addrs, v4, v6)
			}
			tap, err := wire.Open(world.c.NodeNetns("node1"), "eth0")
			if err != nil {
				t.Fatal(err)
			}
			start := time.Now()
			for _, a := range addrs[2:] {
				if got := try(t, ns, "client", "get", "http://"+netip.AddrPortFrom(a, 8080).String()+"/"+string(marker)); !got.OK {
					t.Fatalf("got %+v", got)
				}
			}
			if err := tap.Close(); err != nil {
				t.Fatal(err)
			}
			s, err := tap.Between(addrs, marker, start)
			if err != nil {
				t.Fatal(err)
			}
			if ns == outside {
				if s.Marked == 0 || s.Tunnel > 0 {
					t.Errorf("outside the mesh: %+v, want the marker in clear and no tunnel", s)
				}
				return
			}
			if s.Tunnel == 0 || s.Marked > 0 || s.Other > 0 {
				t.Errorf("in the mesh: %+v, want nothing but the tunnel", s)
			}
		})
	}
}

// What is not HTTP passes too: servers that speak first, streams of which one
// half is closed, and large ones.
func TestStreams(t *testing.T) {
	for _, server := range []string{"near", "far"} {
		v4, v6 := addresses(t, meshed, server)
		for _, a := range []netip.Addr{v4, v6} {
			t.Run(fmt.Sprintf("%s speaks first over %v", server, a), func(t *testing.T) {
				if got := try(t, meshed, "client", "banner", "-addr", netip.AddrPortFrom(a, 9001).String()); !got.OK || got.Banner == "" {
					t.Errorf("got %+v, want a banner", got)
				}
			})
			for _, size := range []int{0, 1, 100_000, 64 << 20} {
				t.Run(fmt.Sprintf("%s echoes %d bytes after half close over %v", server, size, a), func(t *testing.T) {
					got := try(t, meshed, "client", "echo", "-addr", netip.AddrPortFrom(a, 9000).String(), "-bytes", fmt.Sprint(size))
					if !got.OK || got.Bytes != size {
						t.Errorf("got %+v, want %d bytes back", got, size)
					}
				})
			}
		}
	}
}

// Traffic that crosses the border of the mesh goes on in clear while nothing
// forbids it.
func TestAcrossTheBorder(t *testing.T) {
	for _, r := range []struct{ from, to string }{{meshed, outside}, {outside, meshed}} {
		for _, server := range []string{"near", "far"} {
			t.Run(r.from+" to "+r.to+"/"+server, func(t *testing.T) {
				got := try(t, r.from, "client", "get", "http://"+server+"."+r.to+"/")
				if !got.OK || got.Server != server {
					t.Errorf("got %+v, want an answer of %s", got, server)
				}
			})
		}
	}
}
