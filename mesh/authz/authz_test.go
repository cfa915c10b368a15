package authz

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/weft-mesh/weft/mesh"
)

// One connection: cart of shop calls 10.0.0.2:8080 from 10.1.2.3.
func fact() Facts {
	return Facts{
		Peer:        mesh.Identity{TrustDomain: "td", Namespace: "shop", ServiceAccount: "cart"},
		Source:      netip.MustParseAddrPort("10.1.2.3:40000"),
		Destination: netip.MustParseAddrPort("10.0.0.2:8080"),
	}
}

func plain() Facts {
	f := fact()
	f.Peer = mesh.Identity{}
	return f
}

func exact(s string) []mesh.StringMatch {
	return []mesh.StringMatch{{Kind: mesh.MatchExact, Value: s}}
}
func kind(k mesh.MatchKind, s string) []mesh.StringMatch {
	return []mesh.StringMatch{{Kind: k, Value: s}}
}
func nets(s string) []netip.Prefix         { return []netip.Prefix{netip.MustParsePrefix(s)} }
func clause(ms ...mesh.Match) mesh.Clause  { return mesh.Clause{Matches: ms} }
func group(cs ...mesh.Clause) mesh.Group   { return mesh.Group{Clauses: cs} }
func groups(gs ...mesh.Group) []mesh.Group { return gs }
func one(m mesh.Match) []mesh.Group        { return groups(group(clause(m))) }
func presence() []mesh.StringMatch         { return kind(mesh.MatchPresence, "") }
func account(ns, n string) mesh.ServiceAccountMatch {
	return mesh.ServiceAccountMatch{Namespace: ns, ServiceAccount: n}
}

// yes and no are matches that do and do not hold for fact.
func yes() mesh.Match { return mesh.Match{Namespaces: exact("shop")} }
func no() mesh.Match  { return mesh.Match{Namespaces: exact("pay")} }

func TestMatches(t *testing.T) {
	for _, tc := range []struct {
		name   string
		groups []mesh.Group
		facts  Facts
		want   bool
	}{
		{"a policy without groups never matches", nil, fact(), false},
		{"a group without clauses matches", groups(group()), fact(), true},
		{"a clause without matches matches", groups(group(clause())), fact(), true},
		{"an empty match is passed over", one(mesh.Match{}), fact(), false},
		{"an empty match beside one that holds", groups(group(clause(mesh.Match{}, yes()))), fact(), true},
		{"an empty match beside one that does not", groups(group(clause(mesh.Match{}, no()))), fact(), false},
		{"an emptied clause stops its group", groups(group(clause(yes()), clause(mesh.Match{}))), fact(), false},
		{"groups are or", groups(group(clause(no())), group(clause(yes()))), fact(), true},
		{"clauses are and", groups(group(clause(yes()), clause(no()))), fact(), false},
		{"all clauses hold", groups(group(clause(yes()), clause(yes()))), fact(), true},
		{"matches are or", groups(group(clause(no(), yes()))), fact(), true},
		{"fields of a match are and", one(mesh.Match{Namespaces: exact("shop"), DestinationPorts: []uint16{1}}), fact(), false},
		{"values of a field are or", one(mesh.Match{DestinationPorts: []uint16{1, 8080}}), fact(), true},

		{"namespace is the peer's", one(mesh.Match{Namespaces: exact("shop")}), fact(), true},
		{"not namespace", one(mesh.Match{NotNamespaces: exact("shop")}), fact(), false},
		{"not another namespace", one(mesh.Match{NotNamespaces: exact("pay")}), fact(), true},
		{"principal is written without its scheme", one(mesh.Match{Principals: exact("td/ns/shop/sa/cart")}), fact(), true},
		{"principal with a scheme is another text", one(mesh.Match{Principals: exact("spiffe://td/ns/shop/sa/cart")}), fact(), false},
		{"principal prefix", one(mesh.Match{Principals: kind(mesh.MatchPrefix, "td/ns/shop/")}), fact(), true},
		{"principal prefix of another", one(mesh.Match{Principals: kind(mesh.MatchPrefix, "td/ns/shopp")}), fact(), false},
		{"principal suffix", one(mesh.Match{Principals: kind(mesh.MatchSuffix, "/sa/cart")}), fact(), true},
		{"principal presence", one(mesh.Match{Principals: presence()}), fact(), true},
		{"not principal", one(mesh.Match{NotPrincipals: exact("td/ns/shop/sa/cart")}), fact(), false},
		{"one of two not values is enough to fail", one(mesh.Match{NotPrincipals: append(exact("x"), exact("td/ns/shop/sa/cart")...)}), fact(), false},
		{"want and not want together", one(mesh.Match{Namespaces: exact("shop"), NotPrincipals: kind(mesh.MatchSuffix, "/sa/cart")}), fact(), false},
		{"service account", one(mesh.Match{ServiceAccounts: []mesh.ServiceAccountMatch{account("shop", "cart")}}), fact(), true},
		{"service account of another namespace", one(mesh.Match{ServiceAccounts: []mesh.ServiceAccountMatch{account("pay", "cart")}}), fact(), false},
		{"not service account", one(mesh.Match{NotServiceAccounts: []mesh.ServiceAccountMatch{account("shop", "cart")}}), fact(), false},
		{"source range", one(mesh.Match{SourceIPs: nets("10.1.0.0/16")}), fact(), true},
		{"source outside of range", one(mesh.Match{SourceIPs: nets("10.2.0.0/16")}), fact(), false},
		{"not source range", one(mesh.Match{NotSourceIPs: nets("10.1.0.0/16")}), fact(), false},
		{"range in mapped form", one(mesh.Match{SourceIPs: nets("::ffff:10.1.0.0/112")}), fact(), true},
		{"an IPv6 range holds no IPv4 address", one(mesh.Match{SourceIPs: nets("::/0")}), fact(), false},
		{"mapped source", one(mesh.Match{SourceIPs: nets("10.1.0.0/16")}), func() Facts {
			f := fact()
			f.Source = netip.MustParseAddrPort("[::ffff:10.1.2.3]:1")
			return f
		}(), true},
		{"destination range", one(mesh.Match{DestinationIPs: nets("10.0.0.2/32")}), fact(), true},
		{"not destination range", one(mesh.Match{NotDestinationIPs: nets("10.0.0.2/32")}), fact(), false},
		{"destination port", one(mesh.Match{DestinationPorts: []uint16{8080}}), fact(), true},
		{"source port is not destination port", one(mesh.Match{DestinationPorts: []uint16{40000}}), fact(), false},
		{"not destination port", one(mesh.Match{NotDestPorts: []uint16{8080}}), fact(), false},

		{"nobody has no principal", one(mesh.Match{Principals: presence()}), plain(), false},
		{"nobody has not even an empty prefix", one(mesh.Match{Principals: kind(mesh.MatchPrefix, "")}), plain(), false},
		{"nobody is not the empty text", one(mesh.Match{Principals: exact("")}), plain(), false},
		{"nobody has no namespace", one(mesh.Match{Namespaces: kind(mesh.MatchSuffix, "")}), plain(), false},
		{"nobody is in no namespace", one(mesh.Match{NotNamespaces: exact("shop")}), plain(), true},
		{"nobody is not a principal: strict mutual TLS", one(mesh.Match{NotPrincipals: presence()}), plain(), true},
		{"somebody is a principal", one(mesh.Match{NotPrincipals: presence()}), fact(), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for _, action := range []mesh.Action{mesh.Allow, mesh.Deny} {
				p := &mesh.Policy{Action: action, Groups: tc.groups}
				if got := matches(p, &tc.facts); got != tc.want {
					t.Errorf("%v policy matches: %v, want %v", action, got, tc.want)
				}
			}
		})
	}
}

func TestWhatIsUnknownNeverWidensAccess(t *testing.T) {
	noSource, noDestination := fact(), fact()
	noSource.Source = netip.AddrPort{}
	noDestination.Destination = netip.AddrPort{}
	for _, tc := range []struct {
		name  string
		match mesh.Match
		facts Facts
	}{
		{"condition of a later version", mesh.Match{Unknown: true}, fact()},
		{"beside one that holds", mesh.Match{Unknown: true, Namespaces: exact("shop")}, fact()},
		{"beside one that does not", mesh.Match{Unknown: true, Namespaces: exact("pay")}, fact()},
		{"string match of no kind", mesh.Match{Principals: kind(mesh.MatchUnset, "x")}, fact()},
		{"not string match of no kind", mesh.Match{NotPrincipals: kind(mesh.MatchUnset, "x")}, fact()},
		{"string match of a later kind", mesh.Match{NotNamespaces: kind(99, "x")}, fact()},
		{"not range that is none", mesh.Match{NotSourceIPs: []netip.Prefix{{}}}, fact()},
		{"not port that is none", mesh.Match{NotDestPorts: []uint16{0}}, fact()},
		{"not account that is none", mesh.Match{NotServiceAccounts: []mesh.ServiceAccountMatch{{}}}, fact()},
		{"not range, but the source is unknown", mesh.Match{NotSourceIPs: nets("10.0.0.0/8")}, noSource},
		{"not range, but the destination is unknown", mesh.Match{NotDestinationIPs: nets("10.0.0.0/8")}, noDestination},
		{"not port, but the destination is unknown", mesh.Match{NotDestPorts: []uint16{80}}, noDestination},
	} {
		t.Run(tc.name, func(t *testing.T) {
			allow := &mesh.Policy{Action: mesh.Allow, Groups: one(tc.match)}
			deny := &mesh.Policy{Action: mesh.Deny, Groups: one(tc.match)}
			if Decide([]*mesh.Policy{allow}, nil, tc.facts).Allowed {
				t.Error("an allow policy let it pass")
			}
			if Decide([]*mesh.Policy{deny}, nil, tc.facts).Allowed {
				t.Error("a deny policy let it pass")
			}
		})
	}
}

// policy makes one that matches fact, or not.
func policy(name string, a mesh.Action, matching bool) *mesh.Policy {
	m := no()
	if matching {
		m = yes()
	}
	return &mesh.Policy{Name: mesh.Name{Namespace: "shop", Name: name}, Action: a, Groups: one(m)}
}

func dry(p *mesh.Policy) *mesh.Policy {
	p.DryRun = true
	return p
}

func TestDecide(t *testing.T) {
	const allow, deny = mesh.Allow, mesh.Deny
	list := func(ps ...*mesh.Policy) []*mesh.Policy { return ps }
	for _, tc := range []struct {
		name    string
		ps      []*mesh.Policy
		missing []mesh.Name
		want    Decision
	}{
		{"no policies", nil, nil,
			Decision{Allowed: true, Reason: "allowed: no policy forbids it"}},
		{"deny matches", list(policy("d", deny, true)), nil,
			Decision{Policy: mesh.Name{Namespace: "shop", Name: "d"}, Reason: "denied by policy shop/d"}},
		{"deny does not match", list(policy("d", deny, false)), nil,
			Decision{Allowed: true, Reason: "allowed: no policy forbids it"}},
		{"allow matches", list(policy("a", allow, true)), nil,
			Decision{Allowed: true, Policy: mesh.Name{Namespace: "shop", Name: "a"}, Reason: "allowed by policy shop/a"}},
		{"one allow does not match", list(policy("a", allow, false)), nil,
			Decision{Policy: mesh.Name{Namespace: "shop", Name: "a"}, Reason: "denied: allow policy shop/a does not match"}},
		{"no allow of two matches", list(policy("a", allow, false), policy("b", allow, false)), nil,
			Decision{Reason: "denied: none of 2 allow policies matches"}},
		{"one allow of two is enough", list(policy("a", allow, false), policy("b", allow, true)), nil,
			Decision{Allowed: true, Policy: mesh.Name{Namespace: "shop", Name: "b"}, Reason: "allowed by policy shop/b"}},
		{"deny goes before allow, whatever the order", list(policy("a", allow, true), policy("d", deny, true)), nil,
			Decision{Policy: mesh.Name{Namespace: "shop", Name: "d"}, Reason: "denied by policy shop/d"}},
		{"allow without groups denies all", list(&mesh.Policy{Name: mesh.Name{Namespace: "shop", Name: "a"}, Action: allow}), nil,
			Decision{Policy: mesh.Name{Namespace: "shop", Name: "a"}, Reason: "denied: allow policy shop/a does not match"}},
		{"missing policy", list(policy("a", allow, true)), []mesh.Name{{Namespace: "shop", Name: "x"}},
			Decision{Policy: mesh.Name{Namespace: "shop", Name: "x"}, Reason: "denied: policy shop/x applies, but has not arrived"}},
		{"nothing is known", nil, []mesh.Name{{}},
			Decision{Reason: "denied: the policies for this workload are not known yet"}},
		{"nil policy", list(policy("a", allow, true), nil), nil,
			Decision{Reason: "denied: the policies for this workload are not known yet"}},
		{"action unset", list(policy("a", allow, true), policy("u", mesh.ActionUnset, false)), nil,
			Decision{Policy: mesh.Name{Namespace: "shop", Name: "u"}, Reason: "denied by policy shop/u: its action is not known to this version"}},
		{"action of a later version", list(policy("u", 77, false)), nil,
			Decision{Policy: mesh.Name{Namespace: "shop", Name: "u"}, Reason: "denied by policy shop/u: its action is not known to this version"}},
		{"dry run deny has no say", list(dry(policy("d", deny, true))), nil,
			Decision{Allowed: true, Reason: "allowed: no policy forbids it", DryRun: []mesh.Name{{Namespace: "shop", Name: "d"}}}},
		{"dry run deny that does not match", list(dry(policy("d", deny, false))), nil,
			Decision{Allowed: true, Reason: "allowed: no policy forbids it"}},
		{"dry run allow has no say", list(dry(policy("a", allow, false))), nil,
			Decision{Allowed: true, Reason: "allowed: no policy forbids it", DryRun: []mesh.Name{{Namespace: "shop", Name: "a"}}}},
		{"dry run allow does not allow", list(policy("a", allow, false), dry(policy("b", allow, true))), nil,
			Decision{Policy: mesh.Name{Namespace: "shop", Name: "a"}, Reason: "denied: allow policy shop/a does not match"}},
		{"dry run allow beside one that matches", list(policy("a", allow, true), dry(policy("b", allow, false))), nil,
			Decision{Allowed: true, Policy: mesh.Name{Namespace: "shop", Name: "a"}, Reason: "allowed by policy shop/a"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := Decide(tc.ps, tc.missing, fact())
			if got.Allowed != tc.want.Allowed || got.Policy != tc.want.Policy || got.Reason != tc.want.Reason || !slices.Equal(got.DryRun, tc.want.DryRun) {
				t.Errorf("Decide = %+v\nwant     %+v", got, tc.want)
			}
		})
	}
}

func TestZeroDecisionDenies(t *testing.T) {
	if (Decision{}).Allowed {
		t.Error("the zero Decision allows")
	}
}

func TestStrict(t *testing.T) {
	strict := &mesh.Policy{Name: mesh.Name{Namespace: "root", Name: "strict"}, Action: mesh.Deny, Groups: one(mesh.Match{NotPrincipals: presence()})}
	if Decide([]*mesh.Policy{strict}, nil, plain()).Allowed {
		t.Error("plain text passed under STRICT")
	}
	if d := Decide([]*mesh.Policy{strict}, nil, fact()); !d.Allowed {
		t.Errorf("mutual TLS was refused under STRICT: %s", d.Reason)
	}
}

func BenchmarkDecide(b *testing.B) {
	ps := []*mesh.Policy{policy("d", mesh.Deny, false), policy("a", mesh.Allow, false), policy("b", mesh.Allow, true)}
	f := fact()
	b.ReportAllocs()
	for b.Loop() {
		if !Decide(ps, nil, f).Allowed {
			b.Fatal("denied")
		}
	}
}
