package compile

import (
	"net/netip"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/weft-mesh/weft/mesh"
)

// FuzzAuthorizationPolicy compiles specs that nobody has checked: the result
// is a valid policy, and one with complaints never allows anything.
func FuzzAuthorizationPolicy(f *testing.F) {
	for _, spec := range []string{
		`{}`,
		`{"action":"DENY","rules":[{}]}`,
		`{"selector":{"matchLabels":{"a":"b"}},"rules":[{"from":[{"source":{"principals":["*"],"ipBlocks":["10.0.0.0/8"]}}],"to":[{"operation":{"ports":["80"],"paths":["/"]}}],"when":[{"key":"source.ip","values":["::1"]}]}]}`,
		`{"rules":[{"from":[{}]},null]}`,
	} {
		f.Add(spec)
	}
	f.Fuzz(func(t *testing.T, spec string) {
		u := &unstructured.Unstructured{}
		if u.UnmarshalJSON([]byte(`{"apiVersion":"security.istio.io/v1","kind":"AuthorizationPolicy","metadata":{"name":"p","namespace":"shop"},"spec":`+spec+`}`)) != nil {
			t.Skip()
		}
		w := Compile(Settings{}, Inputs{AuthorizationPolicies: []AuthorizationPolicy{ReadAuthorizationPolicy(u)}})
		if len(w.Statuses) != 1 || len(w.Statuses[0].Conditions) != 1 {
			t.Fatalf("statuses %+v, want one with one condition", w.Statuses)
		}
		for _, p := range w.Policies {
			if err := p.Validate(); err != nil {
				t.Fatal(err)
			}
			if w.Statuses[0].Conditions[0].Reason == reasonInvalid && p.Action == mesh.Allow && len(p.Groups) > 0 {
				t.Fatalf("an invalid policy allows: %+v", p)
			}
		}
	})
}

// FuzzServiceEntry compiles specs that nobody has checked: what comes out is
// valid, takes nobody's address, and nothing stands behind what cannot be
// followed as a whole.
func FuzzServiceEntry(f *testing.F) {
	for _, spec := range []string{
		`{}`,
		`{"hosts":["a.example.com"],"resolution":"STATIC","ports":[{"number":80,"name":"http"}],"endpoints":[{"address":"203.0.113.1","ports":{"http":8080}}]}`,
		`{"hosts":["*.example.com"],"addresses":["10.96.0.0/16","10.244.1.7"],"resolution":"NONE","ports":[{"number":80}]}`,
		`{"hosts":["a","a"],"resolution":"DNS","ports":[{"number":443,"protocol":"TLS"}],"workloadSelector":{"labels":{"a":"b"}},"x":1}`,
	} {
		f.Add(spec)
	}
	f.Fuzz(func(t *testing.T, spec string) {
		u := &unstructured.Unstructured{}
		if u.UnmarshalJSON([]byte(`{"apiVersion":"networking.istio.io/v1","kind":"ServiceEntry","metadata":{"name":"e","namespace":"shop"},"spec":`+spec+`}`)) != nil {
			t.Skip()
		}
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "other", Name: "p"}, Status: corev1.PodStatus{PodIP: "10.244.1.7"}}
		w := Compile(Settings{}, Inputs{ServiceEntries: []ServiceEntry{ReadServiceEntry(u)}, Pods: []*corev1.Pod{pod}})
		for _, s := range w.Services {
			if err := s.Validate(); err != nil {
				t.Fatal(err)
			}
			for _, v := range s.VIPs {
				if v.Prefix.Contains(netip.MustParseAddr("10.244.1.7")) {
					t.Fatalf("%s takes the address of a pod: %v", s.Name, v)
				}
			}
			if e := w.entries[mesh.Name{Namespace: u.GetNamespace(), Name: u.GetName()}]; e.closed && (s.Mode == mesh.BalancePassthrough || len(w.Endpoints) > 0) {
				t.Fatalf("%s cannot be followed, and is: mode %q, %d endpoints", s.Name, s.Mode, len(w.Endpoints))
			}
		}
		for _, x := range w.Endpoints {
			if err := x.Validate(); err != nil {
				t.Fatal(err)
			}
		}
	})
}
