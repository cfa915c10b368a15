package netns

import (
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

func listener(t *testing.T, at netip.AddrPort) int {
	t.Helper()
	fd, err := newSocket(familyFor(at))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := Bind(fd, at); err != nil {
		t.Fatalf("bind to %v: %v", at, err)
	}
	if err := unix.Listen(fd, 8); err != nil {
		t.Fatal(err)
	}
	return fd
}

// What the kernel says of both ends of a connection is what package net says.
func TestAddressesOfSockets(t *testing.T) {
	for _, at := range []string{"127.0.0.1:0", "[::1]:0"} {
		t.Run(at, func(t *testing.T) {
			l := listener(t, netip.MustParseAddrPort(at))
			if _, _, err := Accept(l); err != unix.EAGAIN {
				t.Errorf("accept when nobody has connected: %v, want EAGAIN", err)
			}
			here, err := Local(l)
			if err != nil || here.Port() == 0 || here.Addr() != netip.MustParseAddrPort(at).Addr() {
				t.Fatalf("the listener is bound to %v: %v", here, err)
			}
			fd, err := newSocket(familyFor(here))
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(fd)
			if Connected(fd) {
				t.Error("connected before it was asked to connect")
			}
			if err := withAddress(unix.SYS_CONNECT, fd, familyFor(here), here); err != nil && err != unix.EINPROGRESS {
				t.Fatal(err)
			}
			c, peer, err := Accept(l)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(c)
			own, err := Local(fd)
			if err != nil || peer != own {
				t.Errorf("the peer is %v, and it says %v: %v", peer, own, err)
			}
			if to, err := Local(c); err != nil || to != here {
				t.Errorf("accepted at %v, want %v: %v", to, here, err)
			}
			if !Connected(fd) {
				t.Error("not connected")
			}
		})
	}
}

func TestSockaddr(t *testing.T) {
	for _, text := range []string{"10.1.2.3:4660", "[fd00::1:2]:1", "0.0.0.0:65535", "[::]:0"} {
		a := netip.MustParseAddrPort(text)
		s, err := sockaddrOf(familyFor(a), a)
		if err != nil || s.addrPort() != a {
			t.Errorf("%v became %v: %v", a, s.addrPort(), err)
		}
	}
	s, err := sockaddrOf(unix.AF_INET6, netip.MustParseAddrPort("[fe80::1%7]:80"))
	if err != nil || s.Scope_id != 7 {
		t.Errorf("the zone 7 became %d: %v", s.Scope_id, err)
	}
	if err := Bind(-1, netip.MustParseAddrPort("[fe80::1%eth0]:80")); err == nil || err == unix.EBADF {
		t.Errorf("a zone with a name: %v, want an error that says so", err)
	}
	mapped, err := sockaddrOf(unix.AF_INET, netip.MustParseAddrPort("[::ffff:10.0.0.1]:80"))
	if want := netip.MustParseAddrPort("10.0.0.1:80"); err != nil || mapped.addrPort() != want {
		t.Errorf("a mapped address became %v: %v, want %v", mapped.addrPort(), err, want)
	}
	if got := new(sockaddr).addrPort(); got.IsValid() {
		t.Errorf("no address became %v", got)
	}
}

// TestNoGarbage wants addresses to leave nothing to the garbage collector.
func TestNoGarbage(t *testing.T) {
	l := listener(t, netip.MustParseAddrPort("127.0.0.1:0"))
	if n := testing.AllocsPerRun(100, func() {
		if _, err := Local(l); err != nil {
			t.Fatal(err)
		}
		if Connected(l) {
			t.Fatal("a listener is not connected")
		}
		if _, _, err := Accept(l); err == nil {
			t.Fatal("nobody has connected")
		}
		_ = Bind(l, netip.MustParseAddrPort("127.0.0.1:1")) // it is bound already
	}); n > 0 {
		t.Errorf("%v allocations, want none", n)
	}
}
