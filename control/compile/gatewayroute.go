package compile

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/weft-mesh/weft/mesh"
)

// A gatewayRoute is a route of the Gateway API on its way to rules: what it
// says, before it is known where.
type gatewayRoute struct {
	kind     string
	meta     Meta
	parents  []gatewayv1.ParentReference
	protocol mesh.RouteProtocol
	rules    []gatewayRule
	found    findings
	missing  []missingRef
	notes    []string // what is valid and does nothing
	reason   string   // why it is not accepted, if a reason of its own says it
}

// A gatewayRule is one rule, and the matches by which it is reached, each with
// its rank. It has at least one match.
type gatewayRule struct {
	mesh.Rule
	matches []rankedMatch
}

// A rankedMatch is a match and what makes it more specific than others: the
// numbers are compared from the first, and the higher goes before.
type rankedMatch struct {
	mesh.RequestMatch
	rank []int
}

// A missingRef is a reference that leads nowhere, and the reason that the
// Gateway API has for it.
type missingRef struct{ reason, message string }

// An attachment is a route at one port of one service.
type attachment struct {
	*gatewayRoute
	consumer string // the namespace whose clients it is for; "" is all
}

// compileGatewayRoutes adds the rules of the routes of the Gateway API.
func (w *World) compileGatewayRoutes(in Inputs) {
	c := &routeCompiler{settings: w.settings, services: kubeServices(in.Services), grants: readGrants(in.ReferenceGrants), byHost: w.serviceByHost, origins: w.origins}
	var routes []*gatewayRoute
	for _, r := range oldestFirst(in.GRPCRoutes) {
		routes = append(routes, c.grpcRoute(r))
	}
	for _, r := range oldestFirst(in.HTTPRoutes) {
		routes = append(routes, c.httpRoute(r))
	}
	for _, r := range oldestFirst(in.TLSRoutes) {
		routes = append(routes, c.tlsRoute(r))
	}
	for _, r := range oldestFirst(in.TCPRoutes) {
		routes = append(routes, c.tcpRoute(r))
	}
	attached := map[mesh.RouteKey][]attachment{}
	for _, r := range routes {
		w.attach(r, c.services, attached)
	}
	for key, as := range attached {
		d := w.draft(key)
		d.gateway = append(d.gateway, orderRules(key, as)...)
	}
}

// attach files a route at the ports of its parents, and reports what became of
// it at each.
func (w *World) attach(r *gatewayRoute, services map[mesh.Name]*corev1.Service, attached map[mesh.RouteKey][]attachment) {
	out := Status{Kind: r.kind, Name: r.meta.Name, Generation: r.meta.Generation}
	for _, ref := range r.parents {
		parent := mesh.Name{Namespace: cmp.Or(string(deref(ref.Namespace)), r.meta.Name.Namespace), Name: string(ref.Name)}
		kind, group := string(deref(ref.Kind)), groupGateway
		if ref.Group != nil {
			group = string(*ref.Group)
		}
		switch {
		case kind == "Service" && group == "":
			name := w.settings.serviceName(parent.Namespace, parent.Name)
			ports, why := parentPorts(services[parent], "Service "+parent.String(), ref)
			if why == "" {
				r.attachTo(name, parent.Namespace, ports, attached)
			}
			out.Parents = append(out.Parents, ParentStatus{ref, r.conditions(why, w.programmed(name, "Service "+parent.String()))})
		case kind == KindServiceEntry && group == groupNetworking:
			out.Parents = append(out.Parents, ParentStatus{ref, w.attachToEntry(r, parent, ref, attached)})
		case (kind == "" || kind == "Gateway") && group == groupGateway && w.waypoints[parent] != nil:
			out.Parents = append(out.Parents, ParentStatus{ref, []Condition{
				{Type: Accepted, Reason: string(gatewayv1.RouteReasonNotAllowedByListeners),
					Message: "a waypoint takes no routes: name the Service whose requests it is for in spec.parentRefs, with group \"\" and kind Service"},
				r.resolved(),
			}})
		}
	}
	if len(out.Parents) > 0 {
		w.Statuses = append(w.Statuses, out)
	}
}

// attachToEntry files a route at the ports of all hosts of a ServiceEntry.
func (w *World) attachToEntry(r *gatewayRoute, parent mesh.Name, ref gatewayv1.ParentReference, attached map[mesh.RouteKey][]attachment) []Condition {
	what := KindServiceEntry + " " + parent.String()
	e := w.entries[parent]
	if e == nil || len(e.services) == 0 {
		return r.conditions("there is no "+what+" with a host to attach to", Condition{})
	}
	ports, why := parentPorts(e.object(), what, ref)
	if why == "" {
		for _, s := range e.services {
			r.attachTo(s, parent.Namespace, ports, attached)
		}
	}
	return r.conditions(why, w.programmed(e.services[0], what))
}

// parentPorts returns the ports of a service that a parentRef means, or why
// there is none. what is the service's kind and name.
func parentPorts(s *corev1.Service, what string, ref gatewayv1.ParentReference) (ports []uint16, why string) {
	if s == nil {
		return nil, fmt.Sprintf("there is no %s to attach to", what)
	}
	section := string(deref(ref.SectionName))
	for _, p := range tcpPorts(s) {
		if (ref.Port == nil || *ref.Port == p.Port) && (section == "" || section == p.Name) {
			ports = append(ports, uint16(p.Port))
		}
	}
	switch {
	case len(ports) > 0:
		return ports, ""
	case ref.Port != nil && section != "":
		why = fmt.Sprintf("with number %d and name %q", *ref.Port, section)
	case ref.Port != nil:
		why = fmt.Sprintf("with number %d", *ref.Port)
	case section != "":
		why = fmt.Sprintf("with name %q", section)
	}
	return nil, strings.TrimSpace(fmt.Sprintf("%s has no TCP port %s", what, why))
}

// attachTo files the route once at each of the ports. From another namespace
// than the service's it counts for clients of its own namespace only.
func (r *gatewayRoute) attachTo(service mesh.ServiceName, namespace string, ports []uint16, attached map[mesh.RouteKey][]attachment) {
	a := attachment{gatewayRoute: r}
	if r.meta.Name.Namespace != namespace {
		a.consumer = r.meta.Name.Namespace
	}
	for _, port := range ports {
		key := mesh.RouteKey{Service: service, Port: port, Protocol: r.protocol}
		if !slices.ContainsFunc(attached[key], func(b attachment) bool { return b.gatewayRoute == r }) {
			attached[key] = append(attached[key], a)
		}
	}
}

// programmed says whether there is a proxy that follows the routes of a
// service.
func (w *World) programmed(service mesh.ServiceName, what string) Condition {
	if w.serviceNamed(service) == nil {
		return Condition{}
	}
	b, ok := w.bound[service]
	if !ok {
		return Condition{Type: Programmed, Reason: reasonNoWaypoint,
			Message: fmt.Sprintf("%s is not bound to a waypoint, so nothing follows the route; label it or its namespace with %s", what, labelUseWaypoint)}
	}
	if wp := w.waypoints[b.gateway]; wp == nil || !wp.usable() || b.ref.IsZero() {
		return Condition{Type: Programmed, Reason: reasonNoWaypoint, Message: fmt.Sprintf("waypoint %s is not ready", b.gateway)}
	}
	return Condition{Type: Programmed, OK: true, Reason: "Programmed", Message: "followed by waypoint " + b.gateway.String()}
}

// conditions reports what became of the route at a parent.
func (r *gatewayRoute) conditions(why string, programmed Condition) []Condition {
	bad := r.found.of(SeverityError)
	accepted := Condition{Type: Accepted, OK: true, Reason: reasonAccepted, Message: "attached"}
	if len(r.notes) > 0 {
		accepted.Message += ", but " + listed(r.notes)
	}
	broken := 0
	for _, rule := range r.rules {
		if rule.Broken != "" {
			broken++
		}
	}
	partial := broken > 0 && broken < len(r.rules)
	switch {
	case why != "":
		accepted = Condition{Type: Accepted, Reason: string(gatewayv1.RouteReasonNoMatchingParent), Message: why}
		partial = false
	case len(bad) > 0 && !partial:
		accepted = Condition{Type: Accepted, Reason: cmp.Or(r.reason, string(gatewayv1.RouteReasonUnsupportedValue)),
			Message: "what the route matches is answered with 500: " + listed(bad)}
	}
	out := []Condition{accepted, r.resolved()}
	if partial {
		out = append(out, Condition{Type: PartiallyInvalid, OK: true, Reason: cmp.Or(r.reason, string(gatewayv1.RouteReasonUnsupportedValue)),
			Message: fmt.Sprintf("%d of %d rules answer with 500: %s", broken, len(r.rules), listed(bad))})
	}
	if programmed.Type != "" && accepted.OK {
		out = append(out, programmed)
	}
	return out
}

// resolved reports whether what the route refers to is there.
func (r *gatewayRoute) resolved() Condition {
	if len(r.missing) == 0 {
		return Condition{Type: ResolvedRefs, OK: true, Reason: string(gatewayv1.RouteReasonResolvedRefs), Message: "everything that the route names is there"}
	}
	var all []string
	for _, m := range r.missing {
		all = append(all, m.message)
	}
	return Condition{Type: ResolvedRefs, Reason: r.missing[0].reason, Message: listed(all)}
}

// An orderedRule is one match of one rule, with all that decides its place.
type orderedRule struct {
	attachment
	age   int // place of the route among all, the oldest first
	rule  int
	match rankedMatch
}

// orderRules puts the rules of all routes of one service and port in order of
// precedence: those for clients of one namespace first, then gRPC before HTTP,
// then by what the Gateway API says of the kind, the oldest route and its first
// rule winning ties.
func orderRules(key mesh.RouteKey, as []attachment) []mesh.Rule {
	var all []orderedRule
	for age, a := range as {
		for i, r := range a.rules {
			for _, m := range r.matches {
				if a.consumer != "" {
					m.SourceNamespaces = []string{a.consumer}
				}
				all = append(all, orderedRule{a, age, i, m})
			}
		}
	}
	slices.SortStableFunc(all, func(a, b orderedRule) int {
		return cmp.Or(
			compareConsumer(a.consumer, b.consumer),
			cmp.Compare(kindOrder(a.kind), kindOrder(b.kind)),
			slices.Compare(b.match.rank, a.match.rank),
			cmp.Compare(a.age, b.age),
			cmp.Compare(a.rule, b.rule),
		)
	})
	var out []mesh.Rule
	for i, o := range all {
		if i > 0 && all[i-1].gatewayRoute == o.gatewayRoute && all[i-1].rule == o.rule {
			last := &out[len(out)-1]
			last.Matches = append(last.Matches, o.match.RequestMatch)
		} else {
			r := o.rules[o.rule].Rule
			r.Matches = []mesh.RequestMatch{o.match.RequestMatch}
			out = append(out, r)
		}
		if o.consumer != "" && (i+1 == len(all) || all[i+1].consumer != o.consumer) {
			out = endConsumer(out, key.Protocol, o)
		}
	}
	for i := range out {
		out[i].Matches = simplest(out[i].Matches)
	}
	return out
}

// compareConsumer orders routes for one namespace before those for all.
func compareConsumer(a, b string) int {
	if (a == "") != (b == "") {
		return strings.Compare(b, a)
	}
	return strings.Compare(a, b)
}

// kindOrder is which kind of route counts where both are attached: the more
// specific.
func kindOrder(kind string) int {
	return slices.Index([]string{KindGRPCRoute, KindHTTPRoute, KindTLSRoute, KindTCPRoute}, kind)
}

// endConsumer ends the rules for clients of one namespace: where it has routes
// of its own for a service, the rest do not count for it.
func endConsumer(rules []mesh.Rule, p mesh.RouteProtocol, o orderedRule) []mesh.Rule {
	if len(simplest([]mesh.RequestMatch{{Path: o.match.Path, Method: o.match.Method, Headers: o.match.Headers, Query: o.match.Query, SNI: o.match.SNI}})) == 0 {
		return rules // the last of them matches everything
	}
	end := mesh.Rule{From: o.rules[o.rule].From, Matches: []mesh.RequestMatch{{SourceNamespaces: []string{o.consumer}}}}
	if p == mesh.RouteHTTP {
		end.Direct = &mesh.DirectResponse{Status: 404}
	}
	return append(rules, end) // a connection has nowhere to go, and is closed
}

// simplest returns no matches if one of them holds always.
func simplest(ms []mesh.RequestMatch) []mesh.RequestMatch {
	for _, m := range ms {
		if m.Path == nil && m.Method == nil && len(m.Headers)+len(m.Query)+len(m.SNI)+len(m.SourceNamespaces) == 0 {
			return nil
		}
	}
	return ms
}
