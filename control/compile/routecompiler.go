package compile

import (
	"cmp"
	"fmt"
	"math"
	"regexp"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/weft-mesh/weft/mesh"
)

// A routeCompiler compiles routes of the Gateway API.
type routeCompiler struct {
	settings Settings
	services map[mesh.Name]*corev1.Service
	grants   grants
	byHost   func(h mesh.Host, namespace string) *mesh.Service
	origins  map[mesh.ServiceName]origin
	// offline: only the object itself is known, and what it refers to is taken
	// to be there.
	offline bool
}

// begin returns a route with nothing in it but what all kinds have.
func begin[S any](kind string, p mesh.RouteProtocol, o Object[S], common gatewayv1.CommonRouteSpec) *gatewayRoute {
	r := &gatewayRoute{kind: kind, meta: o.Meta, parents: common.ParentRefs, protocol: p}
	if o.Err != nil && len(o.RuleErrs) == 0 {
		r.found.bad("", "%v", o.Err)
	}
	if common.UseDefaultGateways != "" {
		r.notes = append(r.notes, "spec.useDefaultGateways is not supported: there are no default Gateways")
	}
	return r
}

// addRule appends a rule. What was found since before is what is wrong with it: it
// is answered with 500 then.
func addRule[S any](r *gatewayRoute, o Object[S], i int, name *gatewayv1.SectionName, rule gatewayRule, before int) {
	rule.From = r.kind + "/" + r.meta.Name.String()
	rule.Name = string(deref(name))
	if err := o.RuleErrs[i]; err != nil {
		r.found.bad(fmt.Sprintf("spec.rules[%d]", i), "cannot be read: %v", err)
	}
	if o.Blind[i] {
		// A match that is not understood may be for anything, and before all.
		rule.matches = []rankedMatch{{rank: []int{math.MaxInt}}}
	}
	if o.Err != nil && len(o.RuleErrs) == 0 {
		rule.Broken = o.Err.Error()
	}
	if bad := r.found[before:].of(SeverityError); len(bad) > 0 {
		rule.Broken = listed(bad)
	}
	if len(rule.matches) == 0 {
		rule.matches = []rankedMatch{{}}
	}
	if rule.Broken != "" {
		rule.Rule = mesh.Rule{Name: rule.Name, From: rule.From, Broken: rule.Broken}
	}
	r.rules = append(r.rules, rule)
}

// backend resolves a reference to a service.
func (c *routeCompiler) backend(r *gatewayRoute, path string, ref gatewayv1.BackendObjectReference, weight *int32) mesh.Backend {
	out := mesh.Backend{Weight: 1}
	if weight != nil {
		out.Weight = uint32(max(*weight, 0))
	}
	lost := func(reason gatewayv1.RouteConditionReason, format string, args ...any) mesh.Backend {
		why := path + " " + fmt.Sprintf(format, args...)
		r.missing = append(r.missing, missingRef{string(reason), why})
		out.Unroutable, out.Status = why, 500
		return out
	}
	kind := cmp.Or(string(deref(ref.Kind)), "Service")
	if kind == "Hostname" && string(deref(ref.Group)) == groupNetworking {
		return c.hostBackend(r, ref, out, lost)
	}
	if group := string(deref(ref.Group)); kind != "Service" || group != "" {
		return lost(gatewayv1.RouteReasonInvalidKind, "is of kind %q of group %q, want a Service of group \"\", or a Hostname of group %s", kind, group, groupNetworking)
	}
	name := mesh.Name{Namespace: cmp.Or(string(deref(ref.Namespace)), r.meta.Name.Namespace), Name: string(ref.Name)}
	out.Service = c.settings.serviceName(name.Namespace, name.Name)
	port := deref(ref.Port)
	if !validPort(port) {
		return lost(gatewayv1.RouteReasonUnsupportedValue, "has no port, and a Service needs one")
	}
	out.Port = uint16(port)
	if c.offline {
		return out
	}
	if !r.hasParent(name) && !c.grants.permit(r.kind, r.meta.Name.Namespace, name) {
		out.Service, out.Port = mesh.ServiceName{}, 0
		return lost(gatewayv1.RouteReasonRefNotPermitted, "is in namespace %s, and no ReferenceGrant there allows %s objects of namespace %s to name Service %s",
			name.Namespace, r.kind, r.meta.Name.Namespace, name.Name)
	}
	s := c.services[name]
	if s == nil {
		return lost(gatewayv1.RouteReasonBackendNotFound, "is Service %s, which does not exist", name)
	}
	if !slices.ContainsFunc(tcpPorts(s), func(p corev1.ServicePort) bool { return p.Port == port }) {
		return lost(gatewayv1.RouteReasonBackendNotFound, "is port %d of Service %s, which has no such TCP port", port, name)
	}
	return out
}

// hostBackend resolves a reference by host name.
func (c *routeCompiler) hostBackend(r *gatewayRoute, ref gatewayv1.BackendObjectReference, out mesh.Backend, lost func(gatewayv1.RouteConditionReason, string, ...any) mesh.Backend) mesh.Backend {
	namespace, port := r.meta.Name.Namespace, deref(ref.Port)
	switch why := badHost(string(ref.Name), false); {
	case why != "":
		return lost(gatewayv1.RouteReasonUnsupportedValue, "is Hostname %q, %s", ref.Name, why)
	case ref.Namespace != nil:
		return lost(gatewayv1.RouteReasonUnsupportedValue, "is a Hostname with a namespace, and a host has none")
	case !validPort(port):
		return lost(gatewayv1.RouteReasonUnsupportedValue, "has no port, and a Hostname needs one")
	}
	out.Port = uint16(port)
	host := c.settings.fullHost(string(ref.Name), namespace)
	if c.offline {
		out.Service = mesh.ServiceName{Namespace: namespace, Host: host}
		return out
	}
	s := c.byHost(host, namespace)
	if s == nil {
		return lost(gatewayv1.RouteReasonBackendNotFound, "is Hostname %s, and no Service and no ServiceEntry has that name", host)
	}
	// By its host a Service is as much another namespace's as by its name.
	if of := c.origins[s.Name]; of.kind == KindService && !r.hasParent(of.name) && !c.grants.permit(r.kind, namespace, of.name) {
		out.Port = 0
		return lost(gatewayv1.RouteReasonRefNotPermitted, "is of namespace %s, and no ReferenceGrant there allows %s objects of namespace %s to name Service %s",
			of.name.Namespace, r.kind, namespace, of.name.Name)
	}
	if !slices.ContainsFunc(s.Ports, func(p mesh.Port) bool { return p.Service == out.Port }) {
		return lost(gatewayv1.RouteReasonBackendNotFound, "is port %d of %s, which has no such TCP port", port, host)
	}
	out.Service = s.Name
	return out
}

// hasParent reports whether the route is attached to the service. Its clients
// send there already, so that needs no permission.
func (r *gatewayRoute) hasParent(service mesh.Name) bool {
	return slices.ContainsFunc(r.parents, func(p gatewayv1.ParentReference) bool {
		return p.Kind != nil && *p.Kind == "Service" && deref(p.Group) == "" && string(p.Name) == service.Name &&
			cmp.Or(string(deref(p.Namespace)), r.meta.Name.Namespace) == service.Namespace
	})
}

// share reports whether a backend gets any requests. One without a share is
// left out: what is left is what the shares are of.
func share(b mesh.Backend) bool { return b.Weight > 0 }

// duration reads a duration as the Gateway API writes it (GEP-2257).
func (r *gatewayRoute) duration(path string, d *gatewayv1.Duration) mesh.Duration {
	if d == nil {
		return 0
	}
	v, err := time.ParseDuration(string(*d))
	if err != nil || v < 0 {
		r.found.bad(path, "is %q, want a duration such as 1s or 500ms", *d)
	}
	return mesh.Duration(v)
}

// regex checks an expression, and reports whether it can be followed.
func (r *gatewayRoute) regex(path, expr string) bool {
	if _, err := regexp.Compile(expr); err != nil {
		r.found.bad(path, "is not an RE2 expression: %v", err)
		return false
	}
	return true
}

// session reads what keeps the requests of one session together.
func (r *gatewayRoute) session(path string, s *gatewayv1.SessionPersistence) *mesh.Session {
	if s == nil {
		return nil
	}
	name := cmp.Or(deref(s.SessionName), "weft-session")
	timeout := r.duration(path+".absoluteTimeout", s.AbsoluteTimeout)
	switch t := cmp.Or(deref(s.Type), gatewayv1.CookieBasedSessionPersistence); t {
	case gatewayv1.CookieBasedSessionPersistence:
		out := &mesh.Session{Cookie: name, Path: "/"}
		permanent := s.CookieConfig != nil && deref(s.CookieConfig.LifetimeType) == gatewayv1.PermanentCookieLifetimeType
		switch {
		case permanent && timeout == 0:
			r.found.bad(path, "has a permanent cookie without absoluteTimeout")
		case permanent:
			out.Lifetime = timeout
		case timeout > 0:
			r.notes = append(r.notes, path+".absoluteTimeout does nothing for a cookie that ends with the browser")
		}
		return out
	case gatewayv1.HeaderBasedSessionPersistence:
		if timeout > 0 {
			r.notes = append(r.notes, path+".absoluteTimeout does nothing for a header")
		}
		return &mesh.Session{Header: strings.ToLower(name)}
	default:
		r.found.bad(path+".type", "is %q, want Cookie or Header", t)
		return nil
	}
}
