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
package feed

// The resource types on the wire.
const (
	TypeAddress       = "type.googleapis.com/istio.workload.Address"
	TypeAuthorization = "type.googleapis.com/istio.security.Authorization"
)
