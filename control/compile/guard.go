package compile

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"maps"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/weft-mesh/weft/mesh"
)

// GuardPrefix begins the names of the policies that refuse what goes around a
// waypoint. No Kubernetes object can have such a name, because of the
// underscores.
const GuardPrefix = "weft_waypoint_"

// guard returns the policy that refuses direct connections to a pod behind a
// waypoint, or nil. It is for the ports of the pod that bound services send to,
// and lets their waypoints through. A port that a service without a waypoint
// sends to as well stays open, as the users of that service come directly.
//
// Pods whose ports are guarded alike share a policy: its name follows from what
// it says.
func (w *World) guard(pod *corev1.Pod, services []mesh.Membership) *mesh.Policy {
	if pod.Spec.HostNetwork || w.isWaypoint(pod) {
		return nil
	}
	own, _ := w.bind(pod.Namespace, pod.Labels, false)
	if len(w.bound) == 0 && !own.guarded {
		return nil
	}
	through := map[uint16]map[string]bool{} // waypoints by port
	closed := map[uint16]bool{}             // ports that nobody outside of the mesh may reach either
	open := map[uint16]bool{}
	for _, m := range services {
		if m.Service.Namespace != pod.Namespace {
			continue // who names an address of another namespace neither closes a port there nor opens one
		}
		b := w.bound[m.Service]
		for _, p := range m.Ports {
			switch {
			case b.guarded:
				if through[p.Target] == nil {
					through[p.Target] = map[string]bool{}
				}
				through[p.Target][b.identity.Principal()] = true
				closed[p.Target] = closed[p.Target] || !b.outside
			case w.virtual[m.Service]:
				open[p.Target] = true
			}
		}
	}
	groups := guardGroups(through, open, closed, own)
	if len(groups) == 0 {
		return nil
	}
	b, err := json.Marshal(groups)
	if err != nil {
		panic("compile: " + err.Error()) // plain text and numbers
	}
	sum := sha256.Sum256(b)
	return &mesh.Policy{
		Name:   mesh.Name{Namespace: pod.Namespace, Name: GuardPrefix + hex.EncodeToString(sum[:6])},
		Scope:  mesh.ScopeSelector,
		Action: mesh.Deny,
		Groups: groups,
	}
}

// guardGroups makes a group of each set of ports that the same waypoints may
// reach. A pod that has a waypoint of its own is guarded at every port.
func guardGroups(through map[uint16]map[string]bool, open, closed map[uint16]bool, own binding) []mesh.Group {
	ports := map[string][]uint16{} // by the waypoints, joined, with a star for who has no identity
	var listed []uint16
	for _, port := range slices.Sorted(maps.Keys(through)) {
		if open[port] {
			continue
		}
		if own.guarded {
			through[port][own.identity.Principal()] = true
			closed[port] = closed[port] || !own.outside
		}
		if !closed[port] {
			through[port]["*"] = true
		}
		who := strings.Join(slices.Sorted(maps.Keys(through[port])), " ")
		ports[who] = append(ports[who], port)
		listed = append(listed, port)
	}
	var out []mesh.Group
	add := func(m mesh.Match, who ...string) {
		for _, p := range who {
			if p == "*" {
				m.Principals = []mesh.StringMatch{{Kind: mesh.MatchPresence}}
				continue
			}
			m.NotPrincipals = append(m.NotPrincipals, mesh.StringMatch{Kind: mesh.MatchExact, Value: p})
		}
		out = append(out, mesh.Group{Clauses: []mesh.Clause{{Matches: []mesh.Match{m}}}})
	}
	for _, who := range slices.Sorted(maps.Keys(ports)) {
		add(mesh.Match{DestinationPorts: ports[who]}, strings.Split(who, " ")...)
	}
	if own.guarded {
		rest := append(listed, slices.Collect(maps.Keys(open))...)
		slices.Sort(rest)
		who := []string{own.identity.Principal()}
		if own.outside {
			who = append(who, "*")
		}
		add(mesh.Match{NotDestPorts: slices.Compact(rest)}, who...)
	}
	return out
}

// podFacts are what compiling the world has found out about a pod, for when the
// pod itself is compiled.
type podFacts struct {
	services []mesh.Membership
	guard    *mesh.Policy
}

// facts returns what is known of a pod. The pods that the World was compiled
// with are known by their pointer: nobody changes them.
func (w *World) facts(pod *corev1.Pod, addrs []netip.Addr) podFacts {
	if f, ok := w.known[pod]; ok {
		return f
	}
	services := w.memberships(pod, addrs)
	return podFacts{services, w.guard(pod, services)}
}

// compileGuards adds the policies that the pods of now list.
func (w *World) compileGuards(pods []*corev1.Pod) {
	w.guards = map[mesh.Name]bool{}
	w.known = make(map[*corev1.Pod]podFacts, len(pods))
	for _, pod := range pods {
		addrs := PodAddrs(pod)
		if len(addrs) == 0 || ended(pod) {
			continue
		}
		f := w.facts(pod, addrs)
		w.known[pod] = f
		if p := f.guard; p != nil && !w.guards[p.Name] {
			w.guards[p.Name] = true
			w.Policies = append(w.Policies, *p)
		}
	}
}

// Lacks reports whether a workload lists a policy against going around a
// waypoint that the World was compiled without. The workload denies until the
// World has been compiled anew.
func (w *World) Lacks(wl mesh.Workload) bool {
	return slices.ContainsFunc(wl.Policies, func(n mesh.Name) bool {
		return strings.HasPrefix(n.Name, GuardPrefix) && !w.guards[n]
	})
}
