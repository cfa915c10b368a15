package route

import (
	"slices"

	"github.com/weft-mesh/weft/mesh"
)

// fewEntries are asked one by one: an index would cost more.
const fewEntries = 8

// byPath finds the entries whose path fits without asking each. It keeps the
// meaning of the list: the places are in order, and the lowest that holds
// counts.
type byPath struct {
	exact    map[string][]int32
	segments map[string][]int32
	prefixes map[string][]int32
	lengths  []int   // of the prefixes, each once
	rest     []int32 // whatever cannot be looked up
}

// newIndex returns an index of entries, or nil if they are few.
func newIndex(entries []entry) *byPath {
	if len(entries) <= fewEntries {
		return nil
	}
	x := &byPath{exact: map[string][]int32{}, segments: map[string][]int32{}, prefixes: map[string][]int32{}}
	for i := range entries {
		at, p := int32(i), &entries[i].path
		switch {
		case entries[i].never:
		case p.fold:
			x.rest = append(x.rest, at)
		case p.kind == mesh.PathExact:
			x.exact[p.value] = append(x.exact[p.value], at)
		case p.kind == mesh.PathSegment:
			x.segments[p.value] = append(x.segments[p.value], at)
		case p.kind == mesh.PathPrefix:
			x.prefixes[p.value] = append(x.prefixes[p.value], at)
			if !slices.Contains(x.lengths, len(p.value)) {
				x.lengths = append(x.lengths, len(p.value))
			}
		default:
			x.rest = append(x.rest, at)
		}
	}
	slices.Sort(x.lengths)
	return x
}

// first returns the place of the first entry that holds, or -1.
func (x *byPath) first(entries []entry, r *Request) int {
	best := int32(len(entries))
	if len(x.exact) > 0 {
		best = first(entries, x.exact[string(r.Path)], best, r)
	}
	for _, n := range x.lengths {
		if n > len(r.Path) {
			break
		}
		best = first(entries, x.prefixes[string(r.Path[:n])], best, r)
	}
	if len(x.segments) > 0 {
		for i, c := range r.Path {
			if c == '/' {
				best = first(entries, x.segments[string(r.Path[:i])], best, r)
			}
		}
		best = first(entries, x.segments[string(r.Path)], best, r)
	}
	for _, at := range x.rest {
		if at >= best {
			break
		}
		if e := &entries[at]; e.path.holds(r.Path) && e.holds(r) {
			best = at
			break
		}
	}
	if int(best) == len(entries) {
		return -1
	}
	return int(best)
}

// first returns the first of places, whose path is known to fit, that holds,
// if it is before best.
func first(entries []entry, places []int32, best int32, r *Request) int32 {
	for _, at := range places {
		if at >= best {
			break
		}
		if entries[at].holds(r) {
			return at
		}
	}
	return best
}
