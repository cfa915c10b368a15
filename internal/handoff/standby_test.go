package handoff

import (
	"context"
	"log/slog"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"
)

// A twin is a ztunnel of a pair.
type twin struct {
	*Client
	proxy *fakeProxy
	stop  func()
}

func startTwin(t *testing.T, path, pair, name string, standby bool) *twin {
	t.Helper()
	w := &twin{proxy: newFakeProxy(t)}
	w.Client = NewClient(ClientConfig{
		Path: path, Instance: name, Handler: w.proxy, Pair: pair, Standby: standby, Retry: 5 * time.Millisecond,
		Activate: func() {
			w.proxy.mu.Lock()
			defer w.proxy.mu.Unlock()
			w.proxy.order = append(w.proxy.order, "activate")
		},
		Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	})
	w.stop = run(t, w.Run)
	return w
}

// synced waits until the twin has its snapshot.
func (w *twin) synced(t *testing.T) {
	t.Helper()
	eventually(t, "the snapshot", func() bool { return slices.Contains(w.proxy.did(), "end") })
}

func TestStandbyIsActivatedWhenTheActiveOneDies(t *testing.T) {
	f, _ := testFiles(t)
	path := filepath.Join(t.TempDir(), "s")
	s := startServer(t, ServerConfig{Path: path, Snapshot: func() []Entry { return []Entry{{testPod, dup(t, f)}} }})
	a := startTwin(t, path, t.Name(), "a", false)
	a.synced(t)
	if got := a.proxy.did(); !slices.Equal(got, []string{"activate", "add " + testPod.UID, "end"}) {
		t.Errorf("the first one did %v", got)
	}
	b := startTwin(t, path, t.Name(), "b", true)
	b.synced(t)
	if n, _ := s.Connected(); n != 1 || s.Standbys() != 1 || b.Active() || !a.Active() {
		t.Errorf("%d active, %d stand by", n, s.Standbys())
	}

	other := pod("other")
	if err := s.Add(t.Context(), other, f); err != nil {
		t.Fatal(err)
	}
	for _, w := range []*twin{a, b} {
		if _, ok := w.proxy.entry("other"); !ok {
			t.Errorf("%s was not given the new pod", w.cfg.Instance)
		}
	}

	died := time.Now()
	a.stop()
	eventually(t, "the standby to be active", b.Active)
	t.Logf("active %v after the other's death", time.Since(died))
	if n, _ := s.Connected(); n != 1 {
		t.Errorf("%d active", n)
	}
	// The one that died comes back, and leaves the other alone.
	c := startTwin(t, path, t.Name(), "c", false)
	c.synced(t)
	if c.Active() || s.Standbys() != 1 {
		t.Errorf("the one that came back is active: %v, %d stand by", c.Active(), s.Standbys())
	}
	if err := s.Del(t.Context(), "other"); err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(b.proxy.did(), "del other") || !slices.Contains(c.proxy.did(), "del other") {
		t.Errorf("told: %v and %v", b.proxy.did(), c.proxy.did())
	}
	b.stop()
	eventually(t, "the one that came back to be active", c.Active)
	if n := count(b.proxy.did(), "activate") + count(c.proxy.did(), "activate"); n != 2 {
		t.Errorf("%d activations, want one each", n)
	}
}

func count(list []string, s string) (n int) {
	for _, v := range list {
		if v == s {
			n++
		}
	}
	return n
}

// With nobody to wait for, the one that stands by serves.
func TestLonelyStandbyIsActivated(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	startServer(t, ServerConfig{Path: path, ElectWait: 20 * time.Millisecond})
	b := startTwin(t, path, t.Name(), "b", true)
	eventually(t, "the standby to be active", b.Active)
}

// An agent that has started anew finds out who is active; nobody changes.
func TestRestartedAgentLeavesTheActiveOneActive(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	first := NewServer(ServerConfig{Path: path, Log: slog.New(slog.DiscardHandler)})
	stop := run(t, first.Run)
	a := startTwin(t, path, t.Name(), "a", false)
	eventually(t, "the first one", a.Active)
	b := startTwin(t, path, t.Name(), "b", true)
	b.synced(t)
	a.stop()
	eventually(t, "the standby to be active", b.Active)
	eventually(t, "its claim", b.hasClaim)        // what c sees of it while the agent is away
	c := startTwin(t, path, t.Name(), "c", false) // eager, and not active
	c.synced(t)
	stop()
	s := startServer(t, ServerConfig{Path: path, ElectWait: 300 * time.Millisecond})
	eventually(t, "both", func() bool { n, _ := s.Connected(); return n == 1 && s.Standbys() == 1 })
	if !b.Active() || c.Active() {
		t.Errorf("active: b %v, c %v", b.Active(), c.Active())
	}
}

// An agent that does not see the active one, which lives, does not make another
// of its pair active at once: whether that stands by, or has just been started
// to be the active one.
func TestActiveOneThatIsLate(t *testing.T) {
	dir := t.TempDir()
	startServer(t, ServerConfig{Path: filepath.Join(dir, "1")})
	a := startTwin(t, filepath.Join(dir, "1"), t.Name(), "a", false)
	eventually(t, "the claim of the active one", a.hasClaim)

	const electWait = 50 * time.Millisecond
	s := startServer(t, ServerConfig{Path: filepath.Join(dir, "2"), ElectWait: electWait})
	for _, standby := range []bool{true, false} {
		began := time.Now()
		b := startTwin(t, filepath.Join(dir, "2"), t.Name(), "b", standby)
		b.synced(t)
		eventually(t, "another active one", b.Active)
		if took := time.Since(began); took < patientFactor*electWait {
			t.Errorf("standby %v: active after %v, although another is that lives; want %v", standby, took, patientFactor*electWait)
		}
		b.stop()
		eventually(t, "its end", func() bool { n, _ := s.Connected(); return n == 0 })
	}
}

// Of two that are active one is alone: the other, when that has ended.
func TestAlone(t *testing.T) {
	dir := t.TempDir()
	startServer(t, ServerConfig{Path: filepath.Join(dir, "1")})
	startServer(t, ServerConfig{Path: filepath.Join(dir, "2"), ElectWait: time.Millisecond})
	alone := func(w *twin) bool {
		select {
		case <-w.Alone():
			return true
		default:
			return false
		}
	}
	a := startTwin(t, filepath.Join(dir, "1"), t.Name(), "a", false)
	eventually(t, "the first one to be alone", func() bool { return alone(a) })
	b := startTwin(t, filepath.Join(dir, "2"), t.Name(), "b", true)
	eventually(t, "two active ones", b.Active)
	tries := time.NewTimer(3 * claimPause)
	<-tries.C
	if alone(b) {
		t.Error("both are alone")
	}
	a.stop()
	eventually(t, "the other one to be alone", func() bool { return alone(b) })
}

// In an update the new pod's ztunnel serves beside the old one, and its pods
// go to it; the pair of the old one stays as it is.
func TestPairsDoNotMix(t *testing.T) {
	f, _ := testFiles(t)
	path := filepath.Join(t.TempDir(), "s")
	s := startServer(t, ServerConfig{Path: path, ElectWait: 10 * time.Millisecond})
	var all []*twin
	for _, pair := range []string{"old", "new"} {
		for _, standby := range []bool{false, true} {
			w := startTwin(t, path, t.Name()+pair, pair, standby)
			w.synced(t)
			all = append(all, w)
		}
	}
	var active []bool
	for _, w := range all {
		active = append(active, w.Active())
	}
	if !slices.Equal(active, []bool{true, false, true, false}) {
		t.Fatalf("active: %v", active)
	}
	if err := s.Add(t.Context(), testPod, f); err != nil {
		t.Fatal(err)
	}
	var given []bool
	for _, w := range all {
		_, ok := w.proxy.entry(testPod.UID)
		given = append(given, ok)
	}
	if !slices.Equal(given, []bool{false, true, true, true}) {
		t.Errorf("the pod was given to %v", given)
	}
	all[2].stop()
	eventually(t, "the new pair's other", all[3].Active)
	if all[1].Active() {
		t.Error("the old pair's other is active")
	}
}

// When a pair ends while another serves, as in a rollout, the one that stood by
// in it is not activated at once: it ends as well. If it does not, it serves when
// nobody else is left, or after a while.
func TestRolloutLeavesTheDyingStandbyAlone(t *testing.T) {
	for name, wait := range map[string]time.Duration{"nobody else is left": time.Hour, "it lives on": 10 * time.Millisecond} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "s")
			s := startServer(t, ServerConfig{Path: path, ElectWait: wait})
			a := startTwin(t, path, t.Name()+"old", "a", false)
			a.synced(t)
			b := startTwin(t, path, t.Name()+"old", "b", true)
			b.synced(t)
			fresh := startTwin(t, path, t.Name()+"new", "fresh", false)
			eventually(t, "a new one with all pods", func() bool { return hasAll(s, "fresh") })
			left := time.Now()
			a.stop()
			eventually(t, "the end of the old one", func() bool { n, _ := s.Connected(); return n+s.Standbys() == 2 })
			if n, _ := s.Connected(); n != 1 && time.Since(left) < patientFactor*wait {
				t.Fatalf("%d are active, want only the new one", n)
			}
			if wait == time.Hour {
				fresh.stop()
			}
			eventually(t, "the one that stood by to be active", b.Active)
			if took := time.Since(left); wait != time.Hour && took < patientFactor*wait {
				t.Errorf("active after %v, want %v", took, patientFactor*wait)
			}
		})
	}
}

// hasAll reports whether a server knows that a ztunnel has all pods.
func hasAll(s *Server, instance string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.ContainsFunc(s.proxies, func(p *proxy) bool { return p.instance == instance && p.synced })
}

func TestInherit(t *testing.T) {
	active := func(instance, pair string) *proxy {
		return &proxy{instance: instance, pair: pair, active: true, synced: true}
	}
	fresh := func(instance, pair string) *proxy { return &proxy{instance: instance, pair: pair, active: true} }
	standby := func(instance, pair string) *proxy { return &proxy{instance: instance, pair: pair, synced: true} }
	late := func(instance, pair string) *proxy {
		return &proxy{instance: instance, pair: pair, synced: true, late: true}
	}
	for name, c := range map[string]struct {
		left       []*proxy // after an active one of the pair old
		heir, late string
	}{
		"the active one crashes":    {left: []*proxy{standby("b", "old")}, heir: "b"},
		"of several the newest":     {left: []*proxy{standby("b", "old"), standby("c", "old")}, heir: "c"},
		"nobody":                    {},
		"another is active already": {left: []*proxy{active("b", "old"), standby("c", "old")}},
		"a rollout":                 {left: []*proxy{standby("b", "old"), active("a2", "new"), standby("b2", "new")}, late: "b"},
		"a rollout, the old one is back meanwhile":    {left: []*proxy{active("a2", "new"), standby("b2", "new"), standby("b", "old")}, late: "b"},
		"the new pod has not all pods yet":            {left: []*proxy{standby("b", "old"), fresh("a2", "new"), standby("b2", "new")}, heir: "b"},
		"the new pod has no active one yet":           {left: []*proxy{standby("b", "old"), standby("b2", "new")}, heir: "b"},
		"a release without pairs serves":              {left: []*proxy{active("z", ""), standby("b", "old")}, late: "b"},
		"it was the last of its pair, another serves": {left: []*proxy{active("a2", "new"), standby("b2", "new")}},
		"both of the new pod have ended":              {left: []*proxy{late("b2", "new")}, heir: "b2"},
		"its own before others":                       {left: []*proxy{standby("b", "old"), late("b2", "new")}, heir: "b"},
		"one whose own active one may come yet":       {left: []*proxy{standby("b2", "new")}},
		"late once, and its own is back":              {left: []*proxy{fresh("a2", "new"), late("b2", "new")}},
		"nobody else has all pods":                    {left: []*proxy{late("b2", "new"), fresh("a3", "third")}, heir: "b2"},
	} {
		t.Run(name, func(t *testing.T) {
			heir, late := inherit(c.left, "old")
			for _, w := range []struct {
				what string
				got  *proxy
				want string
			}{{"the heir", heir, c.heir}, {"the late one", late, c.late}} {
				got := ""
				if w.got != nil {
					got = w.got.instance
				}
				if got != w.want {
					t.Errorf("%s is %q, want %q", w.what, got, w.want)
				}
			}
		})
	}
}

// An active ztunnel is asked whether it answers if another could be in its
// place, of whatever pair.
func TestHasStandby(t *testing.T) {
	p := &proxy{pair: "new", active: true}
	old := &proxy{pair: "old"}
	s := NewServer(ServerConfig{})
	s.proxies = []*proxy{p, old}
	if s.hasStandby(p) {
		t.Error("one that waits for its own")
	}
	old.late = true
	if !s.hasStandby(p) || s.hasStandby(old) {
		t.Error("none, although one is late")
	}
	s.proxies = append(s.proxies, &proxy{pair: "old", active: true})
	if s.hasStandby(p) {
		t.Error("one that has its own again")
	}
}

// An agent of a release before pairs sends no activate, and says so: then the
// one that does not stand by is active, or the node would have none.
func TestAgentThatKnowsNoPairs(t *testing.T) {
	for standby, want := range map[bool]bool{false: true, true: false} {
		c := NewClient(ClientConfig{Pair: "z", Standby: standby, Handler: newFakeProxy(t)})
		kept := map[string]bool{}
		if _, err := c.handle(context.Background(), message{Kind: snapshotEnd}, Files{}, kept); err != nil {
			t.Fatal(err)
		}
		if c.Active() != want {
			t.Errorf("standby %v: active %v", standby, c.Active())
		}
		c = NewClient(ClientConfig{Pair: "z", Standby: standby, Handler: newFakeProxy(t)})
		if _, err := c.handle(context.Background(), message{Kind: snapshotEnd, Pairs: true}, Files{}, kept); err != nil || c.Active() {
			t.Errorf("standby %v: active without being told, %v", standby, err)
		}
	}
}

// Deaths and returns in quick succession leave one active, and never none.
func TestPairUnderFire(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	s := startServer(t, ServerConfig{Path: path, ElectWait: 10 * time.Millisecond})
	twins := []*twin{startTwin(t, path, t.Name(), "a", false), startTwin(t, path, t.Name(), "b", true)}
	for i := range 40 {
		for _, w := range twins {
			w.synced(t)
		}
		var wg sync.WaitGroup
		dead := 0
		for j, w := range twins {
			if i%3 == 2 || w.Active() { // both, now and then
				wg.Go(w.stop)
				dead |= 1 << j
			}
		}
		wg.Wait()
		for j, w := range twins {
			if dead&(1<<j) != 0 {
				twins[j] = startTwin(t, path, t.Name(), w.cfg.Instance, j == 1)
			}
		}
		eventually(t, "one active and one that stands by", func() bool { n, _ := s.Connected(); return n == 1 && s.Standbys() == 1 })
		eventually(t, "the word of the agent", func() bool { return twins[0].Active() != twins[1].Active() })
	}
}

// An active ztunnel that hangs is as good as dead: the one that stands by
// takes over.
func TestStandbyTakesOverFromOneThatHangs(t *testing.T) {
	f, _ := testFiles(t)
	path := filepath.Join(t.TempDir(), "s")
	s := startServer(t, ServerConfig{Path: path, AckTimeout: time.Second, WatchEvery: 10 * time.Millisecond})
	a, b := startTwin(t, path, t.Name(), "a", false), startTwin(t, path, t.Name(), "b", true)
	a.synced(t)
	b.synced(t)
	if !a.Active() || b.Active() {
		t.Fatalf("active: a %v, b %v", a.Active(), b.Active())
	}
	a.proxy.mu.Lock() // it hangs in what it is asked next
	done := make(chan error, 1)
	go func() { done <- s.Add(context.WithoutCancel(t.Context()), testPod, f) }()
	eventually(t, "the other one to be active", b.Active)
	a.proxy.mu.Unlock()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, ok := b.proxy.entry(testPod.UID); !ok {
		t.Error("the pod is not with the one that is active")
	}
}

// Agent and active ztunnel are gone at once: the one that stands by serves
// what it has. While the active one lives, it does not.
func TestStandbyServesWithoutAgent(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	server := NewServer(ServerConfig{Path: path, Log: slog.New(slog.DiscardHandler)})
	stop := run(t, server.Run)
	pair := t.Name() // abstract sockets are shared by all tests
	a := startTwin(t, path, pair, "a", false)
	a.synced(t)
	eventually(t, "the claim", a.hasClaim)
	b := startTwin(t, path, pair, "b", true)
	b.synced(t)
	stop()
	eventually(t, "the agent to be missed", func() bool { return !b.Connected() })
	for range 20 {
		if free := b.succeed(time.Now().Add(-time.Hour), time.Now()); !free.IsZero() {
			t.Errorf("the claim is free since %v", free)
		}
	}
	if b.Active() {
		t.Fatal("active beside the active one")
	}
	a.stop()
	eventually(t, "the standby to be active", b.Active)
	eventually(t, "its claim", b.hasClaim)

	fresh := startTwin(t, path, pair, "fresh", true)
	fresh.succeed(time.Now().Add(-time.Hour), time.Now())
	b.stop()
	if fresh.succeed(time.Now().Add(-time.Hour), time.Now()); fresh.Active() {
		t.Error("active without any pod")
	}
}

// When a pod ends its agent and its active ztunnel may be gone a moment before
// the one that stands by, which does not begin to serve for that.
func TestStandbyWaitsForItsOwnEnd(t *testing.T) {
	c := NewClient(ClientConfig{Pair: t.Name(), Standby: true, Handler: newFakeProxy(t), Log: slog.New(slog.DiscardHandler)})
	defer func() {
		if c.hasClaim() {
			c.claimed.Close()
		}
	}()
	close(c.synced)
	start := time.Now()
	if free := c.succeed(time.Time{}, start); !free.Equal(start) || c.Active() {
		t.Errorf("at first: free since %v, want %v; active %v", free, start, c.Active())
	}
	if free := c.succeed(start, start.Add(claimFree-1)); !free.Equal(start) || c.Active() {
		t.Errorf("before the time is over: free since %v, want %v; active %v", free, start, c.Active())
	}
	if c.succeed(start, start.Add(claimFree)); !c.Active() || !c.hasClaim() {
		t.Errorf("then: active %v, claim %v", c.Active(), c.hasClaim())
	}
}
