package route

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"github.com/weft-mesh/weft/mesh"
)

// An entry is one match of one rule, or a rule without matches. Conditions that
// could not be understood are left out, and its rule is broken.
type entry struct {
	rule  *Rule
	spec  *mesh.RequestMatch // nil if the rule has no matches
	index int                // of the match in its rule, -1 if it has none
	name  string             // for logs: of the rule, a dot, and of the match

	never      bool
	path       path
	method     *text
	scheme     *text
	authority  *text
	headers    []field
	query      []field
	namespaces []string

	sni     []string // in lower case
	subnets []netip.Prefix
}

// compileEntry makes m ready. The error says what of it was not understood.
func compileEntry(rule *Rule, m *mesh.RequestMatch, index int) (entry, error) {
	e := entry{rule: rule, spec: m, index: index, name: rule.Spec.Name}
	if m == nil {
		return e, nil
	}
	if m.Name != "" {
		e.name += "." + m.Name
	}
	e.never, e.namespaces, e.subnets = m.Never, m.SourceNamespaces, m.DestinationSubnets
	for _, s := range m.SNI {
		e.sni = append(e.sni, strings.ToLower(s))
	}
	var errs [6]error
	if m.Path != nil {
		e.path, errs[0] = compilePath(*m.Path)
	}
	e.method, errs[1] = compileOptional(m.Method)
	e.scheme, errs[2] = compileOptional(m.Scheme)
	e.authority, errs[3] = compileOptional(m.Authority)
	e.headers, errs[4] = compileFields(m.Headers)
	e.query, errs[5] = compileFields(m.Query)
	for i, err := range errs {
		if err != nil {
			return e, fmt.Errorf("%s: %w", [...]string{"path", "method", "scheme", "authority", "headers", "query"}[i], err)
		}
	}
	return e, nil
}

func compileOptional(m *mesh.TextMatch) (*text, error) {
	if m == nil {
		return nil, nil
	}
	t, err := compileText(*m)
	if err != nil {
		return nil, err
	}
	return &t, nil
}

// holds reports whether everything but the path fits.
func (e *entry) holds(r *Request) bool {
	if e.never {
		return false
	}
	if e.method != nil && !e.method.holds(r.Method) {
		return false
	}
	if e.namespaces != nil && !slices.Contains(e.namespaces, r.SourceNamespace) {
		return false
	}
	if e.scheme != nil && !e.scheme.holds(r.Scheme) {
		return false
	}
	if e.authority != nil && !e.authority.holds(toLower(hostOnly(r.Authority))) {
		return false
	}
	for i := range e.headers {
		f := &e.headers[i]
		if v, ok := r.field(f.name); (ok && f.text.holds(v)) == f.not {
			return false
		}
	}
	for i := range e.query {
		f := &e.query[i]
		if v, ok := parameter(r.Query, f.name); (ok && f.text.holds(v)) == f.not {
			return false
		}
	}
	return true
}

// holdsConnection reports whether what can be asked of connections fits.
func (e *entry) holdsConnection(c *Connection) bool {
	if e.never || e.namespaces != nil && !slices.Contains(e.namespaces, c.SourceNamespace) {
		return false
	}
	if e.sni != nil && !slices.ContainsFunc(e.sni, func(want string) bool { return serves(want, c.SNI) }) {
		return false
	}
	to := c.Destination.Unmap()
	return e.subnets == nil || slices.ContainsFunc(e.subnets, func(p netip.Prefix) bool { return p.Contains(to) })
}

// serves reports whether a name, in any case, is want or, if want begins with
// "*.", below it. "*" is every name, but no name is not.
func serves(want, name string) bool {
	name = strings.TrimSuffix(name, ".")
	switch {
	case name == "":
		return false
	case want == "*":
		return true
	case strings.HasPrefix(want, "*."):
		tail := want[1:]
		return len(name) > len(tail) && strings.EqualFold(name[len(name)-len(tail):], tail)
	}
	return strings.EqualFold(name, want)
}

// path is a mesh.PathMatch that is ready. Its zero value holds.
type path struct {
	kind  mesh.PathKind
	value string // in lower case if fold is set; without a trailing slash if it is of segments
	fold  bool
	re    *regexp.Regexp
	start string
}

func compilePath(m mesh.PathMatch) (path, error) {
	p := path{kind: m.Kind, value: m.Value, fold: m.IgnoreCase}
	if p.fold {
		p.value = strings.ToLower(p.value)
	}
	switch m.Kind {
	case mesh.PathExact, mesh.PathPrefix:
	case mesh.PathSegment:
		p.value = strings.TrimSuffix(p.value, "/")
	case mesh.PathRegex:
		re, start, err := compileRegex(m.Value, m.IgnoreCase)
		if err != nil {
			return path{}, err
		}
		p.re, p.start = re, start
	default:
		return path{}, fmt.Errorf("path match of kind %q is not known", m.Kind)
	}
	return p, nil
}

// holds reports whether b fits.
func (p *path) holds(b []byte) bool {
	switch p.kind {
	case mesh.PathExact:
		return len(b) == len(p.value) && p.equal(b)
	case mesh.PathPrefix:
		return len(b) >= len(p.value) && p.equal(b[:len(p.value)])
	case mesh.PathSegment:
		n := len(p.value)
		return (len(b) == n || len(b) > n && b[n] == '/') && p.equal(b[:n])
	case mesh.PathRegex:
		return hasPrefix(b, p.start) && p.re.Match(b)
	}
	return true
}

func (p *path) equal(b []byte) bool {
	if !p.fold {
		return string(b) == p.value
	}
	return equalFold(b, p.value)
}

// matched returns how many bytes of b, which fits, the match names. An
// expression names all of it, and no match at all the root.
func (p *path) matched(b []byte) int {
	switch p.kind {
	case mesh.PathPrefix, mesh.PathSegment:
		return len(p.value)
	case mesh.PathExact, mesh.PathRegex:
		return len(b)
	}
	return 0
}
