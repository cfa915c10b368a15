package balance

import (
	"math"
	"net/netip"
	"testing"

	"github.com/weft-mesh/weft/mesh"
)

// at makes a healthy workload, named after where it runs.
func at(region, zone, node string) *mesh.Workload {
	return &mesh.Workload{
		UID:      mesh.UID(region + "/" + zone + "/" + node),
		Locality: mesh.Locality{Region: region, Zone: zone},
		Node:     node,
		Healthy:  true,
	}
}

func sick(w *mesh.Workload) *mesh.Workload {
	w.Healthy = false
	return w
}

func of(capacity uint32, w *mesh.Workload) *mesh.Workload {
	w.Capacity = &capacity
	return w
}

func TestChoose(t *testing.T) {
	from := *at("eu", "a", "n1")
	near := []mesh.Preference{mesh.PreferRegion, mesh.PreferZone, mesh.PreferNode}
	sameNode := []mesh.Preference{mesh.PreferNetwork, mesh.PreferRegion, mesh.PreferZone, mesh.PreferSubzone, mesh.PreferNode} // as compiled
	for _, tc := range []struct {
		name    string
		service mesh.Service
		from    mesh.Workload
		among   []*mesh.Workload
		want    []mesh.UID // all that may be chosen, in the order of rnd
	}{
		{"any takes all", mesh.Service{}, from, []*mesh.Workload{at("eu", "a", "n1"), at("us", "b", "n2")}, []mesh.UID{"eu/a/n1", "us/b/n2"}},
		{"any ignores preferences", mesh.Service{Preferences: near}, from, []*mesh.Workload{at("us", "b", "n2"), at("eu", "a", "n1")}, []mesh.UID{"us/b/n2", "eu/a/n1"}},
		{"nobody", mesh.Service{}, from, nil, nil},
		{"the sick are left out", mesh.Service{}, from, []*mesh.Workload{sick(at("eu", "a", "n1")), at("us", "b", "n2")}, []mesh.UID{"us/b/n2"}},
		{"only the sick", mesh.Service{}, from, []*mesh.Workload{sick(at("eu", "a", "n1"))}, nil},
		{"the sick may be allowed", mesh.Service{AllowUnhealthy: true}, from, []*mesh.Workload{sick(at("eu", "a", "n1"))}, []mesh.UID{"eu/a/n1"}},
		{"a missing workload is passed over", mesh.Service{}, from, []*mesh.Workload{nil, at("eu", "a", "n1")}, []mesh.UID{"eu/a/n1"}},

		{"as often as the capacities say", mesh.Service{}, from, []*mesh.Workload{of(2, at("eu", "a", "n1")), at("us", "b", "n2"), of(0, at("us", "b", "n3"))},
			[]mesh.UID{"eu/a/n1", "eu/a/n1", "us/b/n2"}},
		{"nobody has a capacity", mesh.Service{}, from, []*mesh.Workload{of(0, at("eu", "a", "n1"))}, nil},
		{"capacities count among the near only", mesh.Service{Mode: mesh.BalanceFailover, Preferences: near}, from,
			[]*mesh.Workload{of(1000, at("us", "b", "n2")), at("eu", "a", "n1")}, []mesh.UID{"eu/a/n1"}},
		{"near without a capacity is not near", mesh.Service{Mode: mesh.BalanceFailover, Preferences: near}, from,
			[]*mesh.Workload{of(0, at("eu", "a", "n1")), at("us", "b", "n2")}, []mesh.UID{"us/b/n2"}},
		{"the largest capacities do not overflow", mesh.Service{}, from,
			[]*mesh.Workload{of(math.MaxUint32, at("eu", "a", "n1")), of(math.MaxUint32, at("eu", "a", "n2"))}, []mesh.UID{"eu/a/n1"}},

		{"strict: all or none", mesh.Service{Mode: mesh.BalanceStrict, Preferences: near}, from,
			[]*mesh.Workload{at("eu", "a", "n1"), at("eu", "a", "n2"), at("us", "a", "n1")}, []mesh.UID{"eu/a/n1"}},
		{"strict: none is near", mesh.Service{Mode: mesh.BalanceStrict, Preferences: near}, from, []*mesh.Workload{at("eu", "a", "n2")}, nil},
		{"strict: near but sick", mesh.Service{Mode: mesh.BalanceStrict, Preferences: near}, from, []*mesh.Workload{sick(at("eu", "a", "n1")), at("eu", "a", "n2")}, nil},
		{"strict: unknown nodes are not shared", mesh.Service{Mode: mesh.BalanceStrict, Preferences: []mesh.Preference{mesh.PreferNode}}, *at("", "", ""),
			[]*mesh.Workload{at("", "", "")}, nil},
		{"strict: a preference of a later version", mesh.Service{Mode: mesh.BalanceStrict, Preferences: []mesh.Preference{"rack"}}, from, []*mesh.Workload{at("eu", "a", "n1")}, nil},
		{"strict: the empty network is one", mesh.Service{Mode: mesh.BalanceStrict, Preferences: []mesh.Preference{mesh.PreferNetwork, mesh.PreferCluster}}, from,
			[]*mesh.Workload{at("us", "b", "n2")}, []mesh.UID{"us/b/n2"}},

		{"failover: the nearest", mesh.Service{Mode: mesh.BalanceFailover, Preferences: near}, from,
			[]*mesh.Workload{at("us", "b", "n9"), at("eu", "a", "n2"), at("eu", "a", "n1"), at("eu", "b", "n3")}, []mesh.UID{"eu/a/n1"}},
		{"failover: the nearest of the rest", mesh.Service{Mode: mesh.BalanceFailover, Preferences: near}, from,
			[]*mesh.Workload{at("us", "b", "n9"), at("eu", "a", "n2"), at("eu", "a", "n3"), sick(at("eu", "a", "n1"))}, []mesh.UID{"eu/a/n2", "eu/a/n3"}},
		{"failover: preferences count up to the first that fails", mesh.Service{Mode: mesh.BalanceFailover, Preferences: near}, from,
			[]*mesh.Workload{at("us", "a", "n1"), at("eu", "b", "n3")}, []mesh.UID{"eu/b/n3"}},
		{"failover: anybody at last", mesh.Service{Mode: mesh.BalanceFailover, Preferences: near}, from, []*mesh.Workload{at("us", "b", "n9")}, []mesh.UID{"us/b/n9"}},

		{"failover: the same node, where there are no subzones", mesh.Service{Mode: mesh.BalanceFailover, Preferences: sameNode}, from,
			[]*mesh.Workload{at("eu", "a", "n2"), at("eu", "a", "n1"), at("eu", "b", "n3")}, []mesh.UID{"eu/a/n1"}},
		{"failover: the same node, where there are no zones", mesh.Service{Mode: mesh.BalanceFailover, Preferences: sameNode}, *at("", "", "n1"),
			[]*mesh.Workload{at("", "", "n2"), at("", "", "n1"), at("eu", "a", "n1")}, []mesh.UID{"//n1"}},
		{"failover: a place that only one of the two has is another", mesh.Service{Mode: mesh.BalanceFailover, Preferences: sameNode}, from,
			[]*mesh.Workload{at("", "", "n1"), at("eu", "", "n1"), at("eu", "a", "n2")}, []mesh.UID{"eu/a/n2"}},
		{"failover: without zones anybody is in the same", mesh.Service{Mode: mesh.BalanceFailover, Preferences: sameNode[:3]}, *at("", "", "n1"),
			[]*mesh.Workload{at("", "", "n2"), at("", "", "n1")}, []mesh.UID{"//n2", "//n1"}},

		{"passthrough chooses nobody", mesh.Service{Mode: mesh.BalancePassthrough}, from, []*mesh.Workload{at("eu", "a", "n1")}, nil},
		{"a mode of a later version chooses nobody", mesh.Service{Mode: "luck"}, from, []*mesh.Workload{at("eu", "a", "n1")}, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var cs []Candidate
			for _, w := range tc.among {
				cs = append(cs, Candidate{Workload: w, Port: 80})
			}
			if len(tc.want) == 0 {
				if got, ok := Choose(&tc.service, tc.from, cs, 7); ok {
					t.Errorf("chose %s, want nobody", got.Workload.UID)
				}
				return
			}
			for rnd := range uint64(2 * len(tc.want)) {
				got, ok := Choose(&tc.service, tc.from, cs, rnd)
				if want := tc.want[rnd%uint64(len(tc.want))]; !ok || got.Workload.UID != want {
					t.Errorf("rnd %d: chose %+v, want %s", rnd, got.Workload, want)
				}
			}
			if _, ok := Choose(&tc.service, tc.from, cs, ^uint64(0)); !ok {
				t.Error("the largest rnd chose nobody")
			}
		})
	}
}

func TestChooseNeedsPortAndService(t *testing.T) {
	if _, ok := Choose(&mesh.Service{}, mesh.Workload{}, []Candidate{{Workload: at("a", "b", "c")}}, 0); ok {
		t.Error("chose a candidate without a port")
	}
	if _, ok := Choose(nil, mesh.Workload{}, []Candidate{{Workload: at("a", "b", "c"), Port: 80}}, 0); ok {
		t.Error("chose for no service")
	}
}

func TestAddress(t *testing.T) {
	four, six := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")
	for _, tc := range []struct {
		name      string
		addresses []netip.Addr
		like      string
		want      netip.Addr
	}{
		{"the same family, IPv4", []netip.Addr{six, four}, "10.9.9.9", four},
		{"the same family, IPv6", []netip.Addr{four, six}, "fd00::9", six},
		{"mapped is IPv4", []netip.Addr{six, four}, "::ffff:10.9.9.9", four},
		{"the other family if it must be", []netip.Addr{six}, "10.9.9.9", six},
		{"none", nil, "10.9.9.9", netip.Addr{}},
		{"zero addresses are none", []netip.Addr{{}, four}, "fd00::9", four},
	} {
		got, ok := Address(&mesh.Workload{Addresses: tc.addresses}, netip.MustParseAddr(tc.like))
		if got != tc.want || ok != tc.want.IsValid() {
			t.Errorf("%s: %v, %v; want %v", tc.name, got, ok, tc.want)
		}
	}
}
