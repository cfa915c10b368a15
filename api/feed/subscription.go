package feed

import (
	"slices"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
)

// wildcard is the name by which a subscriber asks for everything.
const wildcard = "*"

// maxResponse is about how many bytes of resources one response carries. A
// first answer is exempt: a proxy may take it for the whole mesh, and what is
// not in the mesh is reached in clear, so it must not come in parts.
const maxResponse = 3 << 20

// A subscription is what one stream wants of one type, and what it has. The
// server's mutex guards it.
type subscription struct {
	everything bool            // wildcard
	keys       map[string]bool // asked for by name or address
	asked      map[string]bool // of keys: not answered yet, so due even if unchanged
	first      bool            // the first answer is due, even if it is empty

	// known are the versions that the stream has. Under a wildcard that is
	// what it said when it came; from the first answer on, at does that.
	known map[string]string
	at    uint64
}

// newSubscription reads the first request of a stream for a type. Naming
// nothing asks for everything.
func newSubscription(req *discovery.DeltaDiscoveryRequest) *subscription {
	s := &subscription{keys: map[string]bool{}, asked: map[string]bool{}, known: map[string]string{}, first: true}
	s.everything = len(req.GetResourceNamesSubscribe()) == 0
	for name, version := range req.GetInitialResourceVersions() {
		s.known[name] = version
	}
	return s
}

// change takes in what a request adds to and removes from a subscription. A
// stream that asks for everything and takes it back in one request wants to
// ask for single things later.
func (s *subscription) change(req *discovery.DeltaDiscoveryRequest) {
	for _, name := range req.GetResourceNamesSubscribe() {
		if name != wildcard {
			s.keys[name], s.asked[name] = true, true
			continue
		}
		if !s.everything {
			s.everything, s.first = true, true
		}
	}
	for _, name := range req.GetResourceNamesUnsubscribe() {
		if name != wildcard {
			delete(s.keys, name)
			delete(s.asked, name)
			continue
		}
		if s.everything {
			s.everything, s.known = false, map[string]string{}
		}
	}
}

// An answer is what a subscription is due.
type answer struct {
	set     []*resource
	removed []string
	whole   bool // in one response, whatever its size
}

// collect returns what is due and notes it as sent.
func (s *subscription) collect(t *table) answer {
	a := answer{whole: s.first}
	switch {
	case !s.everything:
		a.set, a.removed = s.byKey(t)
	case s.first:
		a.set, a.removed = s.everythingElse(t)
		s.known = nil
	default:
		a.set, a.removed = t.since(s.at)
	}
	if s.everything {
		a.set, a.removed = s.force(t, a.set, a.removed)
		s.at = t.seq
	}
	s.first = false
	clear(s.asked)
	return a
}

// byKey compares what the keys stand for with what the stream has.
func (s *subscription) byKey(t *table) (set []*resource, removed []string) {
	want, again := map[string]*resource{}, map[string]*resource{}
	for key := range s.keys {
		into := want
		if s.asked[key] {
			into = again
		}
		if !t.resolve(key, into) && s.asked[key] {
			removed = append(removed, key)
		}
	}
	for name, r := range want {
		if again[name] == nil && s.known[name] != r.version() {
			set = append(set, r)
		}
	}
	for name, r := range again {
		set = append(set, r)
		want[name] = r
	}
	for name := range s.known {
		if want[name] == nil {
			removed = append(removed, name)
			delete(s.known, name)
		}
	}
	for name, r := range want {
		s.known[name] = r.version()
	}
	slices.SortFunc(set, compareNames)
	slices.Sort(removed)
	return set, slices.Compact(removed)
}

// everythingElse returns all that the stream does not have, and the names of
// what it has and is gone.
func (s *subscription) everythingElse(t *table) (set []*resource, removed []string) {
	for _, r := range t.all() {
		if s.known[r.name()] != r.version() {
			set = append(set, r)
		}
	}
	for name := range s.known {
		if t.rows[name] == nil {
			removed = append(removed, name)
		}
	}
	slices.Sort(removed)
	return set, removed
}

// force adds what was asked for by key beside a wildcard: it is answered even
// if the stream has it.
func (s *subscription) force(t *table, set []*resource, removed []string) ([]*resource, []string) {
	if len(s.asked) == 0 {
		return set, removed
	}
	extra := map[string]*resource{}
	for key := range s.asked {
		if !t.resolve(key, extra) && !slices.Contains(removed, key) {
			removed = append(removed, key)
		}
	}
	for _, r := range set {
		delete(extra, r.name())
	}
	for _, r := range extra {
		set = append(set, r)
	}
	slices.SortFunc(set, compareNames)
	return set, removed
}

// responses cuts an answer into responses of at most maxResponse, unless it
// has to stay whole.
func (a answer) responses(typeURL string) []*discovery.DeltaDiscoveryResponse {
	var (
		list []*discovery.DeltaDiscoveryResponse
		r    *discovery.DeltaDiscoveryResponse
		size int
	)
	room := func(n int) *discovery.DeltaDiscoveryResponse {
		if size += n; r == nil || size > maxResponse && !a.whole {
			r, size = &discovery.DeltaDiscoveryResponse{TypeUrl: typeURL}, n
			list = append(list, r)
		}
		return r
	}
	if a.whole {
		room(0)
	}
	for _, x := range a.set {
		m := room(x.size)
		m.Resources = append(m.Resources, x.message)
	}
	for _, name := range a.removed {
		m := room(len(name) + 4)
		m.RemovedResources = append(m.RemovedResources, name)
	}
	return list
}
