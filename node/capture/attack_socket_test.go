package capture

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/internal/netns"
	"github.com/weft-mesh/weft/internal/testnet"
)

// sockaddr is a as system calls have it.
func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}

func familyOf(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// A send is one attempt to get a packet from one address and port to another,
// by a process in a namespace with any capability. An error means that it
// could not even be tried.
type send func(from, to netip.AddrPort) error

// bySocket opens a socket, lets change have it, and connects.
func bySocket(protocol int, change func(fd int, from, to netip.AddrPort) error) send {
	return func(from, to netip.AddrPort) error {
		fd, err := unix.Socket(familyOf(to.Addr()), unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, protocol)
		if err != nil {
			return fmt.Errorf("socket: %w", err)
		}
		defer unix.Close(fd)
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
			return err
		}
		if err := unix.Bind(fd, sockaddr(from)); err != nil {
			return fmt.Errorf("bind: %w", err)
		}
		if err := change(fd, from, to); err != nil {
			return err
		}
		switch err := unix.Connect(fd, sockaddr(to)); {
		case err == nil, errors.Is(err, unix.EINPROGRESS), errors.Is(err, unix.EALREADY), errors.Is(err, unix.EISCONN):
			return nil
		default:
			return fmt.Errorf("connect: %w", err)
		}
	}
}

func marked(mark int) func(fd int, _, _ netip.AddrPort) error {
	return func(fd int, _, _ netip.AddrPort) error {
		return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, mark)
	}
}

func bound(link string) func(fd int, _, _ netip.AddrPort) error {
	return func(fd int, _, _ netip.AddrPort) error { return unix.BindToDevice(fd, link) }
}

// mapped speaks IPv4 by an IPv6 socket, if there is IPv4 to be spoken.
func mapped(change func(fd int, from, to netip.AddrPort) error) send {
	return func(from, to netip.AddrPort) error {
		as6 := func(a netip.AddrPort) netip.AddrPort {
			return netip.AddrPortFrom(netip.AddrFrom16(a.Addr().As16()), a.Port())
		}
		return bySocket(0, change)(as6(from), as6(to))
	}
}

// fastOpen sends data with the SYN, without a cookie (RFC 7413).
func fastOpen(fd int, _, to netip.AddrPort) error {
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, MarkProxy); err != nil {
		return err
	}
	err := unix.Sendto(fd, []byte("sent with the SYN"), unix.MSG_FASTOPEN, sockaddr(to))
	if errors.Is(err, unix.EINPROGRESS) || errors.Is(err, unix.EAGAIN) {
		return nil
	}
	return err
}

// repaired is a connection without a handshake, which CAP_NET_ADMIN can make
// (TCP_REPAIR), and data on it.
func repaired(fd int, _, to netip.AddrPort) error {
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, MarkProxy); err != nil {
		return err
	}
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR, 1); err != nil {
		return fmt.Errorf("repair: %w", err)
	}
	if err := unix.Connect(fd, sockaddr(to)); err != nil {
		return fmt.Errorf("connect in repair: %w", err)
	}
	// struct tcp_repair_window: a peer that announced a window.
	window := make([]byte, 20)
	for _, at := range []int{4, 8, 12} {
		binary.NativeEndian.PutUint32(window[at:], 65535)
	}
	if err := unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR_WINDOW, string(window)); err != nil {
		return fmt.Errorf("window in repair: %w", err)
	}
	const off = -1 // TCP_REPAIR_OFF_NO_WP: and do not ask the other end, which would reset
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR, off); err != nil {
		return fmt.Errorf("end of repair: %w", err)
	}
	_, err := unix.Write(fd, []byte("on a connection that nobody opened"))
	return err
}

// rawSocket sends a SYN with an IP header of its own.
func rawSocket(from, to netip.AddrPort) error {
	fd, err := unix.Socket(familyOf(to.Addr()), unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	packet := testnet.Frame{Src: from, Dst: to, Flags: testnet.SYN}.Bytes()[14:]
	return sent(unix.Sendto(fd, packet, 0, sockaddr(netip.AddrPortFrom(to.Addr(), 0))))
}

// rawTCP sends a SYN for which the kernel makes the IP header.
func rawTCP(from, to netip.AddrPort) error {
	fd, err := unix.Socket(familyOf(to.Addr()), unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, MarkProxy); err != nil {
		return err
	}
	packet := testnet.Frame{Src: from, Dst: to, Flags: testnet.SYN}.Bytes()[14:]
	header := 20
	if to.Addr().Is6() {
		header = 40
	}
	return sent(unix.Sendto(fd, packet[header:], 0, sockaddr(netip.AddrPortFrom(to.Addr(), 0))))
}

// sent makes no error of a drop by a program, which a raw socket is told of.
func sent(err error) error {
	if errors.Is(err, unix.ENOBUFS) {
		return nil
	}
	return err
}

// fromPort reports whether one of the frames is TCP from this port and begins
// a connection or carries data.
func fromPort(frames [][]byte, port uint16) bool {
	for _, f := range frames {
		tcp, ok := tcpOf(f)
		if !ok || len(tcp) < 20 || binary.BigEndian.Uint16(tcp) != port {
			continue
		}
		if tcp[13]&(testnet.SYN|testnet.ACK) == testnet.SYN || len(tcp) > int(tcp[12]>>4)*4 {
			return true
		}
	}
	return false
}

// tcpOf returns the TCP segment of a frame without extension headers.
func tcpOf(f []byte) ([]byte, bool) {
	if len(f) < 14+20 {
		return nil, false
	}
	p := f[14:]
	switch binary.BigEndian.Uint16(f[12:]) {
	case 0x0800:
		header, total := int(p[0]&15)*4, int(binary.BigEndian.Uint16(p[2:]))
		if p[9] != unix.IPPROTO_TCP || header > total || total > len(p) {
			return nil, false
		}
		return p[header:total], true
	case 0x86dd:
		if len(p) < 40 || p[6] != unix.IPPROTO_TCP || 40+int(binary.BigEndian.Uint16(p[4:])) > len(p) {
			return nil, false
		}
		return p[40 : 40+int(binary.BigEndian.Uint16(p[4:]))], true
	}
	return nil, false
}

// An arena is where attempts to send are judged: by what arrives outside.
type arena struct {
	*stage
	seen  *watch
	port  uint16
	shows uint16 // the source port that what is sent has outside; 0 is its own
}

func newArena(t *testing.T, s *stage) *arena {
	return &arena{stage: s, seen: newWatch(t, s.outside, "uplink"), port: 20000}
}

// arrives lets attempt send from a port of its own and reports whether
// anything of it arrives outside.
func (a *arena) arrives(t *testing.T, from *testnet.Host, ns *netns.NS, to netip.Addr, attempt send) bool {
	t.Helper()
	a.port++
	src := from.V4
	if to.Is6() {
		src = from.V6
	}
	err := ns.Do(func() error {
		return attempt(netip.AddrPortFrom(src, a.port), netip.AddrPortFrom(to, 8080))
	})
	if err != nil {
		t.Errorf("from port %d to %v: cannot be tried: %v", a.port, to, err)
	}
	return fromPort(a.seen.frames(from), cmp.Or(a.shows, a.port))
}

// TestSocketsAreNoWayAround: what a process with CAP_NET_RAW or CAP_NET_ADMIN
// can do to a socket takes it past the routes, as is shown first, but past
// none of the guards.
func TestSocketsAreNoWayAround(t *testing.T) {
	s := newStage(t, testnet.Routed)
	startApp(t, s.outside, ":8080")
	s.pod.Sysctl("net/mptcp/enabled", "1")
	s.pod.Sysctl("net/ipv4/tcp_fastopen", "5") // client, without cookies
	p, _ := s.captured(Mode{New: true})
	score := newCard(t)
	a := newArena(t, s)
	attacks := []struct {
		row     string
		attempt send
		inside  bool // works only where there is no capture at all
	}{
		{"attack.so_mark", bySocket(0, marked(MarkProxy)), false},
		{"attack.so_mark", bySocket(0, marked(MarkProxy|0x10000)), false},
		{"attack.so_mark", bySocket(0, marked(MarkLocal)), true},
		{"attack.so_mark", bySocket(0, marked(0x1)), true},
		{"attack.so_bindtodevice", bySocket(0, bound("eth0")), false},
		{"attack.mptcp", bySocket(unix.IPPROTO_MPTCP, marked(MarkProxy)), false},
		{"attack.mptcp", bySocket(unix.IPPROTO_MPTCP, func(int, netip.AddrPort, netip.AddrPort) error { return nil }), true},
		{"attack.fast_open", bySocket(0, fastOpen), false},
		{"attack.tcp_repair", bySocket(0, repaired), false},
		{"attack.mapped_address", mapped(marked(MarkProxy)), false},
		{"attack.raw_socket", rawSocket, false},
		{"attack.raw_socket", rawTCP, false},
	}
	dsts := []netip.Addr{s.outside.V4, s.outside.V6}
	for _, at := range attacks {
		only(t, p, "")
		for _, dst := range dsts {
			from := s.pod
			if at.inside {
				from = s.peer
			}
			if !a.arrives(t, from.Host, from.NS, dst, at.attempt) {
				t.Errorf("%s to %v does not work without the guards either", at.row, dst)
			}
		}
		for _, layer := range []string{pinGuardPod, pinGuardHost, ""} {
			if only(t, p, layer); layer == "" {
				whole(t, p)
			}
			for _, dst := range dsts {
				arrived := a.arrives(t, s.pod.Host, s.pod.NS, dst, at.attempt)
				score.attack(at.row, !arrived)
				if arrived {
					t.Errorf("%s reached %v past %q", at.row, dst, layer)
				}
			}
		}
	}
}

// TestProgramsInThePodSeeRawFrames: frames of a pod that do not go past the
// programs in the pod are stopped there.
func TestProgramsInThePodSeeRawFrames(t *testing.T) {
	s := newStage(t, testnet.Bridged)
	p, _ := s.captured(Mode{New: true})
	score := newCard(t)
	from, to := s.pod.Tap("eth0"), s.peer.MAC("eth0")
	seen := newWatch(t, s.peer.Host, "eth0")
	for _, layer := range []string{"", pinGuardPod} {
		only(t, p, layer)
		for _, addrs := range [][2]netip.Addr{{s.pod.V4, s.peer.V4}, {s.pod.V6, s.peer.V6}} {
			for _, f := range flags(testnet.SYN, testnet.ACK)(testnet.Frame{
				SrcMAC: from.MAC, DstMAC: to, Payload: []byte("through the queue"),
				Src: netip.AddrPortFrom(addrs[0], PortHBONE), Dst: netip.AddrPortFrom(addrs[1], 80),
			}) {
				from.SendThroughQdisc(f.Bytes())
				arrived := contains(seen.frames(s.pod.Host), f)
				if layer == "" && !arrived {
					t.Errorf("flags %#x do not arrive without the guards either", f.Flags)
				}
				if layer != "" {
					score.attack("attack.af_packet_queued", !arrived)
				}
			}
		}
	}
}

// TestKeptConnectionIsNoTicket: what was exempt is the connection that existed
// before capture, not its addresses and ports.
func TestKeptConnectionIsNoTicket(t *testing.T) {
	s := newStage(t, testnet.Routed)
	s.apps()
	score := newCard(t)
	a := newArena(t, s)
	var kept []talk
	for _, dst := range []netip.Addr{s.outside.V4, s.outside.V6} {
		k, err := connect(s.pod.Host, netip.AddrPortFrom(dst, 8080))
		if err != nil {
			t.Fatal(err)
		}
		kept = append(kept, k)
	}
	p, _ := s.captured(Mode{Existing: Keep})
	for _, k := range kept {
		if err := k.echo("kept"); err != nil {
			t.Fatal(err)
		}
		local, remote := addrPort(k.LocalAddr()), addrPort(k.RemoteAddr())
		k.SetLinger(0)
		k.Close()
		for _, layer := range []string{"", pinGuardPod, pinGuardHost} {
			only(t, p, layer)
			a.port = local.Port() - 1
			arrived := a.arrives(t, s.pod.Host, s.pod.NS, remote.Addr(), bySocket(0, marked(MarkProxy)))
			if layer == "" && !arrived {
				t.Errorf("the same flow again, to %v, does not work without the guards either", remote)
			}
			if layer != "" {
				score.attack("attack.kept_flow_reused", !arrived)
			}
		}
	}
}

// TestProbeIsNoTicket: the addresses and ports of a connection that the node
// made to the pod do not let the pod make one to the node.
func TestProbeIsNoTicket(t *testing.T) {
	s := newStage(t, testnet.Routed)
	s.apps()
	p, _ := s.captured(Mode{New: true})
	score := newCard(t)
	seen := newWatch(t, s.node.Host, s.pod.Veth)
	for _, to := range []netip.Addr{s.pod.V4, s.pod.V6} {
		k, err := connect(s.node.Host, netip.AddrPortFrom(to, 8080))
		if err != nil {
			t.Fatal(err)
		}
		ours, node := addrPort(k.RemoteAddr()), addrPort(k.LocalAddr())
		k.SetLinger(0)
		k.Close()
		for _, guarded := range []bool{false, true} {
			if only(t, p, ""); guarded {
				whole(t, p)
			}
			seen.frames(s.pod.Host)
			if err := s.pod.Do(func() error { return rawSocket(ours, node) }); err != nil {
				t.Fatal(err)
			}
			// Nobody listens there: if the SYN arrives, the node answers with a reset.
			arrived := resets(seen.frames(s.pod.Host), node.Port())
			if guarded {
				score.attack("attack.probe_flow_reused", !arrived)
			} else if !arrived {
				t.Errorf("a SYN to %v does not arrive without the guards either", node)
			}
		}
	}
}

// resets reports whether one of the frames is a reset from this port.
func resets(frames [][]byte, port uint16) bool {
	for _, f := range frames {
		if tcp, ok := tcpOf(f); ok && len(tcp) >= 20 && binary.BigEndian.Uint16(tcp) == port && tcp[13]&testnet.RST != 0 {
			return true
		}
	}
	return false
}
