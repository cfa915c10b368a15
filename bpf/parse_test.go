package bpf

import (
	"errors"
	"net/netip"
	"os"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/weft-mesh/weft/internal/testnet"
)

// What tc programs return; the kernel's pkt_cls.h.
const (
	pass = 1<<32 - 1 // TC_ACT_UNSPEC
	shot = 2         // TC_ACT_SHOT
)

// noPod is the number that programs find when no gate has left one.
const noPod = uint32(0)

func load(t *testing.T) *CaptureObjects {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to load programs")
	}
	spec, err := LoadCapture()
	if err != nil {
		t.Fatal(err)
	}
	var o CaptureObjects
	if err := spec.LoadAndAssign(&o, nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { o.Close() })
	if err := errors.Join(o.Pods.Put(noPod, CapturePod{Mode: CaptureModeMODE_STRICT}), o.Stats.Put(noPod, CaptureCounters{})); err != nil {
		t.Fatal(err)
	}
	return &o
}

func run(t *testing.T, p *ebpf.Program, frame []byte) uint32 {
	t.Helper()
	got, err := p.Run(&ebpf.RunOptions{Data: frame})
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// TestGuardsJudgeFrames runs both guards on frames that no blessed socket has
// sent. The sockets are missing here, so what begins a connection or carries
// data must not pass in any disguise.
func TestGuardsJudgeFrames(t *testing.T) {
	var (
		v4  = testnet.Frame{Src: netip.MustParseAddrPort("10.0.0.1:4000"), Dst: netip.MustParseAddrPort("10.0.0.2:80")}
		v6  = testnet.Frame{Src: netip.MustParseAddrPort("[fd00::1]:4000"), Dst: netip.MustParseAddrPort("[fd00::2]:80")}
		syn = func(f testnet.Frame) testnet.Frame { f.Flags = testnet.SYN; return f }
		ack = func(f testnet.Frame) testnet.Frame { f.Flags = testnet.ACK; return f }
		fin = func(f testnet.Frame) testnet.Frame { f.Flags = testnet.FIN | testnet.ACK; return f }
		rst = func(f testnet.Frame) testnet.Frame { f.Flags = testnet.RST; return f }
		sa  = func(f testnet.Frame) testnet.Frame { f.Flags = testnet.SYN | testnet.ACK; return f }
		dat = func(f testnet.Frame) testnet.Frame { f.Payload = []byte("data"); return f }
		udp = func(f testnet.Frame) testnet.Frame { f.UDP = true; return f }
		opt = func(n int) func(testnet.Frame) testnet.Frame {
			return func(f testnet.Frame) testnet.Frame { f.DestinationOptions = n; return f }
		}
		ipo   = func(f testnet.Frame) testnet.Frame { f.IPOptions = make([]byte, 40); return f }
		first = func(f testnet.Frame) testnet.Frame { f.Fragment, f.MoreFragments = true, true; return f }
		later = func(f testnet.Frame) testnet.Frame {
			f.Fragment, f.Offset, f.Payload = true, 3, []byte("rest of it")
			return f
		}
		cut = func(n int) func(testnet.Frame) testnet.Frame {
			return func(f testnet.Frame) testnet.Frame { f.Cut = n; return f }
		}
		vlan = func(ids ...uint16) func(testnet.Frame) testnet.Frame {
			return func(f testnet.Frame) testnet.Frame { f.VLANs = ids; return f }
		}
	)
	type with = []func(testnet.Frame) testnet.Frame
	tests := []struct {
		name string
		with with
		want uint32
		only int // 4 or 6, if the case exists in one family
	}{
		{"SYN", with{syn}, shot, 0},
		{"data", with{ack, dat}, shot, 0},
		{"data with FIN", with{fin, dat}, shot, 0},
		{"data with SYN-ACK", with{sa, dat}, shot, 0},
		{"bare ACK", with{ack}, pass, 0},
		{"bare FIN", with{fin}, pass, 0},
		{"bare reset", with{rst}, pass, 0},
		{"bare SYN-ACK", with{sa}, pass, 0},
		{"UDP", with{udp, dat}, pass, 0},
		{"SYN behind IP options", with{syn, ipo}, shot, 4},
		{"bare ACK behind IP options", with{ack, ipo}, pass, 4},
		{"SYN behind a destination option", with{syn, opt(1)}, shot, 6},
		{"data behind a destination option", with{ack, dat, opt(1)}, shot, 6},
		{"bare ACK behind a destination option", with{ack, opt(1)}, pass, 6},
		{"UDP behind a destination option", with{udp, dat, opt(1)}, pass, 6},
		{"SYN behind seven headers", with{syn, opt(7)}, shot, 6},
		{"bare ACK behind too many headers", with{ack, opt(8)}, shot, 6},
		{"SYN in a first fragment", with{syn, first}, shot, 0},
		{"bare ACK in a first fragment: the data comes in the next", with{ack, first}, shot, 0},
		{"later fragment", with{later}, pass, 0},
		{"UDP in a first fragment", with{udp, dat, first}, pass, 0},
		{"half a TCP header", with{syn, cut(10)}, shot, 0},
		{"VLAN tag", with{syn, vlan(1)}, shot, 0},
		{"priority tags, one hidden in the other", with{syn, vlan(0, 0)}, shot, 0},
	}
	o := load(t)
	for _, base := range []testnet.Frame{v4, v6} {
		family := 4
		if base.Src.Addr().Is6() {
			family = 6
		}
		for _, tt := range tests {
			if tt.only != 0 && tt.only != family {
				continue
			}
			f := base
			for _, change := range tt.with {
				f = change(f)
			}
			for name, guard := range map[string]*ebpf.Program{"pod": o.GuardPod, "host": o.GuardHost} {
				if got := run(t, guard, f.Bytes()); got != tt.want {
					t.Errorf("IPv%d, %s: guard_%s returns %d, want %d", family, tt.name, name, int32(got), int32(tt.want))
				}
			}
		}
	}
}

func TestInboundRefusesForeignAddresses(t *testing.T) {
	o := load(t) // no address is the pod's
	f := testnet.Frame{Src: netip.MustParseAddrPort("10.0.0.1:4000"), Dst: netip.MustParseAddrPort("10.0.0.2:80"), Flags: testnet.SYN}
	if got := run(t, o.Inbound, f.Bytes()); got != shot {
		t.Errorf("got %d, want %d", int32(got), shot)
	}
	var counters CaptureCounters
	if err := o.Stats.Lookup(noPod, &counters); err != nil {
		t.Fatal(err)
	}
	if n := counters.N[CaptureCounterIN_UNKNOWN_ADDR_DROP]; n != 1 {
		t.Errorf("counted %d drops, want 1", n)
	}
}

// TestPodsThatAreNotKnown: a gate of a pod that is not in the map lets nothing
// through, nor does one with a mode that is none; an idle one stops nothing.
func TestPodsThatAreNotKnown(t *testing.T) {
	o := load(t)
	f := testnet.Frame{Src: netip.MustParseAddrPort("10.0.0.1:4000"), Dst: netip.MustParseAddrPort("10.0.0.2:80"), Flags: testnet.SYN}
	programs := map[string]*ebpf.Program{"inbound": o.Inbound, "guard_pod": o.GuardPod, "guard_host": o.GuardHost}
	for _, tt := range []struct {
		name   string
		change func() error
		want   uint32
	}{
		{"idle", func() error { return o.Pods.Put(noPod, CapturePod{Mode: CaptureModeMODE_IDLE}) }, pass},
		{"no mode", func() error { return o.Pods.Put(noPod, CapturePod{}) }, shot},
		{"a mode that is none", func() error { return o.Pods.Put(noPod, CapturePod{Mode: 99}) }, shot},
		{"no pod", func() error { return o.Pods.Delete(noPod) }, shot},
	} {
		if err := tt.change(); err != nil {
			t.Fatal(err)
		}
		for name, p := range programs {
			if got := run(t, p, f.Bytes()); got != tt.want {
				t.Errorf("%s: %s returns %d, want %d", tt.name, name, int32(got), int32(tt.want))
			}
		}
	}
}
