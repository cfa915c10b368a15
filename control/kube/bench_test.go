package kube

import (
	"fmt"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/weft-mesh/weft/api/feed"
	"github.com/weft-mesh/weft/control/compile"
	"github.com/weft-mesh/weft/mesh"
)

// BenchmarkChange measures what one change costs in a large cluster, from the
// end of the moment of quiet until it is ready to be sent: 1,000 services with
// 3 pods each in 20 namespaces behind waypoints, 200 HTTPRoutes, 100
// VirtualServices and 100 DestinationRules.
func BenchmarkChange(b *testing.B) {
	w := NewWatcher(WatcherConfig{
		Client: fake.NewClientset(), Dynamic: dynamicClient(), Settings: compile.Settings{}, Log: quiet(),
		Sink: feed.NewServer(quiet(), prometheus.NewRegistry(), nil), Registerer: prometheus.NewRegistry(),
	})
	add := func(err error) {
		if err != nil {
			b.Fatal(err)
		}
	}
	for i := range 20 {
		add(w.namespaces.GetStore().Add(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint("ns", i), Labels: map[string]string{"istio.io/use-waypoint": "waypoint"}}}))
	}
	for i := range 1000 {
		ns, name := fmt.Sprint("ns", i%20), fmt.Sprint("svc", i)
		set := map[string]string{"app": name, "tier": "web"}
		add(w.services.GetStore().Add(&corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name}, Spec: corev1.ServiceSpec{
			ClusterIP: fmt.Sprintf("10.96.%d.%d", i/250, i%250+1), Selector: set,
			Ports: []corev1.ServicePort{{Name: "http", Port: 80, TargetPort: intstr.FromInt32(8080)}},
		}}))
		for p := range 3 {
			n := 3*i + p
			add(w.pods.GetStore().Add(&corev1.Pod{
				ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: fmt.Sprint(name, "-", p), Labels: map[string]string{"app": name, "tier": "web", "version": fmt.Sprint("v", p)},
					Annotations: map[string]string{"ambient.istio.io/redirection": "enabled"}},
				Spec:   corev1.PodSpec{NodeName: "node1", ServiceAccountName: name},
				Status: corev1.PodStatus{PodIP: fmt.Sprintf("10.%d.%d.%d", 200+n/62500, n/250%250, n%250+1), Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}},
			}))
		}
	}
	custom := func(kind, version string, i int, spec map[string]any) {
		for _, o := range w.optional {
			if o.name != kind {
				continue
			}
			u := &unstructured.Unstructured{Object: map[string]any{"apiVersion": o.group + "/" + version, "kind": kind,
				"metadata": map[string]any{"namespace": fmt.Sprint("ns", i%20), "name": fmt.Sprint("o", i)}, "spec": spec}}
			o.served = 0
			add(o.informers[0].GetStore().Add(u))
		}
	}
	for i := range 200 {
		custom(compile.KindHTTPRoute, "v1", i, map[string]any{
			"parentRefs": []any{map[string]any{"group": "", "kind": "Service", "name": fmt.Sprint("svc", i)}},
			"rules": []any{
				map[string]any{"matches": []any{map[string]any{"path": map[string]any{"type": "PathPrefix", "value": "/a"}}},
					"backendRefs": []any{map[string]any{"name": fmt.Sprint("svc", i), "port": int64(80)}}},
				map[string]any{"backendRefs": []any{map[string]any{"name": fmt.Sprint("svc", i+20), "port": int64(80)}}},
			}})
	}
	for i := range 100 {
		host := fmt.Sprint("svc", 500+i)
		custom(compile.KindVirtualService, "v1", 500+i, map[string]any{"hosts": []any{host}, "http": []any{map[string]any{
			"timeout": "2s", "route": []any{map[string]any{"destination": map[string]any{"host": host, "subset": "v1"}}}}}})
		custom(compile.KindDestinationRule, "v1", 500+i, map[string]any{"host": host,
			"subsets": []any{map[string]any{"name": "v1", "labels": map[string]any{"version": "v1"}}}})
	}
	c := &compiler{w: w, sent: map[mesh.UID]mesh.Workload{}, told: map[conditionKey]string{}, pins: newPins(b.Context(), w)}
	c.compileWorld(time.Now())
	if len(c.world.Services) != 1000 || len(c.sent) != 3000 || len(c.world.Routes) != 300 || len(c.world.TrafficPolicies) != 200 {
		b.Fatalf("%d services, %d pods, %d routes, %d traffic policies", len(c.world.Services), len(c.sent), len(c.world.Routes), len(c.world.TrafficPolicies))
	}
	for b.Loop() {
		c.compileWorld(time.Now())
	}
}
