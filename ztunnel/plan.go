package ztunnel

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/weft-mesh/weft/hbone"
	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/balance"
	"github.com/weft-mesh/weft/mesh/view"
)

// hop is the way a connection leaves the pod.
type hop uint8

const (
	reject      hop = iota // the zero plan moves no bytes
	passthrough            // the target is outside the mesh: plain TCP
	toPeer                 // over HBONE, to the target's own node
	toWaypoint             // over HBONE, to the waypoint in front of the target
)

// plan says what becomes of one outbound connection.
type plan struct {
	hop hop
	// why says, in a rejected plan, what the person on call wants to know.
	why string
	// hold says, in a rejected plan, that this may pass: the waypoint that the
	// connection must go through is not there, or not ready.
	hold bool
	// dial is the address that TCP connects to; for a tunnel its port is the
	// HBONE port.
	dial netip.AddrPort
	// authority is the target that the tunnel is asked for.
	authority netip.AddrPort
	// peers are the identities of which the other end of the tunnel must
	// prove one. Sorted, without the zero Identity.
	peers []mesh.Identity
	// service and workload are the target as far as it is known.
	service  *mesh.Service
	workload *mesh.Workload
	// direct says that the peer may be reached without the tunnel if it is on
	// this node: both ends' namespaces want it.
	direct bool
}

// client is the pod that opens a connection.
type client struct {
	workload  mesh.Workload // as the View knows it; zero if it does not
	addresses []netip.Addr  // as the node agent knows them
	network   string        // of this node
	// avoid are replicas of waypoints that could not be reached a moment ago:
	// they are asked again only when there is no other.
	avoid []netip.AddrPort
}

// planOutbound plans a connection of from to dst. It reads one View and
// touches no socket, so every branch is a row in a table test. rnd is any
// random number; it picks among equal endpoints.
func planOutbound(v *view.View, from client, dst netip.AddrPort, rnd uint64) plan {
	if !v.Synced() {
		// Before the first sync, unknown is not "outside".
		return rejected("nothing is known of the mesh yet: the control service has not been reached since the start")
	}
	if s := v.Service(dst.Addr()); s != nil {
		return planService(v, from, s, dst, rnd)
	}
	w := v.Workload(dst.Addr())
	if w == nil || w.HostNetwork {
		// The address of a load balancer may be a node's, but nobody can take
		// that of a pod or a service this way.
		if s := v.External(dst); s != nil {
			return planService(v, from, s, dst, rnd)
		}
	}
	if w == nil {
		return plan{hop: passthrough, dial: dst}
	}
	if mustPass(v, from, w.Waypoint) {
		p := planWaypoint(v, from, w.Waypoint, dst, rnd)
		p.workload = w
		return p
	}
	return planWorkload(from, w, dst, nil)
}

// planService plans a connection to a virtual address of s.
func planService(v *view.View, from client, s *mesh.Service, dst netip.AddrPort, rnd uint64) plan {
	p := planServiceHop(v, from, s, dst, rnd)
	p.service = s
	return p
}

func planServiceHop(v *view.View, from client, s *mesh.Service, dst netip.AddrPort, rnd uint64) plan {
	if mustPass(v, from, s.Waypoint) {
		return planWaypoint(v, from, s.Waypoint, dst, rnd)
	}
	if !slices.ContainsFunc(s.Ports, func(p mesh.Port) bool { return p.Service == dst.Port() }) {
		return rejected("service %s has no port %d", s.Name.Host, dst.Port())
	}
	if s.Mode == mesh.BalancePassthrough {
		if w := v.Workload(dst.Addr()); w != nil {
			return planWorkload(from, w, dst, s)
		}
		return plan{hop: passthrough, dial: dst}
	}
	c, ok := balance.Choose(s, from.workload, candidates(v, from, s.Name, dst.Port()), rnd)
	if !ok {
		return rejected("service %s has no healthy endpoint for port %d", s.Name.Host, dst.Port())
	}
	addr, ok := balance.Address(c.Workload, dst.Addr())
	if !ok {
		return rejected("workload %s, an endpoint of service %s, has no address", c.Workload.UID, s.Name.Host)
	}
	return planWorkload(from, c.Workload, netip.AddrPortFrom(addr, c.Port), s)
}

// candidates returns the endpoints of service n that this node can reach.
func candidates(v *view.View, from client, n mesh.ServiceName, port uint16) []balance.Candidate {
	var cs []balance.Candidate
	for _, e := range v.Endpoints(n) {
		if e.Workload.Network != from.network {
			continue // behind a gateway between networks
		}
		for _, p := range e.Ports {
			if p.Service == port {
				cs = append(cs, balance.Candidate{Workload: e.Workload, Port: p.Target})
			}
		}
	}
	return cs
}

// planWorkload plans a connection to dst, an address of w, which was reached
// through s if that is not nil.
func planWorkload(from client, w *mesh.Workload, dst netip.AddrPort, s *mesh.Service) plan {
	p := plan{workload: w}
	switch {
	case w.Network != from.network:
		p.why = fmt.Sprintf("workload %s is on network %q, and no gateway to it is known", w.UID, w.Network)
		return p
	case slices.Contains(from.addresses, dst.Addr()):
		// A service chose the client itself, which could have asked 127.0.0.1
		// just as well: the bytes stay in the pod.
		p.hop, p.dial = passthrough, dst
		return p
	case w.Transport == mesh.PlainTCP:
		p.hop, p.dial = passthrough, dst
		return p
	case w.Transport == mesh.HBONE:
		p.direct = w.Direct && from.workload.Direct
		return p.tunnel(toPeer, w, s, netip.AddrPortFrom(dst.Addr(), hbone.Port), dst)
	}
	p.why = fmt.Sprintf("how to reach workload %s is not known: its transport is %v", w.UID, w.Transport)
	return p
}

// mustPass reports whether a connection of from must go through the waypoint
// ref: all must, but for those of the waypoint's own pods.
func mustPass(v *view.View, from client, ref mesh.GatewayRef) bool {
	if ref.IsZero() {
		return false
	}
	s := waypointService(v, ref)
	return s == nil || !slices.ContainsFunc(from.workload.Services, func(m mesh.Membership) bool { return m.Service == s.Name })
}

// waypointService returns the service at which a waypoint is reached, or nil.
func waypointService(v *view.View, ref mesh.GatewayRef) *mesh.Service {
	if s := v.ServiceByName(ref.Service); s != nil || !ref.Address.IsValid() {
		return s
	}
	return v.Service(ref.Address)
}

// planWaypoint plans a connection to dst through the waypoint ref. One that is
// not there rejects: it may be what keeps others out of the target. But it may
// still come, so the connection is held.
func planWaypoint(v *view.View, from client, ref mesh.GatewayRef, dst netip.AddrPort, rnd uint64) plan {
	p := chooseWaypoint(v, from, ref, dst, rnd)
	p.hold = p.hop == reject
	return p
}

func chooseWaypoint(v *view.View, from client, ref mesh.GatewayRef, dst netip.AddrPort, rnd uint64) plan {
	port := cmp.Or(ref.Port, hbone.Port)
	s := waypointService(v, ref)
	if s == nil && ref.Address.IsValid() {
		w := v.Workload(ref.Address)
		if w == nil {
			return rejected("the waypoint at %v is not known", ref.Address)
		}
		return waypointAt(from, w, nil, netip.AddrPortFrom(ref.Address.Unmap(), port), dst)
	}
	if s == nil {
		return rejected("the waypoint %s is not there", ref.Service)
	}
	cs := candidates(v, from, s.Name, port)
	if len(cs) == 0 { // its service need not publish the HBONE port
		for _, e := range v.Endpoints(s.Name) {
			if e.Workload.Network == from.network {
				cs = append(cs, balance.Candidate{Workload: e.Workload, Port: port})
			}
		}
	}
	c, ok := balance.Choose(s, from.workload, reachable(cs, from.avoid), rnd)
	if !ok {
		c, ok = balance.Choose(s, from.workload, cs, rnd)
	}
	if !ok {
		return rejected("the waypoint %s is not ready: it has no healthy replica", s.Name.Host)
	}
	addr, ok := balance.Address(c.Workload, dst.Addr())
	if !ok {
		return rejected("workload %s, a replica of the waypoint %s, has no address", c.Workload.UID, s.Name.Host)
	}
	return waypointAt(from, c.Workload, s, netip.AddrPortFrom(addr, c.Port), dst)
}

// reachable returns cs without those at an address of avoid.
func reachable(cs []balance.Candidate, avoid []netip.AddrPort) []balance.Candidate {
	if len(avoid) == 0 {
		return cs
	}
	return slices.DeleteFunc(slices.Clone(cs), func(c balance.Candidate) bool {
		return slices.ContainsFunc(c.Workload.Addresses, func(a netip.Addr) bool {
			return slices.Contains(avoid, netip.AddrPortFrom(a.Unmap(), c.Port))
		})
	})
}

// waypointAt plans a tunnel for dst to the waypoint w. What is not HBONE
// cannot be a waypoint.
func waypointAt(from client, w *mesh.Workload, s *mesh.Service, dial, dst netip.AddrPort) plan {
	switch {
	case w.Network != from.network:
		return rejected("waypoint %s is on network %q, and no gateway to it is known", w.UID, w.Network)
	case w.Transport != mesh.HBONE:
		return rejected("waypoint %s does not speak HBONE: its transport is %v", w.UID, w.Transport)
	}
	return plan{}.tunnel(toWaypoint, w, s, dial, dst)
}

// tunnel completes p with a tunnel to w, or to whoever else may answer for s.
// A peer without a name rejects.
func (p plan) tunnel(h hop, w *mesh.Workload, s *mesh.Service, dial, authority netip.AddrPort) plan {
	peers := []mesh.Identity{w.Identity}
	if s != nil {
		for _, name := range s.SubjectAltNames {
			// Names of other kinds are for other protocols.
			if id, err := mesh.ParseIdentity(name); err == nil {
				peers = append(peers, id)
			}
		}
	}
	peers = slices.DeleteFunc(peers, mesh.Identity.IsZero)
	slices.SortFunc(peers, func(a, b mesh.Identity) int { return strings.Compare(a.String(), b.String()) })
	peers = slices.Compact(peers)
	if len(peers) == 0 {
		p.why = fmt.Sprintf("workload %s has no identity: nobody could be verified", w.UID)
		return p
	}
	p.hop, p.dial, p.authority, p.peers = h, dial, authority, peers
	return p
}

func rejected(format string, args ...any) plan {
	return plan{why: fmt.Sprintf(format, args...)}
}
