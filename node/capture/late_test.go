package capture

import (
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/bpf"
	"github.com/weft-mesh/weft/internal/testnet"
)

// withoutLate captures a running pod as an agent does that ends at once: the
// late hook is not there.
func (s *stage) withoutLate() (*Pod, *proxy) {
	s.t.Helper()
	p, x := s.prepare()
	p.closing.Store(true)
	s.attach(p, Mode{Existing: Keep})
	if s.guardsWire(p) {
		s.t.Fatal("guard_pod is there, the test is not what it says")
	}
	return p, x
}

func (s *stage) guardsWire(p *Pod) bool {
	s.t.Helper()
	on, err := p.on(p.hook(pinGuardPod))
	if err != nil {
		s.t.Fatal(err)
	}
	return on
}

// TestLateGuard: a running pod is captured before its own guard is there. Nothing
// leaves meanwhile, and whatever comes next brings it.
func TestLateGuard(t *testing.T) {
	t.Run("nothing leaves, and it is mended", func(t *testing.T) {
		s := newStage(t, testnet.Routed)
		s.apps()
		before := s.open()
		p, x := s.withoutLate()
		if ok, err := p.Captured(); !ok || err != nil {
			t.Errorf("captured %v, %v, want that it is", ok, err)
		}
		eachFamily(t, func(t *testing.T, addr func(*testnet.Host) netip.Addr) {
			drops := stat(t, p, "host_guard_syn_drop")
			refused(t, s.pod.Host, netip.AddrPortFrom(addr(s.outside), 8080), func(fd int) error {
				return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, MarkProxy)
			})
			if stat(t, p, "host_guard_syn_drop") == drops {
				t.Error("it was not the guard at the host's end that stopped it")
			}
		})
		alive(t, before, "older connection")
		alive(t, s.open(), "newer connection")
		if x.count("out") != 3 || x.count("in") != 3 {
			t.Errorf("the proxy has seen %d and %d of the newer connections out and in, want 3 and 3", x.count("out"), x.count("in"))
		}
		if mended, err := p.Mend(); err != nil || len(mended) != 1 || !s.guardsWire(p) {
			t.Errorf("mended %q, %v, want the guard", mended, err)
		}
	})
	t.Run("another agent brings it", func(t *testing.T) {
		s := newStage(t, testnet.Routed)
		s.apps()
		before := s.open()
		p, x := s.withoutLate()
		during := s.open()
		p.Close()
		p, err := s.agent().Prepare(t.Context(), s.target(), &x.files.Listeners)
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		if err := p.Attach(t.Context(), Mode{Existing: Reset}); err != nil { // a pod that is captured loses nothing
			t.Fatal(err)
		}
		if !s.guardsWire(p) {
			t.Error("it has not come")
		}
		alive(t, before, "older connection")
		alive(t, during, "captured connection")
	})
	// While the pod leaves, nobody else holds back what captured connections
	// send past lo.
	t.Run("the pod does not leave without it", func(t *testing.T) {
		s := newStage(t, testnet.Routed)
		s.apps()
		p, _ := s.withoutLate()
		during := s.open()
		s.capture.walkers.Programs[bpf.SocketsProgDrain].Close() // what comes next fails
		if err := p.Detach(t.Context()); err == nil {
			t.Fatal("the pod has left")
		}
		if e, err := p.entry(); err != nil || e.Mode != bpf.CaptureModeMODE_LEAVE {
			t.Fatalf("the pod's mode is %v, %v, the test is not what it says", e.Mode, err)
		}
		if !s.guardsWire(p) {
			t.Error("it has not come")
		}
		alive(t, during, "captured connection")
	})
}
