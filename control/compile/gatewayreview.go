package compile

import (
	"strings"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/weft-mesh/weft/mesh"
)

// reviewGatewayAPI returns what its author should know of one object of the
// Gateway API, without looking at any other: references are taken to lead
// somewhere. It reports false for other objects, and for Gateways and routes
// that other controllers may be meant by.
func reviewGatewayAPI(u *unstructured.Unstructured) ([]Finding, bool) {
	if group, _, _ := strings.Cut(u.GetAPIVersion(), "/"); group != groupGateway {
		return nil, false
	}
	c := &routeCompiler{settings: Settings{}.withDefaults(), offline: true}
	var r *gatewayRoute
	switch u.GetKind() {
	case KindHTTPRoute:
		r = c.httpRoute(ReadHTTPRoute(u))
	case KindGRPCRoute:
		r = c.grpcRoute(ReadGRPCRoute(u))
	case KindTCPRoute:
		r = c.tcpRoute(ReadTCPRoute(u))
	case KindTLSRoute:
		r = c.tlsRoute(ReadTLSRoute(u))
	case KindGateway:
		return reviewGateway(ReadGateway(u))
	case KindBackendTLSPolicy:
		return checkBackendTLS(ReadBackendTLSPolicy(u)), true
	case "ReferenceGrant":
		return unread(ReadReferenceGrant(u).Err), true
	default:
		return nil, false
	}
	ours := false
	for _, p := range r.parents {
		ours = ours || p.Kind != nil && (*p.Kind == KindService || *p.Kind == KindServiceEntry)
	}
	if !ours {
		return nil, false // a gateway's controller has its own opinion
	}
	out := r.found
	for _, m := range r.missing {
		path, message, _ := strings.Cut(m.message, " ")
		out.bad(path, "%s", message)
	}
	for _, n := range r.notes {
		path, message, _ := strings.Cut(n, " ")
		out.warn(path, "%s", message)
	}
	return out, true
}

// reviewGateway reviews a Gateway of the class weft-waypoint.
func reviewGateway(g Gateway) ([]Finding, bool) {
	if g.Spec.GatewayClassName != "weft-waypoint" {
		return nil, false
	}
	w := &World{settings: Settings{}.withDefaults(), waypoints: map[mesh.Name]*waypoint{}}
	wp := w.readWaypoint(g, GatewayClass{})
	var out findings
	if wp.refused != "" {
		out.bad("", "%s", wp.refused)
	}
	if len(g.Spec.Addresses) > 0 {
		out.warn("spec.addresses", "does nothing: a waypoint is reached at its Service")
	}
	return out, true
}

// unread says that an object could not be read.
func unread(err error) []Finding {
	var out findings
	if err != nil {
		out.bad("", "%v", err)
	}
	return out
}
