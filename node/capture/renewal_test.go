package capture

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/internal/testnet"
)

// waitsFor reports whether a connection from the port has ended and waits for
// stray packets (state 6 is TIME-WAIT).
func waitsFor(t *testing.T, h *testnet.Host, port uint16) (yes bool) {
	t.Helper()
	err := h.NS.Do(func() error {
		for _, name := range []string{"tcp", "tcp6"} {
			b, err := os.ReadFile("/proc/thread-self/net/" + name)
			if err != nil {
				return err
			}
			for line := range strings.Lines(string(b)) {
				f := strings.Fields(line)
				yes = yes || len(f) > 3 && f[3] == "06" && strings.HasSuffix(f[2], fmt.Sprintf(":%04X", port))
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return yes
}

// dialFrom connects from a port that may have been used before.
func dialFrom(ctx context.Context, h *testnet.Host, from, to netip.AddrPort) (*net.TCPConn, error) {
	return h.NS.Dial(ctx, "tcp", from, to, func(fd int) error {
		return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	})
}

// TestPortIsUsedAgain: a client connects again from the port from which it had
// a connection that the server has closed. In the pod that one still waits for
// stray packets, whether it was the app's, before capture, or the proxy's. The
// new one is the proxy's, and never the app's; without mesh_lookup, nobody's.
func TestPortIsUsedAgain(t *testing.T) { portIsUsedAgain(t, "attack.in_port_reused") }

// portIsUsedAgain counts attempts in the row.
func portIsUsedAgain(t *testing.T, row string) {
	score := newCard(t)
	eachFamily(t, func(t *testing.T, addr func(*testnet.Host) netip.Addr) {
		s := newStage(t, testnet.Routed)
		server := s.pod.Listen(":8080")
		from, to := netip.AddrPortFrom(addr(s.outside), 40000), netip.AddrPortFrom(addr(s.pod.Host), 8080)
		for range 2 {
			if got := closedByServer(t, s, server, from, to); got != from {
				t.Fatalf("without capture the app sees %v, want the client %v", got, from)
			}
		}
		p, x := s.captured(Mode{Existing: Keep})
		if s.capture.Features().SkLookup {
			for i := range 3 {
				score.attack(row, closedByServer(t, s, server, from, to) != from)
				if n := x.count("in"); n != i+1 {
					t.Errorf("the proxy has accepted %d connections, want %d", n, i+1)
				}
			}
			x.kill()
			if err := p.Close(); err != nil { // the agent's descriptors too
				t.Fatal(err)
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), never)
		defer cancel()
		c, err := dialFrom(ctx, s.outside, from, to)
		if err == nil {
			c.Close()
		}
		score.attack(row, err != nil)
	})
}

// closedByServer connects, lets the server close first, so that its end of the
// connection waits for stray packets, and returns whom the server saw.
func closedByServer(t *testing.T, s *stage, server *net.TCPListener, from, to netip.AddrPort) netip.AddrPort {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	c, err := dialFrom(ctx, s.outside, from, to)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	end, err := server.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	end.Close()
	if _, err := c.Read(make([]byte, 1)); err != io.EOF {
		t.Fatalf("the server has closed the connection; the client reads: %v", err)
	}
	c.Close()
	eventually(t, "the pod's end waits", func() bool { return waitsFor(t, s.pod.Host, from.Port()) })
	return addrPort(end.RemoteAddr())
}

// TestFragmentsOfAConnection: what is put together from fragments meets the
// sockets that are there by then. When the proxy's connection is gone, the app's
// listener could take it for the answer to a SYN cookie. The port of tunnels is
// the proxy's alone.
func TestFragmentsOfAConnection(t *testing.T) {
	score := newCard(t)
	s := newStage(t, testnet.Bridged)
	p, _ := s.captured(Mode{New: true})
	startApp(t, s.pod.Host, ":8080")
	wire := s.peer.Tap("eth0")
	fragment := func(port uint16) {
		t.Helper()
		c, err := s.peer.Dial(netip.AddrPortFrom(s.pod.V4, port))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		wire.Send(testnet.Frame{
			SrcMAC: wire.MAC, DstMAC: s.pod.MAC("eth0"),
			Src: addrPort(c.LocalAddr()), Dst: addrPort(c.RemoteAddr()),
			Flags: testnet.ACK, Fragment: true, MoreFragments: true, Payload: make([]byte, 16),
		}.Bytes())
	}
	fragment(15008)
	const tries = 3
	for range tries {
		fragment(8080)
	}
	eventually(t, "the fragments are dropped", func() bool { return stat(t, p, "in_fragment_drop") >= tries })
	if n := stat(t, p, "in_fragment_drop"); n != tries {
		t.Errorf("%d fragments were dropped, want %d: those for tunnels pass", n, tries)
	}
	for range tries {
		score.attack("attack.in_fragment_later", true)
	}
}
