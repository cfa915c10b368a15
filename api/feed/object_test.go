package feed

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/weft-mesh/weft/api/meshv1"
	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/authz"
	"github.com/weft-mesh/weft/mesh/view"
)

// waypoint makes a client subscribe to what waypoints do.
func waypoint(c *ClientConfig) {
	c.Node.Role, c.Node.PodName, c.Node.Namespace = RoleWaypoint, "waypoint-1", "shop"
	c.Token = func() (string, error) { return waypointToken, nil }
}

func routeTo(host mesh.Host, to mesh.Host) mesh.Route {
	return mesh.Route{
		RouteKey: mesh.RouteKey{Service: svc(string(host)).Name, Port: 80, Protocol: mesh.RouteHTTP},
		Rules:    []mesh.Rule{{Backends: []mesh.Backend{{Service: svc(string(to)).Name, Weight: 1}}, Timeout: mesh.Duration(time.Second)}},
	}
}

func protect(name string, targets ...mesh.Target) mesh.Policy {
	return mesh.Policy{
		Name: mesh.Name{Namespace: "shop", Name: name}, Scope: mesh.ScopeTarget, Action: mesh.Allow, Targets: targets,
		Groups: []mesh.Group{{Clauses: []mesh.Clause{{Matches: []mesh.Match{{Methods: []mesh.StringMatch{{Kind: mesh.MatchExact, Value: "GET"}}}}}}}},
	}
}

// l7World is a mesh with one of each.
func l7World() Resources {
	return Resources{
		Workloads:       []mesh.Workload{pod(1)},
		Services:        []mesh.Service{svc("cart", "10.96.0.1/32"), svc("till", "10.96.0.2/32")},
		Policies:        []mesh.Policy{deny("a"), protect("b", mesh.Target{Service: svc("cart").Name})},
		Routes:          []mesh.Route{routeTo("cart", "till")},
		TrafficPolicies: []mesh.TrafficPolicy{{Service: svc("till").Name, Subset: "v1", Labels: map[string]string{"v": "1"}}},
		Waypoints:       []mesh.Waypoint{{Name: mesh.Name{Namespace: "shop", Name: "waypoint"}, Service: svc("waypoint").Name, For: "service"}},
	}
}

func TestObjectsReachAWaypoint(t *testing.T) {
	w := newWorld(t)
	r := l7World()
	w.server.Update(r)
	w.server.SetSynced()
	c := w.proxy(waypoint)
	<-c.Synced()
	v := c.store.Load()
	same(t, v.Route(svc("cart").Name, 80, mesh.RouteHTTP), &r.Routes[0])
	same(t, v.TrafficPolicy(svc("till").Name, "v1", 80), &r.TrafficPolicies[0])
	same(t, v.Waypoint(r.Waypoints[0].Name), &r.Waypoints[0])
	same(t, v.Targeted(svc("cart").Name, mesh.Name{}), []*mesh.Policy{&r.Policies[1]})
	same(t, v.Policy(r.Policies[0].Name), &r.Policies[0])

	kept := v.TrafficPolicy(svc("till").Name, "v1", 80)
	r.Routes[0] = routeTo("cart", "cart")
	r.Policies, r.Waypoints = r.Policies[:1], nil
	w.server.UpdateWorld(Resources{Services: r.Services, Policies: r.Policies, Routes: r.Routes, TrafficPolicies: r.TrafficPolicies}, nil, time.Now())
	c.until(t, "the removals", func(v *view.View) bool {
		return v.Waypoint(mesh.Name{Namespace: "shop", Name: "waypoint"}) == nil && len(v.Targeted(svc("cart").Name, mesh.Name{})) == 0
	})
	v = c.store.Load()
	same(t, v.Route(svc("cart").Name, 80, mesh.RouteHTTP), &r.Routes[0])
	if !has(1)(v) {
		t.Error("UpdateWorld removed a workload that was not in del")
	}

	w.stop() // what is known stays in force, and what is sent again stays the same
	w.start()
	w.server.Update(Resources{Workloads: []mesh.Workload{pod(1), pod(2)}, Services: r.Services, Policies: r.Policies, Routes: r.Routes, TrafficPolicies: r.TrafficPolicies})
	w.server.SetSynced()
	c.until(t, "a pod after the restart", has(2))
	if got := c.store.Load().TrafficPolicy(svc("till").Name, "v1", 80); got != kept {
		t.Error("what did not change is another pointer in a later View")
	}
}

func TestOnlyWaypointsAreToldOfRequests(t *testing.T) {
	w := newWorld(t)
	w.server.Update(l7World())
	w.server.SetSynced()
	r := w.raw(token)
	for _, url := range ofRequests() {
		r.send(everything(url))
	}
	r.send(everything(TypeAuthorization))
	if m := r.want("shop/a", ""); m.GetTypeUrl() != TypeAuthorization {
		t.Errorf("a node's proxy is answered about %s", m.GetTypeUrl())
	}
	r.quiet()

	r = w.raw(waypointToken)
	r.send(everything(TypeRoute))
	r.want("shop/cart:80/http", "")
}

// TestOrder: what refers to something is sent behind it, and what is gone goes
// last, so that no View has a route to a service that it does not have.
func TestOrder(t *testing.T) {
	w := newWorld(t)
	w.server.Update(Resources{})
	w.server.SetSynced()
	r := w.raw(waypointToken)
	for _, url := range sending() {
		r.send(everything(url))
		r.want("", "")
	}
	next := func() string {
		m := r.next()
		var names []string
		for _, x := range m.GetResources() {
			names = append(names, "+"+x.GetName())
		}
		for _, name := range m.GetRemovedResources() {
			names = append(names, "-"+name)
		}
		defer r.ack(m)
		return shortType(m.GetTypeUrl()) + " " + strings.Join(names, " ")
	}
	expect := func(want ...string) {
		t.Helper()
		for _, x := range want {
			if got := next(); got != x {
				t.Errorf("got %q, want %q", got, x)
			}
		}
	}
	world := l7World()
	w.server.UpdateWorld(world, nil, time.Now())
	expect("authorization +shop/a", "policy +shop/b", "address +shop/cart +shop/till +c//Pod/shop/p1", "trafficpolicy +shop/till|v1|0", "route +shop/cart:80/http", "waypoint +shop/waypoint")

	world.Routes[0] = routeTo("cart", "pay")
	w.server.UpdateWorld(Resources{Services: []mesh.Service{svc("cart", "10.96.0.1/32"), svc("pay")}, Routes: world.Routes}, []mesh.UID{pod(1).UID}, time.Now())
	expect("address +shop/pay", "route +shop/cart:80/http", "waypoint -shop/waypoint",
		"trafficpolicy -shop/till|v1|0", "address -shop/till -c//Pod/shop/p1", "policy -shop/b", "authorization -shop/a")
}

func TestWhatIsNotUnderstoodFailsClosed(t *testing.T) {
	object := func(url, name, text string) *discovery.Resource {
		b, err := proto.Marshal(&meshv1.Object{Json: []byte(text)})
		if err != nil {
			t.Fatal(err)
		}
		return &discovery.Resource{Name: name, Version: "1", Resource: &anypb.Any{TypeUrl: url, Value: b}}
	}
	cart := svc("cart").Name
	closed := func(p []*mesh.Policy) bool {
		return len(p) == 1 && !authz.Decide(p, nil, authz.Facts{}).Allowed && !p[0].DryRun
	}
	for _, tc := range []struct {
		name, url, key, text string
		refuses              func(*view.View) bool
	}{
		{"a route with a new field", TypeRoute, "shop/cart:80/http", `{"service":{"namespace":"shop","host":"cart"},"port":80,"protocol":"http","rules":[{"backends":[{"weight":1}],"quantum":true}]}`,
			func(v *view.View) bool {
				r := v.Route(cart, 80, mesh.RouteHTTP)
				return r.Broken != "" && len(r.Rules) == 0
			}},
		{"a route of another name", TypeRoute, "shop/cart:80/http", `{"service":{"namespace":"shop","host":"till"},"port":80,"protocol":"http"}`,
			func(v *view.View) bool {
				return v.Route(cart, 80, mesh.RouteHTTP).Broken != "" && v.Route(svc("till").Name, 80, mesh.RouteHTTP) == nil
			}},
		{"a route that is no JSON", TypeRoute, "shop/cart:0/tls", `{`, func(v *view.View) bool { return v.Route(cart, 443, mesh.RouteTLS).Broken != "" }},
		{"two routes in one", TypeRoute, "shop/cart:80/http", `{"service":{"namespace":"shop","host":"cart"},"port":80,"protocol":"http"}{}`,
			func(v *view.View) bool { return v.Route(cart, 80, mesh.RouteHTTP).Broken != "" }},
		{"a subset with a new field", TypeTrafficPolicy, "shop/cart|v1|80", `{"service":{"namespace":"shop","host":"cart"},"subset":"v1","port":80,"x":1}`,
			func(v *view.View) bool {
				p := v.TrafficPolicy(cart, "v1", 80)
				return p.Broken != "" && v.TrafficPolicy(cart, "", 80) == nil
			}},
		{"a policy with a new condition", TypePolicy, "shop/p", `{"name":{"namespace":"shop","name":"p"},"scope":"target","action":"allow","dryRun":true,"groups":[{}],"targets":[{"service":{"namespace":"shop","host":"cart"}}],"x":1}`,
			func(v *view.View) bool {
				return closed(v.Targeted(cart, mesh.Name{})) && len(v.Targeted(svc("till").Name, mesh.Name{})) == 0
			}},
		{"a policy with a new action", TypePolicy, "shop/p", `{"name":{"namespace":"shop","name":"p"},"scope":"target","action":"audit","targets":[{"service":{"namespace":"shop","host":"cart"}}]}`,
			func(v *view.View) bool { return closed(v.Targeted(cart, mesh.Name{})) }},
		{"a policy with a new kind of target", TypePolicy, "shop/p", `{"name":{"namespace":"shop","name":"p"},"scope":"target","action":"allow","groups":[{}],"targets":[{"vhost":"x"}]}`,
			func(v *view.View) bool { return closed(v.Targeted(cart, mesh.Name{})) }},
		{"a policy that is no JSON", TypePolicy, "shop/p", ``, func(v *view.View) bool {
			return closed(v.Targeted(cart, mesh.Name{})) && closed(v.Targeted(svc("till").Name, mesh.Name{Namespace: "shop", Name: "w"}))
		}},
		{"a waypoint with a new field", TypeWaypoint, "shop/w", `{"name":{"namespace":"shop","name":"w"},"x":1}`,
			func(v *view.View) bool { return v.Waypoint(mesh.Name{Namespace: "shop", Name: "w"}) == nil }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := newCache(RoleWaypoint)
			// Also when an object that was understood is there.
			for _, r := range []mesh.Route{routeTo("cart", "cart"), {RouteKey: mesh.RouteKey{Service: cart, Protocol: mesh.RouteTLS}}} {
				c.routes[r.String()] = &r
			}
			c.traffic["shop/cart|v1|80"] = &mesh.TrafficPolicy{Service: cart, Subset: "v1", Port: 80}
			p, wp := protect("p", mesh.Target{Service: cart}), mesh.Waypoint{Name: mesh.Name{Namespace: "shop", Name: "w"}}
			c.targeted["shop/p"], c.waypoints["shop/w"] = &p, &wp
			c.versions[tc.url][tc.key] = "0"
			x := object(tc.url, tc.key, tc.text)
			err := c.apply(&discovery.DeltaDiscoveryResponse{TypeUrl: tc.url, Resources: []*discovery.Resource{x}})
			if err == nil || !strings.Contains(err.Error(), tc.key) {
				t.Errorf("the error is %v, want one that names %s", err, tc.key)
			}
			if !tc.refuses(c.view()) {
				b, _ := json.Marshal(c.view())
				t.Errorf("it does not refuse: %s", b)
			}
			if _, there := c.versions[tc.url][tc.key]; there {
				t.Error("it would not be sent again on the next connection")
			}
			if err := c.apply(&discovery.DeltaDiscoveryResponse{TypeUrl: tc.url, RemovedResources: []string{tc.key}}); err != nil {
				t.Error(err)
			}
			if v := c.view(); len(v.Targeted(svc("till").Name, mesh.Name{})) != 0 && tc.url == TypePolicy {
				t.Error("the stand-in outlives its resource")
			}
		})
	}
	c := newCache(RoleWaypoint)
	wrong := &discovery.Resource{Name: "shop/cart:80/http", Resource: &anypb.Any{TypeUrl: TypeAddress}}
	if err := c.apply(&discovery.DeltaDiscoveryResponse{TypeUrl: TypeRoute, Resources: []*discovery.Resource{wrong}}); err == nil || c.view().Route(cart, 80, mesh.RouteHTTP).Broken == "" {
		t.Error("a route whose content is of another type is served as if there were none")
	}
}

// TestConditionsOfRequestsAreUnknownToOthers: the message for connections has
// no words for them.
func TestConditionsOfRequestsAreUnknownToOthers(t *testing.T) {
	text := []mesh.StringMatch{{Kind: mesh.MatchExact, Value: "x"}}
	for i, m := range []mesh.Match{
		{Methods: text}, {NotMethods: text}, {Hosts: text}, {NotHosts: text}, {Paths: text}, {NotPaths: text},
		{Headers: []mesh.HeaderMatch{{Name: "x"}}}, {RemoteIPs: []netip.Prefix{prefix("10.0.0.0/8")}}, {NotRemoteIPs: []netip.Prefix{prefix("10.0.0.0/8")}},
	} {
		p := protect("p")
		p.Groups[0].Clauses[0].Matches[0] = m
		got, err := ToPolicy(FromPolicy(p))
		if err != nil || !got.Groups[0].Clauses[0].Matches[0].Unknown {
			t.Errorf("match %d: %+v, %v: want it unknown", i, got.Groups, err)
		}
	}
}

func TestConvergenceIsMeasured(t *testing.T) {
	w := newWorld(t)
	w.server.Update(Resources{Workloads: []mesh.Workload{pod(1)}})
	w.server.SetSynced()
	r := w.raw(token)
	r.send(everything(TypeAddress))
	r.want("c//Pod/shop/p1", "")
	r.quiet()
	samples := func() (n uint64, sum float64) { return histogram(w.server.metrics.converged) }
	if n, _ := samples(); n != 0 {
		t.Errorf("what a subscriber gets when it comes counts as %d changes", n)
	}
	w.server.UpdateWorld(Resources{Workloads: []mesh.Workload{pod(2)}}, nil, time.Now().Add(-time.Hour))
	m := r.next()
	if n, _ := samples(); n != 0 {
		t.Error("a change counts before it is acknowledged")
	}
	r.ack(m)
	eventually(t, "the change is counted", func() bool { n, _ := samples(); return n == 1 })
	if _, sum := samples(); sum < 3600 {
		t.Errorf("it took %v s, want an hour and a bit", sum)
	}
	w.server.UpdateWorld(Resources{}, nil, time.Now().Add(-time.Hour)) // changes nothing
	w.server.UpdateWorkloads([]mesh.Workload{pod(3)}, nil, time.Now())
	r.want("c//Pod/shop/p3", "")
	eventually(t, "the next change is counted", func() bool { n, _ := samples(); return n == 2 })
}

// FuzzObject: whatever arrives, nothing is half understood.
func FuzzObject(f *testing.F) {
	good := must(json.Marshal(routeTo("cart", "till")))
	for _, url := range ofRequests() {
		f.Add(url, "shop/cart:80/http", good)
		f.Add(url, "shop/cart:08/http", good)
		f.Add(url, "shop/cart|v1|080", good)
		f.Add(url, "shop/cart|v1|80", []byte(`{"service":{"namespace":"shop","host":"cart"},"subset":"v1","port":80}`))
		f.Add(url, "shop/p", []byte(`{"name":{"namespace":"shop","name":"p"},"targets":[{}]}`))
	}
	f.Fuzz(func(t *testing.T, url, name string, b []byte) {
		if !slices.Contains(ofRequests(), url) {
			return
		}
		c := newCache(RoleWaypoint)
		err := c.setObject(url, name, must(proto.Marshal(&meshv1.Object{Json: b})))
		switch r, p, q := c.routes[name], c.traffic[name], c.targeted[name]; {
		case err == nil:
		case r != nil && (r.Broken == "" || r.String() != name), p != nil && (p.Broken == "" || p.Key() != name), q != nil && (q.Action != mesh.ActionUnset || len(q.Targets) == 0):
			t.Errorf("%v left %s", err, fmt.Sprint(r, p, q))
		case url == TypePolicy && q == nil:
			t.Errorf("%v left no policy", err)
		}
		c.view()
	})
}
