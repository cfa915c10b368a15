package capture

import (
	"context"
	"io"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/internal/testnet"
)

// layers are the programs that each stop traffic around the proxy, and what
// they count when they do.
func layers() map[string]string {
	return map[string]string{
		pinGuardPod:  "pod_guard_syn_drop",
		pinGuardHost: "host_guard_syn_drop",
		pinInbound:   "in_unknown_socket_drop",
	}
}

// only leaves one of the layers, or none.
func only(t *testing.T, p *Pod, pin string) {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	for layer := range layers() {
		if layer == pin {
			h := p.hook(pin)
			if err := p.put(h, p.programs[h.program]); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if err := p.drop(layer); err != nil {
			t.Fatal(err)
		}
	}
}

// TestSocketOptionsAreNoWayAround: what a process with CAP_NET_RAW can do to a
// socket takes it past the routes, as the first case shows, but past none of
// the layers.
func TestSocketOptionsAreNoWayAround(t *testing.T) {
	ways := map[string]func(fd int) error{
		"SO_MARK": func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, MarkProxy) },
		"SO_BINDTODEVICE": func(fd int) error {
			return unix.BindToDevice(fd, "eth0")
		},
	}
	s := newStage(t, testnet.Routed)
	startApp(t, s.outside, ":8080")
	p, _ := s.captured(Mode{New: true})
	for name, way := range ways {
		t.Run(name, func(t *testing.T) {
			eachFamily(t, func(t *testing.T, addr func(*testnet.Host) netip.Addr) {
				dst := netip.AddrPortFrom(addr(s.outside), 8080)
				only(t, p, "")
				ctx, cancel := context.WithTimeout(context.Background(), soon)
				defer cancel()
				c, err := s.pod.NS.Dial(ctx, "tcp", netip.AddrPort{}, dst, way)
				if err != nil {
					t.Fatalf("the attack does not even work without guards: %v", err)
				}
				defer c.Close()
				for layer, counter := range layers() {
					only(t, p, layer)
					before := stat(t, p, counter)
					refused(t, s.pod.Host, dst, way)
					if stat(t, p, counter) == before {
						t.Errorf("%s has not counted the drop as %s", layer, counter)
					}
				}
			})
		})
	}
}

// TestMarkRoutesButDoesNotBless: with both guards, a socket that is marked and
// blessed passes; the same one without the blessing does not.
func TestMarkRoutesButDoesNotBless(t *testing.T) {
	s := newStage(t, testnet.Routed)
	startApp(t, s.outside, ":8080")
	_, x := s.captured(Mode{New: true})
	dst := netip.AddrPortFrom(s.outside.V4, 8080)
	ctx, cancel := context.WithTimeout(context.Background(), soon)
	defer cancel()
	c, err := s.pod.NS.Dial(ctx, "tcp", netip.AddrPort{}, dst, x.toWire)
	if err != nil {
		t.Fatalf("the proxy's own socket does not pass: %v", err)
	}
	c.Close()
	refused(t, s.pod.Host, dst, func(fd int) error {
		return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, MarkProxy)
	})
}

// TestOtherProtocolsPass: capture is about TCP.
func TestOtherProtocolsPass(t *testing.T) {
	s := newStage(t, testnet.Routed)
	s.captured(Mode{New: true})
	eachFamily(t, func(t *testing.T, addr func(*testnet.Host) netip.Addr) {
		for _, pair := range [][2]*testnet.Host{{s.pod.Host, s.outside}, {s.outside, s.pod.Host}} {
			if err := echoUDP(pair[0], pair[1], addr(pair[1])); err != nil {
				t.Errorf("UDP from %s to %s: %v", pair[0].Name, pair[1].Name, err)
			}
			if err := ping(pair[0], addr(pair[1])); err != nil {
				t.Errorf("ICMP from %s to %s: %v", pair[0].Name, pair[1].Name, err)
			}
		}
	})
}

// TestMPTCPIsCaptured: a client that asks for MPTCP gets plain TCP from the
// proxy's listener.
func TestMPTCPIsCaptured(t *testing.T) {
	s := newStage(t, testnet.Routed)
	_, x := s.captured(Mode{New: true})
	s.pod.Sysctl("net/mptcp/enabled", "1")
	startApp(t, s.outside, ":8080")
	eachFamily(t, func(t *testing.T, addr func(*testnet.Host) netip.Addr) {
		dst := netip.AddrPortFrom(addr(s.outside), 8080)
		before := x.count("out")
		c, err := dialMPTCP(s.pod.Host, dst)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		k, err := greet(c)
		if err != nil {
			t.Fatal(err)
		}
		if err := k.echo("hello"); err != nil {
			t.Fatal(err)
		}
		if x.count("out") != before+1 {
			t.Error("the proxy has not seen the connection")
		}
		if _, err := io.WriteString(c, "x"); err != nil {
			t.Error(err)
		}
	})
}
