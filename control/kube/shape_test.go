package kube

import (
	"encoding/json"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/kubernetes/fake"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	"sigs.k8s.io/yaml"

	"github.com/weft-mesh/weft/control/compile"
	"github.com/weft-mesh/weft/mesh"
)

// object reads an object from YAML.
func object(t *testing.T, text string) *unstructured.Unstructured {
	t.Helper()
	b, err := yaml.YAMLToJSON([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	u := &unstructured.Unstructured{}
	if err := u.UnmarshalJSON(b); err != nil {
		t.Fatal(err)
	}
	return u
}

// sameYAML compares v with what text says.
func sameYAML(t *testing.T, what string, v any, text string) {
	t.Helper()
	var want any
	if err := yaml.Unmarshal([]byte(text), &want); err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	var got any
	if err := json.Unmarshal(b, &got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

var noon = time.Date(2026, 1, 2, 12, 0, 0, 0, time.UTC)

// TestParentsAreShared proves that the entries of other controllers survive,
// that ours are replaced, and that those that no longer hold go.
func TestParentsAreShared(t *testing.T) {
	service := gatewayv1.Kind("Service")
	group := gatewayv1.Group("")
	accepted := []compile.Condition{{Type: compile.Accepted, OK: true, Reason: "Accepted", Message: "fine"}}
	st := compile.Status{Kind: compile.KindHTTPRoute, Generation: 3, Parents: []compile.ParentStatus{
		{Parent: gatewayv1.ParentReference{Group: &group, Kind: &service, Name: "cart"}, Conditions: accepted},
	}}
	const foreign = `
  - parentRef: {name: edge}
    controllerName: example.com/gateway
    conditions: [{type: Accepted, status: "True"}]`
	const mine = `
  - parentRef: {group: "", kind: Service, name: cart}
    controllerName: weft.dev/waypoint
    conditions: [{type: Accepted, status: "True", reason: Accepted, message: fine, observedGeneration: 3, lastTransitionTime: "2020-01-01T00:00:00Z"}]`
	const stale = `
  - parentRef: {group: "", kind: Service, name: gone}
    controllerName: weft.dev/waypoint
    conditions: []`
	for _, tc := range []struct {
		name, have string
		st         compile.Status
		differ     bool
		want       string
	}{
		{"nothing there", " []", st, true, `[{parentRef: {group: "", kind: Service, name: cart}, controllerName: weft.dev/waypoint,
			conditions: [{type: Accepted, status: "True", reason: Accepted, message: fine, observedGeneration: 3, lastTransitionTime: "2026-01-02T12:00:00Z"}]}]`},
		{"as it should be", foreign + mine, st, false, ""},
		{"in another order", mine + foreign, st, false, ""},
		{"one of ours is stale", mine + foreign + stale, st, true, foreign + mine},
		{"not ours any more", foreign + stale, compile.Status{}, true, foreign},
		{"never ours", foreign, compile.Status{}, false, ""},
	} {
		u := object(t, "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: r, namespace: shop, resourceVersion: '7'}\nstatus:\n  parents:"+tc.have)
		status, exclusive, differ := shapeParents.merge(u, tc.st, true, noon)
		if differ != tc.differ || !exclusive {
			t.Errorf("%s: differ %v, exclusive %v; want %v and true", tc.name, differ, exclusive, tc.differ)
		}
		if tc.differ {
			sameYAML(t, tc.name, status["parents"], tc.want)
		}
	}
	policy := object(t, "apiVersion: gateway.networking.k8s.io/v1\nkind: BackendTLSPolicy\nmetadata: {name: r, namespace: shop}")
	status, _, differ := shapeAncestors.merge(policy, st, true, noon)
	if !differ {
		t.Error("a policy without a status needs none")
	}
	sameYAML(t, "ancestors", status, `{ancestors: [{ancestorRef: {group: "", kind: Service, name: cart}, controllerName: weft.dev/waypoint,
		conditions: [{type: Accepted, status: "True", reason: Accepted, message: fine, observedGeneration: 3, lastTransitionTime: "2026-01-02T12:00:00Z"}]}]}`)
}

func TestGatewayStatus(t *testing.T) {
	st := compile.Status{Kind: compile.KindGateway, Generation: 2, Addresses: []string{"10.96.0.9"},
		Conditions: []compile.Condition{{Type: compile.Programmed, Reason: "Pending", Message: "no pod is ready"}},
		Listeners:  []compile.ListenerStatus{{Name: "mesh", AttachedRoutes: 2, Conditions: []compile.Condition{{Type: compile.Accepted, OK: true, Reason: "Accepted", Message: "m"}}}},
	}
	u := object(t, `
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint, namespace: shop}
status:
  conditions:
  - {type: Programmed, status: Unknown, reason: Pending, message: Waiting for controller, lastTransitionTime: "1970-01-01T00:00:00Z"}
  - {type: Theirs, status: "True"}`)
	status, differ := mergeGateway(u, st, noon)
	if !differ {
		t.Error("the status that the API server makes is taken for ours")
	}
	sameYAML(t, "status", status, `
addresses: [{type: IPAddress, value: 10.96.0.9}]
conditions:
- {type: Theirs, status: "True"}
- {type: Programmed, status: "False", reason: Pending, message: no pod is ready, observedGeneration: 2, lastTransitionTime: "2026-01-02T12:00:00Z"}
listeners:
- name: mesh
  attachedRoutes: 2
  supportedKinds: []
  conditions: [{type: Accepted, status: "True", reason: Accepted, message: m, observedGeneration: 2, lastTransitionTime: "2026-01-02T12:00:00Z"}]`)
	u.Object["status"] = normal(status)
	if _, differ := mergeGateway(u, st, noon.Add(time.Hour)); differ {
		t.Error("what was written is written again")
	}
	st.Listeners[0].AttachedRoutes = 3
	if _, differ := mergeGateway(u, st, noon); !differ {
		t.Error("a change of a listener is not written")
	}
}

// TestServiceConditions proves that a condition is written once, and taken
// back when it no longer holds; of somebody else's there is one try.
func TestServiceConditions(t *testing.T) {
	svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "cart", Namespace: "shop", Generation: 1, ResourceVersion: "1"}}
	w := NewWatcher(WatcherConfig{Client: fake.NewClientset(svc), Dynamic: dynamicClient(), Sink: newSink(), Log: quiet()})
	start(t, w.Run)
	<-w.Synced()
	s := &StatusWriter{Watcher: w, swept: map[string]string{}, Now: func() time.Time { return noon }}
	bound := []compile.Status{{Kind: compile.KindService, Name: mesh.Name{Namespace: "shop", Name: "cart"},
		Conditions: []compile.Condition{{Type: compile.WaypointBound, OK: true, Reason: "Bound", Message: "m"}}}}
	if got := s.due(nil); len(got) != 0 {
		t.Fatalf("nothing is to be said, and %v is written", got)
	}
	got := s.due(bound)
	if len(got) != 1 || got[0].kind != "Service" {
		t.Fatalf("%v is written, want one condition of the service", got)
	}
	sameYAML(t, "status", got[0].status, `{conditions: [{type: istio.io/WaypointBound, status: "True", reason: Bound, message: m, observedGeneration: 1, lastTransitionTime: "2026-01-02T12:00:00Z"}]}`)
	has := svc.DeepCopy()
	has.ResourceVersion = "2"
	has.Status.Conditions = []metav1.Condition{{Type: compile.WaypointBound, Status: "True", Reason: "Bound", Message: "m", ObservedGeneration: 1, LastTransitionTime: metav1.NewTime(noon)}, {Type: "Theirs"}}
	if err := w.services.GetStore().Update(has); err != nil {
		t.Fatal(err)
	}
	if got := s.due(bound); len(got) != 0 {
		t.Errorf("what the service has is written again: %v", got)
	}
	if got := s.due(nil); len(got) != 1 || len(got[0].status["conditions"].([]any)) != 0 {
		t.Errorf("the condition is not taken back: %v", got)
	}
	if got := s.due(nil); len(got) != 0 {
		t.Errorf("it is taken back for ever, and may be somebody else's: %v", got)
	}
}

func TestMover(t *testing.T) {
	world := func(waypoint string) *compile.World {
		s := mesh.Service{Name: mesh.ServiceName{Namespace: "shop", Host: "cart"}}
		if waypoint != "" {
			s.Waypoint.Service = mesh.ServiceName{Namespace: "shop", Host: mesh.Host(waypoint)}
		}
		return &compile.World{Services: []mesh.Service{s}}
	}
	var m mover
	if m.moved(nil, world("w"), noon) {
		t.Error("what is bound at the start moves")
	}
	if m.moved(world("w"), world("w"), noon) || m.moved(world("w"), world(""), noon) || m.moved(&compile.World{}, world("w"), noon) {
		t.Error("what stays, is released, or is new, moves")
	}
	if !m.moved(world(""), world("w"), noon) {
		t.Fatal("what is bound does not move")
	}
	if s, next := m.moving(noon.Add(settle - 1)); len(s) != 1 || next != noon.Add(settle) {
		t.Errorf("moving %v until %v", s, next)
	}
	if !m.moved(world("w"), world("x"), noon.Add(time.Second)) {
		t.Error("another waypoint is no move")
	}
	if s, _ := m.moving(noon.Add(settle)); len(s) != 1 {
		t.Error("the later move is forgotten with the first")
	}
	if s, next := m.moving(noon.Add(settle + time.Second)); s != nil || !next.IsZero() {
		t.Errorf("still moving: %v until %v", s, next)
	}
	m.moved(world(""), world("w"), noon)
	m.moved(world("w"), world(""), noon)
	if s, _ := m.moving(noon); s != nil {
		t.Error("what is released moves on")
	}
}

// TestServiceEntryShape proves that the addresses that hosts were given are
// written, kept while they are the same, and taken back.
func TestServiceEntryShape(t *testing.T) {
	st := compile.Status{Kind: compile.KindServiceEntry, Generation: 2,
		Conditions:    []compile.Condition{{Type: compile.WaypointBound, OK: true, Reason: "WaypointAccepted", Message: "bound"}},
		HostAddresses: []compile.HostAddress{{Host: "a.example.com", Address: netip.MustParseAddr("240.240.0.7")}}}
	const want = `
conditions: [{type: istio.io/WaypointBound, status: "True", reason: WaypointAccepted, message: bound, observedGeneration: 2, lastTransitionTime: "2026-01-02T12:00:00Z"}]
addresses: [{host: a.example.com, value: 240.240.0.7}]
observedGeneration: 2`
	u := object(t, "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {name: out, namespace: shop}")
	status, exclusive, differ := shapeServiceEntry.merge(u, st, true, noon)
	if exclusive || !differ {
		t.Errorf("exclusive %v, differ %v; want false, true", exclusive, differ)
	}
	sameYAML(t, "status", status, want)
	u.Object["status"] = normal(status)
	if _, _, differ := shapeServiceEntry.merge(u, st, true, noon); differ {
		t.Error("what is written is written again")
	}
	st.HostAddresses = nil
	status, _, differ = shapeServiceEntry.merge(u, st, true, noon)
	if list, _ := status["addresses"].([]any); !differ || len(list) != 0 {
		t.Errorf("addresses are %v, differ %v; want none, true", list, differ)
	}
}
