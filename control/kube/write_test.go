package kube

import (
	"context"
	"encoding/json"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"github.com/weft-mesh/weft/control/compile"
	"github.com/weft-mesh/weft/internal/run"
)

// TestBundleWriter proves that each namespace gets the bundle, that it is
// repaired, and that what is not Weft's is left alone.
func TestBundleWriter(t *testing.T) {
	const roots = "-----ROOT-----"
	bundle := func(ns, data string, labels map[string]string) *corev1.ConfigMap {
		return &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: BundleName, Namespace: ns, Labels: labels}, Data: map[string]string{BundleKey: data}}
	}
	ours := map[string]string{"app.kubernetes.io/managed-by": "weft"}
	dying := aNamespace("dying")
	dying.Status.Phase = corev1.NamespaceTerminating
	client := fake.NewClientset(aNamespace("empty"), aNamespace("stale"), aNamespace("foreign"), dying,
		bundle("stale", "old", ours), bundle("foreign", "theirs", map[string]string{"istio.io/config": "true"}))
	var log logBook
	w := NewWatcher(WatcherConfig{Client: client, Dynamic: dynamicClient(), Sink: newSink(), Log: quiet()})
	b := &BundleWriter{Client: client, Watcher: w, Roots: func() []byte { return []byte(roots) }, Log: log.logger()}
	start(t, func(ctx context.Context) error { return run.All(ctx, w.Run, b.Run) })

	data := func(ns string) string {
		m, err := client.CoreV1().ConfigMaps(ns).Get(t.Context(), BundleName, metav1.GetOptions{})
		if err != nil {
			return ""
		}
		if m.Labels["app.kubernetes.io/managed-by"] == "weft" && m.Data[BundleKey] == roots {
			return "ours"
		}
		return m.Data[BundleKey]
	}
	has := func(ns, want string) func() bool { return func() bool { return data(ns) == want } }
	eventually(t, "a namespace without a bundle gets one", has("empty", "ours"))
	eventually(t, "a stale one is renewed", has("stale", "ours"))
	eventually(t, "a foreign one is warned of", func() bool { return log.count("namespace=foreign") == 1 })

	ctx := t.Context()
	if _, err := client.CoreV1().Namespaces().Create(ctx, aNamespace("later"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a new namespace gets one", has("later", "ours"))
	if err := client.CoreV1().ConfigMaps("empty").Delete(ctx, BundleName, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a deleted one comes back", has("empty", "ours"))
	if _, err := client.CoreV1().ConfigMaps("stale").Update(ctx, bundle("stale", "forged", ours), metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a changed one is repaired", has("stale", "ours"))
	if got := data("foreign"); got != "theirs" {
		t.Errorf("the foreign bundle is now %q", got)
	}
	if got := data("dying"); got != "" {
		t.Errorf("a terminating namespace got %q", got)
	}
	if _, err := client.CoreV1().ConfigMaps("foreign").Update(ctx, bundle("foreign", "theirs", ours), metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "labelled, it is taken over", has("foreign", "ours"))
}

// TestStatusWriter proves that a status is applied once, by server-side apply
// on the status subresource, and again when it changes.
func TestStatusWriter(t *testing.T) {
	dyn := dynamicClient(policy(t, "AuthorizationPolicy", "shop", "p", "{rules: [{}]}"))
	patches := make(chan clienttesting.PatchAction, 100)
	dyn.PrependReactor("patch", "*", func(a clienttesting.Action) (bool, runtime.Object, error) {
		patch := a.(clienttesting.PatchAction)
		u := &unstructured.Unstructured{}
		if err := json.Unmarshal(patch.GetPatch(), &u.Object); err != nil {
			return true, nil, err
		}
		// What the API server does: the status is replaced, and watchers
		// see it.
		obj, err := dyn.Tracker().Get(authorizationPolicies, patch.GetNamespace(), patch.GetName())
		if err != nil {
			return true, nil, err
		}
		next := obj.DeepCopyObject().(*unstructured.Unstructured)
		next.Object["status"] = u.Object["status"]
		next.SetResourceVersion(next.GetResourceVersion() + "1")
		err = dyn.Tracker().Update(authorizationPolicies, next, patch.GetNamespace())
		patches <- patch
		return true, next, err
	})
	w := NewWatcher(WatcherConfig{Client: fake.NewClientset(), Dynamic: dyn, Sink: newSink(), Log: quiet(), Quiet: time.Millisecond})
	sw := &StatusWriter{Dynamic: dyn, Watcher: w, Log: quiet(), Now: func() time.Time { return time.Unix(0, 0) }}
	start(t, func(ctx context.Context) error { return run.All(ctx, w.Run, sw.Run) })

	first := <-patches
	if first.GetSubresource() != "status" || first.GetPatchType() != "application/apply-patch+yaml" {
		t.Errorf("patched %q by %q", first.GetSubresource(), first.GetPatchType())
	}
	want := `{"apiVersion":"security.istio.io/v1","kind":"AuthorizationPolicy","metadata":{"name":"p","namespace":"shop"},` +
		`"status":{"conditions":[{"lastTransitionTime":"1970-01-01T00:00:00Z","message":"enforced by ztunnel for every pod in namespace shop",` +
		`"observedGeneration":1,"reason":"Accepted","status":"True","type":"ZtunnelAccepted"}],"observedGeneration":1}}`
	if diff := cmp.Diff(want, string(bytesTrim(first.GetPatch()))); diff != "" {
		t.Errorf("patch (-want +got):\n%s", diff)
	}

	broken := policy(t, "AuthorizationPolicy", "shop", "p", "{rules: [{to: [{operation: {ports: [http]}}]}]}")
	broken.SetGeneration(2)
	broken.SetResourceVersion("7")
	got, err := dyn.Tracker().Get(authorizationPolicies, "shop", "p")
	if err != nil {
		t.Fatal(err)
	}
	broken.Object["status"] = got.(*unstructured.Unstructured).Object["status"]
	if err := dyn.Tracker().Update(authorizationPolicies, broken, "shop"); err != nil {
		t.Fatal(err)
	}
	second := <-patches
	var p struct {
		Status struct {
			Conditions []struct{ Status, Reason string }
		}
	}
	if err := json.Unmarshal(second.GetPatch(), &p); err != nil || len(p.Status.Conditions) != 1 || p.Status.Conditions[0].Reason != "Invalid" {
		t.Errorf("second patch %s, %v: want one condition with reason Invalid", second.GetPatch(), err)
	}
	select {
	case extra := <-patches:
		t.Errorf("patched a third time: %s", extra.GetPatch())
	default:
	}
}

func bytesTrim(b []byte) []byte {
	for len(b) > 0 && b[len(b)-1] == '\n' {
		b = b[:len(b)-1]
	}
	return b
}

// TestMergeConditions proves what is kept of the conditions that are there.
func TestMergeConditions(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	st := compile.Status{Kind: compile.KindAuthorizationPolicy, Generation: 4,
		Conditions: []compile.Condition{{Type: compile.ZtunnelAccepted, OK: true, Reason: "Accepted", Message: "fine"}}}
	condition := func(typ, status, message string, generation int64) map[string]any {
		return map[string]any{"type": typ, "status": status, "reason": "Accepted", "message": message,
			"observedGeneration": generation, "lastTransitionTime": "2020-01-01T00:00:00Z"}
	}
	foreign := map[string]any{"type": "SomebodyElses", "status": "True"}
	for _, tc := range []struct {
		name   string
		have   []any
		differ bool
		kept   bool // the time of transition
		others int
	}{
		{"nothing there", nil, true, false, 0},
		{"the same there", []any{condition(compile.ZtunnelAccepted, "True", "fine", 4)}, false, true, 0},
		{"another message", []any{condition(compile.ZtunnelAccepted, "True", "other", 4)}, true, true, 0},
		{"an older generation", []any{condition(compile.ZtunnelAccepted, "True", "fine", 3)}, true, true, 0},
		{"another status", []any{condition(compile.ZtunnelAccepted, "False", "fine", 4)}, true, false, 0},
		{"one of ours that no longer holds", []any{condition(compile.ZtunnelAccepted, "True", "fine", 4), condition(compile.WaypointAccepted, "False", "x", 4)}, true, true, 0},
		{"somebody else's is kept", []any{foreign, condition(compile.ZtunnelAccepted, "True", "fine", 4)}, false, true, 1},
		{"garbage is kept", []any{"text", condition(compile.ZtunnelAccepted, "True", "fine", 4)}, false, true, 1},
	} {
		obj := &unstructured.Unstructured{Object: map[string]any{"status": map[string]any{"conditions": tc.have}}}
		got, differ := mergeConditions(obj, st, now)
		if differ != tc.differ || len(got) != tc.others+1 {
			t.Errorf("%s: differ %v, %d conditions, want %v, %d", tc.name, differ, len(got), tc.differ, tc.others+1)
			continue
		}
		at := got[len(got)-1].(map[string]any)["lastTransitionTime"]
		if kept := at == "2020-01-01T00:00:00Z"; kept != tc.kept {
			t.Errorf("%s: time of transition %v, want kept %v", tc.name, at, tc.kept)
		}
	}
}

// TestCreateOnce proves that of many processes that make a CA at the same
// time, all use the same.
func TestCreateOnce(t *testing.T) {
	s := Secrets{Client: fake.NewClientset(), Namespace: "weft-system"}
	if _, ok, err := s.Read(t.Context(), "ca"); ok || err != nil {
		t.Fatalf("an empty cluster has the secret: %v, %v", ok, err)
	}
	var wg sync.WaitGroup
	got := make([]string, 16)
	for i := range got {
		wg.Go(func() {
			data, err := s.CreateOnce(t.Context(), "ca", map[string][]byte{"key": {byte('a' + i)}})
			if err != nil {
				t.Error(err)
			}
			got[i] = string(data["key"])
		})
	}
	wg.Wait()
	for _, g := range got {
		if g != got[0] || g == "" {
			t.Fatalf("processes use different keys: %q", got)
		}
	}
}

// TestReadReview proves whom a token makes its bearer.
func TestReadReview(t *testing.T) {
	user := func(name string, extra map[string]authenticationv1.ExtraValue) authenticationv1.TokenReviewStatus {
		return authenticationv1.TokenReviewStatus{Authenticated: true, Audiences: []string{"istio-ca"}, User: authenticationv1.UserInfo{Username: name, Extra: extra}}
	}
	bound := map[string]authenticationv1.ExtraValue{extraPodName: {"p"}, extraPodUID: {"u"}, extraNodeName: {"n"}}
	for _, tc := range []struct {
		name string
		in   authenticationv1.TokenReviewStatus
		want Review
	}{
		{"a bound token", user("system:serviceaccount:ns:sa", bound),
			Review{Audiences: []string{"istio-ca"}, Namespace: "ns", ServiceAccount: "sa", PodName: "p", PodUID: "u", NodeName: "n"}},
		{"a token that is not bound", user("system:serviceaccount:ns:sa", nil), Review{Audiences: []string{"istio-ca"}, Namespace: "ns", ServiceAccount: "sa"}},
		{"two values are none", user("system:serviceaccount:ns:sa", map[string]authenticationv1.ExtraValue{extraPodName: {"p", "q"}}),
			Review{Audiences: []string{"istio-ca"}, Namespace: "ns", ServiceAccount: "sa"}},
		{"expired", authenticationv1.TokenReviewStatus{Error: "token has expired"}, Review{Refused: "token has expired"}},
		{"an error beats authenticated", authenticationv1.TokenReviewStatus{Authenticated: true, Error: "x"}, Review{Refused: "x"}},
		{"the zero status", authenticationv1.TokenReviewStatus{}, Review{Refused: "not authenticated"}},
		{"a person", user("admin", bound), Review{Refused: "not a service account token"}},
		{"a node", user("system:node:n", bound), Review{Refused: "not a service account token"}},
		{"no account", user("system:serviceaccount:ns:", nil), Review{Refused: "not a service account token"}},
		{"too many parts", user("system:serviceaccount:ns:sa:x", nil), Review{Refused: "not a service account token"}},
	} {
		if diff := cmp.Diff(tc.want, readReview(tc.in)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tc.name, diff)
		}
	}
}

// TestReviewToken proves what is asked, and that an API server that does not
// answer is an error and not a refusal.
func TestReviewToken(t *testing.T) {
	client := fake.NewClientset()
	var asked authenticationv1.TokenReviewSpec
	client.PrependReactor("create", "tokenreviews", func(a clienttesting.Action) (bool, runtime.Object, error) {
		asked = a.(clienttesting.CreateAction).GetObject().(*authenticationv1.TokenReview).Spec
		return true, &authenticationv1.TokenReview{Status: authenticationv1.TokenReviewStatus{Error: "bad"}}, nil
	})
	got, err := ReviewToken(t.Context(), client, "secret", "istio-ca")
	if err != nil || got.Refused != "bad" {
		t.Fatalf("%+v, %v, want refused", got, err)
	}
	if diff := cmp.Diff(authenticationv1.TokenReviewSpec{Token: "secret", Audiences: []string{"istio-ca"}}, asked); diff != "" {
		t.Errorf("asked (-want +got):\n%s", diff)
	}
	client.PrependReactor("create", "tokenreviews", func(clienttesting.Action) (bool, runtime.Object, error) {
		return true, nil, context.DeadlineExceeded
	})
	if _, err := ReviewToken(t.Context(), client, "secret", "istio-ca"); err == nil {
		t.Error("an API server that does not answer is taken for an answer")
	}
}

// TestWebhookWriter proves that the roots are put in and kept, and that a
// configuration that somebody has removed is not missed.
func TestWebhookWriter(t *testing.T) {
	conf := &admissionregistrationv1.ValidatingWebhookConfiguration{
		ObjectMeta: metav1.ObjectMeta{Name: "weft"}, Webhooks: []admissionregistrationv1.ValidatingWebhook{{Name: "a"}, {Name: "b"}},
	}
	client := fake.NewClientset(conf)
	w := &WebhookWriter{Client: client, Name: "weft", Roots: func() []byte { return []byte("ROOT") }, Log: quiet()}
	for range 2 {
		if err := w.write(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	got, err := client.AdmissionregistrationV1().ValidatingWebhookConfigurations().Get(t.Context(), "weft", metav1.GetOptions{})
	if err != nil || string(got.Webhooks[0].ClientConfig.CABundle) != "ROOT" || string(got.Webhooks[1].ClientConfig.CABundle) != "ROOT" {
		t.Errorf("%v, %v: want the roots in both", got, err)
	}
	updates := 0
	for _, a := range client.Actions() {
		if a.GetVerb() == "update" {
			updates++
		}
	}
	if updates != 1 {
		t.Errorf("written %d times, want once", updates)
	}
	w.Name = "gone"
	if err := w.write(t.Context()); err != nil {
		t.Errorf("a configuration that is not there: %v", err)
	}
}
