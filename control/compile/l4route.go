package compile

import (
	"fmt"
	"strings"

	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/weft-mesh/weft/mesh"
)

// tcpRoute compiles a TCPRoute. It has no matches, so its first rule takes
// every connection.
func (c *routeCompiler) tcpRoute(o TCPRoute) *gatewayRoute {
	r := begin(KindTCPRoute, mesh.RouteTCP, o, o.Spec.CommonRouteSpec)
	for i, in := range o.Spec.Rules {
		before := len(r.found)
		out := c.l4Rule(r, fmt.Sprintf("spec.rules[%d]", i), in.BackendRefs)
		addRule(r, o, i, in.Name, out, before)
	}
	if len(o.Spec.Rules) == 0 {
		addRule(r, o, 0, nil, gatewayRule{}, 0)
	}
	return r
}

// tlsRoute compiles a TLSRoute. Its host names are the server names that its
// rules are for: the longer first, and one without a wildcard before one with.
func (c *routeCompiler) tlsRoute(o TLSRoute) *gatewayRoute {
	r := begin(KindTLSRoute, mesh.RouteTLS, o, o.Spec.CommonRouteSpec)
	for i, in := range o.Spec.Rules {
		before := len(r.found)
		out := c.l4Rule(r, fmt.Sprintf("spec.rules[%d]", i), in.BackendRefs)
		for _, h := range o.Spec.Hostnames {
			name := strings.ToLower(string(h))
			exact := 1
			if strings.HasPrefix(name, "*") {
				exact = 0
			}
			out.matches = append(out.matches, rankedMatch{mesh.RequestMatch{SNI: []string{name}}, []int{exact, len(name)}})
		}
		addRule(r, o, i, in.Name, out, before)
	}
	if len(o.Spec.Rules) == 0 {
		addRule(r, o, 0, nil, gatewayRule{}, 0)
	}
	return r
}

func (c *routeCompiler) l4Rule(r *gatewayRoute, path string, refs []gatewayv1.BackendRef) gatewayRule {
	var out gatewayRule
	for i, ref := range refs {
		b := c.backend(r, fmt.Sprintf("%s.backendRefs[%d]", path, i), ref.BackendObjectReference, ref.Weight)
		if share(b) {
			out.Backends = append(out.Backends, b)
		}
	}
	return out
}
