package compile

import (
	"cmp"
	"strings"

	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/weft-mesh/weft/mesh"
)

// A Status is what the user is told about one of his objects.
type Status struct {
	Kind       string      `json:"kind"`
	Name       mesh.Name   `json:"name"`
	Generation int64       `json:"generation,omitempty"` // of the object that was compiled
	Conditions []Condition `json:"conditions,omitempty"`
	// Parents are the results of a route at each parent that is ours, and of a
	// policy at each of its targets. Entries of other controllers in the
	// object's status are not ours to touch.
	Parents []ParentStatus `json:"parents,omitempty"`
	// Addresses and Listeners are of a Gateway.
	Addresses []string         `json:"addresses,omitempty"`
	Listeners []ListenerStatus `json:"listeners,omitempty"`
	// HostAddresses are those given to the hosts of a ServiceEntry.
	HostAddresses []HostAddress `json:"hostAddresses,omitempty"`
}

// A ParentStatus says what became of a route or policy at one place. It is
// written to status.parents of routes, and to status.ancestors of policies.
type ParentStatus struct {
	Parent     gatewayv1.ParentReference `json:"parent"`
	Conditions []Condition               `json:"conditions"`
}

// A ListenerStatus says what became of one listener of a Gateway. A waypoint's
// takes no kind of route: those are attached to Services.
type ListenerStatus struct {
	Name           string      `json:"name"`
	AttachedRoutes int32       `json:"attachedRoutes"` // services that are bound to the waypoint
	Conditions     []Condition `json:"conditions"`
}

// A Condition is one fact of a Status.
type Condition struct {
	Type    string `json:"type"`
	OK      bool   `json:"ok"` // written as "True" or "False"
	Reason  string `json:"reason"`
	Message string `json:"message"`
}

// The condition types.
const (
	// ZtunnelAccepted is true when the object is enforced by ztunnel exactly
	// as it is written.
	ZtunnelAccepted = "ZtunnelAccepted"
	// WaypointAccepted is true when the object is enforced by a waypoint.
	WaypointAccepted = "WaypointAccepted"
	// Accepted is true when the object is valid and is meant exactly as it is
	// written.
	Accepted = "Accepted"
	// ResolvedRefs is true when everything exists that the object names.
	ResolvedRefs = "ResolvedRefs"
	// Programmed is true when there are waypoints that follow the object.
	Programmed = "Programmed"
	// PartiallyInvalid is true when some rules of a route are valid and others
	// answer 500.
	PartiallyInvalid = "PartiallyInvalid"
	// WaypointBound is true when the traffic to a service goes through the
	// waypoint that its labels name.
	WaypointBound = "istio.io/WaypointBound"
)

// The reasons.
const (
	reasonAccepted    = "Accepted"
	reasonUnsupported = "UnsupportedValue" // understood, but not enforced as written
	reasonInvalid     = "Invalid"          // not understood; the safe reading is enforced
	reasonConflicted  = "Conflicted"       // an older object wins
	reasonNoWaypoint  = "NoWaypoint"       // meant for a proxy that is not there
	reasonResolved    = "ResolvedRefs"
	reasonNotFound    = "NotFound"   // it names what does not exist
	reasonProgrammed  = "Programmed" // proxies follow it
	reasonDelegate    = "Delegate"   // others have taken it in
	reasonNoMesh      = "NotForMesh" // it is for Gateways only
	reasonNotAllowed  = "NotAllowed" // it names what it may not change
	reasonOverridden  = "Overridden" // another object is in its place
)

// The kinds of objects that get a Status.
const (
	KindAuthorizationPolicy = "AuthorizationPolicy"
	KindPeerAuthentication  = "PeerAuthentication"
	KindVirtualService      = "VirtualService"
	KindDestinationRule     = "DestinationRule"
	KindServiceEntry        = "ServiceEntry"
	KindWorkloadEntry       = "WorkloadEntry"
	KindService             = "Service"
	KindGatewayClass        = "GatewayClass" // its Name has no namespace
	KindGateway             = "Gateway"
	KindHTTPRoute           = "HTTPRoute"
	KindGRPCRoute           = "GRPCRoute"
	KindTCPRoute            = "TCPRoute"
	KindTLSRoute            = "TLSRoute"
	KindBackendTLSPolicy    = "BackendTLSPolicy"
)

func compareStatus(a, b Status) int {
	return cmp.Or(strings.Compare(a.Kind, b.Kind), a.Name.Compare(b.Name))
}
