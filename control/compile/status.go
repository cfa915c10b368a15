package compile

import (
	"cmp"
	"strings"

	"github.com/weft-mesh/weft/mesh"
)

// A Status is what the user is told about one of his objects.
type Status struct {
	Kind       string      `json:"kind"`
	Name       mesh.Name   `json:"name"`
	Generation int64       `json:"generation,omitempty"` // of the object that was compiled
	Conditions []Condition `json:"conditions"`
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
)

// The reasons.
const (
	reasonAccepted    = "Accepted"
	reasonUnsupported = "UnsupportedValue" // understood, but not enforced as written
	reasonInvalid     = "Invalid"          // not understood; the safe reading is enforced
	reasonConflicted  = "Conflicted"       // an older object wins
	reasonNoWaypoint  = "NoWaypoint"       // meant for a proxy that is not there
)

// The kinds of objects that get a Status.
const (
	KindAuthorizationPolicy = "AuthorizationPolicy"
	KindPeerAuthentication  = "PeerAuthentication"
	KindVirtualService      = "VirtualService"
	KindDestinationRule     = "DestinationRule"
)

func compareStatus(a, b Status) int {
	return cmp.Or(strings.Compare(a.Kind, b.Kind), a.Name.Compare(b.Name))
}
