package compile

import (
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"net/netip"

	networkingv1alpha3 "istio.io/api/networking/v1alpha3"
	corev1 "k8s.io/api/core/v1"

	"github.com/weft-mesh/weft/mesh"
)

// labelAutoAddress on a ServiceEntry, with the value false, keeps its hosts
// without an address that they were not given by the user.
const labelAutoAddress = "networking.istio.io/enable-autoallocate-ip"

// The addresses that are given to hosts are those that Istio gives: they are in
// ranges that nobody routes (240.0.0.0/4 is RFC 1112's class E; 2001:2::/48 is
// for benchmarks, RFC 5180). A slot is the part that differs.
const slots = 1 << 16

func givenAddrs(slot uint16) (v4, v6 netip.Addr) {
	a6 := [16]byte{0x20, 0x01, 0x00, 0x02}
	binary.BigEndian.PutUint16(a6[14:], slot)
	return netip.AddrFrom4([4]byte{240, 240, byte(slot >> 8), byte(slot)}), netip.AddrFrom16(a6)
}

// slotOf returns the slot that an address was given from, or 0.
func slotOf(a netip.Addr) uint16 {
	b := a.AsSlice()
	slot := binary.BigEndian.Uint16(b[len(b)-2:])
	if v4, v6 := givenAddrs(slot); a == v4 || a == v6 {
		return slot
	}
	return 0
}

// wantsAddress reports whether the hosts are given addresses. Without one a name
// resolves to what it is outside of the mesh, and connections to it pass no
// waypoint. Names are looked up by waypoints only, so without one a host
// whose endpoints are names has to stay what it is. What cannot be followed gets
// an address, at which connections are refused.
func (e *serviceEntry) wantsAddress(bound bool) bool {
	if len(e.addresses) > 0 || e.Labels[labelAutoAddress] == "false" {
		return false
	}
	return e.closed || e.Spec.GetResolution() != networkingv1alpha3.ServiceEntry_NONE && (bound || !e.names())
}

// A giver gives addresses to hosts. Who has one keeps it: its clients may know
// it.
type giver struct {
	v4, v6 bool // the families of the cluster
	taken  map[uint16]mesh.ServiceName
	kept   map[mesh.ServiceName]uint16
}

// newGiver reads what has been given. entries are the oldest first.
func newGiver(services []mesh.Service, entries []*serviceEntry) *giver {
	g := &giver{taken: map[uint16]mesh.ServiceName{0: {}}, kept: map[mesh.ServiceName]uint16{}}
	for _, s := range services {
		for _, v := range s.VIPs {
			g.v4, g.v6 = g.v4 || v.Prefix.Addr().Is4(), g.v6 || v.Prefix.Addr().Is6()
		}
	}
	g.v4 = g.v4 || !g.v6
	for _, e := range entries {
		for _, p := range e.addresses {
			if slot := slotOf(p.Addr()); slot != 0 {
				g.taken[slot] = mesh.ServiceName{Namespace: e.Name.Namespace} // written by a user
			}
		}
	}
	for _, e := range entries {
		for _, h := range e.Given {
			name := mesh.ServiceName{Namespace: e.Name.Namespace, Host: h.Host}
			slot := slotOf(h.Address)
			if _, had := g.kept[name]; slot == 0 || had {
				continue
			}
			if _, taken := g.taken[slot]; !taken {
				g.taken[slot], g.kept[name] = name, slot
			}
		}
	}
	return g
}

// give returns the addresses of a host: the ones that it has, else the first
// free ones from a place that follows from its name.
func (g *giver) give(e *serviceEntry, host mesh.Host) []netip.Addr {
	name := mesh.ServiceName{Namespace: e.Name.Namespace, Host: host}
	slot, ok := g.kept[name]
	if !ok {
		h := fnv.New32a()
		_, _ = h.Write([]byte(name.String())) // it cannot fail
		first := uint16(h.Sum32())
		slot = first
		for {
			if _, taken := g.taken[slot]; !taken {
				break
			}
			if slot++; slot == first {
				e.found.bad("spec.addresses", "is empty, and all %d addresses are given away: write one", slots-1)
				return nil
			}
		}
		g.taken[slot], g.kept[name] = name, slot
	}
	v4, v6 := givenAddrs(slot)
	var out []netip.Addr
	if g.v4 {
		out = append(out, v4)
	}
	if g.v6 {
		out = append(out, v6)
	}
	return out
}

// addressOwners knows whose addresses a ServiceEntry may not claim: it would
// take away what is sent there.
type addressOwners struct {
	w     *World
	owner map[netip.Addr]string
	first map[netip.Prefix]mesh.Name // ServiceEntries that have claimed a range
}

func (w *World) addressOwners(pods []*corev1.Pod) *addressOwners {
	o := &addressOwners{w: w, owner: map[netip.Addr]string{}, first: map[netip.Prefix]mesh.Name{}}
	for _, p := range pods {
		if ended(p) {
			continue
		}
		for _, a := range PodAddrs(p) {
			o.owner[a] = fmt.Sprintf("pod %s/%s", p.Namespace, p.Name)
			if p.Spec.HostNetwork {
				o.owner[a] = "a node"
			}
		}
	}
	for i := range w.Services {
		for _, v := range w.Services[i].VIPs {
			o.owner[v.Prefix.Addr()] = w.origins[w.Services[i].Name].String()
		}
	}
	return o
}

// check takes from e the addresses that are somebody else's.
func (o *addressOwners) check(e *serviceEntry) {
	var kept []netip.Prefix
	for _, p := range e.addresses {
		why := o.holder(p)
		if first, ok := o.first[p]; ok && why == "" && first != e.Name {
			why = "ServiceEntry " + first.String()
		}
		// Pods come and go without all being compiled anew: but not these.
		o.w.ranges = append(o.w.ranges, p)
		if why != "" {
			e.found.bad("spec.addresses", "has %s, which is or holds the address of %s: it is not taken from there", text(p), why)
			continue
		}
		o.first[p] = e.Name
		kept = append(kept, p)
	}
	e.addresses = kept
}

// holder returns who has an address in p, the lowest if there are several.
func (o *addressOwners) holder(p netip.Prefix) string {
	if p.IsSingleIP() {
		return o.owner[p.Addr()]
	}
	var least netip.Addr
	for a := range o.owner {
		if p.Contains(a) && (!least.IsValid() || a.Less(least)) {
			least = a
		}
	}
	return o.owner[least]
}

// text returns a range as users write it.
func text(p netip.Prefix) string {
	if p.IsSingleIP() {
		return p.Addr().String()
	}
	return p.String()
}
