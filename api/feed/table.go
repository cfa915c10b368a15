package feed

import (
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/weft-mesh/weft/mesh"
)

// A table holds the resources of one type and remembers in which order they
// changed. Its owner guards it with a mutex.
type table struct {
	rows map[string]*resource
	// changed says when each name last changed or was removed: a count that
	// only grows. Names that everybody knows of are forgotten by compact.
	changed map[string]uint64
	journal []entry // in order; an entry whose seq is not changed[name] is stale
	seq     uint64
	enough  int // the length of journal at which to compact it

	byAlias   map[string]map[string]bool           // alias -> names
	members   map[mesh.ServiceName]map[string]bool // service -> names of its workloads
	withRange map[string]bool                      // names of services with ranges
}

// An entry says that name changed at seq.
type entry struct {
	seq  uint64
	name string
}

func newTable() *table {
	return &table{
		rows:      map[string]*resource{},
		changed:   map[string]uint64{},
		byAlias:   map[string]map[string]bool{},
		members:   map[mesh.ServiceName]map[string]bool{},
		withRange: map[string]bool{},
	}
}

// set stores r and reports whether that changed anything.
func (t *table) set(r *resource) bool {
	old := t.rows[r.name()]
	if old != nil && old.version() == r.version() {
		return false
	}
	t.unindex(old)
	t.rows[r.name()] = r
	for _, a := range r.message.GetAliases() {
		add(t.byAlias, a, r.name())
	}
	for _, s := range r.services {
		add(t.members, s, r.name())
	}
	if len(r.ranges) > 0 {
		t.withRange[r.name()] = true
	}
	t.touch(r.name())
	return true
}

// remove forgets name and reports whether it was there.
func (t *table) remove(name string) bool {
	old := t.rows[name]
	if old == nil {
		return false
	}
	t.unindex(old)
	delete(t.rows, name)
	t.touch(name)
	return true
}

// apply stores rows, after it has removed the workloads of del.
func (t *table) apply(rows []*resource, del []mesh.UID) {
	for _, u := range del {
		t.remove(string(u))
	}
	for _, r := range rows {
		t.set(r)
	}
}

// replace makes rows all there is of those that mine reports.
func (t *table) replace(rows []*resource, mine func(*resource) bool) {
	keep := make(map[string]bool, len(rows))
	for _, r := range rows {
		keep[r.name()] = true
		t.set(r)
	}
	for _, name := range slices.Sorted(maps.Keys(t.rows)) {
		if !keep[name] && mine(t.rows[name]) {
			t.remove(name)
		}
	}
}

func (t *table) touch(name string) {
	t.seq++
	t.changed[name] = t.seq
	t.journal = append(t.journal, entry{t.seq, name})
}

func (t *table) unindex(r *resource) {
	if r == nil {
		return
	}
	for _, a := range r.message.GetAliases() {
		drop(t.byAlias, a, r.name())
	}
	for _, s := range r.services {
		drop(t.members, s, r.name())
	}
	delete(t.withRange, r.name())
}

func add[K comparable](m map[K]map[string]bool, k K, name string) {
	if m[k] == nil {
		m[k] = map[string]bool{}
	}
	m[k][name] = true
}

func drop[K comparable](m map[K]map[string]bool, k K, name string) {
	delete(m[k], name)
	if len(m[k]) == 0 {
		delete(m, k)
	}
}

// since returns what changed after seq: the resources as they are now, and the
// names of those that are gone, each in the order of change.
func (t *table) since(seq uint64) (set []*resource, removed []string) {
	i, _ := slices.BinarySearchFunc(t.journal, seq, func(e entry, seq uint64) int {
		if e.seq <= seq {
			return -1
		}
		return 1
	})
	for _, e := range t.journal[i:] {
		if t.changed[e.name] != e.seq {
			continue
		}
		if r := t.rows[e.name]; r != nil {
			set = append(set, r)
		} else {
			removed = append(removed, e.name)
		}
	}
	return set, removed
}

// compact forgets what every reader has seen: all up to seq. It does so when
// the journal has doubled since the last time, so it may be called after every
// change.
func (t *table) compact(seq uint64) {
	if len(t.journal) < t.enough {
		return
	}
	t.journal = slices.DeleteFunc(t.journal, func(e entry) bool { return e.seq <= seq || t.changed[e.name] != e.seq })
	maps.DeleteFunc(t.changed, func(_ string, at uint64) bool { return at <= seq })
	t.enough = 2*len(t.journal) + 1024
}

// all returns every resource, sorted by name.
func (t *table) all() []*resource {
	list := slices.Collect(maps.Values(t.rows))
	slices.SortFunc(list, compareNames)
	return list
}

func compareNames(a, b *resource) int { return strings.Compare(a.name(), b.name()) }

// resolve adds to out what a subscriber that asks for key needs: the resource
// of that name, or those that have the address "network/address"; with a
// service also its workloads. It reports whether there was anything.
func (t *table) resolve(key string, out map[string]*resource) bool {
	names := t.byAlias[key]
	found := false
	take := func(name string) {
		r := t.rows[name]
		if r == nil {
			return
		}
		found = true
		out[name] = r
		if r.service == (mesh.ServiceName{}) {
			return
		}
		for member := range t.members[r.service] {
			out[member] = t.rows[member]
		}
	}
	take(key)
	for name := range names {
		take(name)
	}
	if !found {
		take(t.narrowest(key))
	}
	return found
}

// narrowest returns the name of the service whose narrowest range holds the
// address of key, or "".
func (t *table) narrowest(key string) string {
	i := strings.LastIndexByte(key, '/')
	if i < 0 || len(t.withRange) == 0 {
		return ""
	}
	network := key[:i]
	a, err := netip.ParseAddr(key[i+1:])
	if err != nil {
		return ""
	}
	best, bits := "", -1
	for name := range t.withRange {
		for _, v := range t.rows[name].ranges {
			if v.Network != network || !v.Prefix.Contains(a) {
				continue
			}
			if v.Prefix.Bits() > bits || v.Prefix.Bits() == bits && name < best {
				best, bits = name, v.Prefix.Bits()
			}
		}
	}
	return best
}
