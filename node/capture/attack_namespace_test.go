package capture

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/internal/testnet"
)

// linkLocal returns the address of an interface that needs no configuration.
func linkLocal(t *testing.T, h *testnet.Host) netip.Addr {
	t.Helper()
	var found netip.Addr
	eventually(t, "a link-local address", func() bool {
		list, err := h.Addrs()
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range list {
			if a.Is6() && a.IsLinkLocalUnicast() {
				found = a
			}
		}
		return found.IsValid()
	})
	return found
}

// connectOn begins to connect over an interface, and returns the port that it
// connects from.
func connectOn(t *testing.T, h *testnet.Host, link string, to netip.AddrPort) (port uint16) {
	t.Helper()
	err := h.Do(func() error {
		i, err := net.InterfaceByName(link)
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		t.Cleanup(func() { unix.Close(fd) })
		sa := &unix.SockaddrInet6{Addr: to.Addr().As16(), Port: int(to.Port()), ZoneId: uint32(i.Index)}
		if err := unix.Connect(fd, sa); err != nil && !errors.Is(err, unix.EINPROGRESS) {
			return err
		}
		own, err := unix.Getsockname(fd)
		if err == nil {
			port = uint16(own.(*unix.SockaddrInet6).Port)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return port
}

// TestLinkLocalIsNoWayAround: neighbours on one bridge have addresses that no
// route leads to and no control plane knows.
func TestLinkLocalIsNoWayAround(t *testing.T) {
	s := newStage(t, testnet.Bridged)
	app := startApp(t, s.pod.Host, ":8080")
	pod, peer := linkLocal(t, s.pod.Host), linkLocal(t, s.peer.Host)
	p, _ := s.captured(Mode{New: true})
	score := newCard(t)
	seen := newWatch(t, s.peer.Host, "eth0")
	for _, guarded := range []bool{false, true} {
		if only(t, p, ""); guarded {
			whole(t, p)
		}
		for range 3 {
			port := connectOn(t, s.pod.Host, "eth0", netip.AddrPortFrom(peer, 8080))
			arrived := fromPort(seen.frames(s.pod.Host), port)
			if guarded {
				score.attack("attack.link_local", !arrived)
			} else if !arrived {
				t.Error("a SYN to a neighbour does not arrive without the guards either")
			}
		}
	}
	// On the way in, the programs know all the pod's addresses, or drop.
	answersFromHere(s.pod)
	for _, guarded := range []bool{true, false} {
		if whole(t, p); !guarded {
			only(t, p, "")
		}
		for range 3 {
			judged := func() uint64 { return stat(t, p, "captured_in") + stat(t, p, "in_unknown_addr_drop") }
			before := judged()
			port := connectOn(t, s.peer.Host, "eth0", netip.AddrPortFrom(pod, 8080))
			direct := func() bool {
				for _, a := range app.accepted() {
					if a.Port() == port {
						return true
					}
				}
				return false
			}
			if guarded {
				eventually(t, "the SYN is judged", func() bool { return judged() > before })
				score.attack("attack.in_link_local", !direct())
			} else {
				eventually(t, "without the program, the app accepts", direct)
			}
		}
	}
}

// TestNamespacesAreNotBelieved: a pod is captured in the namespace that has its
// addresses, and served by sockets of that namespace, whatever an agent that
// was told wrong, or a proxy, hands in.
func TestNamespacesAreNotBelieved(t *testing.T) {
	s := newStage(t, testnet.Routed)
	score := newCard(t)
	right := s.target()
	p, x := s.prepare()
	theirs, err := s.capture.Prepare(t.Context(), targetOf(s.peer), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.Close()
	y := startProxy(t, theirs)
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	of := func(edit func(t *Target)) Target {
		t := right
		edit(&t)
		return t
	}
	for name, try := range map[string]struct {
		target Target
		held   *Listeners
	}{
		"the neighbour's namespace": {of(func(t *Target) { t.Netns = s.peer.NS }), &x.files.Listeners},
		"the node's namespace":      {of(func(t *Target) { t.Netns = s.node.NS }), &x.files.Listeners},
		"a namespace elsewhere":     {of(func(t *Target) { t.Netns = s.outside.NS }), &x.files.Listeners},
		"the neighbour's address":   {of(func(t *Target) { t.Addrs = []netip.Addr{s.peer.V4} }), &x.files.Listeners},
		"one address too many":      {of(func(t *Target) { t.Addrs = append([]netip.Addr{s.peer.V6}, t.Addrs...) }), &x.files.Listeners},
		"the neighbour's sockets":   {right, &y.files.Listeners},
	} {
		for range 3 {
			q, err := s.capture.Prepare(t.Context(), try.target, try.held)
			score.attack("attack.namespace_claimed", err != nil)
			if err == nil {
				q.Close()
				t.Errorf("%s was taken", name)
			}
		}
	}
	// All of that has changed nothing for the pod.
	q, err := s.capture.Prepare(t.Context(), right, &x.files.Listeners)
	if err != nil {
		t.Fatalf("the pod's own namespace and sockets: %v", err)
	}
	defer q.Close()
}

// TestProbeOfAClosedPort: the node is refused at once, as without capture.
func TestProbeOfAClosedPort(t *testing.T) {
	s := newStage(t, testnet.Routed)
	s.captured(Mode{New: true})
	score := newCard(t)
	for _, a := range []netip.Addr{s.pod.V4, s.pod.V6} {
		for range 3 {
			ctx, cancel := context.WithTimeout(context.Background(), soon)
			c, err := s.node.NS.Dial(ctx, "tcp", netip.AddrPort{}, netip.AddrPortFrom(a, 9), nil)
			cancel()
			if err == nil {
				c.Close()
			}
			score.use("cni.probe_refused", errors.Is(err, unix.ECONNREFUSED))
			if !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("to %v: %v, want that the connection is refused", a, err)
				break
			}
		}
	}
}

// TestTunnelsOfOtherProtocols: packets that hold TCP inside another protocol of
// IP could be unpacked by the node and sent on.
func TestTunnelsOfOtherProtocols(t *testing.T) {
	s := newStage(t, testnet.Bridged)
	p, _ := s.captured(Mode{New: true})
	score := newCard(t)
	from, to := s.pod.Tap("eth0"), s.peer.MAC("eth0")
	seen := newWatch(t, s.peer.Host, "eth0")
	for _, guarded := range []bool{false, true} {
		if only(t, p, ""); guarded {
			whole(t, p)
		}
		for _, protocol := range []byte{4, 41, 47, 137} {
			for _, addrs := range [][2]netip.Addr{{s.pod.V4, s.peer.V4}, {s.pod.V6, s.peer.V6}} {
				f := testnet.Frame{
					SrcMAC: from.MAC, DstMAC: to, Flags: testnet.SYN, Payload: []byte{protocol},
					Src: netip.AddrPortFrom(addrs[0], 4000), Dst: netip.AddrPortFrom(addrs[1], 80),
				}
				from.Send(wrapped(f, protocol))
				arrived := false
				for _, g := range seen.frames(s.pod.Host) {
					arrived = arrived || len(g) > 40 && (g[14+9] == protocol && g[14]>>4 == 4 || g[14+6] == protocol && g[14]>>4 == 6)
				}
				if guarded {
					score.attack("attack.ip_in_ip", !arrived)
				} else if !arrived {
					t.Errorf("protocol %d does not pass without the guards either", protocol)
				}
			}
		}
	}
}

// wrapped is the frame's packet inside another packet between the same two.
func wrapped(f testnet.Frame, protocol byte) []byte {
	b := f.Bytes()
	inner := append([]byte(nil), b[14:]...)
	if f.Src.Addr().Is6() {
		out := append([]byte(nil), b[:14+40]...)
		out[14+6] = protocol
		binary.BigEndian.PutUint16(out[14+4:], uint16(len(inner)))
		return append(out, inner...)
	}
	out := append([]byte(nil), b[:14+20]...)
	out[14+9] = protocol
	binary.BigEndian.PutUint16(out[14+2:], uint16(20+len(inner)))
	out[14+10], out[14+11] = 0, 0
	var sum uint32
	for i := 14; i < 34; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(out[i:]))
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	binary.BigEndian.PutUint16(out[14+10:], ^uint16(sum))
	return append(out, inner...)
}
