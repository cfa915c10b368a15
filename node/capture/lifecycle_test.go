package capture

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/bpf"
	"github.com/weft-mesh/weft/internal/netns"
	"github.com/weft-mesh/weft/internal/testnet"
)

// open opens connections of every kind to and from the pod.
func (s *stage) open() map[string]talk {
	s.t.Helper()
	out := map[string]talk{}
	for name, way := range map[string]struct {
		from *testnet.Host
		to   netip.Addr
	}{
		"out IPv4":              {s.pod.Host, s.outside.V4},
		"out IPv6":              {s.pod.Host, s.outside.V6},
		"out to the node":       {s.pod.Host, s.node.V4},
		"in IPv4":               {s.outside, s.pod.V4},
		"in IPv6":               {s.outside, s.pod.V6},
		"in from the node":      {s.node.Host, s.pod.V4},
		"in from the neighbour": {s.peer.Host, s.pod.V4},
		"itself":                {s.pod.Host, s.pod.V4},
	} {
		k, err := connect(way.from, netip.AddrPortFrom(way.to, 8080))
		if err != nil {
			s.t.Fatalf("%s: %v", name, err)
		}
		out[name] = k
	}
	return out
}

func alive(t *testing.T, ks map[string]talk, when string) {
	t.Helper()
	for name, k := range ks {
		if err := k.echo("still there"); err != nil {
			t.Errorf("%s, %s: %v", when, name, err)
		}
	}
}

func (s *stage) apps() {
	for _, h := range []*testnet.Host{s.pod.Host, s.peer.Host, s.outside, s.node.Host} {
		startApp(s.t, h, ":8080")
	}
}

func TestRunningPodKeepsItsConnections(t *testing.T) {
	for name, kind := range map[string]testnet.Kind{"routed": testnet.Routed, "bridged": testnet.Bridged} {
		t.Run(name, func(t *testing.T) {
			s := newStage(t, kind)
			s.apps()
			before := s.open()
			p, x := s.captured(Mode{Existing: Keep})
			alive(t, before, "after the capture, older connection")
			if n := x.count("in") + x.count("out"); n != 0 {
				t.Errorf("the proxy has seen %d of the older connections", n)
			}
			during := s.open()
			alive(t, during, "newer connection")
			if x.count("out") != 3 || x.count("in") != 3 {
				t.Errorf("the proxy has seen %d and %d of the newer connections out and in, want 3 and 3", x.count("out"), x.count("in"))
			}

			if err := p.Detach(t.Context()); err != nil {
				t.Fatal(err)
			}
			alive(t, before, "after the end of the capture, older connection")
			alive(t, during, "after the end of the capture, captured connection")
			ins, outs := x.count("in"), x.count("out")
			after := s.open()
			alive(t, after, "after the end of the capture, newer connection")
			if x.count("in") != ins || x.count("out") != outs {
				t.Error("the proxy has seen a connection of a pod that left")
			}

			// And back, with the proxy still busy with the captured ones.
			p2, err := s.capture.Prepare(t.Context(), s.target(), &x.files.Listeners)
			if err != nil {
				t.Fatal(err)
			}
			defer p2.Close()
			if err := p2.Attach(t.Context(), Mode{Existing: Keep}); err != nil {
				t.Fatal(err)
			}
			for when, ks := range map[string]map[string]talk{"oldest": before, "first captured": during, "direct": after} {
				alive(t, ks, "captured again, "+when)
			}
		})
	}
}

func TestRunningPodIsReset(t *testing.T) {
	s := newStage(t, testnet.Routed)
	s.apps()
	before := s.open()
	s.captured(Mode{Existing: Reset})
	for name, k := range before {
		err := k.echo("still there")
		if name == "itself" {
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		if err == nil {
			t.Errorf("%s: is not reset", name)
		}
	}
}

// TestKeptSocketCannotMove: an exemption is for a connection. A process that
// disconnects its kept socket and connects it elsewhere is captured or stopped.
func TestKeptSocketCannotMove(t *testing.T) {
	s := newStage(t, testnet.Routed)
	s.apps()
	k, err := connect(s.pod.Host, netip.AddrPortFrom(s.outside.V4, 8080))
	if err != nil {
		t.Fatal(err)
	}
	p, _ := s.captured(Mode{Existing: Keep})
	if err := k.echo("kept"); err != nil {
		t.Fatal(err)
	}
	f, err := k.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fd := int(f.Fd())
	disconnect := unix.RawSockaddr{Family: unix.AF_UNSPEC}
	if err := connectRaw(fd, &disconnect); err != nil {
		t.Fatal(err)
	}
	// Its mark still takes it past the routes.
	mark, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK)
	if err != nil || mark != MarkProxy {
		t.Fatalf("the socket has the mark %#x (%v), the test is not what it says", mark, err)
	}
	before := stat(t, p, "pod_guard_syn_drop")
	if err := unix.SetNonblock(fd, true); err != nil {
		t.Fatal(err)
	}
	for _, to := range []netip.Addr{s.peer.V4, s.outside.V4} {
		connectRaw(fd, &disconnect)
		if err := unix.Connect(fd, &unix.SockaddrInet4{Addr: to.As4(), Port: 8080}); !errors.Is(err, unix.EINPROGRESS) {
			t.Errorf("connect to %v: %v, want that it hangs", to, err)
		}
		eventually(t, "the guard stops the SYN", func() bool { return stat(t, p, "pod_guard_syn_drop") > before })
		before = stat(t, p, "pod_guard_syn_drop")
	}
}

// TestCaptureUnderTraffic captures and releases a pod over and over while
// connections are made in both directions, one after the other. None fails.
func TestCaptureUnderTraffic(t *testing.T) {
	s := newStage(t, testnet.Routed)
	s.apps()
	stop := make(chan struct{})
	var work sync.WaitGroup
	var mu sync.Mutex
	done, failed, slowest := map[string]int{}, []string{}, map[string]time.Duration{}
	for name, way := range map[string]struct {
		from *testnet.Host
		to   netip.Addr
	}{
		"out IPv4": {s.pod.Host, s.outside.V4}, "out IPv6": {s.pod.Host, s.outside.V6},
		"in IPv4": {s.outside, s.pod.V4}, "in IPv6": {s.outside, s.pod.V6},
		"probe": {s.node.Host, s.pod.V4},
	} {
		work.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				begin := time.Now()
				err := once(way.from, netip.AddrPortFrom(way.to, 8080))
				took := time.Since(begin)
				mu.Lock()
				done[name]++
				slowest[name] = max(slowest[name], took)
				if took > 150*time.Millisecond {
					t.Logf("%s took %v", name, took)
				}
				if err != nil {
					failed = append(failed, fmt.Sprintf("%s: %v", name, err))
				}
				mu.Unlock()
			}
		})
	}
	grown := func() bool {
		mu.Lock()
		defer mu.Unlock()
		for _, n := range done {
			if n < 20 {
				return false
			}
		}
		clear(done)
		return true
	}
	for range 5 {
		p, err := s.capture.Prepare(t.Context(), s.target(), nil)
		if err != nil {
			t.Fatal(err)
		}
		x := startProxy(t, p)
		if err := p.Attach(t.Context(), Mode{Existing: Keep}); err != nil {
			t.Fatal(err)
		}
		eventually(t, "traffic goes on while captured", grown)
		if err := p.Detach(t.Context()); err != nil {
			t.Fatal(err)
		}
		eventually(t, "traffic goes on while not captured", grown)
		x.stopAccepting()
		if err := p.Drained(t.Context()); err != nil {
			t.Fatal(err)
		}
		x.kill()
		p.Close()
	}
	close(stop)
	work.Wait()
	t.Logf("slowest connections: %v", slowest)
	for _, f := range failed {
		t.Error(f)
	}
}

// once makes a connection, uses it and closes it.
func once(from *testnet.Host, to netip.AddrPort) error {
	ctx, cancel := context.WithTimeout(context.Background(), soon)
	defer cancel()
	c, err := from.NS.Dial(ctx, "tcp", netip.AddrPort{}, to, nil)
	if err != nil {
		return err
	}
	defer c.Close()
	k, err := greet(c)
	if err != nil {
		return fmt.Errorf("greeting: %w", err)
	}
	if err := k.echo("hello"); err != nil {
		return fmt.Errorf("echo: %w", err)
	}
	k.CloseWrite()
	if _, err := io.ReadAll(k); err != nil {
		return fmt.Errorf("close: %w", err)
	}
	return nil
}

func TestDeadProxyFailsClosed(t *testing.T) {
	s := newStage(t, testnet.Routed)
	s.apps()
	p, x := s.captured(Mode{New: true})
	x.kill()
	if err := p.Close(); err != nil { // the agent's descriptors too
		t.Fatal(err)
	}
	closed := func(when string) {
		t.Helper()
		eachFamily(t, func(t *testing.T, addr func(*testnet.Host) netip.Addr) {
			refused(t, s.pod.Host, netip.AddrPortFrom(addr(s.outside), 8080), nil)
			refused(t, s.outside, netip.AddrPortFrom(addr(s.pod.Host), 8080), nil)
			refused(t, s.outside, netip.AddrPortFrom(addr(s.pod.Host), PortHBONE), nil)
		})
	}
	closed("without a proxy")
	if err := s.capture.Close(); err != nil {
		t.Fatal(err)
	}
	closed("without a proxy and an agent")
	// Even if every program were taken off, the app's traffic stays inside.
	if err := os.RemoveAll(s.capture.podsDir()); err != nil {
		t.Fatal(err)
	}
	refused(t, s.pod.Host, netip.AddrPortFrom(s.outside.V4, 8080), nil)
	refused(t, s.outside, netip.AddrPortFrom(s.pod.V4, 8080), nil)
}

// TestBacklogOutlivesTheProxy: the agent's descriptors keep the listeners, so
// while a proxy restarts, connections wait.
func TestBacklogOutlivesTheProxy(t *testing.T) {
	s := newStage(t, testnet.Routed)
	s.apps()
	p, x := s.captured(Mode{New: true})
	x.kill()
	out, err := s.pod.Dial(netip.AddrPortFrom(s.outside.V4, 8080))
	if err != nil {
		t.Fatal(err)
	}
	in, err := s.outside.Dial(netip.AddrPortFrom(s.pod.V4, 8080))
	if err != nil {
		t.Fatal(err)
	}
	startProxy(t, p)
	for _, c := range []*net.TCPConn{out, in} {
		if _, err := greet(c); err != nil {
			t.Error(err)
		}
	}
}

// TestAgentRestart: a new agent takes over a captured pod, its listeners from
// the proxy, and exchanges the programs; connections live through it.
func TestAgentRestart(t *testing.T) {
	s := newStage(t, testnet.Routed)
	s.apps()
	p, x := s.captured(Mode{New: true})
	ks := s.open()
	ids := linkIDs(t, p)
	if err := errors.Join(p.Close(), s.capture.Close()); err != nil {
		t.Fatal(err)
	}
	alive(t, ks, "without an agent")
	alive(t, s.open(), "begun without an agent")

	again := s.agent()
	if got, err := again.Pinned(); err != nil || !slices.Equal(got, []string{"uid-pod"}) {
		t.Fatalf("the new agent finds %v, %v", got, err)
	}
	// The proxy has the listeners; without them the agent must not pretend.
	if _, err := again.Prepare(t.Context(), s.target(), nil); !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("without the proxy's listeners: %v, want that the port is taken", err)
	}
	p2, err := again.Prepare(t.Context(), s.target(), &x.files.Listeners)
	if err != nil {
		t.Fatal(err)
	}
	defer p2.Close()
	if ok, err := p2.Captured(); !ok || err != nil {
		t.Errorf("captured %v, %v, want that the capture held", ok, err)
	}
	if err := p2.Attach(t.Context(), Mode{}); err != nil {
		t.Fatal(err)
	}
	if got := linkIDs(t, p2); again.Features().Rung == RungTCX && got != ids {
		t.Errorf("links %v, want the old ones, %v, with new programs", got, ids)
	}
	alive(t, ks, "with a new agent")
	alive(t, s.open(), "begun with a new agent")
}

func linkIDs(t *testing.T, p *Pod) (ids [5]uint32) {
	t.Helper()
	for i, h := range p.hooks() {
		l := p.links[h.pin]
		if l == nil && p.c.features.Rung == RungClsact && h.index != 0 {
			continue
		}
		if l == nil {
			t.Fatalf("no link %s", h.pin)
		}
		info, err := l.Info()
		if err != nil {
			t.Fatal(err)
		}
		ids[i] = uint32(info.ID)
	}
	return ids
}

// TestHalfDoneIsNotCaptured cuts a capture short after each of its steps: it
// never counts as captured, and a new agent finishes it.
func TestHalfDoneIsNotCaptured(t *testing.T) {
	s := newStage(t, testnet.Routed)
	s.apps()
	k := s.open()
	p, x := s.captured(Mode{Existing: Keep})
	for _, missing := range []string{pinCaptured, pinGuardHost, pinGuardPod, pinInbound, pinGuardLo, pinSkLookup} {
		if err := p.unmarkCaptured(); err != nil {
			t.Fatal(err)
		}
		if missing != pinCaptured {
			if err := p.drop(missing); err != nil {
				t.Fatal(err)
			}
		}
		p.Close()
		again := s.agent()
		var err error
		if p, err = again.Prepare(t.Context(), s.target(), &x.files.Listeners); err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		if ok, err := p.Captured(); ok || err != nil {
			t.Errorf("without %s the pod counts as captured (%v)", missing, err)
		}
		if err := p.Attach(t.Context(), Mode{Existing: Keep}); err != nil {
			t.Fatalf("without %s: %v", missing, err)
		}
		p.background.Wait() // the next step takes off what is put on there
		if ok, err := p.Captured(); !ok || err != nil {
			t.Errorf("finished after %s: captured %v, %v", missing, ok, err)
		}
		alive(t, k, "finished after "+missing)
	}
	// The sign alone is not believed either.
	if err := p.drop(pinGuardHost); err != nil {
		t.Fatal(err)
	}
	if ok, err := p.Captured(); ok || err != nil {
		t.Errorf("with a sign but without a guard the pod counts as captured (%v)", err)
	}
}

// TestFailedAttachLeavesThePodAsItWas: the first step that fails stops the
// capture; the pod's traffic is as before or less.
func TestFailedAttach(t *testing.T) {
	s := newStage(t, testnet.Routed)
	s.apps()
	p, _ := s.prepare()
	s.capture.cfg.ProcRoot = "/nonexistent"
	err := p.Attach(t.Context(), Mode{})
	if err == nil || !strings.Contains(err.Error(), "tcp_fwmark_accept") {
		t.Errorf("got %v, want an error that names the sysctl", err)
	}
	if ok, err := p.Captured(); ok || err != nil {
		t.Errorf("captured %v, %v", ok, err)
	}
	alive(t, s.open(), "after a capture that failed")
}

// TestNewSandboxOfTheSamePod: the same pod in another namespace. What is
// pinned for the old one is worth nothing.
func TestNewSandboxOfTheSamePod(t *testing.T) {
	s := newStage(t, testnet.Routed)
	s.apps()
	p, x := s.captured(Mode{New: true})
	p.Close()
	x.kill()
	other := s.node.Pod("pod", testnet.Routed)
	startApp(t, other.Host, ":8080")
	p2, err := s.capture.Prepare(t.Context(), targetOf(other), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer p2.Close()
	if ok, err := p2.Captured(); ok || err != nil {
		t.Errorf("the new sandbox counts as captured (%v)", err)
	}
	x2 := startProxy(t, p2)
	if err := p2.Attach(t.Context(), Mode{New: true}); err != nil {
		t.Fatal(err)
	}
	if err := once(s.outside, netip.AddrPortFrom(other.V4, 8080)); err != nil {
		t.Error(err)
	}
	if err := once(other.Host, netip.AddrPortFrom(s.outside.V4, 8080)); err != nil {
		t.Error(err)
	}
	if x2.count("in") != 1 || x2.count("out") != 1 {
		t.Errorf("the proxy has seen %d in and %d out, want 1 and 1", x2.count("in"), x2.count("out"))
	}
}

// TestDetachLeavesNothing: programs, pins, rules and routes are gone.
func TestDetachLeavesNothing(t *testing.T) {
	s := newStage(t, testnet.Routed)
	rules := func() string { return s.pod.Run("ip", "rule") + s.pod.Run("ip", "-6", "rule") }
	before := rules()
	p, x := s.captured(Mode{New: true})
	if rules() == before {
		t.Fatal("the test does not see rules")
	}
	if err := p.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}
	x.kill()
	if err := p.Drained(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := rules(); got != before {
		t.Errorf("rules are left:\n%s\nwant:\n%s", got, before)
	}
	for _, family := range []string{"-4", "-6"} {
		if out := s.pod.Run("ip", family, "route", "show", "table", "all"); strings.Contains(out, "1500") {
			t.Errorf("routes are left:\n%s", out)
		}
	}
	if exists(p.dir) {
		t.Error("pins are left")
	}
	if err := p.Detach(t.Context()); err != nil {
		t.Errorf("a second Detach: %v", err)
	}
}

// TestForgetLeavesNothing: when a pod is gone, Forget lets its namespace end.
func TestForgetLeavesNothing(t *testing.T) {
	s := newStage(t, testnet.Routed)
	pod := s.node.Pod("short", testnet.Routed)
	veth := "/sys/class/net/" + pod.Veth
	there := func() (ok bool) {
		// sysfs shows the namespace of whoever mounted it; ask netlink.
		out := s.node.Run("ip", "-o", "link")
		return strings.Contains(out, pod.Veth+"@")
	}
	p, err := s.capture.Prepare(t.Context(), targetOf(pod), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Attach(t.Context(), Mode{New: true}); err != nil {
		t.Fatal(err)
	}
	if !there() {
		t.Fatalf("the test does not see %s", veth)
	}
	pod.NS.Close() // the last process is gone
	if err := p.Forget(); err != nil {
		t.Fatal(err)
	}
	if exists(filepath.Join(s.capture.podsDir(), "uid-short")) {
		t.Error("pins are left")
	}
	eventually(t, "the namespace ends and takes its veth with it", func() bool { return !there() })
	if err := s.capture.Forget("uid-short"); err != nil {
		t.Errorf("to forget twice: %v", err)
	}
}

func TestPodWithoutIPv6(t *testing.T) {
	s := newStage(t, testnet.Routed)
	s.pod = s.node.PodWithoutIPv6("four", testnet.Routed)
	s.apps()
	p, x := s.captured(Mode{New: true})
	f, err := p.Files()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for i, l := range f.Listeners {
		if (l == nil) != (i%2 == 1 || i >= int(bpf.CaptureRoleROLE_DNS4)) {
			t.Errorf("listener %d is %v", i, l)
		}
	}
	if err := once(s.pod.Host, netip.AddrPortFrom(s.outside.V4, 8080)); err != nil {
		t.Error(err)
	}
	if err := once(s.outside, netip.AddrPortFrom(s.pod.V4, 8080)); err != nil {
		t.Error(err)
	}
	if x.count("in") != 1 || x.count("out") != 1 {
		t.Errorf("the proxy has seen %d in and %d out, want 1 and 1", x.count("in"), x.count("out"))
	}
	if err := p.Detach(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestPrepareRefuses(t *testing.T) {
	s := newStage(t, testnet.Routed)
	hostAgain := must(netns.Open(fmt.Sprintf("/proc/self/fd/%d", s.node.Fd())))
	defer hostAgain.Close()
	tests := []struct {
		name string
		t    Target
		want string
	}{
		{"no UID", Target{Netns: s.pod.NS, Addrs: []netip.Addr{s.pod.V4}}, "not a pod UID"},
		{"a path as UID", Target{UID: "../x", Netns: s.pod.NS, Addrs: []netip.Addr{s.pod.V4}}, "not a pod UID"},
		{"no address", Target{UID: "u", Netns: s.pod.NS}, "no address yet"},
		{"the host's namespace", Target{UID: "u", Netns: hostAgain, Addrs: []netip.Addr{s.node.V4}}, "hostNetwork"},
		{"another pod's namespace", Target{UID: "u", Netns: s.peer.NS, Addrs: []netip.Addr{s.pod.V4}}, "another pod's"},
		{"a namespace of another node", Target{UID: "u", Netns: s.outside.NS, Addrs: []netip.Addr{s.outside.V4}}, "another namespace than the host's"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := s.capture.Prepare(t.Context(), tt.t, nil)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want it to say %q", err, tt.want)
			}
		})
	}
	t.Run("port taken by the app", func(t *testing.T) {
		l := s.pod.Listen(":15006")
		defer l.Close()
		_, err := s.capture.Prepare(t.Context(), s.target(), nil)
		if !errors.Is(err, unix.EADDRINUSE) || !strings.Contains(err.Error(), "15006") {
			t.Errorf("got %v, want it to name the port that is taken", err)
		}
	})
	t.Run("listeners of another pod", func(t *testing.T) {
		other, err := s.capture.Prepare(t.Context(), targetOf(s.peer), nil)
		if err != nil {
			t.Fatal(err)
		}
		defer other.Close()
		_, err = s.capture.Prepare(t.Context(), s.target(), &other.listeners)
		if err == nil || !strings.Contains(err.Error(), "another network namespace") {
			t.Errorf("got %v, want it to refuse", err)
		}
		if err := other.Forget(); err != nil {
			t.Error(err)
		}
	})
	if got, err := s.capture.Pinned(); err != nil || len(got) != 0 {
		t.Errorf("pins %v, %v are left of what was refused", got, err)
	}
}

// TestDetachOfOtherRoute: a route that was made without what this version adds
// to it is ours all the same.
func TestDetachOfOtherRoute(t *testing.T) {
	s := newStage(t, testnet.Routed)
	p, x := s.captured(Mode{New: true})
	for family, src := range map[string]netip.Addr{"-4": s.pod.V4, "-6": s.pod.V6} {
		if out := s.pod.Run("ip", family, "route", "show", "table", "1500"); !strings.Contains(out, "congctl "+congestion) {
			t.Errorf("the route is %q, want it with %s", out, congestion)
		}
		s.pod.Run("ip", family, "route", "flush", "table", "1500")
		s.pod.Run("ip", family, "route", "add", "local", "default", "dev", "lo", "table", "1500", "proto", "80", "src", src.String())
	}
	if mended, err := p.Mend(); err != nil || len(mended) != 0 {
		t.Errorf("mended %q, %v: nothing was missing", mended, err)
	}
	if err := p.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}
	x.kill()
	if err := p.Drained(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, family := range []string{"-4", "-6"} {
		if out := s.pod.Run("ip", family, "route", "show", "table", "all"); strings.Contains(out, "1500") {
			t.Errorf("routes are left:\n%s", out)
		}
	}
}
