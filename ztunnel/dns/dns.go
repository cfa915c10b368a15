// Package dns decides what becomes of a pod's name queries: those for names of
// the mesh are answered from a view.View, everything else is for the resolver
// that the pod has asked. It has no sockets: a decision is a pure function of
// the View, the pod, the message and chance.
//
// Only names that the mesh knows are answered, and only for addresses. That a
// name does not exist is never said here: the pod's own resolver knows more
// names than the mesh does. Search paths are the client's work (resolv.conf(5)),
// so a name is looked up as it stands.
package dns

import (
	"math/rand/v2"
	"net/netip"
	"slices"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/view"
)

// TTL is how long a client may keep an answer, in seconds.
const TTL = 30

// A Client is the pod that asks.
type Client struct {
	Namespace string
	Network   string
}

// A Packet is one message of a client.
type Packet struct {
	Message []byte
	TCP     bool // without the two bytes of its length
	// Buffer is where the reply goes if it fits; nil makes one.
	Buffer []byte
}

// A Verdict says what becomes of a message. The zero Verdict is that nothing
// does.
type Verdict uint8

// The verdicts.
const (
	Drop    Verdict = iota // not a query
	Reply                  // send Decision.Message back
	Forward                // send the query on to whom it was for
)

// A Decision is what becomes of one message.
type Decision struct {
	Verdict Verdict
	// Message is the reply.
	Message []byte
	// Type is what was asked for, in lower case, for metrics; "other" for what
	// is rare.
	Type string
}

// Decide decides on a packet of a client. rnd is any random number: it orders
// the addresses of services that have no virtual one.
func Decide(v *view.View, from Client, p Packet, rnd uint64) Decision {
	q, problem := parse(p.Message)
	d := Decision{Verdict: Forward, Type: typeName(q.kind)}
	switch problem {
	case notQuery:
		d.Verdict = Drop
		return d
	case malformed:
		d.Verdict, d.Message = Reply, failure(p.Buffer[:0], p.Message, dnsmessage.RCodeFormatError)
		return d
	case strange:
		return d
	}
	addrs, ok := lookup(v, from, q, rnd)
	if !ok {
		return d
	}
	limit := maxTCP
	if !p.TCP {
		limit = min(q.udpSize, maxUDP)
	}
	// A question that could be read can be written; if not, it is not ours to
	// answer.
	if reply, err := answer(p.Buffer[:0], q, addrs, limit); err == nil {
		d.Verdict, d.Message = Reply, reply
	}
	return d
}

// lookup returns the addresses that q asks for, which may be none, and false if
// the mesh does not know the name or is not asked for addresses.
func lookup(v *view.View, from Client, q query, seed uint64) ([]netip.Addr, bool) {
	if !v.Synced() || q.class != dnsmessage.ClassINET || q.host == "" {
		return nil, false
	}
	switch q.kind {
	case dnsmessage.TypeA, dnsmessage.TypeAAAA:
	case typeSVCB, typeHTTPS:
		// Hints and other names in these would lead past the addresses here.
	default:
		return nil, false
	}
	s := v.Resolve(from.Namespace, q.host)
	if s == nil {
		return nil, false
	}
	all := virtual(s, from)
	if len(all) == 0 {
		all = endpoints(v, s, from, seed)
	}
	if len(all) == 0 {
		return nil, false // who is behind it, if anybody, the mesh does not know
	}
	return slices.DeleteFunc(all, func(a netip.Addr) bool {
		return !(q.kind == dnsmessage.TypeA && a.Is4() || q.kind == dnsmessage.TypeAAAA && a.Is6())
	}), true
}

// virtual returns the virtual addresses of s that the client can use. A range
// is nobody's address.
func virtual(s *mesh.Service, from Client) []netip.Addr {
	var out []netip.Addr
	for _, v := range s.VIPs {
		if v.Network != from.Network || !v.Prefix.IsSingleIP() {
			continue
		}
		if a := v.Prefix.Addr().Unmap(); wants(s, a) && !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	return out
}

// wants reports whether the name of s resolves to addresses of a's family.
func wants(s *mesh.Service, a netip.Addr) bool {
	switch s.IPFamilies {
	case "ipv4":
		return a.Is4()
	case "ipv6":
		return a.Is6()
	}
	return true
}

// endpoints returns the addresses of the workloads behind s that the client
// can reach and that may take connections, in an order that depends on seed.
func endpoints(v *view.View, s *mesh.Service, from Client, seed uint64) []netip.Addr {
	var out []netip.Addr
	seen := map[netip.Addr]bool{}
	for _, e := range v.Endpoints(s.Name) {
		if e.Workload.Network != from.Network || !e.Workload.Healthy && !s.AllowUnhealthy {
			continue
		}
		for _, a := range e.Workload.Addresses {
			if a = a.Unmap(); wants(s, a) && !seen[a] {
				seen[a] = true
				out = append(out, a)
			}
		}
	}
	rnd := rand.New(rand.NewPCG(seed, seed))
	rnd.Shuffle(len(out), func(i, j int) { out[i], out[j] = out[j], out[i] })
	return out
}
