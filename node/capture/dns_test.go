package capture

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/bpf"
	"github.com/weft-mesh/weft/internal/testnet"
)

// A names is the part of a proxy that answers name queries: it says who asked
// whom, from the address that was asked.
type names struct {
	mu   sync.Mutex
	seen []string
}

// answerNames serves the sockets for name queries that x was given.
func answerNames(t testing.TB, x *proxy) *names {
	t.Helper()
	n := &names{}
	for _, slot := range []bpf.CaptureRole{bpf.CaptureRoleROLE_DNS4, bpf.CaptureRoleROLE_DNS6} {
		f := x.files.Listeners[slot]
		if f == nil {
			continue
		}
		pc, err := net.FilePacketConn(f)
		if err != nil {
			t.Fatal(err)
		}
		c := pc.(*net.UDPConn)
		x.stop = append(x.stop, c)
		x.work.Go(func() { n.serve(t, x, c) })
	}
	return n
}

func (n *names) serve(t testing.TB, x *proxy, c *net.UDPConn) {
	b, oob := make([]byte, 512), make([]byte, 128)
	for {
		size, oobn, _, from, err := c.ReadMsgUDPAddrPort(b, oob)
		if err != nil {
			return
		}
		asked, err := originalDst(oob[:oobn])
		if err != nil {
			t.Error(err)
			return
		}
		n.mu.Lock()
		n.seen = append(n.seen, fmt.Sprintf("%s of %v", b[:size], asked))
		n.mu.Unlock()
		if err := n.answer(x, asked, from, fmt.Appendf(nil, "%s answered by the proxy", b[:size])); err != nil {
			t.Error(err)
		}
	}
}

// answer sends from an address that is not the pod's.
func (n *names) answer(x *proxy, as, to netip.AddrPort, text []byte) error {
	lc := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) (err error) {
		e := raw.Control(func(fd uintptr) {
			err = errors.Join(unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, MarkProxy),
				unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_TRANSPARENT, 1))
		})
		return errors.Join(e, err)
	}}
	var c net.PacketConn
	err := x.ns.Do(func() (err error) {
		c, err = lc.ListenPacket(context.Background(), "udp", as.String())
		return err
	})
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.WriteTo(text, net.UDPAddrFromAddrPort(to))
	return err
}

func originalDst(oob []byte) (netip.AddrPort, error) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return netip.AddrPort{}, err
	}
	for _, m := range msgs {
		sa, err := unix.ParseOrigDstAddr(&m)
		if err != nil {
			continue
		}
		switch sa := sa.(type) {
		case *unix.SockaddrInet4:
			return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port)), nil
		case *unix.SockaddrInet6:
			return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port)), nil
		}
	}
	return netip.AddrPort{}, fmt.Errorf("no original address in %d messages", len(msgs))
}

func (n *names) asked() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return append([]string(nil), n.seen...)
}

// nameServer is an ordinary one, outside of the mesh.
func nameServer(t testing.TB, h *testnet.Host, port uint16) {
	t.Helper()
	for _, a := range []netip.Addr{h.V4, h.V6} {
		var c net.PacketConn
		if err := h.Do(func() (err error) {
			c, err = net.ListenPacket("udp", netip.AddrPortFrom(a, port).String())
			return err
		}); err != nil {
			t.Fatal(err)
		}
		var work sync.WaitGroup
		work.Go(func() {
			for b := make([]byte, 512); ; {
				n, from, err := c.ReadFrom(b)
				if err != nil {
					return
				}
				c.WriteTo(append(b[:n:n], " answered by the server"...), from)
			}
		})
		t.Cleanup(func() { c.Close(); work.Wait() })
	}
}

// query asks over a connected or an unconnected socket, and, as resolvers do,
// again after a while: a datagram may be lost. The answer must come from whom it
// asked.
func query(from *testnet.Host, to netip.AddrPort, connected bool, within time.Duration) (string, error) {
	b := make([]byte, 512)
	var c *net.UDPConn
	err := from.Do(func() error {
		if connected {
			conn, err := net.Dial("udp", to.String())
			if err == nil {
				c = conn.(*net.UDPConn)
			}
			return err
		}
		conn, err := net.ListenPacket("udp", ":0")
		if err == nil {
			c = conn.(*net.UDPConn)
		}
		return err
	})
	if err != nil {
		return "", err
	}
	defer c.Close()
	var n int
	var peer netip.AddrPort
	for end := time.Now().Add(within); ; {
		if connected {
			_, err = c.Write([]byte("name"))
		} else {
			_, err = c.WriteToUDPAddrPort([]byte("name"), to)
		}
		if err != nil {
			return "", err
		}
		c.SetReadDeadline(time.Now().Add(min(within, 1500*time.Millisecond)))
		n, peer, err = c.ReadFromUDPAddrPort(b)
		if err == nil {
			break
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) || time.Now().After(end) {
			return "", err
		}
	}
	if got := netip.AddrPortFrom(peer.Addr().Unmap(), peer.Port()); got != to {
		return "", fmt.Errorf("%v answers, %v was asked", got, to)
	}
	return string(b[:n]), nil
}

func eachSocket(t *testing.T, f func(t *testing.T, connected bool)) {
	t.Run("connected", func(t *testing.T) { f(t, true) })
	t.Run("unconnected", func(t *testing.T) { f(t, false) })
}

const (
	byProxy  = "name answered by the proxy"
	byServer = "name answered by the server"
)

func (s *stage) withDNS() Target {
	t := s.target()
	t.DNS = true
	return t
}

func TestNameQueriesAreCaptured(t *testing.T) {
	s := newStage(t, testnet.Routed)
	nameServer(t, s.outside, 53)
	nameServer(t, s.outside, 5353)
	nameServer(t, s.pod.Host, 53)
	p, err := s.capture.Prepare(t.Context(), s.withDNS(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	x := startProxy(t, p)
	n := answerNames(t, x)
	if err := p.Attach(t.Context(), Mode{New: true}); err != nil {
		t.Fatal(err)
	}
	eachFamily(t, func(t *testing.T, addr func(*testnet.Host) netip.Addr) {
		eachSocket(t, func(t *testing.T, connected bool) {
			for _, tt := range []struct {
				name string
				from *testnet.Host
				to   netip.AddrPort
				want string
			}{
				{"a server", s.pod.Host, netip.AddrPortFrom(addr(s.outside), 53), byProxy},
				{"an address that nobody has", s.pod.Host, netip.AddrPortFrom(addr(s.outside).Prev(), 53), byProxy},
				{"another port", s.pod.Host, netip.AddrPortFrom(addr(s.outside), 5353), byServer},
				{"a server in the pod", s.pod.Host, netip.AddrPortFrom(addr(s.pod.Host), 53), byServer},
				{"a server in the pod, from outside", s.outside, netip.AddrPortFrom(addr(s.pod.Host), 53), byServer},
				{"a server, from a pod that is not captured", s.peer.Host, netip.AddrPortFrom(addr(s.outside), 53), byServer},
			} {
				before := len(n.asked())
				got, err := query(tt.from, tt.to, connected, soon)
				if err != nil || got != tt.want {
					t.Errorf("%s: got %q, %v, want %q", tt.name, got, err, tt.want)
				}
				if tt.want != byProxy {
					continue
				}
				if seen := n.asked(); len(seen) != before+1 || seen[before] != fmt.Sprintf("name of %v", tt.to) {
					t.Errorf("%s: the proxy has seen %q, want one more, of %v", tt.name, seen[before:], tt.to)
				}
			}
		})
	})
	if got := stat(t, p, "captured_dns"); got == 0 {
		t.Error("no query was counted")
	}
	// The proxy's own queries leave.
	c, err := net.ListenUDP("udp", nil)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if err := x.ns.Do(func() (err error) { c, err = net.ListenUDP("udp", nil); return err }); err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	raw := must(c.SyscallConn())
	raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, MarkProxy) })
	if err != nil {
		t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(soon))
	for _, a := range []netip.Addr{s.outside.V4, s.outside.V6} {
		if _, err := c.WriteToUDPAddrPort([]byte("name"), netip.AddrPortFrom(a, 53)); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 512)
		if got, err := c.Read(b); err != nil || string(b[:got]) != byServer {
			t.Errorf("the proxy asks and gets %q, %v", b[:got], err)
		}
	}
}

// TestNameQueriesWithoutAProxy: while the agent holds the sockets, queries wait
// in them; when nobody does, they are lost, and go to no program of the pod.
func TestNameQueriesWithoutAProxy(t *testing.T) {
	s := newStage(t, testnet.Routed)
	nameServer(t, s.outside, 53)
	p, err := s.capture.Prepare(t.Context(), s.withDNS(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if err := p.Attach(t.Context(), Mode{New: true}); err != nil {
		t.Fatal(err)
	}
	dst := netip.AddrPortFrom(s.outside.V4, 53)
	answer := make(chan string, 1)
	go func() {
		got, err := query(s.pod.Host, dst, true, soon)
		answer <- fmt.Sprint(got, err)
	}()
	eventually(t, "the query is given to the socket", func() bool { return stat(t, p, "captured_dns") == 1 })
	x := startProxy(t, p)
	answerNames(t, x)
	if got := <-answer; got != byProxy+"<nil>" {
		t.Errorf("the query that waited got %q", got)
	}

	// A release of the proxy that has no name server.
	if err := p.CaptureDNS(false); err != nil {
		t.Fatal(err)
	}
	if got, err := query(s.pod.Host, dst, true, soon); err != nil || got != byServer {
		t.Errorf("with the capture of names off: %q, %v", got, err)
	}
	if err := p.CaptureDNS(true); err != nil {
		t.Fatal(err)
	}
	if got, err := query(s.pod.Host, dst, true, soon); err != nil || got != byProxy {
		t.Errorf("with the capture of names on again: %q, %v", got, err)
	}

	x.kill()
	stats := func() uint64 { return stat(t, p, "dns_no_proxy_drop") }
	if err := p.listeners.Close(); err != nil {
		t.Fatal(err)
	}
	nameServer(t, s.pod.Host, 53)
	before := stats()
	if got, err := query(s.pod.Host, dst, true, never); err == nil {
		t.Errorf("without a proxy %q came", got)
	}
	if stats() == before {
		t.Error("the loss of the query was not counted")
	}
}

// TestAdoptWithoutNameSockets: the proxy that holds a pod's listeners may be of
// a release that took none for name queries.
func TestAdoptWithoutNameSockets(t *testing.T) {
	s := newStage(t, testnet.Routed)
	p, x := s.captured(Mode{New: true})
	p.Close()
	again, err := s.agent().Prepare(t.Context(), s.withDNS(), &x.files.Listeners)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if err := again.Attach(t.Context(), Mode{}); err != nil {
		t.Fatal(err)
	}
	y := startProxy(t, again)
	answerNames(t, y)
	eachFamily(t, func(t *testing.T, addr func(*testnet.Host) netip.Addr) {
		if got, err := query(s.pod.Host, netip.AddrPortFrom(addr(s.outside), 53), false, soon); err != nil || got != byProxy {
			t.Errorf("got %q, %v", got, err)
		}
	})
	// And back: names are not captured any more.
	nameServer(t, s.outside, 53)
	last, err := s.capture.Prepare(t.Context(), s.target(), &x.files.Listeners)
	if err != nil {
		t.Fatal(err)
	}
	defer last.Close()
	if err := last.Attach(t.Context(), Mode{}); err != nil {
		t.Fatal(err)
	}
	if got, err := query(s.pod.Host, netip.AddrPortFrom(s.outside.V4, 53), false, soon); err != nil || got != byServer {
		t.Errorf("with DNS no longer in the target: %q, %v", got, err)
	}
	if rules := s.pod.Run("ip", "rule"); strings.Contains(rules, "103:") {
		t.Errorf("a rule is left:\n%s", rules)
	}
}
