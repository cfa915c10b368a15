package balance

import (
	"slices"
	"strings"

	"github.com/weft-mesh/weft/mesh"
)

// levels sorts endpoints by how near they are, and where each locality has its
// share, by locality.
func (g *Group) levels(s *mesh.Service, p *mesh.TrafficPolicy, es []*Endpoint) []level {
	if len(es) == 0 {
		return nil
	}
	n := p.Balance.Locality
	if n != nil && !n.Disabled {
		if shares, ok := sharesFrom(n.Distribute, g.self.Locality); ok {
			if l, ok := distribute(shares, es); ok {
				return []level{l}
			}
			return nil
		}
	}
	at := map[int][]*Endpoint{}
	for _, e := range es {
		d := distance(s, p, &g.self, e.Workload)
		at[d] = append(at[d], e)
	}
	far := make([]int, 0, len(at))
	for d := range at {
		far = append(far, d)
	}
	slices.Sort(far)
	ls := make([]level, 0, len(far))
	for _, d := range far {
		ls = append(ls, level{pools: []*pool{{share: 1, members: at[d]}}})
	}
	return ls
}

// distance returns how far w is: the nearest that are there take all requests
// for as long as they can.
func distance(s *mesh.Service, p *mesh.TrafficPolicy, self, w *mesh.Workload) int {
	n := p.Balance.Locality
	switch {
	case n != nil && n.Disabled:
		return 0
	case n != nil && len(n.Priority) > 0 && p.Outlier != nil:
		d := len(n.Priority)
		for _, label := range n.Priority {
			if !sharesLabel(label, self, w) {
				break
			}
			d--
		}
		if len(n.Failover) > 0 && d == len(n.Priority) && !failsTo(n.Failover, self, w) {
			d++
		}
		return d
	case s.Mode == mesh.BalanceFailover && n == nil:
		return len(s.Preferences) - rank(&mesh.Service{Mode: s.Mode, Preferences: s.Preferences, AllowUnhealthy: true}, self, Candidate{w, 1})
	case p.Outlier == nil:
		// Without a way to notice that the near ones fail, nobody would ever
		// leave them: so nearness does not count, as in Istio.
		return 0
	}
	return localityDistance(n, self, w)
}

// localityDistance counts from the same subzone (0) to anywhere (4).
func localityDistance(n *mesh.Nearness, self, w *mesh.Workload) int {
	a, b := self.Locality, w.Locality
	switch {
	case a.Region == "":
		return 0 // where we are is not known
	case a == b:
		return 0
	case a.Region == b.Region && a.Zone == b.Zone:
		return 1
	case a.Region == b.Region:
		return 2
	case n != nil && failsTo(n.Failover, self, w):
		return 3
	}
	return 4
}

// failsTo reports whether requests of self's region go to w's next.
func failsTo(fs []mesh.LocalityFailover, self, w *mesh.Workload) bool {
	for _, f := range fs {
		if f.From == self.Locality.Region && f.To == w.Locality.Region {
			return true
		}
	}
	return false
}

// sharesLabel reports whether both workloads have the same value of a label.
// "key=value" asks whether w has that value.
func sharesLabel(label string, self, w *mesh.Workload) bool {
	key, want, fixed := strings.Cut(label, "=")
	theirs, ok := labelOf(w, key)
	if fixed {
		return ok && theirs == want
	}
	ours, known := labelOf(self, key)
	return ok == known && ours == theirs
}

// labelOf returns a label, those of the place included, which are not among a
// workload's Labels.
func labelOf(w *mesh.Workload, key string) (string, bool) {
	some := func(s string) (string, bool) { return s, s != "" }
	switch key {
	case "topology.kubernetes.io/region":
		return some(w.Locality.Region)
	case "topology.kubernetes.io/zone":
		return some(w.Locality.Zone)
	case "topology.istio.io/subzone":
		return some(w.Locality.Subzone)
	case "topology.istio.io/network":
		return some(w.Network)
	case "topology.istio.io/cluster":
		return some(w.Cluster)
	case "kubernetes.io/hostname":
		return some(w.Node)
	}
	v, ok := w.Labels[key]
	return v, ok
}

// sharesFrom returns the shares for clients at l: of the first that fits.
func sharesFrom(ds []mesh.LocalityShares, l mesh.Locality) (map[string]uint32, bool) {
	for _, d := range ds {
		if inLocality(d.From, l) {
			return d.To, true
		}
	}
	return nil, false
}

// distribute makes a pool of the endpoints of each locality that has a share.
// The most exact of several that hold an endpoint has it.
func distribute(shares map[string]uint32, es []*Endpoint) (level, bool) {
	by := map[string][]*Endpoint{}
	for _, e := range es {
		best, found := "", false
		for to := range shares {
			if !inLocality(to, e.Workload.Locality) {
				continue
			}
			if !found || exactness(to) > exactness(best) {
				best, found = to, true
			}
		}
		if found && shares[best] > 0 {
			by[best] = append(by[best], e)
		}
	}
	var l level
	for _, to := range sortedKeys(by) {
		l.pools = append(l.pools, &pool{share: uint64(shares[to]), members: by[to]})
	}
	return l, len(l.pools) > 0
}

func sortedKeys[T any](m map[string]T) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// exactness counts what a pattern says.
func exactness(pattern string) int { return len(strings.TrimSuffix(pattern, "*")) }

// inLocality reports whether l is in "region/zone/subzone", where missing parts
// and "*" hold everything.
func inLocality(pattern string, l mesh.Locality) bool {
	have := [...]string{l.Region, l.Zone, l.Subzone}
	for i, want := range strings.Split(pattern, "/") {
		switch {
		case want == "*":
			return true
		case i >= len(have), want != have[i]:
			return false
		}
	}
	return true
}

// loadScale is the whole of the loads of levels.
const loadScale = 1 << 16

// spread divides the requests between the levels: each takes what its healthy
// endpoints can take, and may be asked for 1.4 times its part before the next
// is (the factor that Envoy has).
func spread(ls []level) {
	left := uint32(loadScale)
	last := -1
	for i := range ls {
		ready, all := 0, 0
		for _, p := range ls[i].pools {
			ready += len(p.ready)
			all += len(p.members)
		}
		ls[i].load = 0
		if ready == 0 {
			continue
		}
		last = i
		ls[i].load = min(left, max(1, uint32(uint64(loadScale)*14*uint64(ready)/(10*uint64(all)))))
		left -= ls[i].load
	}
	if last < 0 || left == 0 || left == loadScale {
		return
	}
	// All together are too weak: they share what there is.
	total := loadScale - left
	rest := uint32(loadScale)
	for i := range ls {
		ls[i].load = uint32(uint64(ls[i].load) * loadScale / uint64(total))
		rest -= ls[i].load
	}
	ls[last].load += rest
}
