package main

import (
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/kubernetes/fake"
)

func TestOldCluster(t *testing.T) {
	_, err := render("weft-system", "v1.26.9", settings{registry: "r"})
	if err == nil || !strings.Contains(err.Error(), "v1.26.9") || !strings.Contains(err.Error(), "1.27") {
		t.Errorf("error %v, want one with both versions", err)
	}
	for _, ok := range []string{"v1.27.0", "v1.36.3+k3s1", "v1.30.4-gke.100"} {
		if _, err := render("weft-system", ok, settings{registry: "r"}); err != nil {
			t.Errorf("%s: %v", ok, err)
		}
	}
}

func TestOneWeftInACluster(t *testing.T) {
	k := &kube{typed: fake.NewClientset(&appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Namespace: "mesh", Name: "ztunnel", Labels: map[string]string{partOf: "weft"}}})}
	if err := k.onlyIn(t.Context(), "mesh"); err != nil {
		t.Errorf("in its own namespace: %v", err)
	}
	if err := k.onlyIn(t.Context(), "weft-system"); err == nil || !strings.Contains(err.Error(), "-n mesh") {
		t.Errorf("in another namespace: %v, want an error that names the first", err)
	}
}

// A definition of somebody else that does not serve what weft-control reads
// would leave the policies of the cluster without force.
func TestLacksVersion(t *testing.T) {
	crd := func(versions ...any) *unstructured.Unstructured {
		return &unstructured.Unstructured{Object: map[string]any{"spec": map[string]any{"versions": versions}}}
	}
	version := func(name string, served, storage bool) any {
		return map[string]any{"name": name, "served": served, "storage": storage}
	}
	want := crd(version("v1", true, true), version("v1beta1", true, false))
	for _, tc := range []struct {
		name string
		got  *unstructured.Unstructured
		want string
	}{
		{"ours", want, ""},
		{"stored as another version", crd(version("v1beta1", true, true), version("v1", true, false)), ""},
		{"older", crd(version("v1beta1", true, true)), "v1"},
		{"not served", crd(version("v1", false, true)), "v1"},
		{"nothing", crd(), "v1"},
	} {
		if got := lacksVersion(tc.got, want); got != tc.want {
			t.Errorf("%s: lacks %q, want %q", tc.name, got, tc.want)
		}
	}
	for _, own := range rendered(t).crds {
		if got := lacksVersion(own, own); got != "" || !strings.HasSuffix(own.GetName(), ".istio.io") {
			t.Errorf("%s lacks %q of itself", own.GetName(), got)
		}
	}
}
