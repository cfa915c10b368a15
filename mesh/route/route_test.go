package route

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"

	"github.com/weft-mesh/weft/mesh"
)

// fields are header fields by their name in lower case.
type fields map[string][]string

func (f fields) Joined(name string, _ []byte) ([]byte, bool) {
	v, ok := f[name]
	return []byte(strings.Join(v, ",")), ok
}

// asked is a request, edited.
func asked(edits ...func(*Request)) *Request {
	r := &Request{Method: []byte("GET"), Scheme: []byte("http"), Authority: []byte("Cart.shop:80"), Path: []byte("/api/v1/items"),
		Query: []byte("color=red&empty=&flag&a=1&a=2"), SourceNamespace: "web",
		Fields: fields{"x-user": {"jason"}, "x-two": {"a", "b"}, "x-empty": {""}}}
	for _, edit := range edits {
		edit(r)
	}
	return r
}

func at(path string) func(*Request) { return func(r *Request) { r.Path = []byte(path) } }

func exact(s string) *mesh.TextMatch { return text1(mesh.TextExact, s) }
func text1(k mesh.TextKind, s string) *mesh.TextMatch {
	return &mesh.TextMatch{Kind: k, Value: s}
}
func path1(k mesh.PathKind, s string) *mesh.PathMatch { return &mesh.PathMatch{Kind: k, Value: s} }
func header(name string, k mesh.TextKind, s string, not bool) mesh.RequestMatch {
	return mesh.RequestMatch{Headers: []mesh.FieldMatch{{Name: name, TextMatch: *text1(k, s), Not: not}}}
}
func query(name string, k mesh.TextKind, s string) mesh.RequestMatch {
	return mesh.RequestMatch{Query: []mesh.FieldMatch{{Name: name, TextMatch: *text1(k, s)}}}
}

func TestMatch(t *testing.T) {
	fold := func(m mesh.RequestMatch) mesh.RequestMatch { m.Path.IgnoreCase = true; return m }
	byPath := func(k mesh.PathKind, s string) mesh.RequestMatch { return mesh.RequestMatch{Path: path1(k, s)} }
	for _, tc := range []struct {
		name  string
		match mesh.RequestMatch
		req   *Request
		want  bool
	}{
		{"an empty match holds", mesh.RequestMatch{}, asked(), true},
		{"exact path", byPath(mesh.PathExact, "/api/v1/items"), asked(), true},
		{"exact path is all of it", byPath(mesh.PathExact, "/api/v1"), asked(), false},
		{"exact path has case", byPath(mesh.PathExact, "/API/v1/items"), asked(), false},
		{"exact path without case", fold(byPath(mesh.PathExact, "/API/v1/Items")), asked(), true},
		{"prefix is text", byPath(mesh.PathPrefix, "/api/v1/it"), asked(), true},
		{"prefix without case", fold(byPath(mesh.PathPrefix, "/API/v1/It")), asked(), true},
		{"longer prefix", byPath(mesh.PathPrefix, "/api/v1/items/"), asked(), false},
		{"segments", byPath(mesh.PathSegment, "/api/v1"), asked(), true},
		{"segments with a trailing slash", byPath(mesh.PathSegment, "/api/v1/"), asked(), true},
		{"segments are whole", byPath(mesh.PathSegment, "/api/v1/it"), asked(), false},
		{"segments are all", byPath(mesh.PathSegment, "/api/v1/items"), asked(), true},
		{"segments with a slash in the request", byPath(mesh.PathSegment, "/api"), asked(at("/api/")), true},
		{"the root has all segments", byPath(mesh.PathSegment, "/"), asked(), true},
		{"segments without case", fold(byPath(mesh.PathSegment, "/API/V1")), asked(), true},
		{"expression for the whole path", byPath(mesh.PathRegex, "/api/v[0-9]+/.*"), asked(), true},
		{"expression that is a part", byPath(mesh.PathRegex, "/api/v[0-9]+"), asked(), false},
		{"expression with an alternative", byPath(mesh.PathRegex, "/api|/api/v1/items"), asked(), true},
		{"alternatives are not anchored apart", byPath(mesh.PathRegex, "/api|x"), asked(at("/api/evil")), false},
		{"expression without case", fold(byPath(mesh.PathRegex, "/API/.*")), asked(), true},

		{"method", mesh.RequestMatch{Method: exact("GET")}, asked(), true},
		{"another method", mesh.RequestMatch{Method: exact("PUT")}, asked(), false},
		{"method by expression", mesh.RequestMatch{Method: text1(mesh.TextRegex, "GET|PUT")}, asked(), true},
		{"scheme", mesh.RequestMatch{Scheme: exact("https")}, asked(), false},
		{"authority without port and case", mesh.RequestMatch{Authority: exact("cart.shop")}, asked(), true},
		{"authority by expression", mesh.RequestMatch{Authority: text1(mesh.TextRegex, `cart\..*`)}, asked(), true},
		{"authority by suffix", mesh.RequestMatch{Authority: text1(mesh.TextSuffix, ".shop")}, asked(), true},
		{"IPv6 authority", mesh.RequestMatch{Authority: exact("[::1]")}, asked(func(r *Request) { r.Authority = []byte("[::1]:80") }), true},

		{"header", header("x-user", mesh.TextExact, "jason", false), asked(), true},
		{"header prefix", header("x-user", mesh.TextPrefix, "ja", false), asked(), true},
		{"header suffix", header("x-user", mesh.TextSuffix, "son", false), asked(), true},
		{"header by expression", header("x-user", mesh.TextRegex, "j.*", false), asked(), true},
		{"header value has case", header("x-user", mesh.TextExact, "Jason", false), asked(), false},
		{"header presence", header("x-user", mesh.TextPresence, "", false), asked(), true},
		{"an empty header is there", header("x-empty", mesh.TextPresence, "", false), asked(), true},
		{"an absent header", header("x-none", mesh.TextPresence, "", false), asked(), false},
		{"without a header", header("x-none", mesh.TextPresence, "", true), asked(), true},
		{"without a header value", header("x-user", mesh.TextExact, "jason", true), asked(), false},
		{"without another header value", header("x-user", mesh.TextExact, "anna", true), asked(), true},
		{"several values are one text", header("x-two", mesh.TextExact, "a,b", false), asked(), true},
		{"one of several values is not the text", header("x-two", mesh.TextExact, "a", false), asked(), false},
		{"host as a header", header("host", mesh.TextExact, "Cart.shop:80", false), asked(), true},
		{"method as a header", header(":method", mesh.TextExact, "GET", false), asked(), true},
		{"no fields", header("x-user", mesh.TextPresence, "", false), asked(func(r *Request) { r.Fields = nil }), false},

		{"query", query("color", mesh.TextExact, "red"), asked(), true},
		{"query of another value", query("color", mesh.TextExact, "blue"), asked(), false},
		{"query by expression", query("color", mesh.TextRegex, "r.."), asked(), true},
		{"query without value", query("flag", mesh.TextPresence, ""), asked(), true},
		{"query with an empty value", query("empty", mesh.TextExact, ""), asked(), true},
		{"the first of two counts", query("a", mesh.TextExact, "2"), asked(), false},
		{"absent parameter", query("x", mesh.TextPresence, ""), asked(), false},
		{"a part of a name", query("olor", mesh.TextPresence, ""), asked(), false},

		{"source namespace", mesh.RequestMatch{SourceNamespaces: []string{"a", "web"}}, asked(), true},
		{"another source namespace", mesh.RequestMatch{SourceNamespaces: []string{"a"}}, asked(), false},
		{"nobody has no namespace", mesh.RequestMatch{SourceNamespaces: []string{"web"}}, asked(func(r *Request) { r.SourceNamespace = "" }), false},
		{"never", mesh.RequestMatch{Never: true}, asked(), false},
		{"all fields hold", mesh.RequestMatch{Method: exact("GET"), Path: path1(mesh.PathPrefix, "/api"), Scheme: exact("http")}, asked(), true},
		{"one field of several does not", mesh.RequestMatch{Method: exact("GET"), Path: path1(mesh.PathPrefix, "/apu")}, asked(), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for _, padding := range []int{0, 20} { // by list, and by index
				rules := []mesh.Rule{{Matches: []mesh.RequestMatch{tc.match}}}
				for range padding {
					rules = append(rules, mesh.Rule{Matches: []mesh.RequestMatch{{Path: path1(mesh.PathExact, "/none")}}})
				}
				res, ok := Compile(&mesh.Route{Rules: rules}).Match(tc.req)
				if ok != tc.want {
					t.Errorf("matches: %v, want %v", ok, tc.want)
				}
				if ok && (res.Rule.Index != 0 || res.Match == nil || res.Index != 0 || res.Rule.Broken != "") {
					t.Errorf("met %+v", res)
				}
			}
		})
	}
}

func TestFirstMatchWins(t *testing.T) {
	r := &mesh.Route{Rules: []mesh.Rule{
		{Name: "first", Matches: []mesh.RequestMatch{{Name: "a", Path: path1(mesh.PathExact, "/a")}, {Name: "b", Path: path1(mesh.PathPrefix, "/b")}}},
		{Name: "second", Matches: []mesh.RequestMatch{{Path: path1(mesh.PathSegment, "/b")}, {Path: path1(mesh.PathExact, "/a")}}},
		{Name: "rest"},
		{Name: "late", Matches: []mesh.RequestMatch{{Path: path1(mesh.PathExact, "/late")}}},
	}}
	table := Compile(r)
	for _, tc := range []struct {
		path, name string
		index      int
		matched    int
	}{
		{"/a", "first.a", 0, 2},
		{"/b/c", "first.b", 1, 2},
		{"/late", "rest", -1, 0},
	} {
		res, ok := table.Match(asked(at(tc.path)))
		if !ok || res.Name != tc.name || res.Index != tc.index || res.Matched != tc.matched {
			t.Errorf("%s met %q, match %d, %d bytes; want %q, %d, %d", tc.path, res.Name, res.Index, res.Matched, tc.name, tc.index, tc.matched)
		}
	}
	if _, ok := Compile(&mesh.Route{}).Match(asked()); ok {
		t.Error("a route without rules was met")
	}
	if res, ok := Compile(nil).Match(asked()); !ok || res.Name != "default" || res.Rule.Pick(0) == nil || res.Rule.Spec.Retry.Attempts != 2 {
		t.Error("a service without a route does not get the default rule")
	}
}

// What is not understood must not let a request fall through to a rule that was
// meant for others.
func TestBrokenRulesStillMatch(t *testing.T) {
	for _, tc := range []struct {
		name string
		rule mesh.Rule
		req  *Request
		want bool
	}{
		{"as the rule says", mesh.Rule{Broken: "no such thing"}, asked(), true},
		{"path expression", mesh.Rule{Matches: []mesh.RequestMatch{{Path: path1(mesh.PathRegex, "(")}}}, asked(), true},
		{"expression that would close our group", mesh.Rule{Matches: []mesh.RequestMatch{{Path: path1(mesh.PathRegex, "a)|(b")}}}, asked(), true},
		{"path of no kind", mesh.Rule{Matches: []mesh.RequestMatch{{Path: path1("", "/x")}}}, asked(), true},
		{"header expression", mesh.Rule{Matches: []mesh.RequestMatch{header("a", mesh.TextRegex, "(", false)}}, asked(), true},
		{"not of an unknown kind", mesh.Rule{Matches: []mesh.RequestMatch{header("a", "later", "", true)}}, asked(), true},
		{"query expression", mesh.Rule{Matches: []mesh.RequestMatch{query("a", mesh.TextRegex, "(")}}, asked(), true},
		{"method of an unknown kind", mesh.Rule{Matches: []mesh.RequestMatch{{Method: text1("later", "")}}}, asked(), true},
		{"beside a condition that does not hold", mesh.Rule{Matches: []mesh.RequestMatch{{Path: path1(mesh.PathRegex, "("), Method: exact("PUT")}}}, asked(), false},
		{"rewrite expression", mesh.Rule{Rewrite: &mesh.Rewrite{Regex: &mesh.RegexChange{Match: "("}}}, asked(), true},
		{"rewrite with a group that is not there", mesh.Rule{Rewrite: &mesh.Rewrite{Regex: &mesh.RegexChange{Match: "a", Replacement: `\1`}}}, asked(), true},
		{"rewrite of a backend", mesh.Rule{Backends: []mesh.Backend{{Rewrite: &mesh.Rewrite{Regex: &mesh.RegexChange{Match: "("}}}}}, asked(), true},
		{"origin expression", mesh.Rule{CORS: &mesh.CORS{AllowOrigins: []mesh.TextMatch{*text1(mesh.TextRegex, "(")}}}, asked(), true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			res, ok := Compile(&mesh.Route{Rules: []mesh.Rule{tc.rule}}).Match(tc.req)
			if ok != tc.want {
				t.Fatalf("matches: %v, want %v", ok, tc.want)
			}
			if ok && res.Rule.Broken == "" {
				t.Error("the rule is not broken")
			}
		})
	}
}

func TestMatchConnection(t *testing.T) {
	for _, tc := range []struct {
		name  string
		match mesh.RequestMatch
		conn  Connection
		want  bool
	}{
		{"everything", mesh.RequestMatch{}, Connection{}, true},
		{"name", mesh.RequestMatch{SNI: []string{"a.example.com"}}, Connection{SNI: "A.Example.com"}, true},
		{"another name", mesh.RequestMatch{SNI: []string{"a.example.com"}}, Connection{SNI: "b.example.com"}, false},
		{"below", mesh.RequestMatch{SNI: []string{"x", "*.Example.com"}}, Connection{SNI: "a.b.example.com"}, true},
		{"below is not itself", mesh.RequestMatch{SNI: []string{"*.example.com"}}, Connection{SNI: "example.com"}, false},
		{"below is not beside", mesh.RequestMatch{SNI: []string{"*.example.com"}}, Connection{SNI: "badexample.com"}, false},
		{"any name", mesh.RequestMatch{SNI: []string{"*"}}, Connection{SNI: "x"}, true},
		{"no name", mesh.RequestMatch{SNI: []string{"*"}}, Connection{}, false},
		{"subnet", mesh.RequestMatch{DestinationSubnets: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}, Connection{Destination: netip.MustParseAddr("::ffff:10.1.2.3")}, true},
		{"another subnet", mesh.RequestMatch{DestinationSubnets: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}, Connection{Destination: netip.MustParseAddr("11.1.2.3")}, false},
		{"unknown destination", mesh.RequestMatch{DestinationSubnets: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}}, Connection{}, false},
		{"source namespace", mesh.RequestMatch{SourceNamespaces: []string{"web"}}, Connection{SourceNamespace: "web"}, true},
		{"another source namespace", mesh.RequestMatch{SourceNamespaces: []string{"web"}}, Connection{}, false},
		{"never", mesh.RequestMatch{Never: true}, Connection{}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			table := Compile(&mesh.Route{Rules: []mesh.Rule{{Matches: []mesh.RequestMatch{tc.match}}}})
			if _, ok := table.MatchConnection(&tc.conn); ok != tc.want {
				t.Errorf("matches: %v, want %v", ok, tc.want)
			}
		})
	}
}

func TestPick(t *testing.T) {
	rule := func(weights ...uint32) *Rule {
		r := mesh.Rule{}
		for i, w := range weights {
			r.Backends = append(r.Backends, mesh.Backend{Subset: fmt.Sprint(i), Weight: w})
		}
		return Compile(&mesh.Route{Rules: []mesh.Rule{r}}).entries[0].rule
	}
	for _, tc := range []struct {
		weights []uint32
		want    []float64 // shares
	}{
		{nil, nil},
		{[]uint32{5}, []float64{1}},
		{[]uint32{0}, []float64{1}},
		{[]uint32{0, 0}, []float64{0, 0}},
		{[]uint32{90, 10}, []float64{.9, .1}},
		{[]uint32{0, 1, 0, 3}, []float64{0, .25, 0, .75}},
		{[]uint32{1 << 31, 1 << 31}, []float64{.5, .5}},
	} {
		r, got := rule(tc.weights...), make([]float64, len(tc.weights))
		const n = 10_000
		for i := range uint64(n) { // an even cover of the range
			if b := r.Pick(i*(^uint64(0)/n) + i); b != nil {
				got[b.Spec.Subset[0]-'0'] += 1. / n
			}
		}
		for i := range got {
			if d := got[i] - tc.want[i]; d < -.001 || d > .001 {
				t.Errorf("shares of %v are %v, want %v", tc.weights, got, tc.want)
			}
		}
	}
	if b := rule(0, 1, 0).Pick(^uint64(0)); b == nil || b.Spec.Subset != "1" {
		t.Errorf("the highest number draws %+v", b)
	}
}

func TestRewrite(t *testing.T) {
	s := func(v string) *string { return &v }
	seg, pre := mesh.PathSegment, mesh.PathPrefix
	for _, tc := range []struct {
		name    string
		kind    mesh.PathKind
		match   string
		rewrite mesh.Rewrite
		path    string
		want    string
	}{
		// The table of the Gateway API's ReplacePrefixMatch.
		{"segments", seg, "/foo", mesh.Rewrite{Prefix: s("/xyz")}, "/foo/bar", "/xyz/bar"},
		{"segments", seg, "/foo", mesh.Rewrite{Prefix: s("/xyz/")}, "/foo/bar", "/xyz/bar"},
		{"segments", seg, "/foo/", mesh.Rewrite{Prefix: s("/xyz")}, "/foo/bar", "/xyz/bar"},
		{"segments", seg, "/foo/", mesh.Rewrite{Prefix: s("/xyz/")}, "/foo/bar", "/xyz/bar"},
		{"segments", seg, "/foo", mesh.Rewrite{Prefix: s("/xyz")}, "/foo", "/xyz"},
		{"segments", seg, "/foo", mesh.Rewrite{Prefix: s("/xyz")}, "/foo/", "/xyz/"},
		{"segments", seg, "/foo", mesh.Rewrite{Prefix: s("")}, "/foo/bar", "/bar"},
		{"segments", seg, "/foo", mesh.Rewrite{Prefix: s("")}, "/foo/", "/"},
		{"segments", seg, "/foo", mesh.Rewrite{Prefix: s("")}, "/foo", "/"},
		{"segments", seg, "/foo", mesh.Rewrite{Prefix: s("/")}, "/foo/", "/"},
		{"segments", seg, "/foo", mesh.Rewrite{Prefix: s("/")}, "/foo", "/"},
		{"segments", seg, "/", mesh.Rewrite{Prefix: s("/xyz")}, "/bar", "/xyz/bar"},
		{"no match is the root", "", "", mesh.Rewrite{Prefix: s("/xyz")}, "/bar", "/xyz/bar"},
		{"text", pre, "/foo", mesh.Rewrite{Prefix: s("/xyz")}, "/foobar", "/xyzbar"},
		{"text with a slash", pre, "/foo/", mesh.Rewrite{Prefix: s("/")}, "/foo/bar", "/bar"},
		{"text to the root", pre, "/foo", mesh.Rewrite{Prefix: s("/")}, "/foo/bar", "/bar"},
		{"text without a slash", pre, "/foo/", mesh.Rewrite{Prefix: s("")}, "/foo/bar", "/bar"},
		{"exact is all", mesh.PathExact, "/foo", mesh.Rewrite{Prefix: s("/x")}, "/foo", "/x"},
		{"expression is all", mesh.PathRegex, "/f.*", mesh.Rewrite{Prefix: s("/x")}, "/foo/bar", "/x"},
		{"whole path", seg, "/foo", mesh.Rewrite{Path: s("/one")}, "/foo/bar", "/one"},
		{"whole path without a slash", seg, "/foo", mesh.Rewrite{Path: s("one")}, "/foo/bar", "/one"},
		{"groups", seg, "/", mesh.Rewrite{Regex: &mesh.RegexChange{Match: `^/service/([^/]+)(/.*)$`, Replacement: `\2/instance/\1`}}, "/service/foo/v1/api", "/v1/api/instance/foo"},
		{"every match", seg, "/", mesh.Rewrite{Regex: &mesh.RegexChange{Match: `one`, Replacement: `two`}}, "/xxx/one/yyy/one/zzz", "/xxx/two/yyy/two/zzz"},
		{"a dollar and a backslash are themselves", seg, "/", mesh.Rewrite{Regex: &mesh.RegexChange{Match: `a`, Replacement: `$1\\`}}, "/a", `/$1\`},
		{"an expression that does not match", seg, "/", mesh.Rewrite{Regex: &mesh.RegexChange{Match: `zzz`, Replacement: ``}}, "/a", "/a"},
		{"nothing", seg, "/", mesh.Rewrite{Authority: "x"}, "/a", "/a"},
	} {
		t.Run(tc.name+" "+tc.path, func(t *testing.T) {
			rule := mesh.Rule{Rewrite: &tc.rewrite, Matches: []mesh.RequestMatch{{}}}
			if tc.kind != "" {
				rule.Matches[0].Path = path1(tc.kind, tc.match)
			}
			res, ok := Compile(&mesh.Route{Rules: []mesh.Rule{rule}}).Match(asked(at(tc.path)))
			if !ok || res.Rule.Broken != "" {
				t.Fatalf("met %+v, %v", res, ok)
			}
			if got := string(res.Rule.Rewrite.AppendPath(nil, []byte(tc.path), &res)); got != tc.want {
				t.Errorf("got %q, want %q", got, tc.want)
			}
		})
	}
}

func TestAllows(t *testing.T) {
	c, err := compileCORS(&mesh.CORS{AllowOrigins: []mesh.TextMatch{*exact("https://a.com"), *text1(mesh.TextPrefix, "http://b"), *text1(mesh.TextRegex, `https://[a-z]+\.c\.com`)}})
	if err != nil {
		t.Fatal(err)
	}
	for origin, want := range map[string]bool{"https://a.com": true, "https://a.com.evil": false, "http://b.com": true, "https://x.c.com": true, "https://x.c.com.evil": false, "null": false} {
		if c.Allows([]byte(origin)) != want {
			t.Errorf("%s is allowed: %v", origin, !want)
		}
	}
	if c, _ := compileCORS(&mesh.CORS{AllowOrigins: []mesh.TextMatch{*exact("*")}}); !c.Allows([]byte("x")) {
		t.Error("* does not allow")
	}
}

// many is a route with so many rules, of all kinds, and one for the rest.
func many(n int) *mesh.Route {
	r := &mesh.Route{}
	for i := range n {
		kind := []mesh.PathKind{mesh.PathExact, mesh.PathPrefix, mesh.PathSegment}[i%3]
		r.Rules = append(r.Rules, mesh.Rule{Name: fmt.Sprint(i), Matches: []mesh.RequestMatch{{Path: path1(kind, fmt.Sprintf("/service-%d/v1", i))}}})
	}
	r.Rules = append(r.Rules, mesh.Rule{Name: "rest"})
	return r
}

// The index must never decide otherwise than asking one by one.
func TestIndexAgreesWithTheList(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	words := []string{"", "a", "ab", "b", "A", "a/b", "ab/"}
	kinds := []mesh.PathKind{mesh.PathExact, mesh.PathPrefix, mesh.PathSegment, mesh.PathRegex}
	some := func() string {
		s := ""
		for range 1 + rnd.IntN(3) {
			s += "/" + words[rnd.IntN(len(words))]
		}
		return s
	}
	for range 300 {
		r := &mesh.Route{}
		for range 10 + rnd.IntN(30) {
			m := mesh.RequestMatch{Never: rnd.IntN(20) == 0}
			if rnd.IntN(20) > 0 {
				m.Path = path1(kinds[rnd.IntN(4)], some())
				m.Path.IgnoreCase = rnd.IntN(4) == 0
			}
			if rnd.IntN(3) == 0 {
				m.Method = exact([]string{"GET", "PUT"}[rnd.IntN(2)])
			}
			r.Rules = append(r.Rules, mesh.Rule{Matches: []mesh.RequestMatch{m}})
		}
		table := Compile(r)
		if table.paths == nil {
			t.Fatal("there is no index")
		}
		for range 50 {
			q := asked(at(some()))
			if got, want := table.paths.first(table.entries, q), table.linear(q); got != want {
				t.Fatalf("%s met entry %d by the index, %d by the list, of %+v", q.Path, got, want, r.Rules)
			}
		}
	}
}

func TestMatchDoesNotAllocate(t *testing.T) {
	r := many(200)
	r.Rules[0].Matches = []mesh.RequestMatch{{Path: path1(mesh.PathRegex, "/service-[0-9]+/v9/.*"), Query: []mesh.FieldMatch{{Name: "q", TextMatch: *exact("1")}}, Authority: exact("cart")}}
	table := Compile(r)
	req := asked(at("/service-150/v1"), func(r *Request) { r.Fields, r.Authority = nil, []byte("cart.shop:80") })
	if n := testing.AllocsPerRun(100, func() { table.Match(req) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkMatch(b *testing.B) {
	for _, bc := range []struct {
		name  string
		route *mesh.Route
		path  string
	}{
		{"201", many(200), "/service-150/v1"},
		{"201rest", many(200), "/other/path/of/four"},
		{"4", many(3), "/service-2/v1"},
		{"default", nil, "/x"},
	} {
		b.Run(bc.name, func(b *testing.B) {
			table, req := Compile(bc.route), asked(at(bc.path))
			b.ReportAllocs()
			for b.Loop() {
				if _, ok := table.Match(req); !ok {
					b.Fatal("no match")
				}
			}
		})
	}
}
