package balance

import (
	"testing"
	"time"

	"github.com/weft-mesh/weft/mesh"
)

// fail makes requests at e that go like that.
func fail(e *Endpoint, now time.Time, outs ...Outcome) {
	for _, o := range outs {
		e.Begin()
		e.End(o, now)
	}
}

func TestWhatEjects(t *testing.T) {
	const s, x, g, l, u = Success, ServerError, GatewayError, LocalFailure, Unknown
	for _, tc := range []struct {
		name string
		o    mesh.Outlier
		outs []Outcome
		want bool
	}{
		{"5xx in a row", mesh.Outlier{Consecutive5xx: 3}, []Outcome{x, x, x}, true},
		{"not so many", mesh.Outlier{Consecutive5xx: 3}, []Outcome{x, x}, false},
		{"a success between", mesh.Outlier{Consecutive5xx: 3}, []Outcome{x, x, s, x, x}, false},
		{"what says nothing is not between", mesh.Outlier{Consecutive5xx: 3}, []Outcome{x, x, u, x}, true},
		{"gateway errors are 5xx", mesh.Outlier{Consecutive5xx: 3}, []Outcome{x, g, x}, true},
		{"failures to connect are 5xx", mesh.Outlier{Consecutive5xx: 3}, []Outcome{l, l, l}, true},
		{"failures to connect are gateway errors", mesh.Outlier{ConsecutiveGateway: 3}, []Outcome{l, g, l}, true},
		{"0 is never", mesh.Outlier{}, []Outcome{x, g, l, x, g, l, x, x, x, x, x, x}, false},
		{"gateway errors in a row", mesh.Outlier{ConsecutiveGateway: 2}, []Outcome{g, g}, true},
		{"another 5xx between gateway errors", mesh.Outlier{ConsecutiveGateway: 2}, []Outcome{g, x, g}, false},
		{"local failures apart", mesh.Outlier{Consecutive5xx: 2, SplitLocal: true, ConsecutiveLocal: 4}, []Outcome{l, l, l}, false},
		{"enough local failures apart", mesh.Outlier{Consecutive5xx: 2, SplitLocal: true, ConsecutiveLocal: 4}, []Outcome{l, l, l, l}, true},
		{"an answer ends local failures, whatever it is", mesh.Outlier{Consecutive5xx: 9, SplitLocal: true, ConsecutiveLocal: 2}, []Outcome{l, x, l}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tc.o.MaxEjected, tc.o.BaseEjection = 100, mesh.Duration(time.Minute)
			grp := group(&mesh.TrafficPolicy{Outlier: &tc.o}, pods(2))
			e := grp.Endpoints()[0]
			fail(e, start, tc.outs...)
			if e.Ejected() != tc.want {
				t.Errorf("ejected is %v, want %v", e.Ejected(), tc.want)
			}
			if n := picks(t, grp, 200, start, nil)[e.Workload.UID]; (n == 0) != tc.want {
				t.Errorf("it was chosen %d times of 200", n)
			}
		})
	}
}

func TestEjectionsGetLonger(t *testing.T) {
	p := &mesh.TrafficPolicy{Outlier: &mesh.Outlier{Consecutive5xx: 1, MaxEjected: 100,
		BaseEjection: mesh.Duration(30 * time.Second), Interval: mesh.Duration(10 * time.Second)}}
	g := group(p, pods(2))
	e := g.Endpoints()[0]
	now := start
	for _, want := range []time.Duration{30 * time.Second, time.Minute, 90 * time.Second} {
		fail(e, now, ServerError)
		g.Pick(Request{}, now.Add(want-time.Nanosecond))
		if !e.Ejected() {
			t.Fatalf("back before %v", want)
		}
		now = now.Add(want)
		g.Pick(Request{}, now)
		if e.Ejected() {
			t.Fatalf("not back after %v", want)
		}
	}
	// Each interval of good conduct takes one off.
	for range 3 {
		now = now.Add(10 * time.Second)
		g.Pick(Request{}, now)
	}
	fail(e, now, ServerError)
	g.Pick(Request{}, now.Add(30*time.Second))
	if e.Ejected() {
		t.Error("old ejections still count after three good intervals")
	}
}

func TestNotAllAreEjected(t *testing.T) {
	for _, tc := range []struct {
		name        string
		pods        int
		max, health uint32
		want        int // chosen from, when all have failed
	}{
		{"one may be, whatever the share", 5, 10, 0, 4},
		{"half", 4, 50, 0, 2},
		{"a share is not exceeded", 3, 50, 0, 2},
		{"all", 4, 100, 0, 0},
		{"too few are healthy: all count again", 4, 100, 30, 4},
	} {
		t.Run(tc.name, func(t *testing.T) {
			g := group(&mesh.TrafficPolicy{Outlier: &mesh.Outlier{Consecutive5xx: 1, MaxEjected: tc.max, MinHealthPercent: tc.health,
				BaseEjection: mesh.Duration(time.Minute)}}, pods(tc.pods))
			for _, e := range g.Endpoints() {
				fail(e, start, ServerError)
			}
			if ready, _ := g.Ready(); ready != tc.want {
				t.Errorf("%d are ready, want %d", ready, tc.want)
			}
			if _, ok := g.Pick(Request{}, start); ok != (tc.want > 0) {
				t.Errorf("Pick says %v", ok)
			}
		})
	}
}

func TestPolicyWithoutOutliersForgives(t *testing.T) {
	p := &mesh.TrafficPolicy{Outlier: &mesh.Outlier{Consecutive5xx: 1, MaxEjected: 100, BaseEjection: mesh.Duration(time.Hour)}}
	ws := pods(1)
	g := group(p, ws)
	fail(g.Endpoints()[0], start, ServerError)
	if _, ok := g.Pick(Request{}, start); ok {
		t.Fatal("an ejected endpoint was chosen")
	}
	g.Update(&mesh.Service{}, nil, candidates(ws), start)
	if _, ok := g.Pick(Request{}, start); !ok {
		t.Error("still ejected, and no policy asks for it")
	}
}

func TestBreaker(t *testing.T) {
	g := group(&mesh.TrafficPolicy{Connections: mesh.Connections{Max: 1, MaxPending: 2, MaxRequests: 3, MaxRetries: 4}}, pods(1))
	for kind, limit := range map[Kind]int{Connections: 1, Pending: 2, Requests: 3, Retries: 4} {
		for i := range limit {
			if !g.Breaker.Take(kind) {
				t.Fatalf("kind %d: number %d was refused", kind, i+1)
			}
		}
		if g.Breaker.Take(kind) {
			t.Errorf("kind %d: more than %d", kind, limit)
		}
		if g.Breaker.Used(kind) != limit || g.Breaker.Overflows(kind) != 1 {
			t.Errorf("kind %d: %d used, %d overflows; want %d and 1", kind, g.Breaker.Used(kind), g.Breaker.Overflows(kind), limit)
		}
		g.Breaker.Release(kind)
		if !g.Breaker.Take(kind) {
			t.Errorf("kind %d: refused after one was released", kind)
		}
	}
	var free Breaker
	for range 1000 {
		if !free.Take(Requests) {
			t.Fatal("a breaker without limits refused")
		}
	}
}

func TestRetryBudget(t *testing.T) {
	g := group(&mesh.TrafficPolicy{RetryBudget: &mesh.RetryBudget{Percent: 20, Min: 2}}, pods(1))
	taken := func() (n int) {
		for g.Breaker.Take(Retries) {
			n++
		}
		for range n {
			g.Breaker.Release(Retries)
		}
		return n
	}
	if n := taken(); n != 2 {
		t.Errorf("%d retries of nothing, want the minimum of 2", n)
	}
	for range 50 {
		g.Breaker.Take(Requests)
	}
	if n := taken(); n != 10 {
		t.Errorf("%d retries of 50 requests, want a fifth", n)
	}
	g = group(&mesh.TrafficPolicy{RetryBudget: &mesh.RetryBudget{}}, pods(1))
	if n := taken(); n != 0 {
		t.Errorf("%d retries where none are allowed", n)
	}
}
