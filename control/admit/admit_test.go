package admit

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	admissionv1 "k8s.io/api/admission/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

func object(apiVersion, kind, meta, spec string) []byte {
	return fmt.Appendf(nil, `{"apiVersion": %q, "kind": %q, "metadata": {"name": "x", "namespace": "shop"%s}, "spec": %s}`, apiVersion, kind, meta, spec)
}

func TestReview(t *testing.T) {
	const networking = "networking.istio.io/v1"
	for _, tc := range []struct {
		name      string
		operation admissionv1.Operation
		object    []byte
		allowed   bool
		want      string // in the message or the warnings
	}{
		{"a valid object", admissionv1.Create,
			object(networking, "VirtualService", "", `{"hosts": ["a"], "http": [{"route": [{"destination": {"host": "a"}}]}]}`), true, ""},
		{"an error names its field", admissionv1.Create,
			object(networking, "VirtualService", "", `{"hosts": ["a"], "http": [{"route": [{"destination": {"host": "a"}, "weight": -1}]}]}`), false, "spec.http[0].route[0].weight is -1"},
		{"an unknown field is an error", admissionv1.Update,
			object(networking, "DestinationRule", "", `{"host": "a", "trafficPolicies": {"tls": {}}}`), false, "did you mean trafficPolicy?"},
		{"a warning lets it through", admissionv1.Create,
			object(networking, "VirtualService", "", `{"hosts": ["a"], "gateway": null, "http": [{"route": [{"destination": {"host": "a"}}]}]}`), true, "spec.gateway is not a field"},
		{"a policy that ztunnel cannot enforce as written", admissionv1.Create,
			object("security.istio.io/v1", "AuthorizationPolicy", "", `{"rules": [{"to": [{"operation": {"methods": ["GET"]}}]}]}`), true, "allows nothing"},
		{"the same policy with a target", admissionv1.Create,
			object("security.istio.io/v1", "AuthorizationPolicy", "", `{"targetRefs": [{"kind": "Service", "group": "", "name": "a"}], "rules": [{"to": [{"operation": {"methods": ["GET"]}}]}]}`), true, ""},
		{"a target that cannot be", admissionv1.Create,
			object("security.istio.io/v1", "AuthorizationPolicy", "", `{"targetRefs": [{"kind": "Pod", "group": "", "name": "a"}]}`), false, "spec.targetRefs[0] is of kind Pod"},
		{"an error in an object of the Gateway API", admissionv1.Create,
			object("gateway.networking.k8s.io/v1", "HTTPRoute", "", `{"parentRefs": [{"kind": "Service", "group": "", "name": "a"}], "rules": [{"filters": [{"type": "ExternalAuth"}]}]}`), true, "spec.rules[0].filters[0].type is \"ExternalAuth\", which is not supported"},
		{"a kind that is passed over", admissionv1.Create, object("telemetry.istio.io/v1", "Telemetry", "", `{}`), true, "kind is Telemetry, which this version of Weft passes over"},
		{"an invalid object that is going may go", admissionv1.Update,
			object(networking, "VirtualService", `, "deletionTimestamp": "2026-01-01T00:00:00Z"`, `{"http": 1}`), true, ""},
		{"a deletion", admissionv1.Delete, nil, true, ""},
		{"a kind of others", admissionv1.Create, object("example.com/v1", "Thing", "", `{"hosts": 1}`), true, ""},
		{"something that is no object", admissionv1.Create, []byte(`[]`), false, "not readable"},
		{"nothing", admissionv1.Create, []byte(`null`), false, "not readable"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := Review(&admissionv1.AdmissionRequest{UID: "7", Operation: tc.operation, Namespace: "shop", Object: runtime.RawExtension{Raw: tc.object}})
			said := strings.Join(r.Warnings, "\n")
			if r.Result != nil {
				said += r.Result.Message
			}
			if r.UID != "7" || r.Allowed != tc.allowed || !strings.Contains(said, tc.want) || tc.want == "" && said != "" {
				t.Errorf("allowed %v, want %v; %q in: %s", r.Allowed, tc.allowed, tc.want, said)
			}
			if !tc.allowed && (r.Result == nil || r.Result.Code != http.StatusUnprocessableEntity || len(r.Result.Details.Causes) == 0) {
				t.Errorf("a denial without its causes: %+v", r.Result)
			}
		})
	}
}

func TestWarningsAreShort(t *testing.T) {
	long := strings.Repeat("ü", 300)
	got := shortened(long)
	if len(got) > longestWarning || !strings.HasSuffix(got, "ü...") || !strings.HasPrefix(long, strings.TrimSuffix(got, "...")) {
		t.Errorf("%d bytes: %s", len(got), got)
	}
	if shortened("short") != "short" {
		t.Error("a short one was changed")
	}
}

func TestHandler(t *testing.T) {
	post := func(body string) *httptest.ResponseRecorder {
		w := httptest.NewRecorder()
		Handler().ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/admit", strings.NewReader(body)))
		return w
	}
	review := admissionv1.AdmissionReview{Request: &admissionv1.AdmissionRequest{UID: "u", Operation: admissionv1.Create,
		Object: runtime.RawExtension{Raw: object("networking.istio.io/v1", "VirtualService", "", `{}`)}}}
	review.APIVersion, review.Kind = "admission.k8s.io/v1", "AdmissionReview"
	b, err := json.Marshal(review)
	if err != nil {
		t.Fatal(err)
	}
	w := post(string(b))
	var out admissionv1.AdmissionReview
	if err := json.Unmarshal(w.Body.Bytes(), &out); err != nil || w.Code != http.StatusOK {
		t.Fatalf("%d: %v", w.Code, err)
	}
	if out.APIVersion != review.APIVersion || out.Kind != review.Kind || out.Request != nil || out.Response == nil || out.Response.UID != "u" || out.Response.Allowed {
		t.Errorf("answer %s", w.Body)
	}
	if w := post("{}"); w.Code != http.StatusBadRequest {
		t.Errorf("without a request: %d", w.Code)
	}
	if w := post(`{"request": "` + strings.Repeat("x", longestReview) + `"}`); w.Code != http.StatusRequestEntityTooLarge {
		t.Errorf("too long: %d", w.Code)
	}
	w = httptest.NewRecorder()
	Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/admit", nil))
	if w.Code != http.StatusMethodNotAllowed {
		t.Errorf("GET: %d", w.Code)
	}
}

// FuzzReview proves that no object ends the webhook, and that whatever is
// denied says why.
func FuzzReview(f *testing.F) {
	f.Add(object("networking.istio.io/v1", "VirtualService", "", `{"hosts": ["a"], "http": [{"match": [{"uri": {"prefix": "/"}}], "route": [{"destination": {"host": "a"}}]}]}`))
	f.Add(object("networking.istio.io/v1", "DestinationRule", "", `{"host": "a", "subsets": [{"name": "v1", "labels": {"a": "b"}}]}`))
	f.Add(object("security.istio.io/v1", "AuthorizationPolicy", "", `{"targetRefs": [{"kind": "Service"}], "rules": [{"when": [{"key": "request.headers[a]", "values": ["*"]}]}]}`))
	f.Add(object("gateway.networking.k8s.io/v1", "HTTPRoute", "", `{"parentRefs": [{"kind": "Service", "group": "", "name": "a"}], "rules": [{}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := Review(&admissionv1.AdmissionRequest{UID: "7", Operation: admissionv1.Create, Object: runtime.RawExtension{Raw: bytes.Clone(b)}})
		if !r.Allowed && (r.Result == nil || r.Result.Message == "") {
			t.Errorf("denied without a reason: %s", b)
		}
	})
}
