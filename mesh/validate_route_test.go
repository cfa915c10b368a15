package mesh

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func validL7() (Route, TrafficPolicy, Waypoint, Policy) {
	cart := ServiceName{"shop", "cart.svc"}
	path, code := "/new", 14
	r := Route{RouteKey: RouteKey{Service: cart, Port: 80, Protocol: RouteHTTP}, Rules: []Rule{{
		Name: "r",
		Matches: []RequestMatch{{Path: &PathMatch{Kind: PathSegment, Value: "/a"}, Method: &TextMatch{Kind: TextExact, Value: "GET"},
			Headers: []FieldMatch{{Name: "x-a", TextMatch: TextMatch{Kind: TextPresence}, Not: true}}, Query: []FieldMatch{{Name: "q", TextMatch: TextMatch{Kind: TextRegex, Value: "."}}}}},
		Backends: []Backend{{Service: cart, Weight: 1}},
		Rewrite:  &Rewrite{Path: &path},
		Fault:    &Fault{Delay: &FaultDelay{PerMillion: 1, For: 1e9}, Abort: &FaultAbort{PerMillion: 2, GRPCStatus: &code}},
		Mirrors:  []Mirror{{Backend: Backend{Service: cart}, PerMillion: 1_000_000}},
		Session:  &Session{Cookie: "c"},
	}, {Redirect: &Redirect{Status: 302, DerivePort: "scheme"}}, {Broken: "why"}}}
	p := TrafficPolicy{Service: cart, Balance: Balance{Algorithm: RingHash, Hash: &HashKey{Header: "x"}}, TLS: &UpstreamTLS{Mode: TLSSimple}}
	w := Waypoint{Name: Name{"shop", "waypoint"}, Service: ServiceName{"shop", "waypoint.svc"}, Identity: Identity{"td", "shop", "waypoint"}, For: "service", AccessLog: "json"}
	a := Policy{Name: Name{"shop", "p"}, Scope: ScopeTarget, Action: Deny, Targets: []Target{{Service: cart}, {Waypoint: w.Name}},
		Groups: []Group{{Clauses: []Clause{{Matches: []Match{{
			Methods: []StringMatch{{MatchExact, "GET"}}, NotHosts: []StringMatch{{MatchSuffix, ".x"}}, Paths: []StringMatch{{MatchTemplate, "/a/{*}/{**}"}},
			Headers: []HeaderMatch{{Name: "x-a", NotValues: []StringMatch{{MatchPresence, ""}}}}, RemoteIPs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")},
		}}}}}}}
	return r, p, w, a
}

func TestValidateL7(t *testing.T) {
	complaints := func(r Route, p TrafficPolicy, w Waypoint, a Policy) string {
		var all strings.Builder
		for _, err := range []error{r.Validate(), p.Validate(), w.Validate(), a.Validate()} {
			if err != nil {
				all.WriteString(err.Error() + "\n")
			}
		}
		return all.String()
	}
	if got := complaints(validL7()); got != "" {
		t.Errorf("valid objects: %s", got)
	}
	match := func(a *Policy) *Match { return &a.Groups[0].Clauses[0].Matches[0] }
	for _, tc := range []struct {
		want string
		edit func(*Route, *TrafficPolicy, *Waypoint, *Policy)
	}{
		{"service \"/\" lacks a part", func(r *Route, _ *TrafficPolicy, _ *Waypoint, _ *Policy) { r.Service = ServiceName{} }},
		{"protocol", func(r *Route, _ *TrafficPolicy, _ *Waypoint, _ *Policy) { r.Protocol = "" }},
		{"no request to compare", func(r *Route, _ *TrafficPolicy, _ *Waypoint, _ *Policy) { r.Protocol = RouteTCP }},
		{"server names", func(r *Route, _ *TrafficPolicy, _ *Waypoint, _ *Policy) { r.Rules[0].Matches[0].SNI = []string{"a"} }},
		{"compare destinations", func(r *Route, _ *TrafficPolicy, _ *Waypoint, _ *Policy) {
			r.Rules[0].Matches[0].DestinationSubnets = make([]netip.Prefix, 1)
		}},
		{"rule 0: match 0: path match of kind", func(r *Route, _ *TrafficPolicy, _ *Waypoint, _ *Policy) { r.Rules[0].Matches[0].Path.Kind = "x" }},
		{"text match of kind", func(r *Route, _ *TrafficPolicy, _ *Waypoint, _ *Policy) { r.Rules[0].Matches[0].Query[0].Kind = "" }},
		{"header name", func(r *Route, _ *TrafficPolicy, _ *Waypoint, _ *Policy) {
			r.Rules[0].Matches[0].Headers[0].Name = "X-A"
		}},
		{"more than one way", func(r *Route, _ *TrafficPolicy, _ *Waypoint, _ *Policy) {
			r.Rules[0].Rewrite.Prefix = r.Rules[0].Rewrite.Path
		}},
		{"of a million", func(r *Route, _ *TrafficPolicy, _ *Waypoint, _ *Policy) { r.Rules[0].Mirrors[0].PerMillion++ }},
		{"grpc status 17", func(r *Route, _ *TrafficPolicy, _ *Waypoint, _ *Policy) { *r.Rules[0].Fault.Abort.GRPCStatus = 17 }},
		{"redirect: status 200", func(r *Route, _ *TrafficPolicy, _ *Waypoint, _ *Policy) { r.Rules[1].Redirect.Status = 200 }},
		{"either a cookie or a header", func(r *Route, _ *TrafficPolicy, _ *Waypoint, _ *Policy) { r.Rules[0].Session.Header = "x" }},
		{"negative", func(r *Route, _ *TrafficPolicy, _ *Waypoint, _ *Policy) { r.Rules[0].Timeout = -1 }},
		{"header name \"a b\"", func(r *Route, _ *TrafficPolicy, _ *Waypoint, _ *Policy) {
			r.Rules[0].RequestHeaders.Remove = []string{"a b"}
		}},
		{"algorithm", func(_ *Route, p *TrafficPolicy, _ *Waypoint, _ *Policy) { p.Balance.Algorithm = "luck" }},
		{"one thing to hash", func(_ *Route, p *TrafficPolicy, _ *Waypoint, _ *Policy) { p.Balance.Hash.SourceIP = true }},
		{"tls mode", func(_ *Route, p *TrafficPolicy, _ *Waypoint, _ *Policy) { p.TLS.Mode = "" }},
		{"nobody could be verified", func(_ *Route, _ *TrafficPolicy, w *Waypoint, _ *Policy) { w.Identity = Identity{} }},
		{"access log", func(_ *Route, _ *TrafficPolicy, w *Waypoint, _ *Policy) { w.AccessLog = "xml" }},
		{"scope is target", func(_ *Route, _ *TrafficPolicy, _ *Waypoint, a *Policy) { a.Targets = nil }},
		{"there are targets", func(_ *Route, _ *TrafficPolicy, _ *Waypoint, a *Policy) { a.Scope = ScopeGlobal }},
		{"target 0: want either", func(_ *Route, _ *TrafficPolicy, _ *Waypoint, a *Policy) { a.Targets[0] = Target{} }},
		{"string match template", func(_ *Route, _ *TrafficPolicy, _ *Waypoint, a *Policy) { match(a).Methods[0].Kind = MatchTemplate }},
		{"after {**}", func(_ *Route, _ *TrafficPolicy, _ *Waypoint, a *Policy) { match(a).Paths[0].Value = "/{**}/{*}" }},
		{"neither literal", func(_ *Route, _ *TrafficPolicy, _ *Waypoint, a *Policy) { match(a).Paths[0].Value = "/a{*}" }},
		{"compared with nothing", func(_ *Route, _ *TrafficPolicy, _ *Waypoint, a *Policy) { match(a).Headers[0].NotValues = nil }},
		{"address range", func(_ *Route, _ *TrafficPolicy, _ *Waypoint, a *Policy) { match(a).RemoteIPs[0] = netip.Prefix{} }},
	} {
		r, p, w, a := validL7()
		tc.edit(&r, &p, &w, &a)
		if got := complaints(r, p, w, a); !strings.Contains(got, tc.want) {
			t.Errorf("complaint %q, want one with %q", got, tc.want)
		}
	}
}

func TestL7RoundTrip(t *testing.T) {
	r, p, w, a := validL7()
	check := func(in, out any) {
		t.Helper()
		b, err := json.Marshal(in)
		if err != nil {
			t.Fatal(err)
		}
		d := json.NewDecoder(strings.NewReader(string(b)))
		d.DisallowUnknownFields()
		if err := d.Decode(out); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(in, out, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); d != "" {
			t.Errorf("JSON round trip (-in +out):\n%s", d)
		}
	}
	check(&r, &Route{})
	check(&p, &TrafficPolicy{})
	check(&w, &Waypoint{})
	check(&a, &Policy{})
}
