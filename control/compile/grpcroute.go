package compile

import (
	"fmt"
	"regexp"
	"strings"

	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/weft-mesh/weft/mesh"
)

// grpcRoute compiles a GRPCRoute to rules for requests: a call is a request
// for the path /service/method.
func (c *routeCompiler) grpcRoute(o GRPCRoute) *gatewayRoute {
	r := begin(KindGRPCRoute, mesh.RouteHTTP, o, o.Spec.CommonRouteSpec)
	r.noteHostnames(o.Spec.Hostnames)
	for i, in := range o.Spec.Rules {
		before, path := len(r.found), fmt.Sprintf("spec.rules[%d]", i)
		out := c.grpcRule(r, path, in)
		addRule(r, o, i, in.Name, out, before)
	}
	if len(o.Spec.Rules) == 0 {
		addRule(r, o, 0, nil, gatewayRule{}, 0)
	}
	return r
}

func (c *routeCompiler) grpcRule(r *gatewayRoute, path string, in gatewayv1.GRPCRouteRule) gatewayRule {
	var out gatewayRule
	f := c.filters(r, path+".filters", httpFilters(in.Filters))
	out.Mirrors, out.RequestHeaders, out.ResponseHeaders = f.mirrors, f.request, f.response
	for i, ref := range in.BackendRefs {
		path := fmt.Sprintf("%s.backendRefs[%d]", path, i)
		b := c.backend(r, path, ref.BackendObjectReference, ref.Weight)
		f := c.filters(r, path+".filters", httpFilters(ref.Filters))
		b.Mirrors, b.RequestHeaders, b.ResponseHeaders = f.mirrors, f.request, f.response
		if share(b) {
			out.Backends = append(out.Backends, b)
		}
	}
	out.Retry = gatewayRetry()
	out.Session = r.session(path+".sessionPersistence", in.SessionPersistence)
	for i, m := range in.Matches {
		out.matches = append(out.matches, r.grpcMatch(fmt.Sprintf("%s.matches[%d]", path, i), m))
	}
	return out
}

// grpcMatch compiles one match. Rank: the longer service, then the longer
// method, then the number of header fields.
func (r *gatewayRoute) grpcMatch(path string, in gatewayv1.GRPCRouteMatch) rankedMatch {
	var out rankedMatch
	var service, method string
	if m := in.Method; m != nil {
		service, method = deref(m.Service), deref(m.Method)
		typ := gatewayv1.GRPCMethodMatchExact
		if m.Type != nil {
			typ = *m.Type
		}
		switch {
		case typ == gatewayv1.GRPCMethodMatchRegularExpression:
			okService := service == "" || r.regex(path+".method.service", service)
			okMethod := method == "" || r.regex(path+".method.method", method)
			if okService && okMethod {
				out.Path = callPath(service, method, func(s string) string { return "(?:" + s + ")" })
			}
		case typ == gatewayv1.GRPCMethodMatchExact && service != "" && method != "":
			out.Path = &mesh.PathMatch{Kind: mesh.PathExact, Value: "/" + service + "/" + method}
		case typ == gatewayv1.GRPCMethodMatchExact && service != "":
			out.Path = &mesh.PathMatch{Kind: mesh.PathPrefix, Value: "/" + service + "/"}
		case typ == gatewayv1.GRPCMethodMatchExact:
			out.Path = callPath("", method, regexp.QuoteMeta)
		default:
			r.found.bad(path+".method.type", "is %q, want Exact or RegularExpression", typ)
		}
		if service == "" && method == "" {
			r.found.bad(path+".method", "has neither service nor method")
		}
	}
	for i, h := range in.Headers {
		m := r.fieldMatch(fmt.Sprintf("%s.headers[%d]", path, i), strings.ToLower(string(h.Name)), string(deref(h.Type)), h.Value)
		out.Headers = addField(out.Headers, m)
	}
	out.rank = []int{len(service), len(method), len(out.Headers)}
	return out
}

// callPath is the expression for calls of a service and method, each as quote
// writes it. An empty one is any.
func callPath(service, method string, quote func(string) string) *mesh.PathMatch {
	part := func(s string) string {
		if s == "" {
			return "[^/]+"
		}
		return quote(s)
	}
	return &mesh.PathMatch{Kind: mesh.PathRegex, Value: "/" + part(service) + "/" + part(method)}
}

// httpFilters writes the filters of a GRPCRoute as those of an HTTPRoute.
func httpFilters(in []gatewayv1.GRPCRouteFilter) []gatewayv1.HTTPRouteFilter {
	var out []gatewayv1.HTTPRouteFilter
	for _, f := range in {
		out = append(out, gatewayv1.HTTPRouteFilter{
			Type:                   gatewayv1.HTTPRouteFilterType(f.Type),
			RequestHeaderModifier:  f.RequestHeaderModifier,
			ResponseHeaderModifier: f.ResponseHeaderModifier,
			RequestMirror:          f.RequestMirror,
			ExtensionRef:           f.ExtensionRef,
		})
	}
	return out
}
