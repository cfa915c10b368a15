package authz

import (
	"net/netip"
	"slices"

	"github.com/weft-mesh/weft/mesh"
)

// matches reports whether any group of p holds: all clauses of a group, any
// match of a clause. A group without clauses and a clause without matches
// hold; a policy without groups never does.
//
// A path that servers may read in two ways has to be allowed in both, and is
// denied in either.
func matches(p *mesh.Policy, f *Facts) bool {
	e := evaluation{Facts: f, unknown: p.Action == mesh.Deny}
	e.source = f.Source.Addr().Unmap().WithZone("")
	e.destination = f.Destination.Addr().Unmap().WithZone("")
	if f.HTTP == nil {
		return e.groups(p)
	}
	e.path = f.HTTP.Path
	e.remote = f.HTTP.RemoteIP.Unmap().WithZone("")
	first := e.groups(p)
	if len(f.HTTP.Unslashed) == 0 || first == e.unknown {
		return first
	}
	e.path = f.HTTP.Unslashed
	return e.groups(p)
}

// An evaluation is one policy against one connection or request.
type evaluation struct {
	*Facts
	source, destination, remote netip.Addr // unmapped
	path                        []byte
	unknown                     bool // what a condition that is not understood yields
}

func (e *evaluation) groups(p *mesh.Policy) bool {
	for i := range p.Groups {
		if e.group(&p.Groups[i]) {
			return true
		}
	}
	return false
}

func (e *evaluation) group(g *mesh.Group) bool {
	for i := range g.Clauses {
		if !e.clause(&g.Clauses[i]) {
			return false
		}
	}
	return true
}

// clause passes over empty matches, so a clause that has nothing but those
// does not hold; one without any does.
func (e *evaluation) clause(c *mesh.Clause) bool {
	if len(c.Matches) == 0 {
		return true
	}
	for i := range c.Matches {
		if m := &c.Matches[i]; !empty(m) && e.match(m) {
			return true
		}
	}
	return false
}

func empty(m *mesh.Match) bool {
	return !m.Unknown &&
		len(m.Namespaces)+len(m.NotNamespaces)+len(m.Principals)+len(m.NotPrincipals)+
			len(m.ServiceAccounts)+len(m.NotServiceAccounts)+len(m.SourceIPs)+len(m.NotSourceIPs)+
			len(m.DestinationIPs)+len(m.NotDestinationIPs)+len(m.DestinationPorts)+len(m.NotDestPorts) == 0 &&
		!ofRequest(m)
}

// match holds if every field that is set holds.
func (e *evaluation) match(m *mesh.Match) bool {
	if e.notUnderstood(m) {
		return e.unknown
	}
	namespace, principal := e.Peer.Namespace, ""
	if len(m.Principals)+len(m.NotPrincipals) > 0 {
		principal = e.Peer.Principal()
	}
	return fits(m.Namespaces, m.NotNamespaces, func(s mesh.StringMatch) bool { return text(s, namespace) }) &&
		fits(m.Principals, m.NotPrincipals, func(s mesh.StringMatch) bool { return text(s, principal) }) &&
		fits(m.ServiceAccounts, m.NotServiceAccounts, e.serviceAccount) &&
		fits(m.SourceIPs, m.NotSourceIPs, func(p netip.Prefix) bool { return contains(p, e.source) }) &&
		fits(m.DestinationIPs, m.NotDestinationIPs, func(p netip.Prefix) bool { return contains(p, e.destination) }) &&
		fits(m.DestinationPorts, m.NotDestPorts, func(p uint16) bool { return p == e.Destination.Port() }) &&
		(!ofRequest(m) || e.request(m))
}

// fits reports whether one of want holds, if there are any, and none of not.
func fits[T any](want, not []T, holds func(T) bool) bool {
	return (len(want) == 0 || slices.ContainsFunc(want, holds)) && !slices.ContainsFunc(not, holds)
}

// notUnderstood reports whether m has a condition that cannot be judged: one
// that did not survive the wire, or one about an address that is not known. A
// Not list of such conditions would otherwise hold by ignorance.
func (e *evaluation) notUnderstood(m *mesh.Match) bool {
	invalid := func(p netip.Prefix) bool { return !p.IsValid() }
	zero := func(p uint16) bool { return p == 0 }
	nobody := func(a mesh.ServiceAccountMatch) bool { return a.Namespace == "" || a.ServiceAccount == "" }
	return m.Unknown ||
		slices.ContainsFunc(m.Namespaces, strange) || slices.ContainsFunc(m.NotNamespaces, strange) ||
		slices.ContainsFunc(m.Principals, strange) || slices.ContainsFunc(m.NotPrincipals, strange) ||
		slices.ContainsFunc(m.ServiceAccounts, nobody) || slices.ContainsFunc(m.NotServiceAccounts, nobody) ||
		slices.ContainsFunc(m.SourceIPs, invalid) || slices.ContainsFunc(m.NotSourceIPs, invalid) ||
		slices.ContainsFunc(m.DestinationIPs, invalid) || slices.ContainsFunc(m.NotDestinationIPs, invalid) ||
		slices.ContainsFunc(m.DestinationPorts, zero) || slices.ContainsFunc(m.NotDestPorts, zero) ||
		!e.source.IsValid() && len(m.SourceIPs)+len(m.NotSourceIPs) > 0 ||
		!e.destination.IsValid() && len(m.DestinationIPs)+len(m.NotDestinationIPs) > 0 ||
		e.Destination.Port() == 0 && len(m.DestinationPorts)+len(m.NotDestPorts) > 0 ||
		ofRequest(m) && e.requestNotUnderstood(m)
}

// strange reports whether s is of a kind that is not known, or not for texts in
// general.
func strange(s mesh.StringMatch) bool {
	return s.Kind == mesh.MatchUnset || s.Kind > mesh.MatchPresence
}

// text compares one string. The empty string is an absent one: nothing matches
// it, not even an empty prefix.
func text[T string | []byte](m mesh.StringMatch, s T) bool {
	if len(s) == 0 {
		return false
	}
	switch n := len(m.Value); m.Kind {
	case mesh.MatchExact:
		return string(s) == m.Value
	case mesh.MatchPrefix:
		return len(s) >= n && string(s[:n]) == m.Value
	case mesh.MatchSuffix:
		return len(s) >= n && string(s[len(s)-n:]) == m.Value
	case mesh.MatchPresence:
		return true
	}
	return false
}

func (e *evaluation) serviceAccount(m mesh.ServiceAccountMatch) bool {
	return !e.Peer.IsZero() && e.Peer.Namespace == m.Namespace && e.Peer.ServiceAccount == m.ServiceAccount
}

// contains compares addresses of one family; p may be written mapped.
func contains(p netip.Prefix, a netip.Addr) bool {
	if p.Addr().Is4In6() && p.Bits() >= 96 {
		p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	return p.Contains(a)
}
