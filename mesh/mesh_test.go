package mesh

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseIdentity(t *testing.T) {
	good := Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "cart"}
	for _, tc := range []struct {
		in   string
		want Identity
	}{
		{"spiffe://cluster.local/ns/shop/sa/cart", good},
		{"", Identity{}},
		{"cluster.local/ns/shop/sa/cart", Identity{}},
		{"SPIFFE://cluster.local/ns/shop/sa/cart", Identity{}},
		{"spiffe://cluster.local/ns/shop/sa/cart/", Identity{}},
		{"spiffe://cluster.local/ns//sa/cart", Identity{}},
		{"spiffe:///ns/shop/sa/cart", Identity{}},
		{"spiffe://cluster.local/sa/cart/ns/shop", Identity{}},
		{"spiffe://cluster.local/ns/shop/sa/c%61rt", Identity{}},
		{"spiffe://cluster.local/ns/shop/sa/cart?x", Identity{}},
		{"spiffe://user@cluster.local/ns/shop/sa/cart", Identity{}},
		{"spiffe://cluster.local/ns/shop/sa/cart\n", Identity{}},
		{"spiffe://cluster.local/ns/shóp/sa/cart", Identity{}},
		{"spiffe://cluster.local/ns/../sa/cart", Identity{}},
		{"spiffe://cluster.local/ns/./sa/cart", Identity{}},
		{"spiffe://cluster.local/ns/shop/sa/..", Identity{}},
		{"spiffe://cluster.local/ns/shop/sa/.", Identity{}},
		{"spiffe://../ns/shop/sa/cart", Identity{}},
		{"spiffe://cluster.local/ns/shop/sa/...", Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "..."}},
	} {
		got, err := ParseIdentity(tc.in)
		if got != tc.want || (err == nil) != (tc.want != Identity{}) {
			t.Errorf("ParseIdentity(%q) = %v, %v; want %v", tc.in, got, err, tc.want)
		}
	}
	if s := (Identity{}).String(); s != "" {
		t.Errorf("the zero identity writes %q, want nothing", s)
	}
}

func FuzzParseIdentity(f *testing.F) {
	f.Add("spiffe://cluster.local/ns/shop/sa/cart")
	f.Add("spiffe://a/ns/b/sa/c/")
	f.Fuzz(func(t *testing.T, s string) {
		id, err := ParseIdentity(s)
		switch {
		case err != nil && !id.IsZero():
			t.Fatalf("ParseIdentity(%q) gave %v with error %v", s, id, err)
		case err == nil && id.String() != s:
			t.Fatalf("ParseIdentity(%q) writes %q", s, id)
		}
	})
}

func FuzzParseNames(f *testing.F) {
	f.Add("shop/cart.shop.svc.cluster.local")
	f.Add("a/b/c")
	f.Fuzz(func(t *testing.T, s string) {
		if n, err := ParseName(s); err == nil && n.String() != s {
			t.Fatalf("ParseName(%q) writes %q", s, n)
		}
		if n, err := ParseServiceName(s); err == nil && n.String() != s {
			t.Fatalf("ParseServiceName(%q) writes %q", s, n)
		}
	})
}

func TestWords(t *testing.T) {
	type enums struct {
		T Transport
		A Action
		K MatchKind
	}
	for _, tc := range []struct {
		in   enums
		want string
	}{
		{enums{}, `{"T":"unset","A":"unset","K":"unset"}`},
		{enums{PlainTCP, Allow, MatchExact}, `{"T":"plain","A":"allow","K":"exact"}`},
		{enums{HBONE, Deny, MatchPresence}, `{"T":"hbone","A":"deny","K":"presence"}`},
	} {
		b, err := json.Marshal(tc.in)
		if err != nil || string(b) != tc.want {
			t.Errorf("wrote %s (%v), want %s", b, err, tc.want)
		}
		var got enums
		if err := json.Unmarshal(b, &got); err != nil || got != tc.in {
			t.Errorf("read %s as %v (%v)", b, got, err)
		}
	}
	for _, s := range []string{`{"T":"quic"}`, `{"A":"audit"}`, `{"K":"regex"}`, `{"T":"transport(9)"}`} {
		if err := json.Unmarshal([]byte(s), new(enums)); err == nil {
			t.Errorf("%s was read without an error", s)
		}
	}
	if s := Transport(9).String(); s != "transport(9)" {
		t.Errorf("unknown transport writes %q", s)
	}
}

// valid returns a valid object of each kind.
func valid() (Workload, Service, Policy) {
	w := Workload{
		UID:       "c//Pod/shop/cart",
		Name:      Name{"shop", "cart"},
		Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")},
		Identity:  Identity{"td", "shop", "cart"},
		Transport: HBONE,
		Services:  []Membership{{Service: ServiceName{"shop", "cart.svc"}, Ports: []Port{{Service: 80, Target: 8080}}}},
	}
	s := Service{Name: ServiceName{"shop", "cart.svc"}, VIPs: []VIP{{Prefix: netip.MustParsePrefix("10.96.0.1/32")}}}
	p := Policy{Name: Name{"shop", "p"}, Scope: ScopeSelector, Action: Allow}
	return w, s, p
}

func TestValidate(t *testing.T) {
	w, s, p := valid()
	for _, err := range []error{w.Validate(), s.Validate(), p.Validate()} {
		if err != nil {
			t.Errorf("valid object: %v", err)
		}
	}
	for _, tc := range []struct {
		want string // part of the complaint
		edit func(*Workload, *Service, *Policy)
	}{
		{"uid is empty", func(w *Workload, _ *Service, _ *Policy) { w.UID = "" }},
		{"lacks a part", func(w *Workload, _ *Service, _ *Policy) { w.Name.Namespace = "" }},
		{"not a plain IPv4", func(w *Workload, _ *Service, _ *Policy) { w.Addresses[0] = netip.MustParseAddr("::ffff:10.0.0.1") }},
		{"not a plain IPv4", func(w *Workload, _ *Service, _ *Policy) { w.Addresses[0] = netip.MustParseAddr("fe80::1%eth0") }},
		{"transport(9)", func(w *Workload, _ *Service, _ *Policy) { w.Transport = 9 }},
		{"nobody could be verified", func(w *Workload, _ *Service, _ *Policy) { w.Identity = Identity{} }},
		{"0 is not a port", func(w *Workload, _ *Service, _ *Policy) { w.Services[0].Ports[0].Target = 0 }},
		{"both service", func(w *Workload, _ *Service, _ *Policy) {
			w.Waypoint = GatewayRef{Service: ServiceName{"a", "b"}, Address: netip.MustParseAddr("10.0.0.9")}
		}},
		{"waypoint", func(_ *Workload, s *Service, _ *Policy) { s.Waypoint.Port = 1 }},
		{"not a network prefix", func(_ *Workload, s *Service, _ *Policy) { s.VIPs[0].Prefix = netip.MustParsePrefix("10.0.0.1/8") }},
		{"preference", func(_ *Workload, s *Service, _ *Policy) { s.Preferences = []Preference{"planet"} }},
		{"balance mode", func(_ *Workload, s *Service, _ *Policy) { s.Mode = "luck" }},
		{"ip families", func(_ *Workload, s *Service, _ *Policy) { s.IPFamilies = "ipx" }},
		{"scope", func(_ *Workload, _ *Service, p *Policy) { p.Scope = "" }},
		{"neither allow nor deny", func(_ *Workload, _ *Service, p *Policy) { p.Action = ActionUnset }},
		{"group 0, clause 0, match 0: string match unset", func(_ *Workload, _ *Service, p *Policy) {
			p.Groups = []Group{{Clauses: []Clause{{Matches: []Match{{NotPrincipals: make([]StringMatch, 1)}}}}}}
		}},
	} {
		w, s, p := valid()
		tc.edit(&w, &s, &p)
		var all strings.Builder
		for _, err := range []error{w.Validate(), s.Validate(), p.Validate()} {
			if err != nil {
				all.WriteString(err.Error())
			}
		}
		if !strings.Contains(all.String(), tc.want) {
			t.Errorf("complaint %q, want one with %q", all.String(), tc.want)
		}
	}
}

func TestJSONRoundTrip(t *testing.T) {
	w, s, _ := valid()
	p := Policy{Name: Name{"shop", "p"}, Scope: ScopeNamespace, Action: Deny, DryRun: true, Groups: []Group{{Clauses: []Clause{{Matches: []Match{
		{Principals: []StringMatch{{MatchSuffix, "x"}}, SourceIPs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, DestinationPorts: []uint16{80}, Unknown: true},
	}}}}}}
	check := func(in, out any) {
		t.Helper()
		b, err := json.Marshal(in)
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(b, out); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(in, out, cmp.Comparer(func(a, b netip.Addr) bool { return a == b }), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); d != "" {
			t.Errorf("JSON round trip (-in +out):\n%s", d)
		}
	}
	check(&w, &Workload{})
	check(&s, &Service{})
	check(&p, &Policy{})
}
