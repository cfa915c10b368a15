package main

import (
	"bytes"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

func TestWaypointCommandLine(t *testing.T) {
	t.Setenv("KUBECONFIG", t.TempDir()+"/none")
	for _, r := range []struct {
		name string
		args string
		code int
		want string
	}{
		{"help names the verbs", "waypoint --help", 0, "generate"},
		{"generate", "waypoint generate -n shop --for all", 0, `apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata:
  labels:
    istio.io/waypoint-for: all
  name: waypoint
  namespace: shop
spec:
  gatewayClassName: weft-waypoint
  listeners:
  - name: mesh
    port: 15008
    protocol: HBONE
`},
		{"generate without a namespace", "waypoint generate --name wp", 0, "metadata:\n  name: wp\nspec:"},
		{"for what is not known", "waypoint generate --for everything", 1, "want service, workload, all or none"},
		{"apply for what is not known", "waypoint apply --for everything", 1, "want service, workload, all or none"},
		{"no name", "waypoint generate --name=", 1, "name is empty"},
		{"no cluster", "waypoint list", 1, "--kubeconfig"},
		{"unknown output", "waypoint list -o xml", 1, "want json or yaml"},
		{"delete nothing", "waypoint delete", 1, "--all"},
		{"delete some and all", "waypoint delete a --all", 1, "--all"},
		{"completion of what it is for", "__complete waypoint apply --for ", 0, "workload"},
	} {
		t.Run(r.name, func(t *testing.T) {
			var out bytes.Buffer
			args := strings.Fields(r.args)
			if strings.HasSuffix(r.args, " ") {
				args = append(args, "")
			}
			code := run(t.Context(), args, &out, &out)
			if code != r.code || !strings.Contains(out.String(), r.want) {
				t.Errorf("code %d, want %d, and %q in:\n%s", code, r.code, r.want, out.String())
			}
		})
	}
}

func TestReadWaypoint(t *testing.T) {
	gateway := func(generation int64, conditions ...any) *unstructured.Unstructured {
		s := waypointSpec{namespace: "shop", name: "waypoint"}
		g := s.gateway()
		g.SetGeneration(generation)
		g.Object["status"] = map[string]any{"conditions": conditions, "addresses": []any{map[string]any{"type": "IPAddress", "value": "10.96.0.1"}}}
		return g
	}
	condition := func(kind, status, reason string, seen int64) any {
		return map[string]any{"type": kind, "status": status, "reason": reason, "message": "so it is", "observedGeneration": seen}
	}
	for _, r := range []struct {
		name  string
		g     *unstructured.Unstructured
		ready bool
		why   string
	}{
		{"ready", gateway(1, condition("Accepted", "True", "Accepted", 1), condition("Programmed", "True", "Programmed", 1)), true, ""},
		{"not accepted", gateway(1, condition("Accepted", "False", "InvalidParameters", 1), condition("Programmed", "False", "Invalid", 1)), false, "InvalidParameters: so it is"},
		{"not programmed", gateway(1, condition("Accepted", "True", "Accepted", 1), condition("Programmed", "False", "Pending", 1)), false, "Pending: so it is"},
		{"nobody has looked", gateway(1), false, "nothing has taken it up"},
		{"of an older generation", gateway(2, condition("Accepted", "True", "Accepted", 2), condition("Programmed", "True", "Programmed", 1)), false, "Programmed"},
	} {
		t.Run(r.name, func(t *testing.T) {
			w := readWaypoint(r.g)
			if w.Programmed != r.ready || !strings.Contains(w.why(), r.why) || (r.why == "") != (w.why() == "") {
				t.Errorf("ready %v, why %q; want %v, %q", w.Programmed, w.why(), r.ready, r.why)
			}
		})
	}
}

func TestWaypointTable(t *testing.T) {
	ws := []waypointState{
		{Namespace: "shop", Name: "waypoint", Class: waypointClass, For: "service", Programmed: true, Ready: 2, Wanted: 2, Addresses: []string{"10.96.0.1"}},
		{Namespace: "pay", Name: "w", Class: istioClass, For: "all"},
	}
	var out bytes.Buffer
	if err := waypointPeople(ws)(&out); err != nil {
		t.Fatal(err)
	}
	const want = `NAMESPACE  NAME      CLASS           FOR      READY  REPLICAS  ADDRESS
shop       waypoint  weft-waypoint   service  yes    2/2       10.96.0.1
pay        w         istio-waypoint  all      no     0/0       -
waypoint pay/w is not ready: nothing has taken it up yet: is weft-control running, and does it know GatewayClass istio-waypoint?
`
	if out.String() != want {
		t.Errorf("got\n%s\nwant\n%s", out.String(), want)
	}
	if _, err := named(ws, "shop", []string{"other"}); err == nil {
		t.Error("a waypoint that is not there was found")
	}
}

func TestSameWaypoint(t *testing.T) {
	s := waypointSpec{name: "w", traffic: "all"}
	if !sameWaypoint(s.gateway(), s.gateway()) {
		t.Error("a Gateway differs from itself")
	}
	other := s
	other.traffic = ""
	foreign := s.gateway()
	if err := unstructured.SetNestedField(foreign.Object, "istio", "spec", "gatewayClassName"); err != nil {
		t.Fatal(err)
	}
	if sameWaypoint(other.gateway(), s.gateway()) || sameWaypoint(foreign, s.gateway()) {
		t.Error("a Gateway that differs is the same")
	}
}
