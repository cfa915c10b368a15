package compile

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"
)

// TestReviewGatewayAPI reviews objects without the cluster that they are for.
func TestReviewGatewayAPI(t *testing.T) {
	const route = "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: r, namespace: shop}\nspec: "
	const gateway = "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: g, namespace: shop}\nspec: "
	for _, tc := range []struct {
		name, yaml string
		want       []string
		ours       bool
	}{
		{"good", route + `{parentRefs: [{group: "", kind: Service, name: a}], rules: [{backendRefs: [{name: a, port: 80}]}]}`, nil, true},
		{"unknown field", route + `{parentRefs: [{group: "", kind: Service, name: a}], rules: [{match: []}]}`,
			[]string{`spec.rules[0] cannot be read: unknown field "match"`}, true},
		{"reference of another kind", route + `{parentRefs: [{group: "", kind: Service, name: a}], rules: [{backendRefs: [{kind: Bucket, name: a}]}]}`,
			[]string{`spec.rules[0].backendRefs[0] is of kind "Bucket" of group "", want a Service of group "", or a Hostname of group networking.istio.io`}, true},
		{"host names", route + `{hostnames: [a.example.com], parentRefs: [{group: "", kind: Service, name: a}], rules: [{backendRefs: [{name: a, port: 80}]}]}`,
			[]string{"spec.hostnames does not count for a Service, which is asked for by its address"}, true},
		{"route of a gateway", route + `{parentRefs: [{name: g}], rules: [{match: []}]}`, nil, false},
		{"waypoint without its listener", gateway + `{gatewayClassName: weft-waypoint, listeners: []}`,
			[]string{"spec.listeners has none with port 15008 and protocol HBONE"}, true},
		{"waypoint", gateway + `{gatewayClassName: weft-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}`, nil, true},
		{"another class", gateway + `{gatewayClassName: other, listeners: []}`, nil, false},
		{"another group", "apiVersion: v1\nkind: Service\nmetadata: {name: a}\n", nil, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			u := &unstructured.Unstructured{}
			if err := yaml.Unmarshal([]byte(tc.yaml), &u.Object); err != nil {
				t.Fatal(err)
			}
			found, ours := reviewGatewayAPI(u)
			var got []string
			for _, f := range found {
				got = append(got, f.String())
			}
			if diff := cmp.Diff(tc.want, got); diff != "" || ours != tc.ours {
				t.Errorf("ours %v, want %v; findings (-want +got):\n%s", ours, tc.ours, diff)
			}
		})
	}
}
