package capture

import (
	"errors"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/internal/testnet"
)

// TestRungs runs the tests of capture on each rung of the ladder, by turning
// off what this kernel has. What a rung does not promise is named, with the
// test of what holds instead.
func TestRungs(t *testing.T) {
	type tests = map[string]func(*testing.T)
	always := tests{
		"outbound":              TestOutboundIsCaptured,
		"inbound":               TestInboundIsCaptured,
		"names":                 TestNameQueriesAreCaptured,
		"probes":                TestProbesOfTheHostPass,
		"dead proxy":            TestDeadProxyFailsClosed,
		"restart of the agent":  TestAgentRestart,
		"detach leaves nothing": TestDetachLeavesNothing,
	}
	for _, tt := range []struct {
		disable string
		rung    Rung
		why     string // part of it
		tests   tests  // of all that is promised, or of what another rung does not cover
		instead tests  // of what is not promised
	}{
		{disable: "tcx", rung: RungClsact, why: "no tcx links", tests: with(always, tests{
			"socket options are no way out": TestSocketOptionsAreNoWayAround,
			"keep and drain":                TestRunningPodKeepsItsConnections,
			"cut short":                     TestHalfDoneIsNotCaptured,
			"loop":                          TestProxyDoesNotMeetItself,
		}), instead: tests{"filters taken off in the pod": testFiltersTakenOff}},
		{disable: "sk_lookup", rung: RungTCX, why: "no sk_lookup", tests: with(always, tests{
			"keep and drain":     TestRunningPodKeepsItsConnections,
			"port is used again": func(t *testing.T) { portIsUsedAgain(t, "attack.in_port_reused.no_sk_lookup") },
		})},
		{disable: "sk_lookup tcx", rung: RungClsact, why: "no sk_lookup", tests: tests{
			"outbound": TestOutboundIsCaptured,
			"names":    TestNameQueriesAreCaptured,
		}},
		{disable: "iterator", rung: RungTCX, why: "no socket iterators", tests: tests{
			"reset": TestRunningPodIsReset,
		}, instead: tests{"everything is reset": testEverythingIsReset}},
	} {
		t.Run(tt.disable, func(t *testing.T) {
			t.Setenv(disableEnv, tt.disable)
			f, err := Probe(strings.Fields(tt.disable)...)
			if err != nil || f.Rung != tt.rung || !strings.Contains(f.Why, tt.why) {
				t.Fatalf("the probe says %+v, %v; want rung %s because of %q", f, err, tt.rung, tt.why)
			}
			if got := newStage(t, testnet.Routed).capture.Features(); got.Rung != f.Rung || got.Keep != f.Keep || got.SkLookup != f.SkLookup {
				t.Errorf("capture uses %+v, the probe says %+v", got, f)
			}
			for name, test := range with(tt.tests, tt.instead) {
				t.Run(name, test)
			}
		})
	}
}

// with returns both.
func with(a, b map[string]func(*testing.T)) map[string]func(*testing.T) {
	out := maps.Clone(a)
	maps.Copy(out, b)
	return out
}

// testEverythingIsReset: without iterators, connections end when a pod joins and
// when it leaves, at once and whatever was asked for; those of the pod with
// itself go on.
func testEverythingIsReset(t *testing.T) {
	s := newStage(t, testnet.Routed)
	s.apps()
	before := s.open()
	p, x := s.captured(Mode{Existing: Keep})
	ended := func(when string, ks map[string]talk) {
		t.Helper()
		for name, k := range ks {
			err := k.echo("still there")
			if itself := name == "itself"; (err == nil) != itself {
				t.Errorf("%s, %s: %v", when, name, err)
			}
		}
	}
	ended("joined", before)
	during := s.open()
	alive(t, during, "captured")
	if x.count("in") != 3 || x.count("out") != 3 {
		t.Errorf("the proxy has seen %d in and %d out, want 3 and 3", x.count("in"), x.count("out"))
	}
	if err := p.Attach(t.Context(), Mode{Existing: Keep}); err != nil {
		t.Fatal(err)
	}
	alive(t, during, "captured again")
	if err := p.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := during["out IPv4"].echo("still there"); err == nil {
		t.Error("a captured connection goes on although it cannot be held")
	}
	if err := p.Drained(t.Context()); err != nil {
		t.Error(err)
	}
	alive(t, s.open(), "after it")
}

// testFiltersTakenOff: on this rung a pod with NET_ADMIN can take off the
// programs inside itself. Nothing leaves by that, it is noticed, and mended.
func testFiltersTakenOff(t *testing.T) {
	s := newStage(t, testnet.Routed)
	s.apps()
	p, _ := s.captured(Mode{New: true})
	for _, link := range []string{"eth0", "lo"} {
		s.pod.Run("tc", "qdisc", "del", "dev", link, "clsact")
	}
	if ok, err := p.Captured(); ok || err != nil {
		t.Errorf("without its programs the pod counts as captured (%v)", err)
	}
	before := stat(t, p, "host_guard_syn_drop")
	refused(t, s.pod.Host, netip.AddrPortFrom(s.outside.V4, 8080), func(fd int) error {
		return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, MarkProxy)
	})
	if stat(t, p, "host_guard_syn_drop") == before {
		t.Error("it was not the guard at the host's end that stopped it")
	}
	mended, err := p.Mend()
	if err != nil || len(mended) != 3 {
		t.Errorf("mended %q, %v, want three programs", mended, err)
	}
	if ok, err := p.Captured(); !ok || err != nil {
		t.Errorf("mended, the pod counts as not captured (%v)", err)
	}
	alive(t, s.open(), "mended")
}

// TestRungChanges: an agent with another configuration takes a pod over, and
// brings it to its own rung; connections live on.
func TestRungChanges(t *testing.T) {
	s := newStage(t, testnet.Routed)
	s.apps()
	p, x := s.captured(Mode{New: true})
	ks := s.open()
	for _, disable := range [][]string{{FeatureTCX}, nil, {FeatureSkLookup}, {FeatureTCX, FeatureIterator}, {FeatureSkLookup, FeatureTCX}, nil} {
		p.Close()
		s.cfg.Disable = disable
		c := s.agent()
		var err error
		if p, err = c.Prepare(t.Context(), s.target(), &x.files.Listeners); err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		if ok, err := p.Captured(); !ok || err != nil {
			t.Errorf("without %q the pod counts as not captured (%v)", disable, err)
		}
		s.attach(p, Mode{Existing: Keep})
		alive(t, ks, "on another rung")
		alive(t, s.open(), "begun on another rung")
		filters := s.pod.Run("tc", "filter", "show", "dev", "eth0", "ingress")
		links := 0
		for _, h := range p.hooks() {
			if l, err := p.pinned(h); l != nil && h.pin != pinSkLookup && h.pin != pinOutbound && err == nil {
				links++
			}
		}
		if tcx := !slices.Contains(disable, FeatureTCX); tcx != (links == 4) || tcx == strings.Contains(filters, "weft") {
			t.Errorf("without %q there are %d links, and filters:\n%s", disable, links, filters)
		}
	}
}

// TestFiltersOfOthersStay: a CNI plug-in has its own, in the same place.
func TestFiltersOfOthersStay(t *testing.T) {
	t.Setenv(disableEnv, FeatureTCX)
	s := newStage(t, testnet.Routed)
	s.apps()
	theirs, err := passAll()
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.Close()
	err = routed(s.pod.NS, func(nl *netlink.Handle) error {
		eth0, err := nl.LinkByName("eth0")
		if err != nil {
			return err
		}
		h := hook{pin: "theirs", index: eth0.Attrs().Index, kind: ebpf.AttachTCXIngress}
		f := h.filter()
		f.Handle, f.Name, f.Fd = 1, "theirs", theirs.FD()
		return errors.Join(nl.QdiscAdd(h.clsact()), nl.FilterAdd(f))
	})
	if err != nil {
		t.Fatal(err)
	}
	p, _ := s.captured(Mode{New: true})
	alive(t, s.open(), "captured")
	if err := p.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}
	got := s.pod.Run("tc", "filter", "show", "dev", "eth0", "ingress")
	if !strings.Contains(got, "theirs") || strings.Contains(got, "weft") {
		t.Errorf("what is left is not what was there before:\n%s", got)
	}
}

// TestProxyDoesNotMeetItself: a pod that takes away the rules that keep the
// proxy's own connections off the capture does not make it connect to itself
// without end.
func TestProxyDoesNotMeetItself(t *testing.T) {
	sabotage := func(s *stage) {
		for _, family := range []string{"-4", "-6"} {
			for _, rule := range []string{"100", "101"} {
				s.pod.Run("ip", family, "rule", "del", "priority", rule)
			}
		}
	}
	t.Run("without guard_lo it does", func(t *testing.T) {
		s := newStage(t, testnet.Routed)
		s.apps()
		p, x := s.captured(Mode{New: true})
		if err := p.drop(pinGuardLo); err != nil {
			t.Fatal(err)
		}
		sabotage(s)
		c, err := s.pod.Dial(netip.AddrPortFrom(s.outside.V4, 8080))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		eventually(t, "the proxy connects to itself", func() bool { return x.count("out") > 10 })
		x.kill()
	})
	s := newStage(t, testnet.Routed)
	s.apps()
	p, x := s.captured(Mode{New: true})
	sabotage(s)
	eachFamily(t, func(t *testing.T, addr func(*testnet.Host) netip.Addr) {
		outs, drops := x.count("out"), stat(t, p, "loop_drop")
		c, err := s.pod.Dial(netip.AddrPortFrom(addr(s.outside), 8080))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		eventually(t, "what the proxy sends is dropped", func() bool { return stat(t, p, "loop_drop") > drops })
		if n := x.count("out") - outs; n != 1 {
			t.Errorf("the proxy accepted %d connections, want the app's and no other", n)
		}
	})
	// The app's own traffic with itself goes on, and all of it once it is mended.
	if err := once(s.pod.Host, netip.AddrPortFrom(s.pod.V4, 8080)); err != nil {
		t.Error(err)
	}
	if mended, err := p.Mend(); err != nil || len(mended) != 4 {
		t.Errorf("mended %q, %v, want two rules of each family", mended, err)
	}
	alive(t, s.open(), "mended")
}

// TestMend: what a pod with NET_ADMIN takes away lets nothing out, and comes
// back.
func TestMend(t *testing.T) {
	for name, tt := range map[string]struct {
		sabotage [][]string
		mended   int
	}{
		"nothing":             {nil, 0},
		"the capturing rules": {[][]string{{"ip", "rule", "del", "priority", "102"}, {"ip", "-6", "rule", "del", "priority", "102"}}, 2},
		"the routes":          {[][]string{{"ip", "route", "flush", "table", "1500"}, {"ip", "-6", "route", "flush", "table", "1500"}}, 2},
		"all rules":           {[][]string{{"sh", "-c", "for p in 99 100 101 102; do ip rule del priority $p; ip -6 rule del priority $p; done"}}, 8},
		"the sysctl":          {[][]string{{"sh", "-c", "echo 0 >/proc/sys/net/ipv4/tcp_fwmark_accept"}}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStage(t, testnet.Routed)
			s.apps()
			p, _ := s.captured(Mode{New: true})
			for _, command := range tt.sabotage {
				s.pod.Run(command[0], command[1:]...)
			}
			if tt.mended > 1 {
				eachFamily(t, func(t *testing.T, addr func(*testnet.Host) netip.Addr) {
					refused(t, s.pod.Host, netip.AddrPortFrom(addr(s.outside), 8080), nil)
				})
			}
			mended, err := p.Mend()
			if err != nil || len(mended) != tt.mended {
				t.Errorf("mended %q, %v, want %d things", mended, err, tt.mended)
			}
			if again, err := p.Mend(); err != nil || len(again) != 0 {
				t.Errorf("mended again %q, %v", again, err)
			}
			alive(t, s.open(), "mended")
		})
	}
}

// TestDisable: what is not known is refused, not ignored.
func TestDisable(t *testing.T) {
	if _, err := Probe("tcs"); err == nil || !strings.Contains(err.Error(), "tcs") {
		t.Errorf("%v, want that it names what there is not", err)
	}
}

// TestToReset decides for each kind of connection.
func TestToReset(t *testing.T) {
	at := netip.MustParseAddrPort
	c := func(local, remote string, mark uint32) connection {
		return connection{local: at(local), remote: at(remote), mark: mark}
	}
	all := []connection{
		c("10.0.0.1:1000", "192.0.2.1:80", 0),                                        // direct
		c("10.0.0.1:1001", "192.0.2.1:80", MarkProxy),                                // of the proxy
		c("10.0.0.1:1002", "192.0.2.1:80", 0), c("192.0.2.1:80", "10.0.0.1:1002", 0), // captured
		c("10.0.0.1:1003", "10.0.0.1:80", 0), c("10.0.0.1:80", "10.0.0.1:1003", 0), // with itself
		c("127.0.0.1:1003", "127.0.0.1:80", 0), c("127.0.0.1:80", "127.0.0.1:1003", 0), // the same
		c("192.0.2.7:5000", "10.0.0.1:80", MarkLocal), c("10.0.0.1:80", "192.0.2.7:5000", MarkLocal), // inbound
	}
	ports := func(cs []connection) (out []uint16) {
		for _, c := range cs {
			out = append(out, c.local.Port())
		}
		return out
	}
	own := []netip.Addr{netip.MustParseAddr("10.0.0.1")}
	if got := ports(toReset(all, own, false)); len(got) != 1 || got[0] != 1000 {
		t.Errorf("a pod that joins: %v, want the direct one", got)
	}
	if got := ports(toReset(all, own, true)); len(got) != 2 || got[0] != 1002 || got[1] != 80 {
		t.Errorf("a pod that leaves: %v, want the app's ends of the captured ones", got)
	}
}
