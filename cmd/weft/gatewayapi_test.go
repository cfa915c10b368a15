package main

import (
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// The Gateway API of a cluster has one owner: what somebody else has installed
// is never touched, and nothing goes back to an older version.
func TestPlanGatewayAPI(t *testing.T) {
	crd := func(name, version, by string) *unstructured.Unstructured {
		u := &unstructured.Unstructured{Object: map[string]any{}}
		u.SetName(name)
		u.SetAnnotations(map[string]string{bundleVersion: version})
		if by != "" {
			u.SetLabels(map[string]string{managedBy: by})
		}
		return u
	}
	want := []*unstructured.Unstructured{crd("a", "v1.6.3", "weft"), crd("b", "v1.6.3", "weft")}
	names := func(list []*unstructured.Unstructured) string {
		var out []string
		for _, u := range list {
			out = append(out, u.GetName())
		}
		return strings.Join(out, " ")
	}
	for _, tc := range []struct {
		name                    string
		have                    []*unstructured.Unstructured
		create, update, foreign string
	}{
		{"none", nil, "a b", "", ""},
		{"an installation that was broken off", []*unstructured.Unstructured{crd("a", "v1.6.3", "weft")}, "b", "", ""},
		{"ours", []*unstructured.Unstructured{crd("a", "v1.6.3", "weft"), crd("b", "v1.6.3", "weft")}, "", "", ""},
		{"ours, older", []*unstructured.Unstructured{crd("a", "v1.5.0", "weft"), crd("b", "v1.10.0", "weft")}, "", "a", ""},
		{"of somebody else", []*unstructured.Unstructured{crd("b", "v1.4.0", "")}, "", "", "v1.4.0"},
		{"of another program", []*unstructured.Unstructured{crd("a", "", "Helm")}, "", "", "of an unknown version"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			have := map[string]*unstructured.Unstructured{}
			for _, u := range tc.have {
				have[u.GetName()] = u
			}
			create, update, foreign := planGatewayAPI(have, want)
			if names(create) != tc.create || names(update) != tc.update || foreign != tc.foreign {
				t.Errorf("create %q, update %q, foreign %q; want %q, %q, %q", names(create), names(update), foreign, tc.create, tc.update, tc.foreign)
			}
		})
	}
}

// All kinds of the Gateway API that weft-control reads are among the
// definitions, and each says its version.
func TestGatewayDefinitions(t *testing.T) {
	crds, err := gatewayDefinitions()
	if err != nil {
		t.Fatal(err)
	}
	have := map[string]bool{}
	for _, crd := range crds {
		have[crd.GetName()] = true
		if !strings.HasPrefix(crd.GetAnnotations()[bundleVersion], "v1.") || crd.GetLabels()[managedBy] != "weft" || crd.GetKind() != "CustomResourceDefinition" {
			t.Errorf("%s has version %q and labels %v", describe(crd), crd.GetAnnotations()[bundleVersion], crd.GetLabels())
		}
	}
	for _, kind := range []string{"gatewayclasses", "gateways", "httproutes", "grpcroutes", "tcproutes", "tlsroutes", "referencegrants", "backendtlspolicies"} {
		if !have[kind+".gateway.networking.k8s.io"] {
			t.Errorf("no definition of %s", kind)
		}
	}
}
