package ztunnel

import (
	"slices"
	"testing"
)

// Every flow has its turn, however many there are.
func TestRegistryTellsOfEachOnce(t *testing.T) {
	for _, n := range []int{0, 1, 63, 64, 65, 128, 200} {
		var r registry
		for range n {
			r.add(new(flow))
		}
		var got []*flow
		r.each(func(f *flow) { got = append(got, f) })
		if !slices.Equal(got, r.all()) {
			t.Errorf("of %d flows %d had a turn, or not each one", n, len(got))
		}
		r.each(func(f *flow) { r.remove(f) }) // it may end meanwhile
	}
}

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
