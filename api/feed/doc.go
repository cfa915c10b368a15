// Package feed carries the nouns of the mesh over the wire: delta ADS between
// the control service and its proxies.
//
// Server fans changes out to all proxies; Client keeps one view.Store current.
// The messages and their semantics are those that ambient meshes share, so
// another implementation may be at either end.
//
// What does not translate fails closed. An enumeration value of a later
// version becomes one that refuses: an unknown transport is unset, an unknown
// action denies, an unknown condition never allows. A resource that cannot be
// read at all is refused with a NACK and does not replace what was known; if
// nothing was known, something that denies stands in for it.
//
// Proxies of requests, of the role waypoint, subscribe to more: routes,
// traffic policies, policies with targets, and waypoints, each the JSON of the
// noun. There is no half of these. One that has a field which the reader does
// not know takes the place of what was known, and refuses: a route answers 500,
// a traffic policy 503, a policy denies at its targets.
package feed

// The resource types on the wire.
const (
	TypeAddress       = "type.googleapis.com/istio.workload.Address"
	TypeAuthorization = "type.googleapis.com/istio.security.Authorization"

	TypeRoute         = "type.googleapis.com/weft.mesh.v1.Route"
	TypeTrafficPolicy = "type.googleapis.com/weft.mesh.v1.TrafficPolicy"
	TypePolicy        = "type.googleapis.com/weft.mesh.v1.Policy"
	TypeWaypoint      = "type.googleapis.com/weft.mesh.v1.Waypoint"
)

// RoleWaypoint is the role of proxies of requests, in NodeMeta and Subscriber.
const RoleWaypoint = "waypoint"

// sending is the order in which types are sent, so that what refers to
// something follows it. What was removed is sent in the opposite order, behind
// everything else; but see deferred.
func sending() []string {
	return []string{TypeAuthorization, TypePolicy, TypeAddress, TypeTrafficPolicy, TypeRoute, TypeWaypoint}
}

// ofRequests are the types that only a waypoint may subscribe to.
func ofRequests() []string { return []string{TypePolicy, TypeTrafficPolicy, TypeRoute, TypeWaypoint} }
