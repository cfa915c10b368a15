package compile

import (
	"testing"

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
