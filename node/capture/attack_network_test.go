package capture

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/internal/testnet"
)

// both runs ip with the arguments for IPv4 and for IPv6.
func both(h *testnet.Host, args ...string) {
	h.Run("ip", append([]string{"-4"}, args...)...)
	h.Run("ip", append([]string{"-6"}, args...)...)
}

// TestPodsOwnNetworkIsNoWayAround: what root of a pod can do to the pod's
// routing, filters and interfaces takes its packets past the routes, but past
// no guard at the host's end.
func TestPodsOwnNetworkIsNoWayAround(t *testing.T) {
	plain := bySocket(0, func(int, netip.AddrPort, netip.AddrPort) error { return nil })
	mark := bySocket(0, marked(MarkProxy))
	attacks := []struct {
		row     string
		prepare func(t *testing.T, pod *testnet.Pod)
		attempt send
	}{
		{"attack.rules_deleted", func(_ *testing.T, pod *testnet.Pod) {
			both(pod.Host, "rule", "flush")
			both(pod.Host, "rule", "add", "pref", "32766", "lookup", "main")
		}, plain},
		{"attack.rules_overtaken", func(_ *testing.T, pod *testnet.Pod) {
			both(pod.Host, "rule", "add", "pref", "1", "lookup", "main")
		}, plain},
		{"attack.routes_replaced", func(_ *testing.T, pod *testnet.Pod) {
			both(pod.Host, "route", "flush", "table", fmt.Sprint(table))
			pod.Run("ip", "route", "add", "default", "via", "169.254.1.1", "dev", "eth0", "onlink", "table", fmt.Sprint(table))
			pod.Run("ip", "-6", "route", "add", "default", "via", "fe80::1", "dev", "eth0", "onlink", "table", fmt.Sprint(table))
		}, plain},
		{"attack.filters_replaced", func(_ *testing.T, pod *testnet.Pod) {
			pod.Run("tc", "qdisc", "replace", "dev", "eth0", "root", "pfifo")
			pod.Run("sh", "-c", "tc qdisc del dev eth0 clsact 2>/dev/null; tc qdisc add dev eth0 clsact")
			pod.Run("tc", "filter", "add", "dev", "eth0", "egress", "prio", "1", "u32", "match", "u32", "0", "0", "flowid", "1:1")
			pod.Run("tc", "filter", "del", "dev", "eth0", "egress")
			pod.Run("tc", "filter", "del", "dev", "eth0", "ingress")
			pod.Run("tc", "qdisc", "del", "dev", "eth0", "clsact")
			pod.Run("tc", "qdisc", "del", "dev", "eth0", "root")
		}, mark},
		{"attack.source_translated", func(_ *testing.T, pod *testnet.Pod) {
			// To a port of the proxy's, whose listener is blessed.
			pod.Run("nft", fmt.Sprintf(`table inet t { chain post { type filter hook postrouting priority 100;
				oifname eth0 tcp dport 8080 tcp sport set %d; }; }`, PortHBONE))
		}, mark},
	}
	score := newCard(t)
	for _, at := range attacks {
		t.Run(at.row, func(t *testing.T) {
			s := newStage(t, testnet.Routed)
			startApp(t, s.outside, ":8080")
			p, _ := s.captured(Mode{New: true})
			a := newArena(t, s)
			at.prepare(t, s.pod)
			if at.row == "attack.source_translated" {
				a.shows = PortHBONE
			}
			for _, layer := range []string{"", pinGuardHost, "all"} {
				if only(t, p, layer); layer == "all" {
					whole(t, p)
				}
				for _, dst := range []netip.Addr{s.outside.V4, s.outside.V6} {
					arrived := a.arrives(t, s.pod.Host, s.pod.NS, dst, at.attempt)
					if layer == "" && !arrived {
						t.Errorf("does not work to %v without the guards either", dst)
					}
					if layer != "" {
						score.attack(at.row, !arrived)
					}
				}
			}
		})
	}
}

// TestFiltersDeletedWithoutLinks: where the kernel has no tcx links, the pod can
// take off the programs inside it. The host's end is not the pod's.
func TestFiltersDeletedWithoutLinks(t *testing.T) {
	s := newStage(t, testnet.Routed)
	startApp(t, s.outside, ":8080")
	s.cfg.Disable = []string{FeatureTCX}
	s.capture = s.agent()
	p, _ := s.captured(Mode{New: true})
	score := newCard(t)
	a := newArena(t, s)
	ways := []send{bySocket(0, marked(MarkProxy)), bySocket(0, bound("eth0")), rawSocket, bySocket(0, fastOpen)}
	s.pod.Sysctl("net/ipv4/tcp_fastopen", "5")
	for _, guarded := range []bool{true, false} {
		if guarded {
			s.pod.Run("tc", "qdisc", "del", "dev", "eth0", "clsact")
		} else {
			only(t, p, "")
		}
		for _, way := range ways {
			for _, dst := range []netip.Addr{s.outside.V4, s.outside.V6} {
				arrived := a.arrives(t, s.pod.Host, s.pod.NS, dst, way)
				if guarded {
					score.attack("attack.filters_deleted", !arrived)
				} else if !arrived {
					t.Errorf("does not work to %v without the guards either", dst)
				}
			}
		}
	}
}

// TestNestedNamespaceIsNoWayAround: a container engine inside a pod, or an
// attacker, makes namespaces behind the pod's. Nothing that is forwarded for
// them leaves.
func TestNestedNamespaceIsNoWayAround(t *testing.T) {
	score := newCard(t)
	attempt := bySocket(0, func(int, netip.AddrPort, netip.AddrPort) error { return nil })
	for row, how := range map[string]testnet.Nesting{
		"attack.nested_forwarding": testnet.NestedVeth,
		"attack.nested_macvlan":    testnet.NestedMacvlan,
		"attack.nested_interface":  testnet.NestedMove,
	} {
		for _, guarded := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/guarded=%t", row, guarded), func(t *testing.T) {
				s := newStage(t, testnet.Routed)
				startApp(t, s.outside, ":8080")
				p, _ := s.captured(Mode{New: true})
				if !guarded {
					only(t, p, "")
				}
				inner := s.pod.Nest("inner", how)
				if how == testnet.NestedVeth {
					s.pod.Run("nft", "table inet t { chain post { type nat hook postrouting priority 100; oifname eth0 masquerade; }; }")
				}
				a := newArena(t, s)
				for range 3 {
					for _, dst := range []netip.Addr{s.outside.V4, s.outside.V6} {
						arrived := a.arrives(t, inner, inner.NS, dst, attempt)
						if guarded {
							score.attack(row, !arrived)
						} else if !arrived {
							t.Errorf("does not work to %v without the guards either", dst)
						}
					}
				}
			})
		}
	}
}

// TestTunIsNoWayAround: packets that a process writes into a tun device of its
// pod, which forwards them.
func TestTunIsNoWayAround(t *testing.T) {
	s := newStage(t, testnet.Routed)
	startApp(t, s.outside, ":8080")
	p, _ := s.captured(Mode{New: true})
	score := newCard(t)
	tun := openTun(t, s.pod.Host)
	s.pod.Run("ip", "link", "set", "tun0", "up")
	s.pod.Run("ip", "addr", "add", "192.168.77.1/24", "dev", "tun0")
	s.pod.Run("ip", "-6", "addr", "add", "fd68::1/64", "dev", "tun0", "nodad")
	s.pod.Sysctl("net/ipv4/ip_forward", "1")
	s.pod.Sysctl("net/ipv6/conf/all/forwarding", "1")
	s.pod.Run("nft", "table inet t { chain post { type nat hook postrouting priority 100; oifname eth0 masquerade; }; }")
	a := newArena(t, s)
	inner := map[bool]netip.Addr{true: netip.MustParseAddr("192.168.77.2"), false: netip.MustParseAddr("fd68::2")}
	attempt := func(from, to netip.AddrPort) error {
		f := testnet.Frame{Src: netip.AddrPortFrom(inner[to.Addr().Is4()], from.Port()), Dst: to, Flags: testnet.SYN}
		_, err := tun.Write(f.Bytes()[14:])
		return err
	}
	for _, guarded := range []bool{false, true} {
		if only(t, p, ""); guarded {
			whole(t, p)
		}
		for range 3 {
			for _, dst := range []netip.Addr{s.outside.V4, s.outside.V6} {
				arrived := a.arrives(t, s.pod.Host, s.pod.NS, dst, attempt)
				if guarded {
					score.attack("attack.tun", !arrived)
				} else if !arrived {
					t.Errorf("does not work to %v without the guards either", dst)
				}
			}
		}
	}
}

// openTun makes tun0 in the namespace.
func openTun(t *testing.T, h *testnet.Host) *os.File {
	t.Helper()
	var f *os.File
	err := h.Do(func() (err error) {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		f = os.NewFile(uintptr(fd), "tun0")
		r, err := unix.NewIfreq("tun0")
		if err != nil {
			return err
		}
		r.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
		return unix.IoctlIfreq(fd, unix.TUNSETIFF, r)
	})
	if err != nil {
		t.Fatalf("make a tun device: %v", err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// TestProxysConnectionsCannotBeTurned: the pod's own address translation, put
// on the proxy's packets, would lead a connection that the mesh allows to
// somebody else.
func TestProxysConnectionsCannotBeTurned(t *testing.T) {
	s := newStage(t, testnet.Routed)
	startApp(t, s.outside, ":8080")
	victim := startApp(t, s.peer.Host, ":8080")
	p, _ := s.captured(Mode{New: true})
	score := newCard(t)
	s.pod.Run("nft", fmt.Sprintf(`table inet t {
		chain out {
		type nat hook output priority -100
		meta mark & %#[1]x == %#[2]x meta nfproto ipv4 tcp dport 8080 dnat ip to %[3]v:8080
		meta mark & %#[1]x == %#[2]x meta nfproto ipv6 tcp dport 8080 dnat ip6 to [%[4]v]:8080
		}
	}`, MarkMask, MarkProxy, s.peer.V4, s.peer.V6))
	for _, layer := range []string{"", pinGuardHost, "all"} {
		if only(t, p, layer); layer == "all" {
			whole(t, p)
		}
		for _, dst := range []netip.Addr{s.outside.V4, s.outside.V6} {
			before := len(victim.accepted())
			ctx, cancel := context.WithTimeout(context.Background(), patience(layer != ""))
			c, err := s.pod.NS.Dial(ctx, "tcp", netip.AddrPort{}, netip.AddrPortFrom(dst, 8080), nil)
			if err == nil {
				// The proxy has accepted; what it reaches says so.
				c.SetDeadline(time.Now().Add(patience(layer != "")))
				io.ReadFull(c, make([]byte, 1))
				c.Close()
			}
			cancel()
			turned := len(victim.accepted()) > before
			if layer == "" && !turned {
				t.Errorf("does not work to %v without the guards either", dst)
			}
			if layer != "" {
				score.attack("attack.proxy_translated", !turned)
			}
		}
	}
}

// TestPortsOfTheProxyCannotBeTaken: no socket option lets a process of the pod
// listen where the proxy does, not even when the proxy is gone for good.
func TestPortsOfTheProxyCannotBeTaken(t *testing.T) {
	s := newStage(t, testnet.Routed)
	p, x := s.captured(Mode{New: true})
	score := newCard(t)
	greedy := func(fd int) error {
		for _, o := range [][2]int{{unix.SOL_SOCKET, unix.SO_REUSEADDR}, {unix.SOL_SOCKET, unix.SO_REUSEPORT}, {unix.SOL_IP, unix.IP_TRANSPARENT}, {unix.SOL_IP, unix.IP_FREEBIND}} {
			if err := unix.SetsockoptInt(fd, o[0], o[1], 1); err != nil {
				return err
			}
		}
		return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, MarkProxy)
	}
	options := map[string]func(fd int) error{
		"reuse":  greedy,
		"device": func(fd int) error { return errors.Join(greedy(fd), unix.BindToDevice(fd, "eth0")) },
	}
	listen := func(h *testnet.Host, network, at string, option func(int) error) (net.Listener, error) {
		var l net.Listener
		err := h.Do(func() (err error) {
			lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
				var set error
				return errors.Join(c.Control(func(fd uintptr) { set = option(int(fd)) }), set)
			}}
			lc.SetMultipathTCP(false)
			l, err = lc.Listen(context.Background(), network, at)
			return err
		})
		return l, err
	}
	for name, option := range options {
		for _, port := range []int{PortOutbound, PortInbound, PortHBONE} {
			for _, at := range []struct {
				network   string
				pod, peer string
			}{
				{"tcp4", "0.0.0.0", "0.0.0.0"}, {"tcp6", "::", "::"}, {"tcp", "::", "::"},
				{"tcp4", s.pod.V4.String(), s.peer.V4.String()}, {"tcp6", s.pod.V6.String(), s.peer.V6.String()},
			} {
				l, err := listen(s.peer.Host, at.network, net.JoinHostPort(at.peer, fmt.Sprint(port)), option)
				if err != nil {
					t.Errorf("%s: %s port %d outside the mesh: %v", name, at.peer, port, err)
					continue
				}
				l.Close()
				l, err = listen(s.pod.Host, at.network, net.JoinHostPort(at.pod, fmt.Sprint(port)), option)
				score.attack("attack.listener_stolen", err != nil)
				if err == nil {
					l.Close()
					t.Errorf("%s: a process of the pod listens at %s port %d", name, at.pod, port)
				}
			}
		}
	}
	// With the proxy and the agent gone, the ports are free; but nothing
	// leads there.
	x.kill()
	p.mu.Lock()
	err := p.listeners.Close()
	p.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	for _, port := range []uint16{PortInbound, PortHBONE, 8080} {
		l, err := listen(s.pod.Host, "tcp", fmt.Sprintf(":%d", port), func(fd int) error {
			return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, MarkProxy)
		})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		for _, guarded := range []bool{false, true} {
			if only(t, p, ""); guarded {
				whole(t, p)
			}
			for _, to := range []netip.Addr{s.pod.V4, s.pod.V6} {
				ctx, cancel := context.WithTimeout(context.Background(), patience(guarded))
				c, err := s.outside.NS.Dial(ctx, "tcp", netip.AddrPort{}, netip.AddrPortFrom(to, port), nil)
				cancel()
				if err == nil {
					c.Close()
				}
				if guarded {
					score.attack("attack.dead_proxys_port", err != nil)
				} else if err != nil {
					t.Errorf("port %d of %v does not answer without the programs either: %v", port, to, err)
				}
			}
		}
	}
}
