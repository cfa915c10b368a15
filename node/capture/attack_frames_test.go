package capture

import (
	"bytes"
	"fmt"
	"net/netip"
	"testing"

	"github.com/weft-mesh/weft/internal/testnet"
)

// A frameAttack is what a pod with CAP_NET_RAW sends past every program in the
// pod (AF_PACKET with PACKET_QDISC_BYPASS). None of its frames may arrive, but
// later fragments, which are worth nothing without the first.
type frameAttack struct {
	row    string
	family int // 4 or 6; 0 is both
	frames func(f testnet.Frame) []testnet.Frame
}

// one is an attack with one frame.
func one(edit func(f *testnet.Frame)) func(testnet.Frame) []testnet.Frame {
	return func(f testnet.Frame) []testnet.Frame {
		edit(&f)
		return []testnet.Frame{f}
	}
}

// flags is an attack with one frame for each set of flags, with data.
func flags(sets ...byte) func(testnet.Frame) []testnet.Frame {
	return func(f testnet.Frame) (out []testnet.Frame) {
		for _, flags := range sets {
			f.Flags = flags
			out = append(out, f)
		}
		return out
	}
}

// behind is an attack with a SYN behind extension headers.
func behind(kinds ...byte) func(testnet.Frame) []testnet.Frame {
	return one(func(f *testnet.Frame) { f.Flags, f.Extensions = testnet.SYN, kinds })
}

// pieces is an attack with a segment in two fragments, the first of which has
// so many bytes of it.
func pieces(flags byte, first int, second uint16) func(testnet.Frame) []testnet.Frame {
	return func(f testnet.Frame) []testnet.Frame {
		f.Flags, f.Fragment, f.MoreFragments, f.First, f.ID = flags, true, true, first, f.Src.Port()
		rest := f
		rest.MoreFragments, rest.Offset = false, second
		return []testnet.Frame{f, rest}
	}
}

func frameAttacks(s *stage) []frameAttack {
	from := func(pick func(h *testnet.Host) (v4, v6 netip.Addr), h *testnet.Host) func(testnet.Frame) []testnet.Frame {
		return one(func(f *testnet.Frame) {
			v4, v6 := pick(h)
			a := v4
			if f.Src.Addr().Is6() {
				a = v6
			}
			f.Flags, f.Src = testnet.SYN, netip.AddrPortFrom(a, f.Src.Port())
		})
	}
	own := func(h *testnet.Host) (netip.Addr, netip.Addr) { return h.V4, h.V6 }
	return []frameAttack{
		{"attack.af_packet", 0, one(func(f *testnet.Frame) { f.Flags, f.Payload = testnet.SYN, nil })},
		{"attack.fast_open_frame", 0, flags(testnet.SYN)},
		{"attack.data_without_syn", 0, flags(testnet.ACK, testnet.ACK|testnet.PSH, 0)},
		{"attack.data_with_odd_flags", 0, flags(testnet.SYN|testnet.ACK, testnet.RST, testnet.RST|testnet.ACK,
			testnet.FIN|testnet.ACK, testnet.SYN|testnet.FIN, testnet.SYN|testnet.RST, 0x3f, 0xff)},
		{"attack.spoofed_node", 0, from(own, s.node.Host)},
		{"attack.spoofed_pod", 0, from(own, s.peer.Host)},
		{"attack.spoofed_stranger", 0, from(func(*testnet.Host) (netip.Addr, netip.Addr) {
			return netip.MustParseAddr("198.51.100.7"), netip.MustParseAddr("2001:db8::7")
		}, nil)},
		{"attack.listener_port", 0, func(f testnet.Frame) (out []testnet.Frame) {
			for _, port := range []uint16{PortOutbound, PortInbound, PortHBONE} {
				f.Src = netip.AddrPortFrom(f.Src.Addr(), port)
				out = append(out, flags(testnet.SYN, testnet.ACK)(f)...)
			}
			return out
		}},
		{"attack.fragment_first", 0, pieces(testnet.ACK, 40, 5)},
		{"attack.fragment_syn", 0, pieces(testnet.SYN, 24, 3)},
		{"attack.fragment_tiny", 0, pieces(testnet.SYN, 8, 1)},
		{"attack.fragment_overlap", 0, pieces(testnet.ACK, 24, 1)},
		{"attack.vlan_tag", 0, func(f testnet.Frame) (out []testnet.Frame) {
			for _, tags := range [][]uint16{{0}, {0, 0}} {
				f.Flags, f.VLANs = testnet.SYN, tags
				out = append(out, f)
			}
			return out
		}},
		{"attack.ip_options", 4, func(f testnet.Frame) (out []testnet.Frame) {
			for _, n := range []int{4, 20, 40} {
				f.IPOptions = bytes.Repeat([]byte{1}, n) // no-operation
				out = append(out, flags(testnet.SYN, testnet.ACK)(f)...)
			}
			return out
		}},
		{"attack.ipv6_hop_by_hop", 6, behind(0)},
		{"attack.ipv6_destination_options", 6, behind(60)},
		{"attack.ipv6_routing", 6, behind(43)},
		{"attack.ipv6_authentication", 6, behind(51)},
		{"attack.ipv6_fragment_header", 6, behind(44)},
		{"attack.ipv6_nested", 6, func(f testnet.Frame) (out []testnet.Frame) {
			for _, kinds := range [][]byte{{0, 60, 43, 60}, {0, 44, 60}, {60, 60, 60, 60, 60, 60, 60, 60, 60}} {
				out = append(out, behind(kinds...)(f)...)
			}
			return out
		}},
		// The first fragment ends before TCP begins.
		{"attack.ipv6_fragmented_headers", 6, func(f testnet.Frame) []testnet.Frame {
			f.Flags, f.Fragment, f.MoreFragments, f.ID = testnet.SYN, true, true, f.Src.Port()
			f.OptionsInside, f.First = 1, 8
			return []testnet.Frame{f}
		}},
	}
}

// TestFramesAreNoWayAround sends each attack without the guards, where every
// frame arrives at the neighbour, and then with them.
func TestFramesAreNoWayAround(t *testing.T) {
	s := newStage(t, testnet.Bridged)
	p, x := s.captured(Mode{New: true})
	score := newCard(t)
	from, to := s.pod.Tap("eth0"), s.peer.MAC("eth0")
	// A connection of the proxy, so that there are sockets to be mistaken for.
	startApp(t, s.peer.Host, ":8080")
	if _, err := connect(s.pod.Host, netip.AddrPortFrom(s.peer.V4, 8080)); err != nil {
		t.Fatal(err)
	}
	if n := x.count("out"); n != 1 {
		t.Fatalf("the proxy accepted %d connections, want 1", n)
	}
	seen := newWatch(t, s.peer.Host, "eth0")
	const rounds = 3
	port := uint16(4000)
	for _, guarded := range []bool{false, true} {
		if only(t, p, ""); guarded {
			only(t, p, pinGuardHost)
		}
		for _, a := range frameAttacks(s) {
			for _, addrs := range [][2]netip.Addr{{s.pod.V4, s.peer.V4}, {s.pod.V6, s.peer.V6}} {
				if a.family == 4 && addrs[0].Is6() || a.family == 6 && addrs[0].Is4() {
					continue
				}
				for round := range rounds {
					port++
					frames := a.frames(testnet.Frame{
						SrcMAC: from.MAC, DstMAC: to,
						Src: netip.AddrPortFrom(addrs[0], port), Dst: netip.AddrPortFrom(addrs[1], 80),
						Payload: fmt.Appendf(nil, "smuggled in round %d by way of %s", round, a.row),
					})
					for _, f := range frames {
						from.Send(f.Bytes())
					}
					got := seen.frames(s.pod.Host)
					for _, f := range frames {
						arrived := contains(got, f)
						switch {
						case f.Offset > 0:
						case guarded:
							score.attack(a.row, !arrived)
							if arrived {
								t.Errorf("%s: a frame from %v, flags %#x, arrived at %v", a.row, f.Src, f.Flags, f.Dst)
							}
						case !arrived:
							t.Errorf("%s: a frame from %v, flags %#x, does not arrive at %v without the guards either", a.row, f.Src, f.Flags, f.Dst)
						}
					}
				}
			}
		}
	}
	whole(t, p)
	// What neither begins a connection nor carries data may pass.
	for _, flags := range []byte{testnet.ACK, testnet.RST, testnet.FIN | testnet.ACK, testnet.SYN | testnet.ACK} {
		f := testnet.Frame{
			SrcMAC: from.MAC, DstMAC: to, Flags: flags,
			Src: netip.AddrPortFrom(s.pod.V4, 4000), Dst: netip.AddrPortFrom(s.peer.V4, 80),
		}
		from.Send(f.Bytes())
		if !contains(seen.frames(s.pod.Host), f) {
			t.Errorf("a frame without data and with flags %#x does not pass", flags)
		}
	}
}

// contains reports whether f is among the frames. Tags may be gone.
func contains(frames [][]byte, f testnet.Frame) bool {
	f.VLANs = nil
	packet := f.Bytes()[14:]
	for _, g := range frames {
		if bytes.Contains(g, packet) {
			return true
		}
	}
	return false
}

// TestHalfOpenConnectionIsNoWayOut: while somebody outside has a handshake with
// the proxy under way, frames with its addresses are not the proxy's.
func TestHalfOpenConnectionIsNoWayOut(t *testing.T) {
	s := newStage(t, testnet.Bridged)
	p, _ := s.captured(Mode{New: true})
	score := newCard(t)
	in, out := s.peer.Tap("eth0"), s.pod.Tap("eth0")
	seen := newWatch(t, s.peer.Host, "eth0")
	// The peer's kernel knows nothing of this handshake and would end it.
	s.peer.Run("nft", "table inet t { chain out { type filter hook output priority 0; tcp flags rst drop; }; }")
	port := uint16(5000)
	for _, guarded := range []bool{false, true} {
		for _, addrs := range [][2]netip.Addr{{s.pod.V4, s.peer.V4}, {s.pod.V6, s.peer.V6}} {
			for _, to := range []uint16{8080, PortHBONE} {
				port++
				ours, theirs := netip.AddrPortFrom(addrs[0], to), netip.AddrPortFrom(addrs[1], port)
				syns := stat(t, p, "captured_in") + stat(t, p, "captured_hbone")
				whole(t, p)
				in.Send(testnet.Frame{SrcMAC: in.MAC, DstMAC: out.MAC, Src: theirs, Dst: ours, Flags: testnet.SYN, Seq: 1}.Bytes())
				eventually(t, "the handshake begins", func() bool {
					return stat(t, p, "captured_in")+stat(t, p, "captured_hbone") == syns+1
				})
				if !guarded {
					only(t, p, pinInbound)
				}
				// A simultaneous open (RFC 9293, 3.5), and data.
				for _, f := range flags(testnet.SYN, testnet.SYN|testnet.ACK, testnet.ACK)(testnet.Frame{
					SrcMAC: out.MAC, DstMAC: in.MAC, Src: ours, Dst: theirs, Ack: 2, Payload: []byte("smuggled while half open"),
				}) {
					out.Send(f.Bytes())
					arrived := contains(seen.frames(s.pod.Host), f)
					if guarded {
						score.attack("attack.simultaneous_open", !arrived)
					} else if !arrived {
						t.Errorf("flags %#x from %v do not arrive without the guards either", f.Flags, f.Src)
					}
				}
			}
		}
	}
}
