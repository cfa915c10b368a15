package feed

import (
	"fmt"
	"math"
	"net/netip"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	pb "github.com/weft-mesh/weft/api/workload"
	"github.com/weft-mesh/weft/mesh"
)

// unknownCondition marks a match that has a condition the sender could not
// express: any extension a reader does not know makes the match unknown.
const unknownCondition = "weft.io/unknown-condition"

// Values of the wire that no version knows yet. Readers must deny for them.
const (
	unknownAction = pb.Action(math.MaxInt32)
	unknownScope  = pb.Scope(math.MaxInt32)
)

// FromPolicy translates a policy for the wire. An action or scope that is not
// set goes out as a value that no reader knows, so that all of them deny.
func FromPolicy(p mesh.Policy) *pb.Authorization {
	m := &pb.Authorization{
		Name:      p.Name.Name,
		Namespace: p.Name.Namespace,
		Scope:     unknownScope,
		Action:    unknownAction,
		DryRun:    p.DryRun,
	}
	switch p.Scope {
	case mesh.ScopeGlobal:
		m.Scope = pb.Scope_GLOBAL
	case mesh.ScopeNamespace:
		m.Scope = pb.Scope_NAMESPACE
	case mesh.ScopeSelector:
		m.Scope = pb.Scope_WORKLOAD_SELECTOR
	}
	switch p.Action {
	case mesh.Allow:
		m.Action = pb.Action_ALLOW
	case mesh.Deny:
		m.Action = pb.Action_DENY
	}
	for _, g := range p.Groups {
		group := &pb.Group{}
		for _, c := range g.Clauses {
			rules := &pb.Rules{}
			for _, x := range c.Matches {
				rules.Matches = append(rules.Matches, fromMatch(x))
			}
			group.Rules = append(group.Rules, rules)
		}
		m.Groups = append(m.Groups, group)
	}
	return m
}

func fromMatch(x mesh.Match) *pb.Match {
	m := &pb.Match{
		Namespaces:          each(x.Namespaces, fromString),
		NotNamespaces:       each(x.NotNamespaces, fromString),
		Principals:          each(x.Principals, fromString),
		NotPrincipals:       each(x.NotPrincipals, fromString),
		ServiceAccounts:     each(x.ServiceAccounts, fromAccount),
		NotServiceAccounts:  each(x.NotServiceAccounts, fromAccount),
		SourceIps:           each(x.SourceIPs, fromPrefix),
		NotSourceIps:        each(x.NotSourceIPs, fromPrefix),
		DestinationIps:      each(x.DestinationIPs, fromPrefix),
		NotDestinationIps:   each(x.NotDestinationIPs, fromPrefix),
		DestinationPorts:    each(x.DestinationPorts, func(p uint16) uint32 { return uint32(p) }),
		NotDestinationPorts: each(x.NotDestPorts, func(p uint16) uint32 { return uint32(p) }),
	}
	if x.Unknown || ofRequest(x) {
		m.Extensions = []*pb.Extension{{Name: unknownCondition}}
	}
	return m
}

// ofRequest reports whether x has a condition that is known of requests only,
// for which this message has no words.
func ofRequest(x mesh.Match) bool {
	for _, list := range [][]mesh.StringMatch{x.Methods, x.NotMethods, x.Hosts, x.NotHosts, x.Paths, x.NotPaths} {
		if len(list) > 0 {
			return true
		}
	}
	return len(x.Headers)+len(x.RemoteIPs)+len(x.NotRemoteIPs) > 0
}

// each translates a list; an empty one stays nil.
func each[A, B any](list []A, f func(A) B) []B {
	if len(list) == 0 {
		return nil
	}
	out := make([]B, len(list))
	for i, a := range list {
		out[i] = f(a)
	}
	return out
}

func fromString(s mesh.StringMatch) *pb.StringMatch {
	switch s.Kind {
	case mesh.MatchExact:
		return &pb.StringMatch{MatchType: &pb.StringMatch_Exact{Exact: s.Value}}
	case mesh.MatchPrefix:
		return &pb.StringMatch{MatchType: &pb.StringMatch_Prefix{Prefix: s.Value}}
	case mesh.MatchSuffix:
		return &pb.StringMatch{MatchType: &pb.StringMatch_Suffix{Suffix: s.Value}}
	case mesh.MatchPresence:
		return &pb.StringMatch{MatchType: &pb.StringMatch_Presence{Presence: &emptypb.Empty{}}}
	}
	return &pb.StringMatch{}
}

func fromAccount(a mesh.ServiceAccountMatch) *pb.ServiceAccountMatch {
	return &pb.ServiceAccountMatch{Namespace: a.Namespace, ServiceAccount: a.ServiceAccount}
}

func fromPrefix(p netip.Prefix) *pb.AddressRange {
	return &pb.AddressRange{Address: p.Addr().AsSlice(), Length: uint32(max(0, p.Bits()))}
}

// ToPolicy reads a policy from the wire. Its only error is a name that lacks a
// part. What it does not understand it keeps as something that denies: an
// action of a later version as ActionUnset; a scope of a later version as the
// whole namespace, with ActionUnset; a condition, or a field anywhere in the
// message, of a later version as Match.Unknown.
func ToPolicy(m *pb.Authorization) (mesh.Policy, error) {
	p := mesh.Policy{Name: mesh.Name{Namespace: m.GetNamespace(), Name: m.GetName()}, DryRun: m.GetDryRun()}
	switch m.GetAction() {
	case pb.Action_ALLOW:
		p.Action = mesh.Allow
	case pb.Action_DENY:
		p.Action = mesh.Deny
	}
	switch m.GetScope() {
	case pb.Scope_GLOBAL:
		p.Scope = mesh.ScopeGlobal
	case pb.Scope_NAMESPACE:
		p.Scope = mesh.ScopeNamespace
	case pb.Scope_WORKLOAD_SELECTOR:
		p.Scope = mesh.ScopeSelector
	default:
		p.Scope, p.Action = mesh.ScopeNamespace, mesh.ActionUnset
	}
	strange := len(m.GetExtensions()) > 0 || hasUnknown(m)
	for _, g := range m.GetGroups() {
		group := mesh.Group{}
		if strange || hasUnknown(g) {
			group.Clauses = append(group.Clauses, mesh.Clause{Matches: []mesh.Match{{Unknown: true}}})
		}
		for _, r := range g.GetRules() {
			c := mesh.Clause{}
			for _, x := range r.GetMatches() {
				c.Matches = append(c.Matches, toMatch(x, hasUnknown(r)))
			}
			if len(c.Matches) == 0 && hasUnknown(r) {
				c.Matches = []mesh.Match{{Unknown: true}}
			}
			group.Clauses = append(group.Clauses, c)
		}
		p.Groups = append(p.Groups, group)
	}
	if p.Name.Namespace == "" || p.Name.Name == "" {
		return p, fmt.Errorf("policy %q: its name lacks a part", p.Name)
	}
	return p, nil
}

// hasUnknown reports whether m has fields of a later version.
func hasUnknown(m proto.Message) bool { return len(m.ProtoReflect().GetUnknown()) > 0 }

// toMatch reads a match; strange says that its surroundings were not
// understood. Conditions that cannot be read make it unknown.
func toMatch(m *pb.Match, strange bool) mesh.Match {
	x := mesh.Match{
		Namespaces:         each(m.GetNamespaces(), toString),
		NotNamespaces:      each(m.GetNotNamespaces(), toString),
		Principals:         each(m.GetPrincipals(), toString),
		NotPrincipals:      each(m.GetNotPrincipals(), toString),
		ServiceAccounts:    each(m.GetServiceAccounts(), toAccount),
		NotServiceAccounts: each(m.GetNotServiceAccounts(), toAccount),
		Unknown:            strange || len(m.GetExtensions()) > 0 || hasUnknown(m),
	}
	ranges := func(ms []*pb.AddressRange) []netip.Prefix {
		return each(ms, func(m *pb.AddressRange) netip.Prefix {
			p, err := toPrefix(m.GetAddress(), m.GetLength())
			x.Unknown = x.Unknown || err != nil
			return p
		})
	}
	ports := func(ms []uint32) []uint16 {
		return each(ms, func(p uint32) uint16 {
			x.Unknown = x.Unknown || p == 0 || p > math.MaxUint16
			return uint16(p)
		})
	}
	x.SourceIPs, x.NotSourceIPs = ranges(m.GetSourceIps()), ranges(m.GetNotSourceIps())
	x.DestinationIPs, x.NotDestinationIPs = ranges(m.GetDestinationIps()), ranges(m.GetNotDestinationIps())
	x.DestinationPorts, x.NotDestPorts = ports(m.GetDestinationPorts()), ports(m.GetNotDestinationPorts())
	return x
}

// toString reads a string match; one of a later version has no kind.
func toString(m *pb.StringMatch) mesh.StringMatch {
	switch k := m.GetMatchType().(type) {
	case *pb.StringMatch_Exact:
		return mesh.StringMatch{Kind: mesh.MatchExact, Value: k.Exact}
	case *pb.StringMatch_Prefix:
		return mesh.StringMatch{Kind: mesh.MatchPrefix, Value: k.Prefix}
	case *pb.StringMatch_Suffix:
		return mesh.StringMatch{Kind: mesh.MatchSuffix, Value: k.Suffix}
	case *pb.StringMatch_Presence:
		return mesh.StringMatch{Kind: mesh.MatchPresence}
	}
	return mesh.StringMatch{}
}

func toAccount(m *pb.ServiceAccountMatch) mesh.ServiceAccountMatch {
	return mesh.ServiceAccountMatch{Namespace: m.GetNamespace(), ServiceAccount: m.GetServiceAccount()}
}
