package ztunnel

import (
	"net/netip"
	"testing"

	"github.com/weft-mesh/weft/internal/handoff"
	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/authz"
	"github.com/weft-mesh/weft/mesh/view"
)

// Policies as the control service makes them.

// allowOnly lets the service account sa of namespace shop in.
func allowOnly(name, sa string) mesh.Policy {
	return mesh.Policy{Name: mesh.Name{Namespace: "shop", Name: name}, Scope: mesh.ScopeNamespace, Action: mesh.Allow,
		Groups: []mesh.Group{{Clauses: []mesh.Clause{{Matches: []mesh.Match{{Principals: []mesh.StringMatch{
			{Kind: mesh.MatchExact, Value: identityOf("shop", sa).Principal()}}}}}}}}}
}

// denyFrom keeps sa out.
func denyFrom(name, sa string) mesh.Policy {
	p := allowOnly(name, sa)
	p.Action = mesh.Deny
	return p
}

// strict denies whoever has no identity.
func strict() mesh.Policy {
	return mesh.Policy{Name: mesh.Name{Namespace: "shop", Name: "strict"}, Scope: mesh.ScopeNamespace, Action: mesh.Deny,
		Groups: []mesh.Group{{Clauses: []mesh.Clause{{Matches: []mesh.Match{{NotPrincipals: []mesh.StringMatch{{Kind: mesh.MatchPresence}}}}}}}}}
}

func TestAdmit(t *testing.T) {
	info := handoff.Pod{UID: "u", Name: "cart", Namespace: "shop", ServiceAccount: "cart", Addresses: addrs("10.0.0.4", "fd00::4")}
	id := identityOf("shop", "cart")
	me := workload("cart", "10.0.0.4", "fd00::4")
	listed := with(me, func(w *mesh.Workload) { w.Policies = []mesh.Name{{Namespace: "shop", Name: "allow-web"}} })
	selector := with(allowOnly("allow-web", "web"), func(p *mesh.Policy) { p.Scope = mesh.ScopeSelector })
	web, other := identityOf("shop", "web"), identityOf("shop", "other")
	unsetAction := with(allowOnly("unset", "web"), func(p *mesh.Policy) { p.Action = mesh.ActionUnset })

	tests := []struct {
		name     string
		ws       []mesh.Workload
		policies []mesh.Policy
		peer     mesh.Identity
		dst      string
		want     verdict
	}{
		{"no policies: a tunnel", []mesh.Workload{me}, nil, web, "10.0.0.4:8080", admitted},
		{"no policies: plain", []mesh.Workload{me}, nil, mesh.Identity{}, "10.0.0.4:8080", admitted},
		{"over IPv6", []mesh.Workload{me}, nil, web, "[fd00::4]:8080", admitted},
		{"allow policy matches", []mesh.Workload{me}, []mesh.Policy{allowOnly("a", "web")}, web, "10.0.0.4:8080", admitted},
		{"allow policy does not match", []mesh.Workload{me}, []mesh.Policy{allowOnly("a", "web")}, other, "10.0.0.4:8080", denied},
		{"allow policy and nobody", []mesh.Workload{me}, []mesh.Policy{allowOnly("a", "web")}, mesh.Identity{}, "10.0.0.4:8080", denied},
		{"deny policy matches", []mesh.Workload{me}, []mesh.Policy{denyFrom("d", "web")}, web, "10.0.0.4:8080", denied},
		{"deny goes before allow", []mesh.Workload{me}, []mesh.Policy{allowOnly("a", "web"), denyFrom("d", "web")}, web, "10.0.0.4:8080", denied},
		{"plain under STRICT", []mesh.Workload{me}, []mesh.Policy{strict()}, mesh.Identity{}, "10.0.0.4:8080", denied},
		{"tunnel under STRICT", []mesh.Workload{me}, []mesh.Policy{strict()}, other, "10.0.0.4:8080", admitted},
		{"listed policy", []mesh.Workload{listed}, []mesh.Policy{selector}, web, "10.0.0.4:8080", admitted},
		{"listed policy that has not arrived", []mesh.Workload{listed}, nil, web, "10.0.0.4:8080", unresolved},
		{"action of a later version", []mesh.Workload{me}, []mesh.Policy{unsetAction}, web, "10.0.0.4:8080", denied},
		{"pod not in the view", nil, nil, web, "10.0.0.4:8080", unresolved},
		{"pod of that name with another address", []mesh.Workload{workload("cart", "10.0.0.5")}, nil, web, "10.0.0.4:8080", unresolved},
		{"pod of that name with another identity", []mesh.Workload{with(me, func(w *mesh.Workload) { w.Identity.ServiceAccount = "x" })}, nil, web, "10.0.0.4:8080", unresolved},
		{"another address of the mesh", []mesh.Workload{me, workload("b", "10.0.0.5")}, nil, web, "10.0.0.5:8080", notOurs},
		{"loopback", []mesh.Workload{me}, nil, web, "127.0.0.1:8080", notOurs},
		{"an address outside", []mesh.Workload{me}, nil, web, "192.0.2.1:80", notOurs},
		{"the node's address space", []mesh.Workload{me}, nil, web, "169.254.169.254:80", notOurs},
		{"no address", []mesh.Workload{me}, nil, web, "", notOurs},
		{"port 0", []mesh.Workload{me}, nil, web, "10.0.0.4:0", notOurs},
		{"our outbound port", []mesh.Workload{me}, nil, web, "10.0.0.4:15001", notOurs},
		{"our plain port", []mesh.Workload{me}, nil, web, "10.0.0.4:15006", notOurs},
		{"our tunnel port", []mesh.Workload{me}, nil, web, "10.0.0.4:15008", notOurs},
		{"our DNS port", []mesh.Workload{me}, nil, web, "10.0.0.4:15053", notOurs},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var dst netip.AddrPort
			if tt.dst != "" {
				dst = netip.MustParseAddrPort(tt.dst)
			}
			f := authz.Facts{Peer: tt.peer, Source: netip.MustParseAddrPort("10.0.0.2:40000"), Destination: dst}
			a := admit(view.New("1", tt.ws, nil, tt.policies), info, id, f)
			if a.verdict != tt.want {
				t.Errorf("verdict %d (%s), want %d", a.verdict, a.reason, tt.want)
			}
			if a.verdict != admitted && a.reason == "" {
				t.Error("refused without a reason")
			}
		})
	}
}

func TestAdmitNothingBeforeTheFirstSync(t *testing.T) {
	info := handoff.Pod{UID: "u", Name: "cart", Namespace: "shop", ServiceAccount: "cart", Addresses: addrs("10.0.0.4")}
	f := authz.Facts{Peer: identityOf("shop", "web"), Destination: netip.MustParseAddrPort("10.0.0.4:80")}
	for name, v := range map[string]*view.View{
		"zero view":             {},
		"filled but not synced": view.New("", []mesh.Workload{workload("cart", "10.0.0.4")}, nil, nil),
	} {
		if a := admit(v, info, identityOf("shop", "cart"), f); a.verdict == admitted {
			t.Errorf("%s: admitted", name)
		}
	}
	if (admission{}).verdict == admitted {
		t.Error("the zero admission admits")
	}
}
