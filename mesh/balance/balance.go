// Package balance chooses the endpoint that answers for a service.
//
// Choose does it for connections, and is a pure function of its arguments,
// chance included. A Group does it for requests: it remembers how busy each
// endpoint is and which have failed. It reads no clock and starts nothing:
// time and chance are given to it.
package balance

import (
	"net/netip"

	"github.com/weft-mesh/weft/mesh"
)

// A Candidate is an endpoint that could take the connection.
type Candidate struct {
	Workload *mesh.Workload
	Port     uint16 // on the workload, for the service port that was asked for
}

// Choose picks the candidate that takes a connection of the workload from to
// service s, and false if none may. Those that are equally near are as likely
// as their capacities say; rnd, any random number, picks among them.
//
// Candidates without a workload, a port or a capacity never count, and unhealthy
// ones only if s allows them. For a service in passthrough mode nothing is chosen: the
// caller dials the address that was asked for. A mode that is not known
// chooses nothing.
func Choose(s *mesh.Service, from mesh.Workload, cs []Candidate, rnd uint64) (Candidate, bool) {
	if s == nil {
		return Candidate{}, false
	}
	best, ok := lowest(s)
	if !ok {
		return Candidate{}, false
	}
	n := uint64(0)
	for _, c := range cs {
		switch r := rank(s, &from, c); {
		case r > best:
			best, n = r, capacity(c.Workload)
		case r == best:
			n += capacity(c.Workload)
		}
	}
	if n == 0 {
		return Candidate{}, false
	}
	skip := rnd % n
	for _, c := range cs {
		if rank(s, &from, c) != best {
			continue
		}
		w := capacity(c.Workload)
		if skip < w {
			return c, true
		}
		skip -= w
	}
	panic("balance: counted more candidates than there are")
}

// lowest returns the lowest rank that may be chosen, and false if none may.
func lowest(s *mesh.Service) (int, bool) {
	switch s.Mode {
	case mesh.BalanceAny, mesh.BalanceFailover:
		return 0, true
	case mesh.BalanceStrict:
		return len(s.Preferences), true
	}
	return 0, false
}

// rank returns how many of the preferences of s the candidate meets, counted
// up to the first that it does not, or -1 if it may not be chosen at all.
func rank(s *mesh.Service, from *mesh.Workload, c Candidate) int {
	switch {
	case c.Workload == nil || c.Port == 0 || capacity(c.Workload) == 0:
		return -1
	case !c.Workload.Healthy && !s.AllowUnhealthy:
		return -1
	}
	if s.Mode == mesh.BalanceAny {
		return 0
	}
	for i, p := range s.Preferences {
		if !near(p, from, c.Workload) {
			return i
		}
	}
	return len(s.Preferences)
}

// capacity returns the share of w.
func capacity(w *mesh.Workload) uint64 {
	if w.Capacity == nil {
		return 1
	}
	return uint64(*w.Capacity)
}

// near reports whether two workloads share what p is about. Regions, zones and
// subzones that neither has are shared, as in Istio: most clusters have no
// subzones, and many no zones, and their nodes are still nodes. An unknown node
// is nobody's; the empty network and cluster are real ones.
func near(p mesh.Preference, a, b *mesh.Workload) bool {
	switch p {
	case mesh.PreferNetwork:
		return a.Network == b.Network
	case mesh.PreferCluster:
		return a.Cluster == b.Cluster
	case mesh.PreferRegion:
		return a.Locality.Region == b.Locality.Region
	case mesh.PreferZone:
		return a.Locality.Zone == b.Locality.Zone
	case mesh.PreferSubzone:
		return a.Locality.Subzone == b.Locality.Subzone
	case mesh.PreferNode:
		return a.Node != "" && a.Node == b.Node
	}
	return false // a preference of a later version
}

// Address returns the address at which to reach w: the first of the family of
// like, the address that the client asked for, else the first at all; and
// false if w has none.
func Address(w *mesh.Workload, like netip.Addr) (netip.Addr, bool) {
	var first netip.Addr
	for _, a := range w.Addresses {
		switch {
		case !a.IsValid():
			continue
		case a.Unmap().Is4() == like.Unmap().Is4():
			return a.Unmap(), true
		case !first.IsValid():
			first = a.Unmap()
		}
	}
	return first, first.IsValid()
}
