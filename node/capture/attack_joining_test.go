package capture

import (
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/internal/netns"
	"github.com/weft-mesh/weft/internal/testnet"
)

// beginMarked begins to connect, past the routes of the capture, and returns
// the socket and its port.
func beginMarked(t *testing.T, h *testnet.Host, local, to netip.AddrPort) (fd int, port uint16, err error) {
	fd, err = h.NS.Begin(local, to, func(fd int) error {
		return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, MarkProxy)
	})
	if err != nil {
		return -1, 0, err
	}
	t.Cleanup(func() { unix.Close(fd) })
	a, err := unix.Getsockname(fd)
	if err != nil {
		return -1, 0, err
	}
	return fd, uint16(a.(*unix.SockaddrInet4).Port), nil
}

// TestConnectingWhileJoining: a pod that makes connections without a pause while
// it is captured, with a mark that takes them past the routes, gets out those
// that it has begun before, and none that it begins after.
func TestConnectingWhileJoining(t *testing.T) {
	score := newCard(t)
	s := newStage(t, testnet.Routed)
	app := startApp(t, s.outside, ":8080")
	to := netip.AddrPortFrom(s.outside.V4, 8080)
	p, _ := s.prepare()
	var captured atomic.Bool
	var before, after atomic.Int64
	late := map[uint16]bool{}
	stop := make(chan struct{})
	var attacker sync.WaitGroup
	attacker.Go(func() {
		pace := time.NewTicker(time.Millisecond)
		defer pace.Stop()
		for {
			isLate := captured.Load()
			_, port, err := beginMarked(t, s.pod.Host, netip.AddrPort{}, to)
			if err != nil {
				t.Error(err)
				return
			}
			if isLate {
				late[port] = true
				after.Add(1)
			} else {
				before.Add(1)
			}
			select {
			case <-stop:
				return
			case <-pace.C:
			}
		}
	})
	eventually(t, "connections are made", func() bool { return len(app.accepted()) > 20 })
	s.attach(p, Mode{Existing: Keep})
	captured.Store(true)
	eventually(t, "as many are tried once it is captured", func() bool { return after.Load() > 50 })
	close(stop)
	attacker.Wait()
	eventually(t, "their SYNs are stopped", func() bool { return stat(t, p, "pod_guard_syn_drop") >= uint64(after.Load()) })
	arrived := map[uint16]bool{}
	for _, peer := range app.accepted() {
		arrived[peer.Port()] = true
	}
	t.Logf("%d connections begun before, %d after; %d arrived", before.Load(), after.Load(), len(arrived))
	for port := range late {
		score.attack("attack.connecting_while_joining", !arrived[port])
	}
}

// TestConnectingIsKeptOnce: of a connection whose SYN has left when its pod is
// captured, the SYN may be sent again, until it is connected; then it is a
// connection like others that were kept, and its socket begins no other one.
func TestConnectingIsKeptOnce(t *testing.T) {
	score := newCard(t)
	s := newStage(t, testnet.Routed)
	app := startApp(t, s.outside, ":8080")
	from, to := netip.AddrPortFrom(s.pod.V4, 40000), netip.AddrPortFrom(s.outside.V4, 8080)
	s.outside.Run("nft", "table ip hold { chain input { type filter hook input priority 0; tcp dport 8080 drop; }; }")
	fd, port, err := beginMarked(t, s.pod.Host, from, to)
	if err != nil {
		t.Fatal(err)
	}
	p, x := s.captured(Mode{Existing: Keep})
	if netns.Connected(fd) || len(app.accepted()) > 0 {
		t.Fatal("it was connected before the capture, the test is not what it says")
	}
	s.outside.Run("nft", "delete", "table", "ip", "hold")
	eventually(t, "it is connected", func() bool { return netns.Connected(fd) })
	if _, err := unix.Write(fd, []byte("hello")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the server has accepted it", func() bool { return len(app.accepted()) > 0 })
	if got := app.accepted()[0]; got != netip.AddrPortFrom(s.pod.V4, port) || x.count("out") > 0 {
		t.Errorf("the server has accepted %v, and the proxy %d connections; want the pod's own %v and none", got, x.count("out"), from)
	}

	drops := stat(t, p, "pod_guard_syn_drop")
	if err := connectRaw(fd, &unix.RawSockaddr{Family: unix.AF_UNSPEC}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Connect(fd, sockaddr(to)); err != unix.EINPROGRESS {
		t.Errorf("to connect again: %v, want that it hangs", err)
	}
	eventually(t, "the guard stops the SYN", func() bool { return stat(t, p, "pod_guard_syn_drop") > drops })
	score.attack("attack.connecting_again", !netns.Connected(fd) && len(app.accepted()) == 1)
}
