package kube

import (
	"slices"
	"testing"

	"github.com/weft-mesh/weft/control/compile"
	"github.com/weft-mesh/weft/mesh"
)

// TestTransition proves that no policy is without force between the arrival of
// the policies and that of the workloads' lists.
func TestTransition(t *testing.T) {
	policy := func(name string, scope mesh.Scope) mesh.Policy {
		return mesh.Policy{Name: mesh.Name{Namespace: "shop", Name: name}, Scope: scope, Action: mesh.Deny}
	}
	world := func(ps ...mesh.Policy) *compile.World { return &compile.World{Policies: ps} }
	for _, tc := range []struct {
		name        string
		before, now *compile.World
		want        []mesh.Policy
		differ      bool
	}{
		{"at the start", nil, world(policy("p", mesh.ScopeSelector)), []mesh.Policy{policy("p", mesh.ScopeSelector)}, false},
		{"nothing changes", world(policy("p", mesh.ScopeSelector)), world(policy("p", mesh.ScopeSelector)), []mesh.Policy{policy("p", mesh.ScopeSelector)}, false},
		{"one is gone that pods list", world(policy("p", mesh.ScopeSelector)), world(), []mesh.Policy{policy("p", mesh.ScopeSelector)}, true},
		{"one is gone that nobody lists", world(policy("p", mesh.ScopeNamespace)), world(), nil, false},
		{"a namespace's becomes some pods'", world(policy("p", mesh.ScopeNamespace)), world(policy("p", mesh.ScopeSelector)), []mesh.Policy{policy("p", mesh.ScopeNamespace)}, true},
		{"the mesh's becomes some pods'", world(policy("p", mesh.ScopeGlobal)), world(policy("p", mesh.ScopeSelector)), []mesh.Policy{policy("p", mesh.ScopeGlobal)}, true},
		{"some pods' becomes the namespace's", world(policy("p", mesh.ScopeSelector)), world(policy("p", mesh.ScopeNamespace)), []mesh.Policy{policy("p", mesh.ScopeNamespace)}, false},
	} {
		served, differ := transition(tc.before, tc.now)
		same := slices.EqualFunc(served, tc.want, func(a, b mesh.Policy) bool { return a.Name == b.Name && a.Scope == b.Scope })
		if !same || differ != tc.differ {
			t.Errorf("%s: %v, %v, want %v, %v", tc.name, served, differ, tc.want, tc.differ)
		}
	}
}
