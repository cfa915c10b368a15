package netns_test

import (
	"errors"
	"io"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/internal/netns"
	"github.com/weft-mesh/weft/internal/testnet"
)

// More connections than sockets are made ready at once, of both families, begin
// inside the namespace, and are there at once if they stay in it.
func TestBegin(t *testing.T) {
	w := testnet.New(t)
	a := w.Host("a")
	a.Run("ip", "link", "set", "lo", "up") // the way to its own addresses
	l := a.Listen(":80")
	l.SetDeadline(time.Now().Add(30 * time.Second))
	for i := range 20 {
		to := netip.AddrPortFrom([]netip.Addr{a.V4, netip.IPv6Loopback()}[i%2], 80)
		controlled := false
		fd, err := a.NS.Begin(netip.AddrPort{}, to, func(int) error { controlled = true; return nil })
		if err != nil {
			t.Fatal(err)
		}
		if !controlled {
			t.Error("control was not called")
		}
		s, err := l.AcceptTCP() // so it is connected by now
		if err != nil {
			t.Fatal(err)
		}
		if !netns.Connected(fd) {
			t.Errorf("connection %d is accepted and not connected", i)
		}
		c, err := netns.Finish(t.Context(), fd)
		if err != nil {
			t.Fatal(err)
		}
		if mptcp, err := c.MultipathTCP(); mptcp || err != nil {
			t.Errorf("MPTCP %v, %v", mptcp, err)
		}
		s.Write([]byte("x"))
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Error(err)
		}
		c.Close()
		s.Close()
	}
}

func TestBeginFails(t *testing.T) {
	w := testnet.New(t)
	a := w.Host("a")
	a.Run("ip", "link", "set", "lo", "up") // as above
	fd, err := a.NS.Dup()
	if err != nil {
		t.Fatal(err)
	}
	own, err := unix.FcntlInt(fd.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	fd.Close()
	if err != nil {
		t.Fatal(err)
	}
	before := descriptors(t)
	ns, err := netns.FromFD(own)
	if err != nil {
		t.Fatal(err)
	}
	closed := netip.AddrPortFrom(a.V4, 81)
	pending, err := ns.Begin(netip.AddrPort{}, closed, nil)
	if err != nil {
		t.Fatal(err)
	}
	if netns.Connected(pending) {
		t.Error("connected to nobody")
	}
	if c, err := netns.Finish(t.Context(), pending); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("got %v, %v, want that it is refused", c, err)
	}
	failure := errors.New("failure")
	if _, err := ns.Begin(netip.AddrPort{}, closed, func(int) error { return failure }); !errors.Is(err, failure) {
		t.Errorf("got %v, want what control says", err)
	}
	if _, err := ns.Begin(netip.AddrPort{}, netip.AddrPort{}, nil); err == nil {
		t.Error("connected to no address")
	}
	ns.Close() // and what was made ready
	if _, err := ns.Begin(netip.AddrPort{}, closed, nil); !errors.Is(err, os.ErrClosed) {
		t.Errorf("got %v, want that the namespace is closed", err)
	}
	if after := descriptors(t); after >= before {
		t.Errorf("%d descriptors before, %d after: sockets that were made ready are still open", before, after)
	}
}
