package capture

import (
	"bytes"
	"context"
	"fmt"
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

// TestRawFramesAreNoWayAround sends frames past every program in the pod. Each
// arrives at the peer without the host's guard, and none with it.
func TestRawFramesAreNoWayAround(t *testing.T) {
	s := newStage(t, testnet.Bridged)
	p, x := s.captured(Mode{New: true})
	from, to := s.pod.Tap("eth0"), s.peer.Tap("eth0")
	// A connection of the proxy, whose tuple frames may borrow in vain.
	startApp(t, s.peer.Host, ":8080")
	if _, err := connect(s.pod.Host, netip.AddrPortFrom(s.peer.V4, 8080)); err != nil {
		t.Fatal(err)
	}
	if n := x.count("out"); n != 1 {
		t.Fatalf("the proxy accepted %d connections, want 1", n)
	}

	for _, addr := range []func(h *testnet.Host) netip.Addr{
		func(h *testnet.Host) netip.Addr { return h.V4 },
		func(h *testnet.Host) netip.Addr { return h.V6 },
	} {
		base := testnet.Frame{
			SrcMAC: from.MAC, DstMAC: to.MAC,
			Src: netip.AddrPortFrom(addr(s.pod.Host), 4000), Dst: netip.AddrPortFrom(addr(s.peer.Host), 80),
		}
		v6 := base.Src.Addr().Is6()
		ways := map[string]func(f *testnet.Frame){
			"SYN":               func(f *testnet.Frame) { f.Flags = testnet.SYN },
			"data":              func(f *testnet.Frame) { f.Flags = testnet.ACK },
			"first fragment":    func(f *testnet.Frame) { f.Flags, f.Fragment, f.MoreFragments = testnet.ACK, true, true },
			"priority tag":      func(f *testnet.Frame) { f.Flags, f.VLANs = testnet.SYN, []uint16{0} },
			"two priority tags": func(f *testnet.Frame) { f.Flags, f.VLANs = testnet.SYN, []uint16{0, 0} },
			"spoofed source": func(f *testnet.Frame) {
				f.Flags = testnet.SYN
				f.Src = netip.AddrPortFrom(addr(s.node.Host), 4000)
			},
		}
		if v6 {
			ways["destination option"] = func(f *testnet.Frame) { f.Flags, f.DestinationOptions = testnet.SYN, 1 }
		}
		for name, way := range ways {
			t.Run(fmt.Sprintf("%s/%v", name, base.Dst), func(t *testing.T) {
				frame := base
				frame.Payload = []byte("smuggled " + name)
				way(&frame)
				arrives := func(round string) bool {
					last := base
					last.UDP, last.Payload = true, []byte("last of "+name+" "+round)
					from.Send(frame.Bytes())
					from.Send(last.Bytes())
					for _, got := range to.Until(last.Payload) {
						if bytes.Contains(got, frame.Payload) {
							return true
						}
					}
					return false
				}
				only(t, p, pinGuardPod)
				if !arrives("one") {
					t.Fatal("the attack does not even work without the host's guard")
				}
				only(t, p, pinGuardHost)
				if arrives("two") {
					t.Error("the frame left the pod")
				}
			})
		}
	}
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
