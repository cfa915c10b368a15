package capture

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/internal/testnet"
)

// answersFromHere makes the pod's TCP leave by the wire whatever the rules of
// capture say, as root of a pod can: for what happens without the program at
// the pod's end, of which the rules would hold back the answers.
func answersFromHere(pod *testnet.Pod) {
	both(pod.Host, "rule", "add", "pref", "1", "iif", "lo", "lookup", "main")
}

// TestNoWayIntoTheApp: whatever a client does, its connection is the proxy's.
// Without the program at the pod's end, each of these reaches the app.
func TestNoWayIntoTheApp(t *testing.T) {
	option4 := func(fd int) error {
		return unix.SetsockoptString(fd, unix.IPPROTO_IP, unix.IP_OPTIONS, "\x01\x01\x01\x01")
	}
	option6 := func(option int) func(fd int) error {
		return func(fd int) error {
			return unix.SetsockoptString(fd, unix.IPPROTO_IPV6, option, string([]byte{0, 0, 1, 4, 0, 0, 0, 0}))
		}
	}
	attacks := []struct {
		row     string
		family  int
		prepare func(pod *testnet.Pod)
		control func(fd int) error
	}{
		{row: "attack.in_plain"},
		{row: "attack.in_mark", control: func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, MarkProxy) }},
		{row: "attack.in_ip_options", family: 4, control: option4},
		{row: "attack.in_ipv6_hop_by_hop", family: 6, control: option6(unix.IPV6_HOPOPTS)},
		{row: "attack.in_ipv6_destination_options", family: 6, control: option6(unix.IPV6_DSTOPTS)},
		{row: "attack.in_syn_cookies", prepare: func(pod *testnet.Pod) { pod.Sysctl("net/ipv4/tcp_syncookies", "2") }},
	}
	s := newStage(t, testnet.Bridged)
	app := startApp(t, s.pod.Host, ":8080")
	p, _ := s.captured(Mode{New: true})
	score := newCard(t)
	// reaches reports whether the app itself has accepted the client's socket.
	reaches := func(from *testnet.Host, to netip.Addr, control func(fd int) error) bool {
		ctx, cancel := context.WithTimeout(context.Background(), soon)
		defer cancel()
		c, err := from.NS.Dial(ctx, "tcp", netip.AddrPort{}, netip.AddrPortFrom(to, 8080), control)
		if err != nil {
			t.Errorf("connect from %s to %v: %v", from.Name, to, err)
			return false
		}
		defer c.Close()
		if _, err := greet(c); err != nil {
			t.Errorf("from %s to %v: %v", from.Name, to, err)
		}
		for _, peer := range app.accepted() {
			if peer == addrPort(c.LocalAddr()) {
				return true
			}
		}
		return false
	}
	for _, guarded := range []bool{true, false} {
		if whole(t, p); !guarded {
			only(t, p, "")
			answersFromHere(s.pod)
		}
		for _, at := range attacks {
			s.pod.Sysctl("net/ipv4/tcp_syncookies", "1")
			if at.prepare != nil {
				at.prepare(s.pod)
			}
			for _, from := range []*testnet.Host{s.outside, s.peer.Host} {
				for _, to := range []netip.Addr{s.pod.V4, s.pod.V6} {
					if at.family == 4 && to.Is6() || at.family == 6 && to.Is4() {
						continue
					}
					got := reaches(from, to, at.control)
					if guarded {
						score.attack(at.row, !got)
					} else if !got {
						t.Errorf("%s from %s to %v does not reach the app without the program either", at.row, from.Name, to)
					}
				}
			}
		}
	}
}

// TestForgedSYNsAreNoProbes: a SYN with the node's address as its source, sent
// by a neighbour or in fragments, is not one of the node's. The node's own is.
func TestForgedSYNsAreNoProbes(t *testing.T) {
	s := newStage(t, testnet.Bridged)
	startApp(t, s.pod.Host, ":8080")
	p, _ := s.captured(Mode{New: true})
	score := newCard(t)
	from, to := s.peer.Tap("eth0"), s.pod.MAC("eth0")
	port := uint16(6000)
	for _, addrs := range [][2]netip.Addr{{s.node.V4, s.pod.V4}, {s.node.V6, s.pod.V6}} {
		before := stat(t, p, "probe_in")
		if _, err := connect(s.node.Host, netip.AddrPortFrom(addrs[1], 8080)); err != nil {
			t.Fatal(err)
		}
		if stat(t, p, "probe_in") == before {
			t.Fatal("the node's own connection is no probe: the test is not what it says")
		}
		for range 3 {
			port++
			base := testnet.Frame{
				SrcMAC: from.MAC, DstMAC: to, Flags: testnet.SYN, ID: port,
				Src: netip.AddrPortFrom(addrs[0], port), Dst: netip.AddrPortFrom(addrs[1], 8080),
			}
			probes, captured := stat(t, p, "probe_in"), stat(t, p, "captured_in")
			from.Send(base.Bytes())
			eventually(t, "the SYN is judged", func() bool { return stat(t, p, "captured_in")+stat(t, p, "probe_in") > captured+probes })
			score.attack("attack.in_spoofed_node", stat(t, p, "probe_in") == probes)

			// The app must not get what reassembly makes of it either.
			for _, first := range []int{8, 24} {
				port++
				f := base
				f.Src, f.ID, f.Payload = netip.AddrPortFrom(addrs[0], port), port, make([]byte, 32)
				dropped := stat(t, p, "in_fragment_drop") + stat(t, p, "in_malformed_drop")
				for _, piece := range pieces(testnet.SYN, first, uint16(first/8))(f) {
					from.Send(piece.Bytes())
				}
				eventually(t, "the fragment is judged", func() bool {
					return stat(t, p, "in_fragment_drop")+stat(t, p, "in_malformed_drop") > dropped
				})
				score.attack("attack.in_fragment", stat(t, p, "probe_in") == probes)
			}
		}
	}
}

// A thief accepts what it can get and counts the bytes.
type thief struct {
	net.Listener
	mu    sync.Mutex
	bytes int
	conns []net.Conn

	accepting, reading sync.WaitGroup
}

func (f *thief) serve() {
	for {
		c, err := f.Accept()
		if err != nil {
			return
		}
		c.SetDeadline(time.Now().Add(2 * soon))
		f.mu.Lock()
		f.conns = append(f.conns, c)
		f.mu.Unlock()
		f.reading.Go(func() {
			for b := make([]byte, 100); ; {
				n, err := c.Read(b)
				f.mu.Lock()
				f.bytes += n
				f.mu.Unlock()
				if err != nil {
					return
				}
			}
		})
	}
}

// end closes everything, also what is being accepted.
func (f *thief) end() {
	f.Close()
	f.accepting.Wait()
	f.mu.Lock()
	for _, c := range f.conns {
		c.Close()
	}
	f.mu.Unlock()
	f.reading.Wait()
}

func (f *thief) got() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.bytes
}

// TestFiltersInThePodStealNoConnection: the pod's own filters run behind our
// program and can give a SYN to another socket than the one it chose. No data
// gets there.
func TestFiltersInThePodStealNoConnection(t *testing.T) {
	s := newStage(t, testnet.Routed)
	p, _ := s.captured(Mode{New: true})
	score := newCard(t)
	var l net.Listener
	err := s.pod.Do(func() (err error) {
		var lc net.ListenConfig
		lc.SetMultipathTCP(false)
		l, err = lc.Listen(context.Background(), "tcp", ":9999")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	f := &thief{Listener: l}
	f.accepting.Go(f.serve)
	t.Cleanup(f.end)
	raw, err := l.(*net.TCPListener).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) {
		if err := unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, MarkProxy); err != nil {
			t.Error(err)
		}
		if err := unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1); err != nil {
			t.Error(err)
		}
	})
	s.pod.Run("nft", `table inet t {
		chain pre {
			type filter hook prerouting priority -150
			meta nfproto ipv4 tcp dport 8080 tproxy ip to :9999 accept
			meta nfproto ipv6 tcp dport 8080 tproxy ip6 to :9999 accept
		}
	}`)
	for _, guarded := range []bool{false, true} {
		if only(t, p, ""); guarded {
			whole(t, p)
		}
		for _, to := range []netip.Addr{s.pod.V4, s.pod.V6} {
			for range 3 {
				before, dropped := f.got(), stat(t, p, "in_unknown_socket_drop")
				ctx, cancel := context.WithTimeout(context.Background(), patience(guarded))
				c, err := s.outside.NS.Dial(ctx, "tcp", netip.AddrPort{}, netip.AddrPortFrom(to, 8080), nil)
				cancel()
				if err == nil {
					fmt.Fprint(c, "for the app, by way of the mesh")
				}
				if !guarded {
					eventually(t, "without the programs, the filter gives data to the thief", func() bool { return f.got() > before })
				} else {
					eventually(t, "the data is dropped", func() bool { return stat(t, p, "in_unknown_socket_drop") > dropped })
					score.attack("attack.in_stolen", f.got() == before)
				}
				if err == nil {
					c.Close()
				}
			}
		}
	}
}
