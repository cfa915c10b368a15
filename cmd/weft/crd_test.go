package main

import (
	"fmt"
	"slices"
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// A field that a definition does not know is dropped by the API server before
// weft-control can refuse it, and a condition that is dropped is access that
// is widened. So every object of a policy's spec keeps unknown fields.
func TestDefinitionsKeepUnknownFields(t *testing.T) {
	crds := rendered(t).crds
	if len(crds) != 6 {
		t.Fatalf("%d definitions, want 6", len(crds))
	}
	for _, crd := range crds {
		versions, _, _ := unstructured.NestedSlice(crd.Object, "spec", "versions")
		for _, v := range versions {
			v := v.(map[string]any)
			spec, ok, err := unstructured.NestedMap(v, "schema", "openAPIV3Schema", "properties", "spec")
			if !ok || err != nil {
				t.Fatalf("%s %s has no schema: %v", crd.GetName(), v["name"], err)
			}
			for _, path := range dropping(spec, "spec") {
				t.Errorf("%s %s: %s drops fields that it does not know", crd.GetName(), v["name"], path)
			}
		}
	}
}

// dropping returns the paths of the objects in a schema that drop unknown
// fields.
func dropping(schema map[string]any, path string) []string {
	var out []string
	properties, _ := schema["properties"].(map[string]any)
	// What a targeted policy means is decided by whether it has a target.
	target := slices.Contains([]string{"spec.targetRef", "spec.targetRefs[]", "spec.provider"}, path)
	if len(properties) > 0 && schema["x-kubernetes-preserve-unknown-fields"] != true && !target {
		out = append(out, path)
	}
	for name, p := range properties {
		out = append(out, dropping(p.(map[string]any), path+"."+name)...)
	}
	if items, ok := schema["items"].(map[string]any); ok {
		out = append(out, dropping(items, path+"[]")...)
	}
	if each, ok := schema["additionalProperties"].(map[string]any); ok {
		out = append(out, dropping(each, fmt.Sprintf("%s.*", path))...)
	}
	return out
}

// Every condition that the policy compiler knows can be written.
func TestDefinitionsKnowTrustDomains(t *testing.T) {
	for _, crd := range rendered(t).crds {
		if crd.GetName() != "authorizationpolicies.security.istio.io" {
			continue
		}
		versions, _, _ := unstructured.NestedSlice(crd.Object, "spec", "versions")
		for _, v := range versions {
			source, ok, err := unstructured.NestedMap(v.(map[string]any), "schema", "openAPIV3Schema", "properties", "spec",
				"properties", "rules", "items", "properties", "from", "items", "properties", "source", "properties")
			if !ok || err != nil || source["trustDomains"] == nil || source["notTrustDomains"] == nil {
				t.Errorf("source has no trustDomains: %v", err)
			}
		}
	}
}

// Definitions are schemas and nothing else: a word of a description that YAML
// takes for a field is refused by the API server.
func TestDefinitionsAreSchemas(t *testing.T) {
	known := []string{"type", "description", "properties", "items", "additionalProperties", "x-kubernetes-preserve-unknown-fields",
		"enum", "format", "default", "minimum", "maximum", "minItems", "maxItems", "minLength", "maxLength", "pattern", "required",
		"nullable", "oneOf", "not", "anyOf", "allOf", "x-kubernetes-validations", "x-kubernetes-int-or-string"}
	var walk func(path string, schema map[string]any)
	walk = func(path string, schema map[string]any) {
		for k := range schema {
			if !slices.Contains(known, k) {
				t.Errorf("%s has a field %q", path, k)
			}
		}
		properties, _ := schema["properties"].(map[string]any)
		for name, p := range properties {
			walk(path+"."+name, p.(map[string]any))
		}
		for _, of := range []string{"items", "additionalProperties"} {
			if each, ok := schema[of].(map[string]any); ok {
				walk(path+"[]", each)
			}
		}
	}
	for _, crd := range rendered(t).crds {
		versions, _, _ := unstructured.NestedSlice(crd.Object, "spec", "versions")
		for _, v := range versions {
			schema, _, _ := unstructured.NestedMap(v.(map[string]any), "schema", "openAPIV3Schema")
			walk(crd.GetName(), schema)
		}
	}
}
