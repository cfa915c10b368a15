package loop

import (
	"context"
	"errors"
	"net"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/weft-mesh/weft/hbone"
)

// burden keeps a loop from ever sleeping until stop is called.
func burden(l *eventLoop) (stop func()) {
	var over atomic.Bool
	var again func()
	again = func() {
		if !over.Load() {
			runtime.Gosched() // the others want to get on
			l.post(work{kind: workCall, call: again})
		}
	}
	again()
	return func() { over.Store(true) }
}

func withLoops(n int) option {
	return func(w *world, _ *ServerConfig, _ *PoolConfig) { w.client = New(Config{Loops: n}) }
}

// tunnelLoops returns the loops of the tunnels to the one peer, the oldest
// tunnel's first.
func (w *world) tunnelLoops() []*eventLoop {
	w.pool.mu.Lock()
	defer w.pool.mu.Unlock()
	var ls []*eventLoop
	for _, e := range w.pool.entries {
		for _, t := range e.tunnels {
			ls = append(ls, t.loop)
		}
	}
	return ls
}

// converse makes the n-th connection, which carries something, and returns
// the loop that it is on.
func (w *world) converse(n int) *eventLoop {
	w.t.Helper()
	roundTrip(w.t, w.dial(), "hello")
	return w.theOut(n).loop.Load()
}

// TestPeerGetsAnotherTunnel: one loop that does not keep up is no bound for the
// connections to one peer, and nobody waits for the tunnel on another.
func TestPeerGetsAnotherTunnel(t *testing.T) {
	w := newWorld(t, echo, withLoops(3))
	first := w.converse(0)
	if again := w.converse(1); again != first || w.dials.Load() != 1 {
		t.Fatalf("%d tunnels while the loop keeps up", w.dials.Load())
	}
	stop := burden(first)
	t.Cleanup(stop)
	eventually(t, "the loop is saturated", first.saturated)

	if l := w.converse(2); l != first {
		t.Error("a connection waited for another tunnel though there was one")
	}
	eventually(t, "the second tunnel", func() bool { return len(w.tunnelLoops()) == 2 })
	second := w.tunnelLoops()[1]
	if second == first {
		t.Fatal("the second tunnel is on the loop that does not keep up")
	}
	for n := 3; n < 6; n++ {
		if l := w.converse(n); l != second {
			t.Errorf("connection %d is on the loop that does not keep up", n)
		}
	}
	if n := w.dials.Load(); n != 2 {
		t.Errorf("%d tunnels, want 2: the second loop keeps up", n)
	}

	stop2 := burden(second)
	t.Cleanup(stop2)
	eventually(t, "the second loop is saturated", second.saturated)
	w.converse(6) // on one of two saturated loops
	eventually(t, "the third tunnel", func() bool { return len(w.tunnelLoops()) == 3 })
	third := w.tunnelLoops()[2]
	t.Cleanup(burden(third))
	eventually(t, "the third loop is saturated", third.saturated)
	for n := 7; n < 20; n++ {
		w.converse(n)
	}
	if n := w.dials.Load(); n != 3 {
		t.Errorf("%d tunnels on 3 loops", n)
	}
	loads := make(map[*eventLoop]int)
	for n := range 20 {
		loads[w.theOut(n).loop.Load()]++
	}
	// 3 of the first 7 were on the first loop, or 4 if the seventh was.
	if lo, hi := min(loads[first], loads[second], loads[third]), max(loads[first], loads[second], loads[third]); hi-lo > 1 {
		t.Errorf("the saturated loops carry %d to %d connections: it is not the one with the fewest that gets the next", lo, hi)
	}

	stop()
	eventually(t, "the first loop keeps up again", func() bool { return !first.saturated() })
	if l := w.converse(20); l != first {
		t.Error("the first tunnel is not the first choice any more")
	}
}

// TestOneLoopOneTunnel: without another loop there is nothing to gain.
func TestOneLoopOneTunnel(t *testing.T) {
	w := newWorld(t, echo, withLoops(1))
	l := w.converse(0)
	t.Cleanup(burden(l))
	eventually(t, "the loop is saturated", l.saturated)
	for n := range 5 {
		w.converse(n + 1)
	}
	if n := w.dials.Load(); n != 1 {
		t.Errorf("%d tunnels on one loop", n)
	}
}

// TestPeerWantsNoOtherTunnel: who has one that works is asked once for another,
// and no connection suffers.
func TestPeerWantsNoOtherTunnel(t *testing.T) {
	var tries atomic.Int32
	w := newWorld(t, echo, withLoops(2), func(w *world, _ *ServerConfig, pc *PoolConfig) {
		dial := pc.Dial
		pc.Dial = func(ctx context.Context, tg hbone.Target) (*net.TCPConn, error) {
			if tries.Add(1) > 1 {
				return nil, errors.New("refused")
			}
			return dial(ctx, tg)
		}
	})
	l := w.converse(0)
	t.Cleanup(burden(l))
	eventually(t, "the loop is saturated", l.saturated)
	w.converse(1)
	eventually(t, "the second dial", func() bool {
		w.pool.mu.Lock()
		defer w.pool.mu.Unlock()
		for _, e := range w.pool.entries {
			return e.narrow
		}
		return false
	})
	for n := range 5 {
		if at := w.converse(n + 2); at != l {
			t.Error("a connection is not on the only tunnel")
		}
	}
	if n := tries.Load(); n != 2 {
		t.Errorf("%d dials, want 2", n)
	}
}

// TestTunnelsAvoidSaturatedLoops: a server gives what is new to a loop that
// keeps up, if there is one.
func TestTunnelsAvoidSaturatedLoops(t *testing.T) {
	e := New(Config{Loops: 3})
	e.loops[1].busy.Store(true)
	var got []int
	for range 6 {
		got = append(got, slices.Index(e.loops, e.pick()))
	}
	if want := []int{0, 2, 2, 0, 2, 2}; !slices.Equal(got, want) {
		t.Errorf("tunnels went to the loops %v, want %v", got, want)
	}
	for _, l := range e.loops {
		l.busy.Store(true)
	}
	seen := make(map[*eventLoop]bool)
	for range 3 {
		seen[e.pick()] = true
	}
	if len(seen) != 3 {
		t.Errorf("with all loops saturated %d of 3 get tunnels", len(seen))
	}
	e.loops[2].sleeping.Store(true)
	if e.pick() != e.loops[2] {
		t.Error("a loop that sleeps counts as saturated")
	}
}

func TestWhenALoopIsSaturated(t *testing.T) {
	now := time.Unix(1000, 0)
	for _, c := range []struct {
		name  string
		batch int // batches between two sleeps
		sleep int // sleeps
		want  bool
	}{
		{"never sleeps", tired, 0, true},
		{"almost there", tired - 1, 0, false},
		{"sleeps one time in ten", 9, 2 * tired, true},
		{"sleeps one time in eight", 7, 2 * tired, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := &eventLoop{}
			batches := func() {
				for range c.batch {
					l.tell(now)
					l.hurry()
				}
			}
			batches()
			for range c.sleep {
				l.rest()
				batches()
			}
			if l.saturated() != c.want {
				t.Errorf("saturated is %v, with a score of %d", l.saturated(), l.sleepless)
			}
			for range tired / 2 / restful {
				l.rest()
			}
			if l.saturated() {
				t.Error("saturated after a long rest")
			}
		})
	}
	l := &eventLoop{}
	l.tell(now)
	for range tired {
		l.hurry()
	}
	l.rest()
	l.tell(now.Add(forgetful - 1))
	if !l.saturated() {
		t.Error("a moment later it is not saturated any more")
	}
	l.tell(now.Add(2 * forgetful))
	if l.saturated() {
		t.Error("a second later it is still saturated")
	}
}

func TestLoopsFollowProcessors(t *testing.T) {
	for _, c := range []struct{ granted, machine, want int }{
		{1, 1, 1}, {2, 2, 1}, {4, 4, 1}, {8, 8, 2}, {64, 64, 16}, // no limit
		{1, 8, 1}, {2, 8, 1}, {4, 8, 3}, {8, 64, 7},
		{8, 4, 1}, // GOMAXPROCS asks for more than there is
	} {
		if got := loopsFor(c.granted, c.machine); got != c.want {
			t.Errorf("%d loops for %d of %d processors, want %d", got, c.granted, c.machine, c.want)
		}
	}
}
