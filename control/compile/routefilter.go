package compile

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/weft-mesh/weft/mesh"
)

// routeFilters are the filters of a rule or of a backend, compiled.
type routeFilters struct {
	request, response mesh.HeaderEdit
	rewrite           *mesh.Rewrite
	redirect          *mesh.Redirect
	mirrors           []mesh.Mirror
	cors              *mesh.CORS
	prefix            bool // something replaces the prefix that matched
}

// filters compiles a list of filters. One that cannot be followed breaks the
// rule: a request that it was meant for must not pass without it.
func (c *routeCompiler) filters(r *gatewayRoute, path string, in []gatewayv1.HTTPRouteFilter) routeFilters {
	var out routeFilters
	seen := map[gatewayv1.HTTPRouteFilterType]bool{}
	for i, f := range in {
		path := fmt.Sprintf("%s[%d]", path, i)
		if seen[f.Type] && f.Type != gatewayv1.HTTPRouteFilterRequestMirror && f.Type != gatewayv1.HTTPRouteFilterExtensionRef {
			r.found.bad(path, "is a second %s, and there may be one", f.Type)
			r.reason = string(gatewayv1.RouteReasonIncompatibleFilters)
		}
		seen[f.Type] = true
		c.filter(r, path, f, &out)
	}
	if out.redirect != nil && out.rewrite != nil {
		r.found.bad(path, "has RequestRedirect and URLRewrite, which exclude each other")
		r.reason = string(gatewayv1.RouteReasonIncompatibleFilters)
	}
	return out
}

func (c *routeCompiler) filter(r *gatewayRoute, path string, f gatewayv1.HTTPRouteFilter, out *routeFilters) {
	empty := func(field string) { r.found.bad(path, "is of type %s and has no %s", f.Type, field) }
	switch f.Type {
	case gatewayv1.HTTPRouteFilterRequestHeaderModifier:
		if f.RequestHeaderModifier == nil {
			empty("requestHeaderModifier")
			return
		}
		out.request = r.headerEdit(path+".requestHeaderModifier", f.RequestHeaderModifier, true)
	case gatewayv1.HTTPRouteFilterResponseHeaderModifier:
		if f.ResponseHeaderModifier == nil {
			empty("responseHeaderModifier")
			return
		}
		out.response = r.headerEdit(path+".responseHeaderModifier", f.ResponseHeaderModifier, false)
	case gatewayv1.HTTPRouteFilterRequestRedirect:
		if f.RequestRedirect == nil {
			empty("requestRedirect")
			return
		}
		out.redirect = r.redirect(path+".requestRedirect", f.RequestRedirect)
		out.prefix = out.prefix || out.redirect.Prefix != nil
	case gatewayv1.HTTPRouteFilterURLRewrite:
		if f.URLRewrite == nil {
			empty("urlRewrite")
			return
		}
		out.rewrite = &mesh.Rewrite{Authority: r.hostname(path+".urlRewrite.hostname", f.URLRewrite.Hostname)}
		out.rewrite.Path, out.rewrite.Prefix = r.pathModifier(path+".urlRewrite.path", f.URLRewrite.Path, r.found.target)
		out.prefix = out.prefix || out.rewrite.Prefix != nil
	case gatewayv1.HTTPRouteFilterRequestMirror:
		if f.RequestMirror == nil {
			empty("requestMirror")
			return
		}
		if m, ok := c.mirror(r, path+".requestMirror", f.RequestMirror); ok {
			out.mirrors = append(out.mirrors, m)
		}
	case gatewayv1.HTTPRouteFilterCORS:
		if f.CORS == nil {
			empty("cors")
			return
		}
		out.cors = cors(f.CORS)
	case gatewayv1.HTTPRouteFilterExtensionRef:
		r.found.bad(path, "is an ExtensionRef, and Weft has no filters of that kind")
		r.missing = append(r.missing, missingRef{string(gatewayv1.RouteReasonInvalidKind), path + " names a filter of a kind that Weft does not have"})
	default:
		r.found.bad(path+".type", "is %q, which is not supported", f.Type)
	}
}

// headerEdit compiles changes of header fields. The host of a request may be
// set; other fields of framing are passed over.
func (r *gatewayRoute) headerEdit(path string, in *gatewayv1.HTTPHeaderFilter, request bool) mesh.HeaderEdit {
	var out mesh.HeaderEdit
	for i, n := range in.Remove {
		at, name := fmt.Sprintf("%s.remove[%d]", path, i), strings.ToLower(n)
		if !validToken(name) || name == "host" {
			r.found.bad(at, "is %q, which cannot be removed", n)
			continue
		}
		out.Remove = append(out.Remove, name)
	}
	pairs := func(kind string, in []gatewayv1.HTTPHeader) (out []mesh.HeaderPair) {
		for i, h := range in {
			at, name := fmt.Sprintf("%s.%s[%d]", path, kind, i), strings.ToLower(string(h.Name))
			switch {
			case !validToken(name):
				r.found.bad(at+".name", "is %q, want the name of a header", h.Name)
			case name == "host" && (!request || kind == "add"):
				r.found.bad(at+".name", "is Host, of which a request has one, and a response none")
			case name == "host" && !validAuthority(h.Value):
				r.found.bad(at+".value", "is %q, want a host, with a port if need be", h.Value)
			case !validFieldValue(h.Value):
				r.found.bad(at+".value", "is %q, and a header's value has no line ends or control characters", h.Value)
			case slices.Contains(framing, name):
				r.notes = append(r.notes, at+" "+notEdited)
			default:
				out = append(out, mesh.HeaderPair{Name: name, Value: h.Value})
			}
		}
		return out
	}
	out.Set, out.Append = pairs("set", in.Set), pairs("add", in.Add)
	return out
}

// hostname reads the host that requests are sent on, or redirected, with.
func (r *gatewayRoute) hostname(path string, h *gatewayv1.PreciseHostname) string {
	if h != nil && !validAuthority(string(*h)) {
		r.found.bad(path, "is %q, want a host name", *h)
	}
	return string(deref(h))
}

// redirect compiles a redirect. Without a port it takes the well-known one of
// the scheme that it names, or else that of the service.
func (r *gatewayRoute) redirect(path string, in *gatewayv1.HTTPRequestRedirectFilter) *mesh.Redirect {
	out := &mesh.Redirect{Status: 302, Scheme: deref(in.Scheme), Authority: r.hostname(path+".hostname", in.Hostname), DerivePort: "request"}
	if in.StatusCode != nil {
		out.Status = *in.StatusCode
	}
	switch out.Status {
	case 301, 302, 303, 307, 308:
	default:
		r.found.bad(path+".statusCode", "is %d, want 301, 302, 303, 307 or 308", out.Status)
	}
	if out.Scheme != "" {
		out.DerivePort = "scheme"
	}
	if in.Port != nil {
		if !validPort(*in.Port) {
			r.found.bad(path+".port", "is %d, want 1 to 65535", *in.Port)
		}
		out.Port, out.DerivePort = uint16(*in.Port), ""
	}
	out.Path, out.Prefix = r.pathModifier(path+".path", in.Path, r.found.location)
	return out
}

// pathModifier returns the new path, or what replaces the prefix that matched.
func (r *gatewayRoute) pathModifier(path string, in *gatewayv1.HTTPPathModifier, check func(path, s string)) (full, prefix *string) {
	switch {
	case in == nil:
	case in.Type == gatewayv1.FullPathHTTPPathModifier && in.ReplaceFullPath != nil:
		check(path+".replaceFullPath", *in.ReplaceFullPath)
		return in.ReplaceFullPath, nil
	case in.Type == gatewayv1.PrefixMatchHTTPPathModifier && in.ReplacePrefixMatch != nil:
		check(path+".replacePrefixMatch", *in.ReplacePrefixMatch)
		return nil, in.ReplacePrefixMatch
	default:
		r.found.bad(path, "is of type %q, want ReplaceFullPath or ReplacePrefixMatch with the field of that name", in.Type)
	}
	return nil, nil
}

// mirror compiles a mirror. One that leads nowhere is left out, and told.
func (c *routeCompiler) mirror(r *gatewayRoute, path string, in *gatewayv1.HTTPRequestMirrorFilter) (mesh.Mirror, bool) {
	out := mesh.Mirror{PerMillion: 1e6, PlainHost: true}
	switch {
	case in.Percent != nil && in.Fraction != nil:
		r.found.bad(path, "has percent and fraction, which exclude each other")
	case in.Percent != nil && (*in.Percent < 0 || *in.Percent > 100):
		r.found.bad(path+".percent", "is %d, want 0 to 100", *in.Percent)
	case in.Percent != nil:
		out.PerMillion = uint32(*in.Percent) * 1e4
	case in.Fraction != nil:
		of := int32(100)
		if in.Fraction.Denominator != nil {
			of = *in.Fraction.Denominator
		}
		if of <= 0 || in.Fraction.Numerator < 0 || in.Fraction.Numerator > of {
			r.found.bad(path+".fraction", "is %d of %d, want a part of the whole", in.Fraction.Numerator, of)
			break
		}
		out.PerMillion = uint32(int64(in.Fraction.Numerator) * 1e6 / int64(of))
	}
	out.Backend = c.backend(r, path+".backendRef", in.BackendRef, nil)
	return out, out.Backend.Unroutable == ""
}

// cors compiles a policy for scripts of other origins. It answers every
// preflight itself: who may ask is said here, and not by the backend.
func cors(in *gatewayv1.HTTPCORSFilter) *mesh.CORS {
	age := mesh.Duration(5 * time.Second)
	if in.MaxAge > 0 {
		age = mesh.Duration(time.Duration(in.MaxAge) * time.Second)
	}
	out := &mesh.CORS{MaxAge: &age, AllowCredentials: deref(in.AllowCredentials), IgnoreUnmatched: true}
	for _, o := range in.AllowOrigins {
		m := mesh.TextMatch{Kind: mesh.TextExact, Value: string(o)}
		if o != "*" && strings.Contains(string(o), "*") {
			m.Kind = mesh.TextRegex
			m.Value = strings.ReplaceAll(regexp.QuoteMeta(string(o)), `\*`, `[0-9A-Za-z.-]+`)
		}
		out.AllowOrigins = append(out.AllowOrigins, m)
	}
	for _, m := range in.AllowMethods {
		out.AllowMethods = append(out.AllowMethods, string(m))
	}
	for _, h := range in.AllowHeaders {
		out.AllowHeaders = append(out.AllowHeaders, string(h))
	}
	for _, h := range in.ExposeHeaders {
		out.ExposeHeaders = append(out.ExposeHeaders, string(h))
	}
	return out
}
