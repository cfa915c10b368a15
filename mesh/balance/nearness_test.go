package balance

import (
	"testing"
	"time"

	"github.com/weft-mesh/weft/mesh"
)

// placed makes a workload in a subzone, named after it.
func placed(region, zone, subzone string) *mesh.Workload {
	return &mesh.Workload{UID: mesh.UID(region + "/" + zone + "/" + subzone), Healthy: true,
		Locality: mesh.Locality{Region: region, Zone: zone, Subzone: subzone}}
}

func outlier() *mesh.Outlier {
	return &mesh.Outlier{Consecutive5xx: 1, MaxEjected: 100, BaseEjection: mesh.Duration(time.Minute)}
}

// TestFailover ejects the nearest again and again, and looks who is next. The
// group asks from eu/a/1.
func TestFailover(t *testing.T) {
	here, zone, region, us, asia := placed("eu", "a", "1"), placed("eu", "a", "2"), placed("eu", "b", "1"), placed("us", "a", "1"), placed("asia", "a", "1")
	labelled := func(uid string, kv ...string) *mesh.Workload {
		w := &mesh.Workload{UID: mesh.UID(uid), Healthy: true, Labels: map[string]string{}, Locality: mesh.Locality{Region: "us"}}
		for i := 0; i < len(kv); i += 2 {
			w.Labels[kv[i]] = kv[i+1]
		}
		return w
	}
	both, first, second := labelled("both", "v", "1", "w", "1"), labelled("first", "v", "1", "w", "2"), labelled("second", "v", "2", "w", "1")
	for _, tc := range []struct {
		name string
		near *mesh.Nearness
		of   []*mesh.Workload
		want [][]*mesh.Workload
	}{
		{"the nearest first", nil, []*mesh.Workload{us, region, here, zone, asia},
			[][]*mesh.Workload{{here}, {zone}, {region}, {us, asia}}},
		{"to the region that is named", &mesh.Nearness{Failover: []mesh.LocalityFailover{{From: "eu", To: "asia"}}}, []*mesh.Workload{us, here, asia},
			[][]*mesh.Workload{{here}, {asia}, {us}}},
		{"another region's failover is not ours", &mesh.Nearness{Failover: []mesh.LocalityFailover{{From: "us", To: "asia"}}}, []*mesh.Workload{us, asia},
			[][]*mesh.Workload{{us, asia}}},
		{"by labels, the first weighs more", &mesh.Nearness{Priority: []string{"v", "w"}}, []*mesh.Workload{second, first, both},
			[][]*mesh.Workload{{both}, {first}, {second}}},
		{"by a label with a value", &mesh.Nearness{Priority: []string{"v=2"}}, []*mesh.Workload{second, first},
			[][]*mesh.Workload{{second}, {first}}},
		{"by the labels of places", &mesh.Nearness{Priority: []string{"topology.kubernetes.io/region", "topology.kubernetes.io/zone"}}, []*mesh.Workload{us, region, zone},
			[][]*mesh.Workload{{zone}, {region}, {us}}},
		{"switched off", &mesh.Nearness{Disabled: true}, []*mesh.Workload{here, us}, [][]*mesh.Workload{{here, us}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			g := group(&mesh.TrafficPolicy{Outlier: outlier(), Balance: mesh.Balance{Locality: tc.near}}, tc.of)
			for _, want := range tc.want {
				shares := map[mesh.UID]float64{}
				for _, w := range want {
					shares[w.UID] = 1
				}
				got := picks(t, g, 1000, start, nil)
				if len(want) == 1 {
					if got[want[0].UID] != 1000 {
						t.Fatalf("got %v, want %s", got, want[0].UID)
					}
				} else {
					fits(t, got, shares)
				}
				for _, e := range g.Endpoints() {
					if shares[e.Workload.UID] > 0 {
						fail(e, start, ServerError)
					}
				}
			}
			if e, ok := g.Pick(Request{}, start); ok {
				t.Errorf("all have failed, and %s was chosen", e.Workload.UID)
			}
		})
	}
}

func TestNearnessNeedsOutliers(t *testing.T) {
	g := group(nil, []*mesh.Workload{placed("eu", "a", "1"), placed("us", "a", "1")})
	fits(t, picks(t, g, 2000, start, nil), map[mesh.UID]float64{"eu/a/1": 1, "us/a/1": 1})
}

func TestServicePreferences(t *testing.T) {
	for mode, want := range map[mesh.BalanceMode]int{mesh.BalanceFailover: 2, mesh.BalanceStrict: 1, mesh.BalanceAny: 2, "luck": 0, mesh.BalancePassthrough: 0} {
		g := group(nil, nil)
		g.Update(&mesh.Service{Mode: mode, Preferences: []mesh.Preference{mesh.PreferZone}}, nil,
			candidates([]*mesh.Workload{placed("eu", "a", "9"), placed("us", "b", "1")}), start)
		if n := len(g.Endpoints()); n != want {
			t.Errorf("%q: %d endpoints, want %d", mode, n, want)
		}
		if mode == mesh.BalanceFailover {
			if got := picks(t, g, 100, start, nil); got["eu/a/9"] != 100 {
				t.Errorf("failover without failures: %v", got)
			}
		}
	}
}

// Of four near endpoints two may fail before the far ones get anything: 70 % of
// the requests are the near ones' then.
func TestFailoverIsGradual(t *testing.T) {
	var ws []*mesh.Workload
	for i, w := range pods(8) {
		w.Locality = mesh.Locality{Region: "eu", Zone: "a", Subzone: "1"}
		if i >= 4 {
			w.Locality.Region = "us"
		}
		ws = append(ws, w)
	}
	g := group(&mesh.TrafficPolicy{Outlier: outlier()}, ws)
	near := func() (n int) {
		for uid, k := range picks(t, g, 10000, start, nil) {
			if uid < "pod-4" {
				n += k
			}
		}
		return n
	}
	fail(g.Endpoints()[0], start, ServerError)
	if n := near(); n != 10000 {
		t.Errorf("three of four near ones are well and get %d of 10000", n)
	}
	fail(g.Endpoints()[1], start, ServerError)
	if n := near(); n < 6800 || n > 7200 {
		t.Errorf("two of four near ones are well and get %d of 10000, want 70 %%", n)
	}
}

func TestDistribute(t *testing.T) {
	ws := []*mesh.Workload{placed("eu", "a", "1"), placed("eu", "a", "2"), placed("eu", "b", "1"), placed("us", "a", "1"), placed("asia", "a", "1")}
	for _, tc := range []struct {
		name string
		d    []mesh.LocalityShares
		want map[mesh.UID]float64
	}{
		{"by zone, whatever their number", []mesh.LocalityShares{{From: "eu/a/*", To: map[string]uint32{"eu/a/*": 70, "eu/b/*": 20, "us/*": 10}}},
			map[mesh.UID]float64{"eu/a/1": 35, "eu/a/2": 35, "eu/b/1": 20, "us/a/1": 10}},
		{"the more exact one has it", []mesh.LocalityShares{{From: "eu/*", To: map[string]uint32{"eu/*": 50, "eu/a/1": 50}}},
			map[mesh.UID]float64{"eu/a/1": 50, "eu/a/2": 25, "eu/b/1": 25}},
		{"the first that is ours", []mesh.LocalityShares{{From: "us/*", To: map[string]uint32{"asia/*": 100}}, {From: "*", To: map[string]uint32{"us": 50, "asia/a/1": 50}}},
			map[mesh.UID]float64{"us/a/1": 1, "asia/a/1": 1}},
		{"none is ours", []mesh.LocalityShares{{From: "us/*", To: map[string]uint32{"asia/*": 100}}},
			map[mesh.UID]float64{"eu/a/1": 1, "eu/a/2": 1, "eu/b/1": 1, "us/a/1": 1, "asia/a/1": 1}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			g := group(&mesh.TrafficPolicy{Balance: mesh.Balance{Locality: &mesh.Nearness{Distribute: tc.d}}}, ws)
			fits(t, picks(t, g, 10000, start, nil), tc.want)
		})
	}
}

func TestRetriesMayLeaveTheLocality(t *testing.T) {
	g := group(&mesh.TrafficPolicy{Outlier: outlier()}, []*mesh.Workload{placed("eu", "a", "1"), {UID: "also", Healthy: true, Locality: mesh.Locality{Region: "eu", Zone: "a", Subzone: "1"}}, placed("us", "a", "1")})
	first, _ := g.Pick(Request{}, start)
	if first.Workload.UID == "us/a/1" {
		t.Fatal("the far one was first")
	}
	if e, _ := g.Pick(Request{Avoid: []*Endpoint{first}}, start); e.Workload.UID == "us/a/1" || e == first {
		t.Errorf("the second try went to %s, want the other near one", e.Workload.UID)
	}
	if e, _ := g.Pick(Request{Avoid: []*Endpoint{first}, Farther: true}, start); e.Workload.UID != "us/a/1" {
		t.Errorf("the second try went to %s, want the far one", e.Workload.UID)
	}
}

func BenchmarkPick(b *testing.B) {
	g := group(nil, pods(8))
	b.ReportAllocs()
	for b.Loop() {
		e, _ := g.Pick(Request{}, start)
		e.Begin()
		e.End(Success, start)
	}
}
