package netns_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/internal/netns"
	"github.com/weft-mesh/weft/internal/testnet"
)

func current(t *testing.T) netns.ID {
	t.Helper()
	ns, err := netns.Current()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	id, err := ns.ID()
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func TestDoRunsInsideAndComesBack(t *testing.T) {
	h := testnet.New(t).Host("h")
	want, err := h.ID()
	if err != nil {
		t.Fatal(err)
	}
	home := current(t)
	if want == home {
		t.Fatal("the test's namespace is the process's own")
	}
	failure := errors.New("failure")
	var work sync.WaitGroup
	for range 50 {
		work.Go(func() {
			if err := h.Do(func() error {
				if got := current(t); got != want {
					t.Errorf("inside is %v, want %v", got, want)
				}
				return failure
			}); err != failure {
				t.Errorf("got %v, want the function's own error", err)
			}
			if got := current(t); got != home {
				t.Errorf("afterwards the goroutine is in %v, want %v", got, home)
			}
		})
	}
	work.Wait()
}

// TestDoNested: one namespace from inside another, and back to that one.
func TestDoNested(t *testing.T) {
	w := testnet.New(t)
	a, b := w.Host("a"), w.Host("b")
	ida, _ := a.ID()
	idb, _ := b.ID()
	err := a.Do(func() error {
		if err := b.Do(func() error {
			if got := current(t); got != idb {
				t.Errorf("inside b is %v, want %v", got, idb)
			}
			return nil
		}); err != nil {
			return err
		}
		if got := current(t); got != ida {
			t.Errorf("back inside a is %v, want %v", got, ida)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestDoSurvivesAnEndedGoroutine(t *testing.T) {
	h := testnet.New(t).Host("h")
	home := current(t)
	err := h.Do(func() error { runtime.Goexit(); return nil })
	if err == nil {
		t.Error("no error")
	}
	for range 100 {
		if got := current(t); got != home {
			t.Fatalf("a goroutine is in %v, want %v", got, home)
		}
	}
}

func TestOpenRefusesWhatIsNoNetworkNamespace(t *testing.T) {
	for _, path := range []string{"/proc/self/ns/mnt", "/dev/null", "/nonexistent"} {
		if ns, err := netns.Open(path); err == nil {
			ns.Close()
			t.Errorf("%s was opened", path)
		}
	}
	if _, err := netns.FromFD(-1); err == nil {
		t.Error("descriptor -1 was taken")
	}
}

func TestAddrs(t *testing.T) {
	p := testnet.New(t).Node("n").Pod("p", testnet.Routed)
	got, err := p.Addrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []netip.Addr{p.V4, p.V6} {
		if !slices.Contains(got, want) {
			t.Errorf("addresses %v, want %v among them", got, want)
		}
	}
	for _, a := range got {
		if a.IsLoopback() {
			t.Errorf("addresses %v, want no loopback", got)
		}
	}
}

func TestDial(t *testing.T) {
	w := testnet.New(t)
	a, b := w.Host("a"), w.Host("b")
	l := b.Listen(":80")
	for _, to := range []netip.Addr{b.V4, b.V6} {
		controlled := false
		c, err := a.NS.Dial(t.Context(), "tcp", netip.AddrPort{}, netip.AddrPortFrom(to, 80), func(fd int) error {
			controlled = true
			return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1)
		})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if !controlled {
			t.Error("control was not called")
		}
		s, err := l.AcceptTCP()
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		if s.RemoteAddr().String() != c.LocalAddr().String() {
			t.Errorf("connected from %v, accepted from %v", c.LocalAddr(), s.RemoteAddr())
		}
		if mptcp, err := c.MultipathTCP(); mptcp || err != nil {
			t.Errorf("MPTCP %v, %v", mptcp, err)
		}
		s.Write([]byte("x"))
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Error(err)
		}
	}
}

func TestDialFromAnAddress(t *testing.T) {
	w := testnet.New(t)
	a, b := w.Host("a"), w.Host("b")
	l := b.Listen(":80")
	for _, local := range []netip.AddrPort{netip.AddrPortFrom(a.V4, 0), netip.AddrPortFrom(a.V4, 4567)} {
		c, err := a.NS.Dial(t.Context(), "tcp4", local, netip.AddrPortFrom(b.V4, 80), nil)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		s, err := l.AcceptTCP()
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		got := s.RemoteAddr().(*net.TCPAddr).AddrPort()
		if got.Addr().Unmap() != local.Addr() || local.Port() != 0 && got.Port() != local.Port() {
			t.Errorf("came from %v, want %v", got, local)
		}
	}
}

func TestDialFails(t *testing.T) {
	w := testnet.New(t)
	a, b := w.Host("a"), w.Host("b")
	closed := netip.AddrPortFrom(b.V4, 81)
	silent := netip.MustParseAddrPort("10.70.0.200:80")
	b.Run("ip", "addr", "add", "10.70.0.200/32", "dev", "uplink")
	b.Run("nft", "table ip t { chain in { type filter hook input priority 0; ip daddr 10.70.0.200 drop; }; }")
	short, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	ended, end := context.WithCancel(t.Context())
	end()
	failure := errors.New("failure")
	tests := []struct {
		name    string
		ctx     context.Context
		network string
		local   netip.AddrPort
		remote  netip.AddrPort
		control func(int) error
		want    error
	}{
		{"nobody listens", t.Context(), "tcp", netip.AddrPort{}, closed, nil, syscall.ECONNREFUSED},
		{"nobody answers", short, "tcp", netip.AddrPort{}, silent, nil, context.DeadlineExceeded},
		{"context ended before", ended, "tcp", netip.AddrPort{}, closed, nil, context.Canceled},
		{"address of somebody else", t.Context(), "tcp", netip.AddrPortFrom(b.V4, 0), closed, nil, syscall.EADDRNOTAVAIL},
		{"control fails", t.Context(), "tcp", netip.AddrPort{}, closed, func(int) error { return failure }, failure},
		{"no route", t.Context(), "tcp", netip.AddrPort{}, netip.MustParseAddrPort("192.0.2.1:80"), nil, syscall.ENETUNREACH},
		{"families differ", t.Context(), "tcp", netip.AddrPortFrom(a.V6, 0), closed, nil, nil},
		{"network differs", t.Context(), "tcp6", netip.AddrPort{}, closed, nil, nil},
		{"not TCP", t.Context(), "udp", netip.AddrPort{}, closed, nil, net.UnknownNetworkError("udp")},
		{"no address", t.Context(), "tcp", netip.AddrPort{}, netip.AddrPort{}, nil, nil},
	}
	before := descriptors(t)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c, err := a.NS.Dial(tt.ctx, tt.network, tt.local, tt.remote, tt.control)
			if err == nil {
				c.Close()
				t.Fatal("connected")
			}
			if tt.want != nil && !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
	if after := descriptors(t); after > before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
	t.Run("cancelled while nobody answers", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		_, err := a.NS.Dial(ctx, "tcp", netip.AddrPort{}, silent, func(int) error {
			time.AfterFunc(10*time.Millisecond, cancel)
			return nil
		})
		if !errors.Is(err, context.Canceled) {
			t.Errorf("got %v, want %v", err, context.Canceled)
		}
	})
}

func descriptors(t *testing.T) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

func BenchmarkDial(b *testing.B) {
	w := testnet.New(b)
	from, to := w.Host("a"), w.Host("b")
	l := to.Listen(":80")
	go func() {
		for {
			c, err := l.AcceptTCP()
			if err != nil {
				return
			}
			io.Copy(io.Discard, c)
			c.Close()
		}
	}()
	for b.Loop() {
		c, err := from.NS.Dial(b.Context(), "tcp", netip.AddrPort{}, netip.AddrPortFrom(to.V4, 80), nil)
		if err != nil {
			b.Fatal(err)
		}
		c.SetLinger(0) // no time-wait: ports are few
		c.Close()
	}
}
