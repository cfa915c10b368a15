package balance

import (
	"fmt"
	"math"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/weft-mesh/weft/mesh"
)

var start = time.Unix(1_000_000, 0)

// chance returns a source of chance that is the same in each run.
func chance() func() uint64 { return rand.New(rand.NewPCG(1, 2)).Uint64 }

// pods makes n healthy workloads in one place.
func pods(n int) []*mesh.Workload {
	ws := make([]*mesh.Workload, n)
	for i := range ws {
		ws[i] = &mesh.Workload{UID: mesh.UID(fmt.Sprintf("pod-%d", i)), Healthy: true}
	}
	return ws
}

func candidates(ws []*mesh.Workload) []Candidate {
	cs := make([]Candidate, len(ws))
	for i, w := range ws {
		cs[i] = Candidate{w, 80}
	}
	return cs
}

// group makes a Group of ws that asks from eu/a/1.
func group(p *mesh.TrafficPolicy, ws []*mesh.Workload) *Group {
	g := NewGroup(mesh.Workload{Locality: mesh.Locality{Region: "eu", Zone: "a", Subzone: "1"}, Labels: map[string]string{"v": "1", "w": "1"}}, chance())
	g.Update(&mesh.Service{}, p, candidates(ws), start)
	return g
}

// picks counts who is chosen in n requests. hash, if there is one, gives the
// hash of each.
func picks(t *testing.T, g *Group, n int, now time.Time, hash func(int) uint64) map[mesh.UID]int {
	t.Helper()
	got := map[mesh.UID]int{}
	for i := range n {
		r := Request{}
		if hash != nil {
			r.Hash, r.Hashed = hash(i), true
		}
		e, ok := g.Pick(r, now)
		if !ok {
			t.Fatalf("request %d: nobody was chosen", i)
		}
		got[e.Workload.UID]++
	}
	return got
}

// fits fails the test if counts are not as likely as the weights say: by
// chi-square, at p = 0.001 for the degrees of freedom.
func fits(t *testing.T, got map[mesh.UID]int, weights map[mesh.UID]float64) {
	t.Helper()
	var n, sum float64
	for _, c := range got {
		n += float64(c)
	}
	for _, w := range weights {
		sum += w
	}
	chi := 0.0
	for uid, w := range weights {
		want := n * w / sum
		chi += (float64(got[uid]) - want) * (float64(got[uid]) - want) / want
	}
	for uid := range got {
		if weights[uid] == 0 {
			t.Errorf("%s was chosen %d times, and has no share", uid, got[uid])
		}
	}
	// Wilson and Hilferty's approximation of the quantile.
	k := float64(len(weights) - 1)
	limit := k * math.Pow(1-2/(9*k)+3.09*math.Sqrt(2/(9*k)), 3)
	if chi > limit {
		t.Errorf("chi-square is %.1f, above %.1f: got %v for weights %v", chi, limit, got, weights)
	}
}

func TestAlgorithmsGiveEachItsShare(t *testing.T) {
	words := func(i int) uint64 { return Hash(fmt.Sprint("key-", i)) }
	for _, alg := range []mesh.Algorithm{mesh.LeastRequest, mesh.Random, mesh.RoundRobin, mesh.Maglev} {
		for _, tc := range []struct {
			name    string
			weights []uint32
		}{
			{"equal", []uint32{1, 1, 1, 1, 1}},
			{"by capacity", []uint32{1, 2, 3, 10}},
		} {
			t.Run(fmt.Sprintf("%q %s", alg, tc.name), func(t *testing.T) {
				ws, want := pods(len(tc.weights)), map[mesh.UID]float64{}
				for i, w := range ws {
					w.Capacity = &tc.weights[i]
					want[w.UID] = float64(tc.weights[i])
				}
				g := group(&mesh.TrafficPolicy{Balance: mesh.Balance{Algorithm: alg}}, ws)
				fits(t, picks(t, g, 20000, start, words), want)
			})
		}
	}
}

// The arcs of a ring differ by nature; the share of an endpoint with 2000
// points is within some percent of its part.
func TestRingHashIsRoughlyFair(t *testing.T) {
	g := group(&mesh.TrafficPolicy{Balance: mesh.Balance{Algorithm: mesh.RingHash, RingSize: 10000}}, pods(5))
	for uid, n := range picks(t, g, 50000, start, func(i int) uint64 { return Hash(fmt.Sprint(i)) }) {
		if n < 9000 || n > 11000 {
			t.Errorf("%s has %d of 50000 keys, want about a fifth", uid, n)
		}
	}
}

func TestRoundRobinIsStrict(t *testing.T) {
	g := group(&mesh.TrafficPolicy{Balance: mesh.Balance{Algorithm: mesh.RoundRobin}}, pods(3))
	var seen []mesh.UID
	for i := range 30 {
		e, _ := g.Pick(Request{}, start)
		seen = append(seen, e.Workload.UID)
		if i >= 3 && seen[i] != seen[i-3] {
			t.Fatalf("turn %d: %v", i, seen)
		}
	}
	if seen[0] == seen[1] || seen[1] == seen[2] || seen[0] == seen[2] {
		t.Fatalf("not everybody has his turn: %v", seen[:3])
	}
}

func TestRotationByWeightIsEvenlySpaced(t *testing.T) {
	ws := pods(2)
	three := uint32(3)
	ws[0].Capacity = &three
	g := group(&mesh.TrafficPolicy{Balance: mesh.Balance{Algorithm: mesh.RoundRobin}}, ws)
	last := -4
	for i := range 40 {
		if e, _ := g.Pick(Request{}, start); e.Workload == ws[1] {
			if last >= 0 && i-last != 4 {
				t.Fatalf("pod-1 had turn %d and then %d, want every fourth", last, i)
			}
			last = i
		}
	}
	if last < 0 {
		t.Fatal("pod-1 never had a turn")
	}
}

func TestLeastRequestTakesTheLessBusy(t *testing.T) {
	g := group(nil, pods(2))
	busy := g.Endpoints()[0]
	busy.Begin()
	if got := picks(t, g, 1000, start, nil); got[busy.Workload.UID] != 0 {
		t.Errorf("the busy one of two was chosen %d times", got[busy.Workload.UID])
	}
	busy.End(Success, start)
	if got := picks(t, g, 1000, start, nil); got[busy.Workload.UID] < 400 {
		t.Errorf("the one that is busy no more was chosen %d times of 1000", got[busy.Workload.UID])
	}
}

func TestConsistentHashMovesFewKeys(t *testing.T) {
	const keys = 20000
	for _, alg := range []mesh.Algorithm{mesh.RingHash, mesh.Maglev} {
		t.Run(string(alg), func(t *testing.T) {
			p := &mesh.TrafficPolicy{
				Balance: mesh.Balance{Algorithm: alg, RingSize: 20000},
				Outlier: &mesh.Outlier{Consecutive5xx: 1, BaseEjection: mesh.Duration(time.Minute), MaxEjected: 100},
			}
			where := func(g *Group) []mesh.UID {
				at := make([]mesh.UID, keys)
				for i := range at {
					e, ok := g.Pick(Request{Hash: Hash(fmt.Sprint(i)), Hashed: true}, start)
					if !ok {
						t.Fatal("nobody was chosen")
					}
					at[i] = e.Workload.UID
				}
				return at
			}
			ws := pods(10)
			g := group(p, ws)
			before := where(g)

			other := group(p, []*mesh.Workload{ws[3], ws[9], ws[0], ws[1], ws[2], ws[4], ws[8], ws[7], ws[6], ws[5]})
			for i, uid := range where(other) {
				if before[i] != uid {
					t.Fatalf("key %d is at %s, and in a proxy that learned in another order at %s", i, before[i], uid)
				}
			}

			gone := g.Endpoints()[4]
			gone.Begin()
			gone.End(ServerError, start)
			for i, uid := range where(g) {
				switch {
				case uid == gone.Workload.UID:
					t.Fatal("an ejected endpoint was chosen")
				case before[i] != gone.Workload.UID && uid != before[i]:
					t.Fatalf("key %d moved from %s to %s, and neither was ejected", i, before[i], uid)
				}
			}

			g.Update(&mesh.Service{}, p, candidates(append(ws[:4:4], ws[5:]...)), start)
			moved := 0
			for i, uid := range where(g) {
				if before[i] != gone.Workload.UID && uid != before[i] {
					moved++
				}
			}
			// A ring of a given size gives those who stay some points more.
			if limit := map[mesh.Algorithm]int{mesh.RingHash: 10, mesh.Maglev: 3}[alg]; moved > keys*limit/100 {
				t.Errorf("%d of %d keys moved although their endpoint stayed", moved, keys)
			}
		})
	}
}

func TestOddTableSizesAreSafe(t *testing.T) {
	for _, size := range []uint64{1, 2, 4, 100, 65536} {
		g := group(&mesh.TrafficPolicy{Balance: mesh.Balance{Algorithm: mesh.Maglev, TableSize: size}}, pods(5))
		if got := picks(t, g, 1000, start, func(i int) uint64 { return mix(uint64(i)) }); len(got) != 5 {
			t.Errorf("table of %d: %d of 5 endpoints were chosen", size, len(got))
		}
	}
}

func TestUpdateFilters(t *testing.T) {
	ws := pods(5)
	ws[1].Healthy = false
	zero := uint32(0)
	ws[2].Capacity = &zero
	ws[3].Labels = map[string]string{"version": "v2"}
	p := &mesh.TrafficPolicy{Subset: "v2", Labels: map[string]string{"version": "v2"}}
	if got := picks(t, group(p, ws), 100, start, nil); got["pod-3"] != 100 {
		t.Errorf("the subset v2 got %v, want pod-3 only", got)
	}
	if ready, of := group(nil, ws).Ready(); ready != 3 || of != 3 {
		t.Errorf("%d of %d are ready, want the 3 that are healthy and have a capacity", ready, of)
	}
	for name, p := range map[string]*mesh.TrafficPolicy{
		"broken":                   {Broken: "because"},
		"passthrough":              {Balance: mesh.Balance{Algorithm: mesh.Passthrough}},
		"a subset that nobody has": {Labels: map[string]string{"version": "v9"}},
	} {
		if e, ok := group(p, ws).Pick(Request{}, start); ok {
			t.Errorf("%s: chose %s", name, e.Workload.UID)
		}
	}
	if _, ok := NewGroup(mesh.Workload{}, chance()).Pick(Request{}, start); ok {
		t.Error("a group that knows nothing chose")
	}
}

func TestStateSurvivesUpdates(t *testing.T) {
	p := &mesh.TrafficPolicy{Outlier: &mesh.Outlier{Consecutive5xx: 2, BaseEjection: mesh.Duration(time.Minute), MaxEjected: 50}}
	ws := pods(2)
	g := group(p, ws)
	e := g.Endpoints()[0]
	e.Begin()
	e.Begin()
	e.End(ServerError, start)
	changed := *ws[0]
	changed.Node = "elsewhere"
	g.Update(&mesh.Service{}, p, candidates([]*mesh.Workload{&changed, ws[1]}), start)
	now := g.Endpoints()[0]
	if now.Active() != 1 || now.Workload != &changed {
		t.Errorf("after an update: %d active at %p, want 1 at %p", now.Active(), now.Workload, &changed)
	}
	e.End(ServerError, start) // of a request that began before
	if !now.Ejected() {
		t.Error("two failures in a row, one before an update: not ejected")
	}
}

func TestRetriesGoElsewhere(t *testing.T) {
	for _, alg := range []mesh.Algorithm{mesh.LeastRequest, mesh.Random, mesh.RoundRobin, mesh.Maglev, mesh.RingHash} {
		g := group(&mesh.TrafficPolicy{Balance: mesh.Balance{Algorithm: alg}}, pods(3))
		for i := range 300 {
			r := Request{Hash: mix(uint64(i)), Hashed: true}
			seen := map[mesh.UID]bool{}
			for range 3 {
				e, _ := g.Pick(r, start)
				seen[e.Workload.UID] = true
				r.Avoid = append(r.Avoid, e)
			}
			if len(seen) != 3 {
				t.Fatalf("%q: three tries went to %v", alg, seen)
			}
			if _, ok := g.Pick(r, start); !ok {
				t.Fatalf("%q: when all have been tried, nobody was chosen", alg)
			}
		}
	}
}

func TestSession(t *testing.T) {
	p := &mesh.TrafficPolicy{Session: &mesh.Session{Cookie: "s"}, Outlier: &mesh.Outlier{Consecutive5xx: 1, BaseEjection: mesh.Duration(time.Minute), MaxEjected: 50}}
	g := group(p, pods(4))
	at := g.Endpoints()[2]
	for range 50 {
		if e, _ := g.Pick(Request{Session: at.Name()}, start); e != at {
			t.Fatalf("a session at %s went to %s", at.Workload.UID, e.Workload.UID)
		}
	}
	for _, name := range []string{"x", "0000000000000000", "zzzzzzzzzzzzzzzz"} {
		if _, ok := g.Pick(Request{Session: name}, start); !ok {
			t.Errorf("session %q: nobody was chosen", name)
		}
	}
	at.Begin()
	at.End(ServerError, start)
	if e, ok := g.Pick(Request{Session: at.Name()}, start); !ok || e == at {
		t.Error("a session stayed at an ejected endpoint")
	}
}

func TestWarmup(t *testing.T) {
	p := func(aggression float64) *mesh.TrafficPolicy {
		return &mesh.TrafficPolicy{Balance: mesh.Balance{Warmup: &mesh.Warmup{Duration: mesh.Duration(100 * time.Second), MinimumPercent: 10, Aggression: aggression}}}
	}
	for _, alg := range []mesh.Algorithm{mesh.LeastRequest, mesh.RoundRobin} {
		for _, tc := range []struct {
			after      time.Duration
			aggression float64
			want       float64
		}{
			{0, 1, 0.1}, {50 * time.Second, 0, 0.5}, {100 * time.Second, 1, 1}, {25 * time.Second, 2, 0.5},
		} {
			ws := pods(3)
			policy := p(tc.aggression)
			policy.Balance.Algorithm = alg
			g := group(policy, ws[:2])
			added := start.Add(time.Hour)
			g.Update(&mesh.Service{}, policy, candidates(ws), added)
			got := picks(t, g, 20000, added.Add(tc.after), nil)
			t.Run(fmt.Sprintf("%q after %v", alg, tc.after), func(t *testing.T) {
				fits(t, got, map[mesh.UID]float64{"pod-0": 1, "pod-1": 1, "pod-2": tc.want})
			})
		}
	}
}
