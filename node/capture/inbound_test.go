package capture

import (
	"context"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/bpf"
	"github.com/weft-mesh/weft/internal/testnet"
)

// TestSYNCookiesReachTheProxy: with cookies, the packet that makes the
// connection is not the SYN. The app must not get it.
func TestSYNCookiesReachTheProxy(t *testing.T) {
	s := newStage(t, testnet.Routed)
	p, x := s.captured(Mode{New: true})
	s.pod.Sysctl("net/ipv4/tcp_syncookies", "2") // always
	a := startApp(t, s.pod.Host, ":8080")
	try := func(t *testing.T, from *testnet.Host, addr netip.Addr) {
		t.Helper()
		k, err := connect(from, netip.AddrPortFrom(addr, 8080))
		if err != nil {
			t.Fatal(err)
		}
		if err := k.echo("hello"); err != nil {
			t.Fatal(err)
		}
	}
	eachFamily(t, func(t *testing.T, addr func(*testnet.Host) netip.Addr) {
		before, apps := x.count("in"), len(a.accepted())
		try(t, s.outside, addr(s.pod.Host))
		if n := x.count("in") - before; n != 1 {
			t.Errorf("the proxy accepted %d connections, want 1", n)
		}
		if n := len(a.accepted()) - apps; n != 1 {
			t.Errorf("the app accepted %d connections, want the proxy's and no other", n)
		}
		// A probe goes to the app, with cookies too.
		before = x.count("in")
		try(t, s.node.Host, addr(s.pod.Host))
		if x.count("in") != before {
			t.Error("the proxy accepted a probe of the host")
		}
	})
	if stat(t, p, "probe_in") == 0 {
		t.Error("no probe was counted")
	}
}

// TestProbesOfTheHostPass: the host's own connections go straight to the app,
// and the app sees the node's address.
func TestProbesOfTheHostPass(t *testing.T) {
	for name, kind := range map[string]testnet.Kind{"routed": testnet.Routed, "bridged": testnet.Bridged} {
		t.Run(name, func(t *testing.T) {
			s := newStage(t, kind)
			p, x := s.captured(Mode{New: true})
			startApp(t, s.pod.Host, ":8080")
			eachFamily(t, func(t *testing.T, addr func(*testnet.Host) netip.Addr) {
				k, err := connect(s.node.Host, netip.AddrPortFrom(addr(s.pod.Host), 8080))
				if err != nil {
					t.Fatal(err)
				}
				if k.client != addrPort(k.LocalAddr()) {
					t.Errorf("the app sees %v, want the host's socket %v", k.client, k.LocalAddr())
				}
				if err := k.echo("hello"); err != nil {
					t.Fatal(err)
				}
				if x.count("in") != 0 {
					t.Error("the proxy has seen the host's connection")
				}
				// It lives on when its entry is evicted, and without a proxy.
				evict(t, s.capture)
				if err := k.echo("again"); err != nil {
					t.Errorf("after the eviction of its entry: %v", err)
				}
			})
			x.kill()
			if _, err := connect(s.node.Host, netip.AddrPortFrom(s.pod.V4, 8080)); err != nil {
				t.Errorf("a probe needs the proxy: %v", err)
			}
			if stat(t, p, "probe_in") == 0 {
				t.Error("no probe was counted")
			}
		})
	}
}

// evict empties the map of probes.
func evict(t *testing.T, c *Capture) {
	t.Helper()
	var key [40]byte
	probes := c.maps[bpf.CaptureMapProbes]
	for probes.NextKey(nil, &key) == nil {
		if err := probes.Delete(key); err != nil {
			t.Fatal(err)
		}
	}
}

// TestNodeAddressIsNoProbe: a SYN that the node forwards does not become a
// probe by having the node's address as its source.
func TestNodeAddressIsNoProbe(t *testing.T) {
	s := newStage(t, testnet.Routed)
	_, x := s.captured(Mode{New: true})
	startApp(t, s.pod.Host, ":8080")
	// As kube-proxy does for a NodePort: what comes from outside is
	// masqueraded with the node's address.
	s.node.Run("nft", `
		table inet t {
			chain post { type nat hook postrouting priority srcnat;
				iifname "uplink" oifname "`+s.pod.Veth+`" masquerade
			}
		}`)
	eachFamily(t, func(t *testing.T, addr func(*testnet.Host) netip.Addr) {
		before := x.count("in")
		k, err := connect(s.outside, netip.AddrPortFrom(addr(s.pod.Host), 8080))
		if err != nil {
			t.Fatal(err)
		}
		if k.client.Addr() == addr(s.outside) {
			t.Fatal("the test does not masquerade")
		}
		if x.count("in") != before+1 {
			t.Errorf("a forwarded connection with the source %v has passed as a probe", k.client)
		}
	})
}

// TestHostSocketMustBeConnecting: the tuple of a host's socket that is not
// connecting proves nothing about a SYN.
func TestHostSocketMustBeConnecting(t *testing.T) {
	s := newStage(t, testnet.Routed)
	p, _ := s.captured(Mode{New: true})
	startApp(t, s.pod.Host, ":8080")
	k, err := connect(s.node.Host, netip.AddrPortFrom(s.pod.V4, 8080))
	if err != nil {
		t.Fatal(err)
	}
	// The same tuple again, forged on the node: its socket is established.
	evict(t, s.capture)
	before := stat(t, p, "probe_in")
	wire := s.node.Tap(s.pod.Veth)
	wire.SendThroughQdisc(testnet.Frame{
		SrcMAC: wire.MAC, DstMAC: s.pod.MAC("eth0"),
		Src: addrPort(k.LocalAddr()), Dst: addrPort(k.RemoteAddr()), Flags: testnet.SYN, Seq: 1,
	}.Bytes())
	eventually(t, "the forged SYN is given to the proxy", func() bool { return stat(t, p, "captured_in") > 0 })
	if got := stat(t, p, "probe_in"); got != before {
		t.Errorf("%d SYNs passed as probes, want %d", got, before)
	}
}

// TestFragmentedSYN: reassembly would lose the proxy's listener, and the app
// would get the SYN.
func TestFragmentedSYN(t *testing.T) {
	s := newStage(t, testnet.Bridged)
	p, _ := s.captured(Mode{New: true})
	startApp(t, s.pod.Host, ":8080")
	from := s.peer.Tap("eth0")
	f := testnet.Frame{
		SrcMAC: from.MAC, DstMAC: s.pod.MAC("eth0"),
		Src: netip.AddrPortFrom(s.peer.V4, 4000), Dst: netip.AddrPortFrom(s.pod.V4, 8080),
		Flags: testnet.SYN, Fragment: true, MoreFragments: true, Payload: []byte("1234"),
	}
	from.Send(f.Bytes())
	eventually(t, "the fragment is dropped", func() bool { return stat(t, p, "in_fragment_drop") == 1 })
}

// TestTCPBehindIPv6Options: an ordinary socket can put a destination option
// before TCP (IPV6_DSTOPTS, RFC 3542). It is captured in both directions.
func TestTCPBehindIPv6Options(t *testing.T) {
	s := newStage(t, testnet.Routed)
	_, x := s.captured(Mode{New: true})
	startApp(t, s.pod.Host, ":8080")
	startApp(t, s.outside, ":8080")
	option := func(fd int) error {
		return unix.SetsockoptString(fd, unix.IPPROTO_IPV6, unix.IPV6_DSTOPTS, string([]byte{0, 0, 1, 4, 0, 0, 0, 0}))
	}
	for _, way := range []struct {
		role     string
		from, to *testnet.Host
	}{{"in", s.outside, s.pod.Host}, {"out", s.pod.Host, s.outside}} {
		ctx, cancel := context.WithTimeout(context.Background(), soon)
		defer cancel()
		c, err := way.from.NS.Dial(ctx, "tcp", netip.AddrPort{}, netip.AddrPortFrom(way.to.V6, 8080), option)
		if err != nil {
			t.Fatalf("%s: %v", way.role, err)
		}
		defer c.Close()
		k, err := greet(c)
		if err != nil {
			t.Fatalf("%s: %v", way.role, err)
		}
		if err := k.echo("hello"); err != nil {
			t.Errorf("%s: %v", way.role, err)
		}
		if got, ok := x.last(way.role); !ok || got.remote != addrPort(c.LocalAddr()) {
			t.Errorf("%s: the proxy accepted %+v, want it to come from %v", way.role, got, c.LocalAddr())
		}
	}
}

// TestServiceAddressIsSeenBeforeTranslation: the proxy sees the ClusterIP that
// the app asked for, and the node translates the proxy's own connection.
func TestServiceAddressIsSeenBeforeTranslation(t *testing.T) {
	s := newStage(t, testnet.Routed)
	_, x := s.captured(Mode{New: true})
	startApp(t, s.peer.Host, ":8080")
	s.node.Run("nft", `
		table inet t {
			chain pre { type nat hook prerouting priority dstnat;
				ip daddr 10.96.0.10 tcp dport 80 dnat ip to `+s.peer.V4.String()+`:8080
				ip6 daddr fd96::10 tcp dport 80 dnat ip6 to [`+s.peer.V6.String()+`]:8080
			}
		}`)
	for _, vip := range []string{"10.96.0.10:80", "[fd96::10]:80"} {
		dst := netip.MustParseAddrPort(vip)
		k, err := connect(s.pod.Host, dst)
		if err != nil {
			t.Fatal(err)
		}
		if got, _ := x.last("out"); got.local != dst {
			t.Errorf("the proxy sees the destination %v, want %v", got.local, dst)
		}
		if addrPort(k.RemoteAddr()) != dst {
			t.Errorf("the app sees the peer %v, want %v", k.RemoteAddr(), dst)
		}
	}
}

// TestTunnelPort: 15008 has a listener of its own.
func TestTunnelPort(t *testing.T) {
	s := newStage(t, testnet.Routed)
	_, x := s.captured(Mode{New: true})
	eachFamily(t, func(t *testing.T, addr func(*testnet.Host) netip.Addr) {
		dst := netip.AddrPortFrom(addr(s.pod.Host), PortHBONE)
		c, err := s.outside.Dial(dst)
		if err != nil {
			t.Fatal(err)
		}
		eventually(t, "the proxy accepts on the tunnel's listener", func() bool {
			got, ok := x.last("hb")
			return ok && got.local == dst && got.remote == addrPort(c.LocalAddr())
		})
	})
	if n := x.count("in"); n != 0 {
		t.Errorf("%d tunnels came as plain connections", n)
	}
}

// TestPodToItself: what is local to the pod is not captured.
func TestPodToItself(t *testing.T) {
	s := newStage(t, testnet.Routed)
	_, x := s.captured(Mode{New: true})
	startApp(t, s.pod.Host, ":8080")
	for _, a := range []netip.Addr{s.pod.V4, s.pod.V6, netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("::1")} {
		if _, err := connect(s.pod.Host, netip.AddrPortFrom(a, 8080)); err != nil {
			t.Errorf("to itself by %v: %v", a, err)
		}
	}
	// An address that the programs do not know.
	s.pod.Run("ip", "addr", "add", "10.99.99.99/32", "dev", "lo")
	if _, err := connect(s.pod.Host, netip.MustParseAddrPort("10.99.99.99:8080")); err != nil {
		t.Errorf("to itself by an address added later: %v", err)
	}
	if n := x.count("out"); n != 0 {
		t.Errorf("the proxy has seen %d of the pod's connections to itself", n)
	}
}

// TestUnreachableIsNotALoop: a destination without a route must not bring the
// proxy's connection back to the proxy.
func TestUnreachableIsNotALoop(t *testing.T) {
	s := newStage(t, testnet.Routed)
	_, x := s.captured(Mode{New: true})
	s.pod.Run("ip", "-6", "route", "del", "default")
	// The proxy accepts, finds no way, and resets.
	if _, err := connect(s.pod.Host, netip.MustParseAddrPort("[2001:db8::1]:80")); err == nil {
		t.Error("the connection carries data")
	}
	if n := x.count("out"); n != 1 {
		t.Errorf("the proxy accepted %d connections for one", n)
	}
}
