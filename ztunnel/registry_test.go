package ztunnel

import "testing"

// Whatever the order in which flows end, the others stay in the registry.
func TestRegistryForgetsWhatHasEnded(t *testing.T) {
	var r registry
	fs := make([]*flow, 5)
	for i := range fs {
		fs[i] = new(flow)
		r.add(fs[i])
	}
	open := map[*flow]bool{}
	for _, f := range fs {
		open[f] = true
	}
	for _, i := range []int{1, 1, 4, 0, 3, 0, 2, 2} { // some twice
		r.remove(fs[i])
		delete(open, fs[i])
		all := r.all()
		if len(all) != len(open) {
			t.Fatalf("%d flows are left, want %d", len(all), len(open))
		}
		for _, f := range all {
			if !open[f] {
				t.Fatal("a flow is left that has ended")
			}
		}
	}
	r.remove(new(flow)) // never added
}
