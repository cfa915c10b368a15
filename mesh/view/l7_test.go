package view

import (
	"encoding/json"
	"slices"
	"testing"

	"github.com/weft-mesh/weft/mesh"
)

var (
	cart = mesh.ServiceName{Namespace: "shop", Host: "cart.shop.svc.cluster.local"}
	till = mesh.ServiceName{Namespace: "shop", Host: "till.shop.svc.cluster.local"}
)

func route(s mesh.ServiceName, port uint16, p mesh.RouteProtocol) *mesh.Route {
	return &mesh.Route{RouteKey: mesh.RouteKey{Service: s, Port: port, Protocol: p}}
}

func TestRoute(t *testing.T) {
	exact, rest, tcp := route(cart, 80, mesh.RouteHTTP), route(cart, 0, mesh.RouteHTTP), route(cart, 80, mesh.RouteTCP)
	v := WithL7("1", nil, nil, nil, L7{Routes: []*mesh.Route{rest, exact, tcp}})
	for _, tc := range []struct {
		name    string
		service mesh.ServiceName
		port    uint16
		p       mesh.RouteProtocol
		want    *mesh.Route
	}{
		{"of the port", cart, 80, mesh.RouteHTTP, exact},
		{"else of all other ports", cart, 81, mesh.RouteHTTP, rest},
		{"of the protocol", cart, 80, mesh.RouteTCP, tcp},
		{"another port has no route of its protocol", cart, 81, mesh.RouteTCP, nil},
		{"another protocol", cart, 80, mesh.RouteTLS, nil},
		{"another service", till, 80, mesh.RouteHTTP, nil},
	} {
		if got := v.Route(tc.service, tc.port, tc.p); got != tc.want {
			t.Errorf("%s: Route = %v, want %v", tc.name, got, tc.want)
		}
	}
	if (&View{}).Route(cart, 80, mesh.RouteHTTP) != nil || New("1", nil, nil, nil).Route(cart, 80, mesh.RouteHTTP) != nil {
		t.Error("a View without routes has one")
	}
}

func TestTrafficPolicy(t *testing.T) {
	whole := &mesh.TrafficPolicy{Service: cart}
	port := &mesh.TrafficPolicy{Service: cart, Port: 80}
	v1 := &mesh.TrafficPolicy{Service: cart, Subset: "v1"}
	v := WithL7("1", nil, nil, nil, L7{TrafficPolicies: []*mesh.TrafficPolicy{port, v1, whole}})
	for _, tc := range []struct {
		name    string
		service mesh.ServiceName
		subset  string
		port    uint16
		want    *mesh.TrafficPolicy
	}{
		{"of the port", cart, "", 80, port},
		{"else of the service", cart, "", 81, whole},
		{"of the subset", cart, "v1", 80, v1},
		{"a subset that there is not is not the service", cart, "v2", 80, nil},
		{"another service", till, "", 80, nil},
	} {
		if got := v.TrafficPolicy(tc.service, tc.subset, tc.port); got != tc.want {
			t.Errorf("%s: TrafficPolicy = %v, want %v", tc.name, got, tc.want)
		}
	}
}

func TestTargeted(t *testing.T) {
	gateway := mesh.Name{Namespace: "shop", Name: "waypoint"}
	policy := func(name string, scope mesh.Scope, targets ...mesh.Target) *mesh.Policy {
		return &mesh.Policy{Name: mesh.Name{Namespace: "shop", Name: name}, Scope: scope, Action: mesh.Deny, Targets: targets}
	}
	v := Of("1", nil, nil, []*mesh.Policy{
		policy("d-service", mesh.ScopeTarget, mesh.Target{Service: cart}),
		policy("b-waypoint", mesh.ScopeTarget, mesh.Target{Waypoint: gateway}),
		policy("c-both", mesh.ScopeTarget, mesh.Target{Service: cart}, mesh.Target{Waypoint: gateway}, mesh.Target{Service: cart}),
		policy("a-other", mesh.ScopeTarget, mesh.Target{Service: till}),
		policy("e-selector", mesh.ScopeSelector, mesh.Target{Service: cart}),
		policy("f-nothing", mesh.ScopeTarget),
	})
	for _, tc := range []struct {
		name     string
		service  mesh.ServiceName
		waypoint mesh.Name
		want     []string
	}{
		{"of both, each once, by name", cart, gateway, []string{"b-waypoint", "c-both", "d-service"}},
		{"of the service", cart, mesh.Name{}, []string{"c-both", "d-service"}},
		{"of the waypoint", mesh.ServiceName{}, gateway, []string{"b-waypoint", "c-both"}},
		{"of nothing", mesh.ServiceName{}, mesh.Name{}, nil},
		{"of others", till, mesh.Name{Namespace: "shop", Name: "x"}, []string{"a-other"}},
	} {
		var got []string
		for _, p := range v.Targeted(tc.service, tc.waypoint) {
			got = append(got, p.Name.Name)
		}
		if !slices.Equal(got, tc.want) {
			t.Errorf("%s: Targeted = %v, want %v", tc.name, got, tc.want)
		}
	}
	unread := Of("1", nil, nil, []*mesh.Policy{policy("u", mesh.ScopeTarget, mesh.Target{}), policy("c", mesh.ScopeTarget, mesh.Target{Service: cart})})
	if got := unread.Targeted(till, gateway); len(got) != 1 || got[0].Name.Name != "u" {
		t.Errorf("a policy whose targets nobody could read protects a service that may be its target with %v", got)
	}
	if got := unread.Targeted(cart, mesh.Name{}); len(got) != 2 {
		t.Errorf("beside the service's own policy it is %v, want both", got)
	}
	_ = append(v.Targeted(cart, mesh.Name{}), nil)
	if again := v.Targeted(cart, mesh.Name{}); len(again) != 2 || slices.Contains(again, nil) {
		t.Error("a caller's append changed the View")
	}
	pod := mesh.Workload{Name: mesh.Name{Namespace: "shop", Name: "cart-1"}}
	if ps, missing := v.PoliciesFor(&pod); len(ps)+len(missing) != 0 {
		t.Errorf("policies of targets apply to connections to pods: %v, %v", ps, missing)
	}
}

func TestWaypoint(t *testing.T) {
	a, b := &mesh.Waypoint{Name: mesh.Name{Namespace: "a", Name: "w"}}, &mesh.Waypoint{Name: mesh.Name{Namespace: "b", Name: "w"}}
	v := WithL7("1", nil, nil, nil, L7{Waypoints: []*mesh.Waypoint{b, a}})
	if v.Waypoint(b.Name) != b || v.Waypoint(mesh.Name{Namespace: "c", Name: "w"}) != nil {
		t.Error("Waypoint does not find what is there, or finds what is not")
	}
	if got := slices.Collect(v.Waypoints()); !slices.Equal(got, []*mesh.Waypoint{a, b}) {
		t.Errorf("Waypoints = %v", got)
	}
}

func TestL7DumpReplays(t *testing.T) {
	prefix := "/new"
	r := route(cart, 80, mesh.RouteHTTP)
	r.Rules = []mesh.Rule{{
		Matches: []mesh.RequestMatch{{Path: &mesh.PathMatch{Kind: mesh.PathSegment, Value: "/old"}}}, Timeout: mesh.Duration(1500e6),
		Backends: []mesh.Backend{{Service: till, Weight: 1, Rewrite: &mesh.Rewrite{Prefix: &prefix}}}, Retry: &mesh.Retry{Attempts: 2, On: []string{"5xx"}},
	}}
	v := WithL7("v7", nil, nil, nil, L7{
		Routes:          []*mesh.Route{r, route(cart, 0, mesh.RouteTCP)},
		TrafficPolicies: []*mesh.TrafficPolicy{{Service: cart, Subset: "v1", Labels: map[string]string{"v": "1"}}},
		Waypoints:       []*mesh.Waypoint{{Name: mesh.Name{Namespace: "shop", Name: "waypoint"}, Service: cart, For: "service"}},
	})
	first, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	again, err := FromJSON(first)
	if err != nil {
		t.Fatal(err)
	}
	if second, err := json.Marshal(again); err != nil || string(first) != string(second) {
		t.Errorf("the dump changed (%v):\n%s\n%s", err, first, second)
	}
	if again.Route(cart, 80, mesh.RouteHTTP) == nil || again.TrafficPolicy(cart, "v1", 9) == nil || again.Waypoint(mesh.Name{Namespace: "shop", Name: "waypoint"}) == nil {
		t.Error("the replayed View does not answer")
	}
	if v, err := FromJSON([]byte(`{"version":"1","routes":[null],"services":[null]}`)); err != nil || v.Route(cart, 80, mesh.RouteHTTP) != nil {
		t.Errorf("nulls in a dump: %v", err)
	}
}
