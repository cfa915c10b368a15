package ztunnel

import (
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/internal/netns"
	"github.com/weft-mesh/weft/internal/testnet"
)

// otherCongestion returns a congestion control that is not Reno.
func otherCongestion(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("/proc/sys/net/ipv4/tcp_available_congestion_control")
	if err != nil {
		t.Fatal(err)
	}
	all := strings.Fields(string(b))
	if all = slices.DeleteFunc(all, func(name string) bool { return name == "reno" }); len(all) == 0 {
		t.Skip("the kernel knows no congestion control but reno")
	}
	return all[0]
}

// congestionOf counts the connections of this process of which one end has a
// port, by their congestion control.
func congestionOf(t *testing.T, port uint16) map[string]int {
	t.Helper()
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]int{}
	seen := map[uint64]bool{} // a socket may have two descriptors for a moment
	for _, f := range files {
		fd, err := strconv.Atoi(f.Name())
		if err != nil {
			t.Fatal(err)
		}
		local, err := netns.Local(fd)
		if err != nil {
			continue // it is something else, or closed by now
		}
		sa, err := unix.Getpeername(fd)
		if err != nil {
			continue // it listens
		}
		var remote uint16
		switch sa := sa.(type) {
		case *unix.SockaddrInet4:
			remote = uint16(sa.Port)
		case *unix.SockaddrInet6:
			remote = uint16(sa.Port)
		}
		if local.Port() != port && remote != port {
			continue
		}
		name, err := unix.GetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION)
		cookie, err2 := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
		if err != nil || err2 != nil || seen[cookie] {
			continue
		}
		seen[cookie] = true
		found[name]++
	}
	return found
}

// TestCongestionControl: what stays in a pod is not paced, at neither end, and
// what the administrator has chosen holds for the wire.
func TestCongestionControl(t *testing.T) {
	s := newStreet(t)
	other := otherCongestion(t)
	for _, p := range []*testnet.Pod{s.client, s.server} {
		p.Sysctl("net/ipv4/tcp_congestion_control", other)
	}
	for port, to := range map[uint16]netip.Addr{18231: s.server.V4, 18232: s.server.V6} {
		accepted := make(chan net.Conn, 1)
		l := s.server.Listen(netip.AddrPortFrom(to, port).String())
		done := make(chan struct{})
		go func() {
			defer close(done)
			if c, err := l.Accept(); err == nil {
				accepted <- c
			}
		}()
		t.Cleanup(func() { l.Close(); <-done })
		c, err := s.client.Dial(netip.AddrPortFrom(to, port))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		defer (<-accepted).Close()
		if got := congestionOf(t, port); len(got) != 1 || got["reno"] != 4 {
			t.Errorf("to %v: the ends of both connections inside of pods have %v, want 4 with reno", to, got)
		}
		// Both ends of the tunnel.
		if got := congestionOf(t, 15008); got["reno"] != 0 || got[other] == 0 {
			t.Errorf("to %v: tunnels have %v, want what the pods have, %s", to, got, other)
		}
	}
}
