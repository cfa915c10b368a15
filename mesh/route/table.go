package route

import (
	"fmt"
	"math/bits"
	"slices"

	"github.com/weft-mesh/weft/mesh"
)

// A Table is a mesh.Route that is ready to be asked. It never changes, and many
// may ask it at the same time. Make it once for each Route.
type Table struct {
	// Spec is the route, nil for the one that services without a Route have.
	Spec *mesh.Route
	// Broken says why the whole route could not be understood.
	Broken string

	entries []entry // in order
	paths   *byPath // nil if there are too few to be worth it
}

// A Rule is a mesh.Rule that is ready.
type Rule struct {
	Spec  *mesh.Rule
	Index int // in its Route
	// Broken says why requests are answered with 500: what Spec says, or what
	// could not be understood of it.
	Broken   string
	Rewrite  *Rewrite // nil if nothing is rewritten
	CORS     *CORS    // nil if there is none
	Backends []Backend

	total uint64 // of the weights
}

// A Backend is a mesh.Backend that is ready.
type Backend struct {
	Spec    *mesh.Backend
	Rewrite *Rewrite // nil if nothing is rewritten
	below   uint64   // its share ends here
}

// A Result says which rule a request met.
type Result struct {
	Rule *Rule
	// Match is the one of the rule's matches that held, and Index its place;
	// nil and -1 if the rule has none.
	Match *mesh.RequestMatch
	Index int
	// Name is the rule's and the match's, for logs and metrics.
	Name string
	// Matched is how many bytes of the path the match has named: what a
	// rewrite of the prefix replaces.
	Matched int
}

// Compile makes a route ready. A nil route is the one of services that have
// none: everything goes to the service itself, with the default retries. What
// cannot be understood breaks its rule, which then still matches.
func Compile(r *mesh.Route) *Table {
	t := &Table{Spec: r}
	if r == nil {
		r = &mesh.Route{Rules: []mesh.Rule{defaultRule()}}
	}
	t.Broken = r.Broken
	for i := range r.Rules {
		rule := compileRule(&r.Rules[i], i)
		t.add(rule)
	}
	t.paths = newIndex(t.entries)
	return t
}

// defaultRule sends everything to the service itself.
func defaultRule() mesh.Rule {
	return mesh.Rule{
		Name:     "default",
		Backends: []mesh.Backend{{Weight: 1}},
		Retry: &mesh.Retry{Attempts: 2,
			On: []string{"connect-failure", "refused-stream", "unavailable", "cancelled", "retriable-status-codes"}},
	}
}

// add appends the entries of a rule.
func (t *Table) add(rule *Rule) {
	if len(rule.Spec.Matches) == 0 {
		e, _ := compileEntry(rule, nil, -1)
		t.entries = append(t.entries, e)
		return
	}
	for i := range rule.Spec.Matches {
		e, err := compileEntry(rule, &rule.Spec.Matches[i], i)
		if err != nil {
			rule.breaks(fmt.Errorf("match %d: %w", i, err))
		}
		t.entries = append(t.entries, e)
	}
}

// breaks marks the rule as not understood, unless it is already.
func (r *Rule) breaks(err error) {
	if r.Broken == "" {
		r.Broken = err.Error()
	}
}

func compileRule(spec *mesh.Rule, index int) *Rule {
	r := &Rule{Spec: spec, Index: index, Broken: spec.Broken}
	var err error
	if r.Rewrite, err = compileRewrite(spec.Rewrite); err != nil {
		r.breaks(err)
	}
	if r.CORS, err = compileCORS(spec.CORS); err != nil {
		r.breaks(err)
	}
	for i := range spec.Backends {
		b := Backend{Spec: &spec.Backends[i]}
		if b.Rewrite, err = compileRewrite(b.Spec.Rewrite); err != nil {
			r.breaks(fmt.Errorf("backend %d: %w", i, err))
		}
		r.total += uint64(b.Spec.Weight)
		b.below = r.total
		r.Backends = append(r.Backends, b)
	}
	return r
}

// Pick draws one of the rule's backends by chance, which is any number from the
// whole range of its type: each gets its share of the sum of weights, and one
// without weight gets nothing. A single backend gets all. It returns nil if
// there is none to draw.
func (r *Rule) Pick(chance uint64) *Backend {
	if len(r.Backends) == 1 {
		return &r.Backends[0]
	}
	if r.total == 0 {
		return nil
	}
	at, _ := bits.Mul64(chance, r.total)
	for i := range r.Backends {
		if at < r.Backends[i].below {
			return &r.Backends[i]
		}
	}
	return nil
}

// Match returns the first rule that r meets, and false if there is none.
func (t *Table) Match(r *Request) (Result, bool) {
	i := -1
	if t.paths != nil {
		i = t.paths.first(t.entries, r)
	} else {
		i = t.linear(r)
	}
	if i < 0 {
		return Result{}, false
	}
	e := &t.entries[i]
	return Result{Rule: e.rule, Match: e.spec, Index: e.index, Name: e.name,
		Matched: e.path.matched(r.Path)}, true
}

// linear asks every entry in order.
func (t *Table) linear(r *Request) int {
	for i := range t.entries {
		if e := &t.entries[i]; e.path.holds(r.Path) && e.holds(r) {
			return i
		}
	}
	return -1
}

// MatchConnection returns the first rule that a connection meets, and false if
// there is none.
func (t *Table) MatchConnection(c *Connection) (Result, bool) {
	i := slices.IndexFunc(t.entries, func(e entry) bool { return e.holdsConnection(c) })
	if i < 0 {
		return Result{}, false
	}
	e := &t.entries[i]
	return Result{Rule: e.rule, Match: e.spec, Index: e.index, Name: e.name}, true
}
