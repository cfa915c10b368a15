package authz

import (
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

// asked is fact with a request.
func asked(edits ...func(*Request)) Facts {
	f := fact()
	f.HTTP = &Request{
		Method: []byte("GET"), Host: []byte("Cart.Shop:8080"), Path: []byte("/api/v1/items"),
		Fields:   fields{"x-role": {"user"}, "x-empty": {""}, "x-two": {"user", "admin"}},
		RemoteIP: netip.MustParseAddr("192.0.2.1"),
	}
	for _, edit := range edits {
		edit(f.HTTP)
	}
	return f
}

func header(name string, values, not []mesh.StringMatch) mesh.Match {
	return mesh.Match{Headers: []mesh.HeaderMatch{{Name: name, Values: values, NotValues: not}}}
}

func TestRequests(t *testing.T) {
	hosted := func(h string) Facts { return asked(func(r *Request) { r.Host = []byte(h) }) }
	at := func(p string) Facts { return asked(func(r *Request) { r.Path = []byte(p) }) }
	template := func(s string) mesh.Match { return mesh.Match{Paths: kind(mesh.MatchTemplate, s)} }
	for _, tc := range []struct {
		name  string
		match mesh.Match
		facts Facts
		want  bool
	}{
		{"method", mesh.Match{Methods: exact("GET")}, asked(), true},
		{"methods have case", mesh.Match{Methods: exact("get")}, asked(), false},
		{"method prefix", mesh.Match{Methods: kind(mesh.MatchPrefix, "G")}, asked(), true},
		{"not method", mesh.Match{NotMethods: exact("GET")}, asked(), false},
		{"not another method", mesh.Match{NotMethods: exact("PUT")}, asked(), true},
		{"method and namespace", mesh.Match{Methods: exact("GET"), Namespaces: exact("pay")}, asked(), false},

		{"host without case and port", mesh.Match{Hosts: exact("cart.shop")}, asked(), true},
		{"host with its port", mesh.Match{Hosts: exact("cart.SHOP:8080")}, asked(), true},
		{"host with another port", mesh.Match{Hosts: exact("cart.shop:80")}, asked(), false},
		{"host with any port", mesh.Match{Hosts: kind(mesh.MatchPrefix, "cart.shop:")}, asked(), true},
		{"host suffix", mesh.Match{Hosts: kind(mesh.MatchSuffix, ".shop")}, asked(), true},
		{"host with a final dot", mesh.Match{Hosts: exact("cart.shop")}, hosted("cart.shop.:80"), true},
		{"IPv6 host", mesh.Match{Hosts: exact("[::1]")}, hosted("[::1]:80"), true},
		{"IPv6 host without port", mesh.Match{Hosts: exact("[::1]")}, hosted("[::1]"), true},
		{"not host, by another case and port", mesh.Match{NotHosts: exact("cart.shop")}, asked(), false},
		{"no host is not there", mesh.Match{Hosts: presence()}, hosted(""), false},

		{"path", mesh.Match{Paths: exact("/api/v1/items")}, asked(), true},
		{"paths have case", mesh.Match{Paths: exact("/API/v1/items")}, asked(), false},
		{"path prefix", mesh.Match{Paths: kind(mesh.MatchPrefix, "/api/")}, asked(), true},
		{"path suffix", mesh.Match{Paths: kind(mesh.MatchSuffix, "/items")}, asked(), true},
		{"path presence", mesh.Match{Paths: presence()}, asked(), true},
		{"not path", mesh.Match{NotPaths: kind(mesh.MatchPrefix, "/api")}, asked(), false},

		{"one segment", template("/api/{*}/items"), asked(), true},
		{"one segment at the end", template("/api/v1/{*}"), asked(), true},
		{"one segment is not two", template("/api/{*}"), asked(), false},
		{"one segment is not none", template("/api/v1/items/{*}"), asked(), false},
		{"one segment is not empty", template("/api/{*}"), at("/api/"), false},
		{"any segments", template("/api/{**}"), asked(), true},
		{"any segments may be none", template("/api/{**}"), at("/api/"), true},
		{"any segments begin after the slash", template("/api/{**}"), at("/api"), false},
		{"any segments do not begin in a name", template("/api/{**}"), at("/apis/x"), false},
		{"any segments in the middle", template("/{**}/items"), asked(), true},
		{"no segments in the middle", template("/api/v1/{**}/items"), asked(), true},
		{"any segments end at a slash", template("/{**}/tems"), asked(), false},
		{"both", template("/{*}/v1/{**}"), asked(), true},
		{"a literal template", template("/api/v1/items"), asked(), true},
		{"a literal template is all of it", template("/api/v1"), asked(), false},
		{"a longer literal template", template("/api/v1/items/x"), asked(), false},

		{"header", header("x-role", exact("user"), nil), asked(), true},
		{"another header value", header("x-role", exact("admin"), nil), asked(), false},
		{"header presence", header("x-role", presence(), nil), asked(), true},
		{"an empty header is not there", header("x-empty", presence(), nil), asked(), false},
		{"an absent header", header("x-none", presence(), nil), asked(), false},
		{"not header", header("x-role", nil, exact("user")), asked(), false},
		{"not header, absent", header("x-none", nil, exact("user")), asked(), true},
		{"header value and not another", header("x-role", presence(), exact("admin")), asked(), true},
		{"two headers are and", mesh.Match{Headers: []mesh.HeaderMatch{{Name: "x-role", Values: presence()}, {Name: "x-none", Values: presence()}}}, asked(), false},
		{"host as a header", header(":authority", exact("cart.shop"), nil), asked(), true},
		{"method as a header", header(":method", exact("GET"), nil), asked(), true},

		{"remote range", mesh.Match{RemoteIPs: nets("192.0.2.0/24")}, asked(), true},
		{"not remote range", mesh.Match{NotRemoteIPs: nets("192.0.2.0/24")}, asked(), false},
		{"the source is not the remote", mesh.Match{RemoteIPs: nets("10.0.0.0/8")}, asked(), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for _, action := range []mesh.Action{mesh.Allow, mesh.Deny} {
				p := &mesh.Policy{Action: action, Groups: one(tc.match)}
				if got := matches(p, &tc.facts); got != tc.want {
					t.Errorf("%v policy matches: %v, want %v", action, got, tc.want)
				}
			}
		})
	}
}

// What a client may say in two ways is neither a way in nor a way past.
func TestRequestsThatCanBeReadInTwoWays(t *testing.T) {
	noRemote := asked(func(r *Request) { r.RemoteIP = netip.Addr{} })
	slash := asked(func(r *Request) { r.Path, r.Unslashed = []byte("/api%2Fadmin"), []byte("/api/admin") })
	for _, tc := range []struct {
		name  string
		match mesh.Match
		facts Facts
	}{
		{"method of a connection", mesh.Match{Methods: exact("GET")}, fact()},
		{"not method of a connection", mesh.Match{NotMethods: exact("GET")}, fact()},
		{"host of a connection", mesh.Match{NotHosts: exact("a")}, fact()},
		{"path of a connection", mesh.Match{NotPaths: exact("/a")}, fact()},
		{"header of a connection", header("x-role", nil, exact("a")), fact()},
		{"remote address of a connection", mesh.Match{NotRemoteIPs: nets("10.0.0.0/8")}, fact()},
		{"beside what does not hold", mesh.Match{Methods: exact("GET"), Namespaces: exact("pay")}, fact()},
		{"remote address that is not known", mesh.Match{NotRemoteIPs: nets("10.0.0.0/8")}, noRemote},
		{"remote range that is none", mesh.Match{NotRemoteIPs: []netip.Prefix{{}}}, asked()},
		{"not method of no kind", mesh.Match{NotMethods: kind(mesh.MatchUnset, "")}, asked()},
		{"not method template", mesh.Match{NotMethods: kind(mesh.MatchTemplate, "/x")}, asked()},
		{"not host of a later kind", mesh.Match{NotHosts: kind(77, "")}, asked()},
		{"not path of a later kind", mesh.Match{NotPaths: kind(77, "")}, asked()},
		{"not path of a broken template", mesh.Match{NotPaths: kind(mesh.MatchTemplate, "/a{*}")}, asked()},
		{"not header of a later kind", header("x-none", nil, kind(77, "")), asked()},
		{"header without a name", header("", nil, exact("a")), asked()},
		{"pseudo header that is not known here", header(":path", nil, exact("a")), asked()},
		{"path with an encoded slash, as it is", mesh.Match{Paths: exact("/api%2Fadmin")}, slash},
		{"path with an encoded slash, decoded", mesh.Match{Paths: kind(mesh.MatchPrefix, "/api/")}, slash},
		{"not path with an encoded slash, as it is", mesh.Match{NotPaths: exact("/api%2Fadmin")}, slash},
		{"not path with an encoded slash, decoded", mesh.Match{NotPaths: kind(mesh.MatchPrefix, "/api/")}, slash},
		{"field sent twice, the second", header("x-two", exact("admin"), nil), asked()},
		{"field sent twice, the first", header("x-two", exact("user"), nil), asked()},
		{"field sent twice, as a list", header("x-two", exact("user,admin"), nil), asked()},
		{"not a field sent twice", header("x-two", nil, exact("admin")), asked()},
		{"not a field sent twice, by a prefix", header("x-two", nil, kind(mesh.MatchPrefix, "user")), asked()},
	} {
		t.Run(tc.name, func(t *testing.T) {
			allow := &mesh.Policy{Action: mesh.Allow, Groups: one(tc.match)}
			deny := &mesh.Policy{Action: mesh.Deny, Groups: one(tc.match)}
			if Decide([]*mesh.Policy{allow}, nil, tc.facts).Allowed {
				t.Error("an allow policy let it pass")
			}
			if Decide([]*mesh.Policy{deny}, nil, tc.facts).Allowed {
				t.Error("a deny policy let it pass")
			}
		})
	}
}

// A rule that has lost everything but what is unknown must not become empty,
// which would be passed over.
func TestARequestMatchIsNotEmpty(t *testing.T) {
	for _, m := range []mesh.Match{
		{Methods: exact("GET")}, {NotMethods: exact("GET")}, {Hosts: exact("a")}, {NotHosts: exact("a")}, {Paths: exact("/")},
		{NotPaths: exact("/")}, header("a", nil, nil), {RemoteIPs: nets("10.0.0.0/8")}, {NotRemoteIPs: nets("10.0.0.0/8")},
	} {
		if empty(&m) {
			t.Errorf("%+v is empty", m)
		}
	}
}

func TestAllowsAgreesAndDoesNotAllocate(t *testing.T) {
	f := asked()
	f.HTTP.Fields = nil // joining allocates in this test
	deny := &mesh.Policy{Action: mesh.Deny, Groups: one(mesh.Match{Methods: exact("PUT"), Paths: kind(mesh.MatchTemplate, "/api/{**}")})}
	allow := &mesh.Policy{Action: mesh.Allow, Groups: one(mesh.Match{Methods: exact("GET"), Hosts: exact("cart.shop"), Namespaces: exact("shop")})}
	other := &mesh.Policy{Action: mesh.Allow, Groups: one(mesh.Match{Methods: exact("PUT")})}
	for _, tc := range []struct {
		ps   []*mesh.Policy
		want bool
	}{
		{nil, true},
		{[]*mesh.Policy{deny, allow}, true},
		{[]*mesh.Policy{other}, false},
		{[]*mesh.Policy{nil}, false},
	} {
		if got := Allows(tc.ps, nil, &f); got != tc.want || got != Decide(tc.ps, nil, f).Allowed {
			t.Errorf("Allows(%v) = %v, want %v", tc.ps, got, tc.want)
		}
		if n := testing.AllocsPerRun(100, func() { Allows(tc.ps, nil, &f) }); n != 0 {
			t.Errorf("%v allocations", n)
		}
	}
}

func BenchmarkAllows(b *testing.B) {
	f := asked()
	ps := []*mesh.Policy{
		{Action: mesh.Deny, Groups: one(mesh.Match{Paths: kind(mesh.MatchPrefix, "/admin")})},
		{Action: mesh.Allow, Groups: one(mesh.Match{Methods: exact("GET"), Hosts: exact("cart.shop"), Namespaces: exact("shop")})},
	}
	b.ReportAllocs()
	for b.Loop() {
		if !Allows(ps, nil, &f) {
			b.Fatal("denied")
		}
	}
}
