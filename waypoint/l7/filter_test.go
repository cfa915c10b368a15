package l7

import (
	"fmt"
	"net/http"
	"net/netip"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/view"
)

func textOf(k mesh.TextKind, s string) mesh.TextMatch { return mesh.TextMatch{Kind: k, Value: s} }
func pathOf(k mesh.PathKind, s string) []mesh.RequestMatch {
	return []mesh.RequestMatch{{Path: &mesh.PathMatch{Kind: k, Value: s}}}
}
func onlyCart() []mesh.Backend { return []mesh.Backend{{Service: cart, Weight: 1}} }
func of(s string) *string      { return &s }

// heads answers with the head that it was sent.
func heads(rw http.ResponseWriter, r *http.Request) {
	rw.Header().Set("X-One", "1")
	rw.Header().Set("X-Two", "2")
	fmt.Fprintf(rw, "%s %s\n", r.Host, r.URL.RequestURI())
	_ = r.Header.Write(rw)
}

func TestHeaderEdits(t *testing.T) {
	rule := mesh.Rule{Backends: onlyCart(),
		RequestHeaders: mesh.HeaderEdit{Remove: []string{"x-gone"}, Set: []mesh.HeaderPair{{Name: "x-set", Value: "rule"}, {Name: "host", Value: "other.example"}, {Name: "content-length", Value: "99"}},
			Append: []mesh.HeaderPair{{Name: "x-add", Value: "rule"}}},
		ResponseHeaders: mesh.HeaderEdit{Remove: []string{"x-one"}, Set: []mesh.HeaderPair{{Name: "x-two", Value: "rule"}}},
	}
	rule.Backends[0].RequestHeaders.Append = []mesh.HeaderPair{{Name: "x-add", Value: "backend"}}
	rule.Backends[0].ResponseHeaders.Append = []mesh.HeaderPair{{Name: "x-three", Value: "3"}}
	inWorld(t, "both levels, both ways", func(t *testing.T, w *world) {
		w.backend("10.0.0.1:8080", heads)
		w.backend("10.0.0.2:8080", heads)
		r, b := w.client(80).get("/", "X-Gone: 1", "X-Set: client", "X-Add: client", "traceparent: 00-1-2-3", "b3: 1-2-1")
		for _, want := range []string{"other.example /", "X-Set: rule\r\n", "X-Add: client\r\nX-Add: rule\r\nX-Add: backend\r\n", "Traceparent: 00-1-2-3", "B3: 1-2-1"} {
			if !strings.Contains(b, want) {
				t.Errorf("endpoint was sent %q, want %q", b, want)
			}
		}
		if strings.Contains(b, "X-Gone") || strings.Contains(b, "Content-Length") {
			t.Errorf("endpoint was sent %q", b)
		}
		if h := r.Header; h.Get("X-One") != "" || h.Get("X-Two") != "rule" || h.Get("X-Three") != "3" {
			t.Errorf("client was sent %v", h)
		}
	}, rule)
}

func TestRequestID(t *testing.T) {
	uuid := regexp.MustCompile(`X-Request-Id: [0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}\r\n`)
	inWorld(t, "made where there is none, else kept", func(t *testing.T, w *world) {
		w.backend("10.0.0.1:8080", heads)
		w.backend("10.0.0.2:8080", heads)
		c := w.client(80)
		_, first := c.get("/")
		_, second := c.get("/")
		a, b := uuid.FindString(first), uuid.FindString(second)
		if a == "" || b == "" || a == b {
			t.Errorf("made %q and %q", a, b)
		}
		if _, kept := c.get("/", "X-Request-ID: mine"); !strings.Contains(kept, "X-Request-Id: mine\r\n") {
			t.Errorf("not kept: %q", kept)
		}
	})
}

func TestRewrites(t *testing.T) {
	for _, tc := range []struct {
		name, path string
		rule       mesh.Rule
		want       string // what the endpoint echoes, or the status
	}{
		{"prefix, and the query stays", "/shop/cart?q=/shop", mesh.Rule{Matches: pathOf(mesh.PathSegment, "/shop"), Rewrite: &mesh.Rewrite{Prefix: of("/v2")}}, "GET cart /v2/cart?q=/shop"},
		{"authority", "/", mesh.Rule{Rewrite: &mesh.Rewrite{Authority: "new.example"}}, "GET new.example /"},
		{"an expression that makes two slashes", "/a/b", mesh.Rule{Rewrite: &mesh.Rewrite{Regex: &mesh.RegexChange{Match: "^/a(.*)", Replacement: `/\1`}}}, "GET cart /b"},
		{"the path that is matched is normalized", "/x/../shop//cart", mesh.Rule{Matches: pathOf(mesh.PathExact, "/shop/cart")}, "GET cart /shop/cart"},
		{"a prefix that would let dots loose", "/b../admin", mesh.Rule{Matches: pathOf(mesh.PathPrefix, "/b"), Rewrite: &mesh.Rewrite{Prefix: of("/a/")}}, "400"},
		{"an expression that would", "/b../admin", mesh.Rule{Rewrite: &mesh.Rewrite{Regex: &mesh.RegexChange{Match: "^/b(.*)", Replacement: `/a/\1`}}}, "400"},
		{"a prefix that would join an encoding", "/b%2F..x", mesh.Rule{Matches: pathOf(mesh.PathPrefix, "/b%2F"), Rewrite: &mesh.Rewrite{Prefix: of("/a/")}}, "GET cart /a/..x"},
	} {
		tc.rule.Backends = onlyCart()
		inWorld(t, tc.name, func(t *testing.T, w *world) {
			r, b := w.client(80).get(tc.path)
			got := fmt.Sprint(r.StatusCode)
			if r.StatusCode == 200 {
				got, _, _ = strings.Cut(b, " 0:")
			}
			if got != tc.want {
				t.Errorf("got %q, want %q", got, tc.want)
			}
		}, tc.rule)
	}
}

func TestRedirects(t *testing.T) {
	for _, tc := range []struct {
		name     string
		redirect mesh.Redirect
		host     string
		want     string
	}{
		{"host only", mesh.Redirect{Status: 301, Authority: "new.example"}, "cart", "301 http://new.example/shop/a?q=1"},
		{"host with a port", mesh.Redirect{Authority: "new.example:8443", Scheme: "https"}, "cart", "302 https://new.example:8443/shop/a?q=1"},
		{"scheme, port left out", mesh.Redirect{Scheme: "https"}, "cart:80", "302 https://cart/shop/a?q=1"},
		{"scheme, own port kept", mesh.Redirect{Scheme: "https"}, "cart:8080", "302 https://cart:8080/shop/a?q=1"},
		{"port of the scheme", mesh.Redirect{Scheme: "https", DerivePort: "scheme"}, "cart:8080", "302 https://cart/shop/a?q=1"},
		{"port of the request", mesh.Redirect{DerivePort: "request"}, "cart:8080", "302 http://cart/shop/a?q=1"},
		{"port of the request, not that of the scheme", mesh.Redirect{Scheme: "https", DerivePort: "request"}, "cart", "302 https://cart:80/shop/a?q=1"},
		{"port", mesh.Redirect{Port: 8443}, "cart:80", "302 http://cart:8443/shop/a?q=1"},
		{"port that goes without saying", mesh.Redirect{Scheme: "https", Port: 443, Status: 308}, "cart", "308 https://cart/shop/a?q=1"},
		{"path", mesh.Redirect{Path: of("/new")}, "cart", "302 http://cart/new?q=1"},
		{"path with a query", mesh.Redirect{Path: of("/new?z")}, "cart", "302 http://cart/new?z"},
		{"prefix", mesh.Redirect{Prefix: of("/")}, "cart", "302 http://cart/a?q=1"},
		{"IPv6", mesh.Redirect{Port: 81}, "[::1]:80", "302 http://[::1]:81/shop/a?q=1"},
	} {
		inWorld(t, tc.name, func(t *testing.T, w *world) {
			c := w.client(80)
			c.say("GET /shop/a?q=1 HTTP/1.1\r\nHost: " + tc.host + "\r\n\r\n")
			r, _ := c.answer("GET")
			if got := fmt.Sprint(r.StatusCode, " ", r.Header.Get("Location")); got != tc.want {
				t.Errorf("got %s, want %s", got, tc.want)
			}
			if r.Header.Get("X-Rule") != "edited" {
				t.Error("the redirect's head was not edited")
			}
		}, mesh.Rule{Matches: pathOf(mesh.PathSegment, "/shop"), Redirect: &tc.redirect,
			ResponseHeaders: mesh.HeaderEdit{Set: []mesh.HeaderPair{{Name: "x-rule", Value: "edited"}}}})
	}
}

func TestDirectResponse(t *testing.T) {
	inWorld(t, "status and body", func(t *testing.T, w *world) {
		r, b := w.client(80).get("/")
		if r.StatusCode != 418 || b != "short and stout" {
			t.Errorf("got %d %q", r.StatusCode, b)
		}
		if x := w.last(); x.Details != "direct_response" || x.Attempts != 0 {
			t.Errorf("ended %+v", x)
		}
	}, mesh.Rule{Direct: &mesh.DirectResponse{Status: 418, Body: "short and stout"}})
}

func TestCORS(t *testing.T) {
	age := mesh.Duration(time.Hour)
	list := &mesh.CORS{AllowOrigins: []mesh.TextMatch{textOf(mesh.TextExact, "https://a.example"), textOf(mesh.TextRegex, `https://.*\.b\.example`)},
		AllowMethods: []string{"GET", "PUT"}, AllowHeaders: []string{"x-a", "x-b"}, ExposeHeaders: []string{"x-c"}, MaxAge: &age, AllowCredentials: true}
	any := &mesh.CORS{AllowOrigins: []mesh.TextMatch{textOf(mesh.TextExact, "*")}, AllowMethods: []string{"*"}, AllowHeaders: []string{"*"}, IgnoreUnmatched: true}
	strict := &mesh.CORS{AllowOrigins: list.AllowOrigins, IgnoreUnmatched: true}
	for _, tc := range []struct {
		name, method string
		cors         *mesh.CORS
		lines        []string
		tries        int
		want         map[string]string
	}{
		{"preflight", "OPTIONS", list, []string{"Origin: https://a.example", "Access-Control-Request-Method: PUT"}, 0, map[string]string{"Access-Control-Allow-Origin": "https://a.example",
			"Access-Control-Allow-Methods": "GET,PUT", "Access-Control-Allow-Headers": "x-a,x-b", "Access-Control-Max-Age": "3600", "Access-Control-Allow-Credentials": "true", "Access-Control-Expose-Headers": "", "Vary": "origin"}},
		{"preflight of another origin goes on", "OPTIONS", list, []string{"Origin: https://evil.example", "Access-Control-Request-Method: PUT"}, 1, map[string]string{"Access-Control-Allow-Origin": ""}},
		{"preflight of another origin ends here", "OPTIONS", strict, []string{"Origin: https://evil.example", "Access-Control-Request-Method: PUT"}, 0, map[string]string{"Access-Control-Allow-Origin": "", "Access-Control-Allow-Methods": ""}},
		{"OPTIONS that is none", "OPTIONS", list, []string{"Origin: https://a.example"}, 1, map[string]string{"Access-Control-Allow-Origin": "https://a.example"}},
		{"request", "GET", list, []string{"Origin: https://x.b.example"}, 1, map[string]string{"Access-Control-Allow-Origin": "https://x.b.example", "Access-Control-Expose-Headers": "x-c", "Access-Control-Allow-Credentials": "true", "Access-Control-Allow-Methods": ""}},
		{"request of another origin", "GET", list, []string{"Origin: https://b.example"}, 1, map[string]string{"Access-Control-Allow-Origin": "", "Access-Control-Allow-Credentials": ""}},
		{"everything", "OPTIONS", any, []string{"Origin: https://z", "Access-Control-Request-Method: PUT", "Access-Control-Request-Headers: x-1, x-2"}, 0, map[string]string{"Access-Control-Allow-Origin": "https://z",
			"Access-Control-Allow-Methods": "PUT", "Access-Control-Allow-Headers": "x-1, x-2", "Access-Control-Allow-Credentials": ""}},
		{"no origin", "GET", list, nil, 1, map[string]string{"Access-Control-Allow-Origin": "", "Vary": ""}},
	} {
		inWorld(t, tc.name, func(t *testing.T, w *world) {
			c := w.client(80)
			c.say(tc.method + " / HTTP/1.1\r\nHost: cart\r\n" + strings.Join(append(tc.lines, ""), "\r\n") + "\r\n")
			r, _ := c.answer(tc.method)
			if r.StatusCode != 200 || w.last().Attempts != tc.tries {
				t.Errorf("got %d after %d tries", r.StatusCode, w.last().Attempts)
			}
			for name, want := range tc.want {
				if got := strings.Join(r.Header[name], ","); got != want {
					t.Errorf("%s is %q, want %q", name, got, want)
				}
			}
		}, mesh.Rule{CORS: tc.cors, Backends: onlyCart()})
	}
}

func TestFaults(t *testing.T) {
	fourteen := 14
	inWorld(t, "delay", func(t *testing.T, w *world) {
		from := time.Now()
		r, _ := w.client(80).get("/")
		if d := time.Since(from); r.StatusCode != 200 || d < 5*time.Second || d > 5100*time.Millisecond {
			t.Errorf("got %d after %v", r.StatusCode, d)
		}
		if f := w.last().Flags; f != FlagDelay {
			t.Errorf("flags %v", f)
		}
	}, mesh.Rule{Backends: onlyCart(), Timeout: mesh.Duration(time.Second), Fault: &mesh.Fault{Delay: &mesh.FaultDelay{PerMillion: 1e6, For: mesh.Duration(5 * time.Second)}}})
	inWorld(t, "delay and abort", func(t *testing.T, w *world) {
		r, b := w.client(80).get("/")
		if r.StatusCode != 555 || b != "fault filter abort" {
			t.Errorf("got %d %q", r.StatusCode, b)
		}
		if x := w.last(); x.Flags.String() != "DI,FI" || x.Details != "fault_filter_abort" || x.Attempts != 0 {
			t.Errorf("ended %+v", x)
		}
	}, mesh.Rule{Backends: onlyCart(), Retry: &mesh.Retry{Attempts: 3, On: []string{"5xx"}}, Fault: &mesh.Fault{Delay: &mesh.FaultDelay{PerMillion: 1e6, For: mesh.Duration(time.Second)}, Abort: &mesh.FaultAbort{PerMillion: 1e6, Status: 555}}})
	inWorld(t, "gRPC abort", func(t *testing.T, w *world) {
		c := w.client(80)
		r, _ := c.get("/", "Content-Type: application/grpc")
		if r.StatusCode != 200 || r.Header.Get("Grpc-Status") != "14" || r.Header.Get("Grpc-Message") != "fault filter abort" {
			t.Errorf("got %d %v", r.StatusCode, r.Header)
		}
		if r, _ := c.get("/"); r.StatusCode != 503 {
			t.Errorf("who speaks no gRPC got %d", r.StatusCode)
		}
	}, mesh.Rule{Backends: onlyCart(), Fault: &mesh.Fault{Abort: &mesh.FaultAbort{PerMillion: 1e6, GRPCStatus: &fourteen}}})
	inWorld(t, "a share", func(t *testing.T, w *world) {
		c, n := w.client(80), 0
		for range 2000 {
			if r, _ := c.get("/"); r.StatusCode == 500 {
				n++
			}
		}
		if n < 500-100 || n > 500+100 { // five standard deviations
			t.Errorf("%d of 2000 were aborted, want about 500", n)
		}
	}, mesh.Rule{Backends: onlyCart(), Fault: &mesh.Fault{Abort: &mesh.FaultAbort{PerMillion: 250_000, Status: 500}}})
	inWorld(t, "none", func(t *testing.T, w *world) {
		if r, _ := w.client(80).get("/"); r.StatusCode != 200 {
			t.Errorf("got %d", r.StatusCode)
		}
	}, mesh.Rule{Backends: onlyCart(), Fault: &mesh.Fault{Abort: &mesh.FaultAbort{Status: 500}, Delay: &mesh.FaultDelay{For: mesh.Duration(time.Hour)}}})
}

func TestSessions(t *testing.T) {
	inWorld(t, "by cookie", func(t *testing.T, w *world) {
		c := w.client(80)
		r, _ := c.get("/")
		first, set := r.Header.Get("X-Backend"), r.Header.Get("Set-Cookie")
		value, rest, _ := strings.Cut(set, ";")
		if !strings.HasPrefix(value, "sid=") || rest != " Max-Age=60; Path=/; HttpOnly" {
			t.Fatalf("cookie %q", set)
		}
		for range 20 {
			r, _ := c.get("/", "Cookie: a=b; "+value)
			if got := r.Header.Get("X-Backend"); got != first || r.Header.Get("Set-Cookie") != "" {
				t.Fatalf("went to %s, with cookie %q; want %s", got, r.Header.Get("Set-Cookie"), first)
			}
		}
		if r, _ := c.get("/", "Cookie: sid=nonsense"); r.StatusCode != 200 || r.Header.Get("Set-Cookie") == "" {
			t.Errorf("a session that is none: %d %v", r.StatusCode, r.Header)
		}
	}, mesh.Rule{Backends: onlyCart(), Session: &mesh.Session{Cookie: "sid", Path: "/", Lifetime: mesh.Duration(time.Minute)}})
	inWorld(t, "by header", func(t *testing.T, w *world) {
		c := w.client(80)
		r, _ := c.get("/")
		first, name := r.Header.Get("X-Backend"), r.Header.Get("X-Session")
		for range 20 {
			if r, _ := c.get("/", "X-Session: "+name); r.Header.Get("X-Backend") != first {
				t.Fatal("left its session")
			}
		}
	}, mesh.Rule{Backends: onlyCart(), Session: &mesh.Session{Header: "x-session"}})
}

func TestConsistentHash(t *testing.T) {
	policy := func(k mesh.HashKey) []*mesh.TrafficPolicy {
		return []*mesh.TrafficPolicy{{Service: cart, Balance: mesh.Balance{Algorithm: mesh.RingHash, Hash: &k}}}
	}
	run := func(name string, k mesh.HashKey, f func(t *testing.T, c *testClient)) {
		inWorld(t, name, func(t *testing.T, w *world) {
			w.set(nil, policy(k))
			f(t, w.client(80))
		})
	}
	same := func(t *testing.T, c *testClient, path string, lines ...string) string {
		t.Helper()
		r, _ := c.get(path, lines...)
		for range 10 {
			if again, _ := c.get(path, lines...); again.Header.Get("X-Backend") != r.Header.Get("X-Backend") {
				t.Fatal("the same went elsewhere")
			}
		}
		return r.Header.Get("X-Backend")
	}
	differ := func(t *testing.T, at func(i int) string) {
		t.Helper()
		seen := map[string]bool{}
		for i := range 20 {
			seen[at(i)] = true
		}
		if len(seen) != 2 {
			t.Errorf("twenty of them went to %v", seen)
		}
	}
	run("header", mesh.HashKey{Header: "x-user"}, func(t *testing.T, c *testClient) {
		differ(t, func(i int) string { return same(t, c, "/", fmt.Sprint("X-User: ", i)) })
	})
	run("query", mesh.HashKey{Query: "u"}, func(t *testing.T, c *testClient) {
		differ(t, func(i int) string { return same(t, c, fmt.Sprint("/?x&u=", i)) })
	})
	run("source address", mesh.HashKey{SourceIP: true}, func(t *testing.T, c *testClient) { same(t, c, "/") })
	run("cookie", mesh.HashKey{Cookie: &mesh.HashCookie{Name: "u", Path: "/p", Generate: true, TTL: mesh.Duration(time.Second),
		Attributes: []mesh.HeaderPair{{Name: "SameSite", Value: "Strict"}, {Name: "Secure"}}}}, func(t *testing.T, c *testClient) {
		differ(t, func(i int) string { return same(t, c, "/", fmt.Sprintf("Cookie: u=%d", i)) })
		r, _ := c.get("/")
		value, rest, _ := strings.Cut(r.Header.Get("Set-Cookie"), ";")
		if rest != " Max-Age=1; Path=/p; SameSite=Strict; Secure; HttpOnly" {
			t.Errorf("cookie %q", r.Header.Get("Set-Cookie"))
		}
		if got := same(t, c, "/", "Cookie: "+value); got != r.Header.Get("X-Backend") {
			t.Error("the cookie that was made leads elsewhere")
		}
	})
}

func TestRequestsAreAuthorized(t *testing.T) {
	exact := func(s string) []mesh.StringMatch { return []mesh.StringMatch{{Kind: mesh.MatchExact, Value: s}} }
	prefix := func(s string) []mesh.StringMatch { return []mesh.StringMatch{{Kind: mesh.MatchPrefix, Value: s}} }
	policy := func(a mesh.Action, m mesh.Match) *mesh.Policy {
		return &mesh.Policy{Name: mesh.Name{Namespace: "shop", Name: "p"}, Scope: mesh.ScopeTarget, Action: a,
			Targets: []mesh.Target{{Service: cart}}, Groups: []mesh.Group{{Clauses: []mesh.Clause{{Matches: []mesh.Match{m}}}}}}
	}
	for _, tc := range []struct {
		name   string
		policy *mesh.Policy
		path   string
		lines  []string
		want   int
	}{
		{"allowed by method and peer", policy(mesh.Allow, mesh.Match{Methods: exact("GET"), Namespaces: exact("web")}), "/", nil, 200},
		{"not allowed", policy(mesh.Allow, mesh.Match{Methods: exact("PUT")}), "/", nil, 403},
		{"denied by path", policy(mesh.Deny, mesh.Match{Paths: prefix("/admin")}), "/admin/x", nil, 403},
		{"another path", policy(mesh.Deny, mesh.Match{Paths: prefix("/admin")}), "/public", nil, 200},
		{"way round: slashes", policy(mesh.Deny, mesh.Match{Paths: prefix("/admin")}), "//admin/x", nil, 403},
		{"way round: dots", policy(mesh.Deny, mesh.Match{Paths: prefix("/admin")}), "/public/../admin", nil, 403},
		{"way round: encoded letters", policy(mesh.Deny, mesh.Match{Paths: prefix("/admin")}), "/%61dmin", nil, 403},
		{"way round: encoded slash", policy(mesh.Deny, mesh.Match{Paths: prefix("/admin/")}), "/admin%2fx", nil, 403},
		{"way round: encoded slash and dots", policy(mesh.Deny, mesh.Match{Paths: prefix("/admin")}), "/public%2f..%2fadmin", nil, 400},
		{"way in: encoded slash", policy(mesh.Allow, mesh.Match{Paths: exact("/a%2Fb")}), "/a%2fb", nil, 403},
		{"denied by host in another case", policy(mesh.Deny, mesh.Match{Hosts: exact("CART")}), "/", nil, 403},
		{"denied by a field sent twice", policy(mesh.Deny, mesh.Match{Headers: []mesh.HeaderMatch{{Name: "x-role", Values: exact("evil")}}}), "/", []string{"X-Role: good", "X-Role: evil"}, 403},
		{"what a client says of its address is not believed", policy(mesh.Allow, mesh.Match{RemoteIPs: []netip.Prefix{netip.MustParsePrefix("1.2.3.4/32")}}), "/", []string{"X-Forwarded-For: 1.2.3.4"}, 403},
		{"its own address is", policy(mesh.Allow, mesh.Match{RemoteIPs: []netip.Prefix{netip.MustParsePrefix("10.0.9.9/32")}}), "/", nil, 200},
		{"a policy nobody could read", &mesh.Policy{Name: mesh.Name{Namespace: "shop", Name: "p"}, Scope: mesh.ScopeTarget, Targets: []mesh.Target{{Service: cart}}}, "/", nil, 403},
		{"dry run", func() *mesh.Policy {
			p := policy(mesh.Deny, mesh.Match{Methods: exact("GET")})
			p.DryRun = true
			return p
		}(), "/", nil, 200},
	} {
		inWorld(t, tc.name, func(t *testing.T, w *world) {
			v := w.store.Load()
			var ws []*mesh.Workload
			var ss []*mesh.Service
			for x := range v.Workloads() {
				ws = append(ws, x)
			}
			for x := range v.Services() {
				ss = append(ss, x)
			}
			w.store.Set(view.WithL7("2", ws, ss, []*mesh.Policy{tc.policy}, view.L7{}))
			r, b := w.client(80).get(tc.path, tc.lines...)
			if r.StatusCode != tc.want {
				t.Fatalf("got %d %q, want %d", r.StatusCode, b, tc.want)
			}
			if tc.want == 403 && (b != "RBAC: access denied" || w.last().Details != "rbac_access_denied_matched_policy[ns[shop]-policy[p]]" || w.last().Flags != 0) {
				t.Errorf("refused with %q, %q, %v", b, w.last().Details, w.last().Flags)
			}
		})
	}
}

func TestSharesOfWeights(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, mesh.Rule{Backends: []mesh.Backend{{Service: cart, Weight: 90}, {Service: v2, Weight: 10}}})
		w.backend("10.0.0.1:8080", echo("v1"))
		w.backend("10.0.0.2:8080", echo("v1"))
		w.backend("10.0.0.3:8080", echo("v2"))
		c, n := w.client(80), 0
		for range 10_000 {
			if r, _ := c.get("/"); r.Header.Get("X-Backend") == "v2" {
				n++
			}
		}
		if n < 850 || n > 1150 { // 1.5 points, which are five standard deviations
			t.Errorf("%d of 10000 went to a share of 10 %%", n)
		}
	})
}
