package feed

import (
	"fmt"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/view"
)

// meshOfRoutes is a mesh of a hundred namespaces with ten services each, every
// one of which has five pods, a route of five rules, two subsets and a policy.
func meshOfRoutes() Resources {
	var r Resources
	for i := range 1000 {
		ns := fmt.Sprintf("team-%d", i/10)
		name := mesh.ServiceName{Namespace: ns, Host: mesh.Host(fmt.Sprintf("s%d.%s.svc.cluster.local", i%10, ns))}
		r.Services = append(r.Services, mesh.Service{
			Name: name, ShortName: fmt.Sprintf("s%d", i%10), Ports: []mesh.Port{{Service: 80, Target: 8080, AppProtocol: "http"}},
			VIPs: []mesh.VIP{{Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 96, byte(i >> 8), byte(i)}), 32)}},
		})
		for j := range 5 {
			p := in(pod(5*i+j), r.Services[i])
			p.UID, p.Name = mesh.UID(fmt.Sprintf("c//Pod/%s/p%d", ns, 5*i+j)), mesh.Name{Namespace: ns, Name: fmt.Sprintf("p%d", 5*i+j)}
			p.Labels = map[string]string{"version": fmt.Sprintf("v%d", j%2+1)}
			r.Workloads = append(r.Workloads, p)
		}
		route := mesh.Route{RouteKey: mesh.RouteKey{Service: name, Port: 80, Protocol: mesh.RouteHTTP}}
		for j := range 5 {
			route.Rules = append(route.Rules, mesh.Rule{
				Name: fmt.Sprintf("rule-%d", j), From: "VirtualService/" + ns + "/routes", Timeout: mesh.Duration(10 * time.Second),
				Matches: []mesh.RequestMatch{{
					Path:    &mesh.PathMatch{Kind: mesh.PathPrefix, Value: fmt.Sprintf("/api/v%d", j)},
					Headers: []mesh.FieldMatch{{Name: "x-user-group", TextMatch: mesh.TextMatch{Kind: mesh.TextExact, Value: "beta"}}},
				}},
				Backends: []mesh.Backend{{Service: name, Subset: "v1", Port: 80, Weight: 90}, {Service: name, Subset: "v2", Port: 80, Weight: 10}},
				Retry:    &mesh.Retry{Attempts: 2, On: []string{"connect-failure", "refused-stream", "unavailable", "cancelled"}},
			})
		}
		r.Routes = append(r.Routes, route)
		for _, subset := range []string{"", "v1", "v2"} {
			p := mesh.TrafficPolicy{Service: name, Subset: subset, From: "DestinationRule/" + ns + "/policy",
				Outlier: &mesh.Outlier{Consecutive5xx: 5, Interval: mesh.Duration(10 * time.Second), BaseEjection: mesh.Duration(30 * time.Second), MaxEjected: 10}}
			if subset != "" {
				p.Labels = map[string]string{"version": subset}
			}
			r.TrafficPolicies = append(r.TrafficPolicies, p)
		}
		policy := protect(fmt.Sprintf("allow-%d", i), mesh.Target{Service: name})
		policy.Name.Namespace = ns
		r.Policies = append(r.Policies, policy)
	}
	return r
}

// BenchmarkWaypoint1kRoutes is a waypoint that comes new to a mesh of a thousand
// services with routes, until its View is there. It is sent wire-B, and heap-B
// is what it keeps.
func BenchmarkWaypoint1kRoutes(b *testing.B) {
	w := newWorld(b)
	w.server.Update(meshOfRoutes())
	w.server.SetSynced()
	wire := 0
	r := w.raw(waypointToken)
	for _, url := range sending() {
		r.send(everything(url))
		m := r.next()
		wire += proto.Size(m)
		r.ack(m)
	}
	var heap float64
	for b.Loop() {
		before := live()
		c := w.proxy(waypoint)
		<-c.Synced()
		heap = float64(live() - before)
		runtime.KeepAlive(c)
		c.stop()
	}
	b.ReportMetric(float64(wire), "wire-B")
	b.ReportMetric(heap, "heap-B")
}

// BenchmarkWaypointOneRoute is one route that changes among a thousand, until
// it is in the View of a waypoint.
func BenchmarkWaypointOneRoute(b *testing.B) {
	w := newWorld(b)
	all := meshOfRoutes()
	w.server.Update(all)
	w.server.SetSynced()
	c := w.proxy(waypoint)
	<-c.Synced()
	all.Workloads = nil // none of them changes
	i := 0
	for b.Loop() {
		i++
		r := &all.Routes[7]
		r.Rules = append([]mesh.Rule(nil), r.Rules...)
		r.Rules[0].Name = fmt.Sprint(i)
		w.server.UpdateWorld(all, nil, time.Now())
		c.until(b, "the change", func(v *view.View) bool {
			return v.Route(r.Service, 80, mesh.RouteHTTP).Rules[0].Name == r.Rules[0].Name
		})
	}
}

// live returns the bytes on the heap that something still holds.
func live() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
