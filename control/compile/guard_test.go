package compile

import (
	"net/netip"
	"testing"

	"github.com/rogpeppe/go-internal/txtar"
	corev1 "k8s.io/api/core/v1"

	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/authz"
)

// storyWorld compiles the objects of a story, after change.
func storyWorld(t *testing.T, name string, change func(*Inputs)) (*World, Inputs) {
	t.Helper()
	story, err := txtar.ParseFile("testdata/" + name + ".txtar")
	if err != nil {
		t.Fatal(err)
	}
	in := readObjects(t, file(story, "objects.yaml"))
	if change != nil {
		change(&in)
	}
	return Compile(Settings{}, in), in
}

// podOf returns the named pod of a story.
func podOf(t *testing.T, in Inputs, name string) *corev1.Pod {
	t.Helper()
	for _, p := range in.Pods {
		if p.Name == name {
			return p
		}
	}
	t.Fatalf("the story has no pod %s", name)
	return nil
}

// admits decides on a connection to the pod by the policies that it lists.
func admits(t *testing.T, w *World, pod *corev1.Pod, peer mesh.Identity, port uint16) authz.Decision {
	t.Helper()
	wl, ok := w.Workload(pod, nil)
	if !ok {
		t.Fatal("the pod is no workload")
	}
	var ps []*mesh.Policy
	var missing []mesh.Name
next:
	for _, name := range wl.Policies {
		for i := range w.Policies {
			if w.Policies[i].Name == name {
				ps = append(ps, &w.Policies[i])
				continue next
			}
		}
		missing = append(missing, name)
	}
	return authz.Decide(ps, missing, authz.Facts{
		Peer:        peer,
		Source:      netip.MustParseAddrPort("10.244.9.9:40000"),
		Destination: netip.AddrPortFrom(wl.Addresses[0], port),
	})
}

// outside labels the named service for those outside of the mesh.
func outside(name string) func(*Inputs) {
	return func(in *Inputs) {
		for _, s := range in.Services {
			if s.Name == name {
				s.Labels = map[string]string{labelWaypointOutside: "bypass"}
			}
		}
	}
}

// TestNobodyGoesAroundTheWaypoint attacks pods behind a waypoint directly.
func TestNobodyGoesAroundTheWaypoint(t *testing.T) {
	id := func(ns, sa string) mesh.Identity {
		return mesh.Identity{TrustDomain: "cluster.local", Namespace: ns, ServiceAccount: sa}
	}
	waypoint, client := id("shop", "waypoint"), id("shop", "client")
	cart := mesh.ServiceName{Namespace: "shop", Host: "cart.shop.svc.cluster.local"}
	for _, tc := range []struct {
		name, story, pod string
		peer             mesh.Identity
		port             uint16
		change           func(*Inputs)
		want             bool
	}{
		{"the waypoint", "waypoint-bind", "cart-1", waypoint, 8080, nil, true},
		{"a client at the port of a bound service", "waypoint-bind", "cart-1", client, 8080, nil, false},
		{"a client at the other bound port", "waypoint-bind", "cart-1", client, 7070, nil, false},
		{"nobody", "waypoint-bind", "cart-1", mesh.Identity{}, 8080, nil, false},
		{"the same account of another namespace", "waypoint-bind", "cart-1", id("evil", "waypoint"), 8080, nil, false},
		{"the same account of another trust domain", "waypoint-bind", "cart-1", mesh.Identity{TrustDomain: "evil", Namespace: "shop", ServiceAccount: "waypoint"}, 8080, nil, false},
		{"the pod itself", "waypoint-bind", "cart-1", id("shop", "cart"), 8080, nil, false},
		{"a port that a service without a waypoint has too", "waypoint-bind", "cart-1", client, 9090, nil, true},
		{"a port that no service has", "waypoint-bind", "cart-1", client, 1234, nil, true},
		{"a headless service", "waypoint-bind", "set-1", client, 9000, nil, true},
		{"the waypoint's own port", "waypoint-bind", "waypoint-6d4b-x", client, 15008, nil, true},
		{"the waypoint is away", "waypoint-absent", "cart-1", client, 8080, nil, false},
		{"the waypoint is not ready", "waypoint-not-ready", "cart-1", client, 8080, nil, false},
		{"the namespace prefers failure in the open", "waypoint-bypass", "cart-1", client, 8080, nil, true},
		{"some proxies do not know of the waypoint yet", "waypoint-bind", "cart-1", client, 8080,
			func(in *Inputs) { in.Moving = map[mesh.ServiceName]bool{cart: true} }, true},
		{"somebody outside, and the service lets him", "waypoint-bind", "cart-1", mesh.Identity{}, 8080, outside("cart"), true},
		{"a client, and the service lets those outside", "waypoint-bind", "cart-1", client, 8080, outside("cart"), false},
		{"the waypoint, and the service lets those outside", "waypoint-bind", "cart-1", waypoint, 8080, outside("cart"), true},
		{"somebody outside, at the port of a service that does not let him", "waypoint-bind", "cart-1", mesh.Identity{}, 7070, outside("cart"), false},
		{"somebody outside, and the namespace lets him", "waypoint-all", "cart-1", mesh.Identity{}, 1234,
			func(in *Inputs) { in.Namespaces[0].Labels[labelWaypointOutside] = "bypass" }, true},
		{"a client, and the namespace lets those outside", "waypoint-all", "cart-1", client, 1234,
			func(in *Inputs) { in.Namespaces[0].Labels[labelWaypointOutside] = "bypass" }, false},
		{"a waypoint for workloads, at any port", "waypoint-all", "cart-1", client, 1234, nil, false},
		{"a waypoint for workloads, at a service's port", "waypoint-all", "cart-1", client, 8080, nil, false},
		{"the waypoint for workloads", "waypoint-all", "cart-1", waypoint, 1234, nil, true},
		{"a bound service is taken for unbound by its object's label", "waypoint-bind", "cart-1", client, 8080,
			func(in *Inputs) {
				for _, s := range in.Services {
					if s.Name == "cart" {
						s.Labels = map[string]string{labelUseWaypoint: "none"}
					}
				}
			}, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w, in := storyWorld(t, tc.story, tc.change)
			if got := admits(t, w, podOf(t, in, tc.pod), tc.peer, tc.port); got.Allowed != tc.want {
				t.Errorf("%v to port %d of %s: %s", tc.peer, tc.port, tc.pod, got.Reason)
			}
		})
	}
}

// TestPodThatCameLater proves that a pod which needs a rule that nobody needed
// before is guarded from its first moment, and says that the rule is lacking.
func TestPodThatCameLater(t *testing.T) {
	w, in := storyWorld(t, "waypoint-bind", func(in *Inputs) { in.Pods = nil })
	_, full := storyWorld(t, "waypoint-bind", nil)
	pod := podOf(t, full, "cart-1")
	wl, _ := w.Workload(pod, nil)
	if !w.Lacks(wl) {
		t.Error("the World has no rule for the pod, and does not say so")
	}
	if d := admits(t, w, pod, mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "client"}, 8080); d.Allowed {
		t.Error("a direct connection was let through before the rule was there")
	}
	in.Pods = append(in.Pods, pod)
	w = Compile(Settings{}, in)
	if wl, _ = w.Workload(pod, nil); w.Lacks(wl) {
		t.Error("compiled anew, the World still lacks the rule")
	}
}

// TestOnlyReplicasOfAWaypointSpeakForThemselves proves that a pod is not taken
// for a waypoint, which is not captured and reached through its own tunnel, by
// a label alone.
func TestOnlyReplicasOfAWaypointSpeakForThemselves(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(*corev1.Pod)
		want   mesh.Transport
	}{
		{"a replica", func(*corev1.Pod) {}, mesh.HBONE},
		{"another service account", func(p *corev1.Pod) { p.Spec.ServiceAccountName = "default" }, mesh.PlainTCP},
		{"no Deployment behind it", func(p *corev1.Pod) { p.OwnerReferences = nil }, mesh.PlainTCP},
		{"a Gateway that is not there", func(p *corev1.Pod) {
			p.Labels[labelGatewayName], p.Spec.ServiceAccountName = "other", "other"
		}, mesh.PlainTCP},
		{"the node's network", func(p *corev1.Pod) { p.Spec.HostNetwork = true }, mesh.PlainTCP},
		{"another namespace", func(p *corev1.Pod) { p.Namespace = "evil" }, mesh.PlainTCP},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w, in := storyWorld(t, "waypoint-bind", nil)
			pod := podOf(t, in, "waypoint-6d4b-x").DeepCopy()
			tc.change(pod)
			if wl, _ := w.Workload(pod, nil); wl.Transport != tc.want {
				t.Errorf("transport %v, want %v", wl.Transport, tc.want)
			}
		})
	}
}
