package compile

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/weft-mesh/weft/mesh"
)

// httpRoute compiles an HTTPRoute. Host names do not count: a Service is asked
// for by its address.
func (c *routeCompiler) httpRoute(o HTTPRoute) *gatewayRoute {
	r := begin(KindHTTPRoute, mesh.RouteHTTP, o, o.Spec.CommonRouteSpec)
	r.noteHostnames(o.Spec.Hostnames)
	for i, in := range o.Spec.Rules {
		before, path := len(r.found), fmt.Sprintf("spec.rules[%d]", i)
		out := c.httpRule(r, path, in)
		addRule(r, o, i, in.Name, out, before)
	}
	if len(o.Spec.Rules) == 0 {
		addRule(r, o, 0, nil, gatewayRule{}, 0)
	}
	return r
}

// noteHostnames tells that host names are passed over (GEP-1426).
func (r *gatewayRoute) noteHostnames(names []gatewayv1.Hostname) {
	if len(names) > 0 {
		r.notes = append(r.notes, "spec.hostnames does not count for a Service, which is asked for by its address")
	}
}

func (c *routeCompiler) httpRule(r *gatewayRoute, path string, in gatewayv1.HTTPRouteRule) gatewayRule {
	var out gatewayRule
	f := c.filters(r, path+".filters", in.Filters)
	out.Rewrite, out.Redirect, out.Mirrors, out.CORS = f.rewrite, f.redirect, f.mirrors, f.cors
	out.RequestHeaders, out.ResponseHeaders = f.request, f.response
	prefixes := f.prefix
	var perTry mesh.Duration
	if in.Timeouts != nil {
		out.Timeout = r.duration(path+".timeouts.request", in.Timeouts.Request)
		perTry = r.duration(path+".timeouts.backendRequest", in.Timeouts.BackendRequest)
		if out.Timeout > 0 && perTry > out.Timeout {
			r.found.bad(path+".timeouts.backendRequest", "is %v, longer than the whole request's %v", perTry, out.Timeout)
		}
	}
	for i, ref := range in.BackendRefs {
		path := fmt.Sprintf("%s.backendRefs[%d]", path, i)
		b := c.backend(r, path, ref.BackendObjectReference, ref.Weight)
		f := c.filters(r, path+".filters", ref.Filters)
		if f.cors != nil {
			r.found.bad(path+".filters", "has CORS, which is supported for rules only")
		}
		b.Rewrite, b.Redirect, b.Mirrors, b.RequestHeaders, b.ResponseHeaders = f.rewrite, f.redirect, f.mirrors, f.request, f.response
		b.Timeout = perTry
		prefixes = prefixes || f.prefix
		if share(b) {
			out.Backends = append(out.Backends, b)
		}
	}
	if out.Redirect != nil && len(in.BackendRefs) > 0 {
		r.found.bad(path, "has a redirect and backendRefs, which exclude each other")
		r.reason = string(gatewayv1.RouteReasonIncompatibleFilters)
	}
	out.Retry = r.httpRetry(path+".retry", in.Retry)
	out.Session = r.session(path+".sessionPersistence", in.SessionPersistence)
	for i, m := range in.Matches {
		out.matches = append(out.matches, r.httpMatch(fmt.Sprintf("%s.matches[%d]", path, i), m, prefixes))
	}
	if len(in.Matches) == 0 {
		out.matches = []rankedMatch{r.httpMatch(path, gatewayv1.HTTPRouteMatch{}, prefixes)}
	}
	return out
}

// httpMatch compiles one match. Rank: an exact path, then an expression, then
// a prefix, the longer first; then a method, then the number of header fields,
// then of query parameters. prefixes says that a path is needed, because a
// filter replaces what of it matched.
func (r *gatewayRoute) httpMatch(path string, in gatewayv1.HTTPRouteMatch, prefixes bool) rankedMatch {
	var out rankedMatch
	var kind, length, method int
	value := "/"
	if in.Path != nil && in.Path.Value != nil {
		value = *in.Path.Value
	}
	typ := gatewayv1.PathMatchPathPrefix
	if in.Path != nil && in.Path.Type != nil {
		typ = *in.Path.Type
	}
	switch typ {
	case gatewayv1.PathMatchExact:
		kind, out.Path = 2, &mesh.PathMatch{Kind: mesh.PathExact, Value: value}
	case gatewayv1.PathMatchRegularExpression:
		kind = 1
		if r.regex(path+".path.value", value) {
			out.Path = &mesh.PathMatch{Kind: mesh.PathRegex, Value: value}
		}
	case gatewayv1.PathMatchPathPrefix:
		if value = cmp.Or(strings.TrimRight(value, "/"), "/"); value != "/" || prefixes {
			out.Path = &mesh.PathMatch{Kind: mesh.PathSegment, Value: value}
		}
	default:
		r.found.bad(path+".path.type", "is %q, want Exact, PathPrefix or RegularExpression", typ)
	}
	if typ != gatewayv1.PathMatchRegularExpression && !strings.HasPrefix(value, "/") {
		r.found.bad(path+".path.value", "is %q, want a path that begins with a slash", value)
	}
	if prefixes && typ != gatewayv1.PathMatchPathPrefix {
		r.found.bad(path+".path", "is not a PathPrefix, and a filter replaces the prefix that matched (ReplacePrefixMatch)")
	}
	length = len(value)
	if in.Method != nil {
		method = 1
		out.Method = &mesh.TextMatch{Kind: mesh.TextExact, Value: string(*in.Method)}
	}
	for i, h := range in.Headers {
		m := r.fieldMatch(fmt.Sprintf("%s.headers[%d]", path, i), strings.ToLower(string(h.Name)), string(deref(h.Type)), h.Value)
		out.Headers = addField(out.Headers, m)
	}
	for i, q := range in.QueryParams {
		m := r.fieldMatch(fmt.Sprintf("%s.queryParams[%d]", path, i), string(q.Name), string(deref(q.Type)), q.Value)
		out.Query = addField(out.Query, m)
	}
	out.rank = []int{kind, length, method, len(out.Headers), len(out.Query)}
	return out
}

// fieldMatch compiles the match of a header field or query parameter.
func (r *gatewayRoute) fieldMatch(path, name, typ, value string) mesh.FieldMatch {
	out := mesh.FieldMatch{Name: name, TextMatch: mesh.TextMatch{Kind: mesh.TextExact, Value: value}}
	switch typ {
	case "", string(gatewayv1.HeaderMatchExact):
	case string(gatewayv1.HeaderMatchRegularExpression):
		out.Kind = mesh.TextRegex
		r.regex(path+".value", value)
	default:
		r.found.bad(path+".type", "is %q, want Exact or RegularExpression", typ)
	}
	return out
}

// addField adds a match unless there is one of its name: the first counts.
func addField(to []mesh.FieldMatch, m mesh.FieldMatch) []mesh.FieldMatch {
	if slices.ContainsFunc(to, func(h mesh.FieldMatch) bool { return h.Name == m.Name }) {
		return to
	}
	return append(to, m)
}

// gatewayRetry is what a rule that says nothing of retries has: only what has
// not reached an application is tried again.
func gatewayRetry() *mesh.Retry {
	return &mesh.Retry{Attempts: 2, On: []string{"connect-failure", "refused-stream", "unavailable", "cancelled"}}
}

// httpRetry compiles how often a request is tried again. Connections that
// fail count beside the statuses that are named.
func (r *gatewayRoute) httpRetry(path string, in *gatewayv1.HTTPRouteRetry) *mesh.Retry {
	if in == nil {
		return gatewayRetry()
	}
	out := &mesh.Retry{Attempts: 2, On: []string{"connect-failure", "refused-stream", "reset"}}
	if in.Attempts != nil {
		out.Attempts = *in.Attempts
	}
	for i, code := range in.Codes {
		if code < 400 || code > 599 {
			r.found.bad(fmt.Sprintf("%s.codes[%d]", path, i), "is %d, want 400 to 599", code)
		}
		out.Codes = append(out.Codes, int(code))
	}
	if len(out.Codes) > 0 {
		out.On = append(out.On, "retriable-status-codes")
	}
	out.Backoff = r.duration(path+".backoff", in.Backoff)
	if out.Attempts < 0 {
		r.found.bad(path+".attempts", "is %d, want 0 or more", out.Attempts)
	}
	if out.Attempts <= 0 {
		return nil
	}
	return out
}
