package mesh

import "net/netip"

// Scope says which workloads a policy applies to.
type Scope string

// The scopes. The zero Scope applies to nothing by itself; a workload may
// still list the policy.
const (
	ScopeGlobal    Scope = "global"    // every workload of the mesh
	ScopeNamespace Scope = "namespace" // every workload of the policy's namespace
	ScopeSelector  Scope = "selector"  // the workloads that list it
	ScopeTarget    Scope = "target"    // the Targets of the policy, at their waypoint
)

// Action is what a policy does when it matches. The zero Action is invalid
// and denies.
type Action uint8

// The actions.
const (
	ActionUnset Action = iota
	Allow
	Deny
)

// A Policy is an authorization policy whose selector is already resolved. It
// matches a connection when any of its groups does; one without groups never
// matches.
type Policy struct {
	Name   Name    `json:"name"`
	Scope  Scope   `json:"scope"`
	Action Action  `json:"action"`
	Groups []Group `json:"groups,omitempty"`
	DryRun bool    `json:"dryRun,omitempty"` // reported, not enforced
	// Targets are what a policy of ScopeTarget protects.
	Targets []Target `json:"targets,omitempty"`
}

// A Target is a service, or everything behind a waypoint. Exactly one is set.
type Target struct {
	Service  ServiceName `json:"service,omitzero"`
	Waypoint Name        `json:"waypoint,omitzero"` // of the Gateway object
}

// A Group matches when all of its clauses do; an empty one matches everything.
type Group struct {
	Clauses []Clause `json:"clauses,omitempty"`
}

// A Clause matches when any of its matches does; an empty one matches
// everything.
type Clause struct {
	Matches []Match `json:"matches,omitempty"`
}

// A Match holds when every field that is set holds. A list holds when any of
// its values does; a Not list holds when none of them does. A Match without
// any field set is passed over.
type Match struct {
	Namespaces         []StringMatch         `json:"namespaces,omitempty"`
	NotNamespaces      []StringMatch         `json:"notNamespaces,omitempty"`
	Principals         []StringMatch         `json:"principals,omitempty"`
	NotPrincipals      []StringMatch         `json:"notPrincipals,omitempty"`
	ServiceAccounts    []ServiceAccountMatch `json:"serviceAccounts,omitempty"`
	NotServiceAccounts []ServiceAccountMatch `json:"notServiceAccounts,omitempty"`
	SourceIPs          []netip.Prefix        `json:"sourceIPs,omitempty"`
	NotSourceIPs       []netip.Prefix        `json:"notSourceIPs,omitempty"`
	DestinationIPs     []netip.Prefix        `json:"destinationIPs,omitempty"`
	NotDestinationIPs  []netip.Prefix        `json:"notDestinationIPs,omitempty"`
	DestinationPorts   []uint16              `json:"destinationPorts,omitempty"`
	NotDestPorts       []uint16              `json:"notDestinationPorts,omitempty"`
	// What follows is known of requests only. Where a connection is decided on
	// it is unknown, as if Unknown were set.
	Methods      []StringMatch  `json:"methods,omitempty"`
	NotMethods   []StringMatch  `json:"notMethods,omitempty"`
	Hosts        []StringMatch  `json:"hosts,omitempty"` // compared without regard to case
	NotHosts     []StringMatch  `json:"notHosts,omitempty"`
	Paths        []StringMatch  `json:"paths,omitempty"` // the normalized path, without the query
	NotPaths     []StringMatch  `json:"notPaths,omitempty"`
	Headers      []HeaderMatch  `json:"headers,omitempty"`   // each of them holds
	RemoteIPs    []netip.Prefix `json:"remoteIPs,omitempty"` // the client behind trusted proxies
	NotRemoteIPs []netip.Prefix `json:"notRemoteIPs,omitempty"`
	// Unknown is set when the wire carried a condition that this version does
	// not know. In an allow policy such a match never holds; in a deny policy
	// it always does.
	Unknown bool `json:"unknown,omitempty"`
}

// MatchKind says how a StringMatch compares.
type MatchKind uint8

// The kinds. A match of the zero kind, or of one that is not listed here, is
// unknown, as if Match.Unknown were set.
const (
	MatchUnset    MatchKind = iota
	MatchExact              // equal
	MatchPrefix             // begins with
	MatchSuffix             // ends with
	MatchPresence           // is there and is not empty
	MatchTemplate           // a path whose {*} is one segment and {**} any number of them
)

// A StringMatch compares one string.
type StringMatch struct {
	Kind  MatchKind `json:"kind"`
	Value string    `json:"value,omitempty"`
}

// A ServiceAccountMatch compares the peer's namespace and service account,
// both exactly, in any trust domain.
type ServiceAccountMatch struct {
	Namespace      string `json:"namespace"`
	ServiceAccount string `json:"serviceAccount"`
}

// A HeaderMatch compares a header field of a request, its name in lower case.
// One of Values must hold, if there are any, and none of NotValues.
type HeaderMatch struct {
	Name      string        `json:"name"`
	Values    []StringMatch `json:"values,omitempty"`
	NotValues []StringMatch `json:"notValues,omitempty"`
}
