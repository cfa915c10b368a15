// Package authz decides whether a connection may pass. The decision is a pure
// function of the policies that apply and of what is known of the connection.
//
// What is unknown never widens access: in an allow policy an unknown condition
// does not hold, in a deny policy it does.
package authz

import (
	"fmt"
	"net/netip"

	"github.com/weft-mesh/weft/mesh"
)

// Facts are what is known of a connection when it is decided on.
type Facts struct {
	// Peer is who called, as mutual TLS proved it. Zero is nobody: a plain
	// connection.
	Peer mesh.Identity
	// Source and Destination are the ends of the connection as the
	// application sees it, not those of a tunnel around it.
	Source, Destination netip.AddrPort
}

// A Decision says whether a connection may pass, and why. The zero Decision
// denies.
type Decision struct {
	Allowed bool
	// Policy is the policy that decided; zero if none did by itself.
	Policy mesh.Name
	// Reason is a sentence for logs, for example "denied by policy shop/web".
	Reason string
	// DryRun are the policies that would have denied, were they enforced.
	DryRun []mesh.Name
}

// Decide applies ps, the policies of the destination workload, to a
// connection. A missing policy, one whose action is not known, and a nil one
// deny. Then the connection passes if no deny policy matches it, and if either
// there are no allow policies or one of them matches. Policies in dry run are
// reported and have no say.
func Decide(ps []*mesh.Policy, missing []mesh.Name, f Facts) Decision {
	d := enforce(ps, missing, f)
	d.DryRun = dryRun(ps, f)
	return d
}

// enforce decides by the policies that are not in dry run.
func enforce(ps []*mesh.Policy, missing []mesh.Name, f Facts) Decision {
	if len(missing) > 0 {
		return notKnown(missing[0])
	}
	var allow, matched *mesh.Policy
	allows := 0
	for _, p := range ps {
		switch {
		case p == nil:
			return notKnown(mesh.Name{})
		case p.DryRun:
		case p.Action == mesh.Deny:
			if matches(p, f) {
				return Decision{Policy: p.Name, Reason: "denied by policy " + p.Name.String()}
			}
		case p.Action == mesh.Allow:
			allow = p
			allows++
			if matched == nil && matches(p, f) {
				matched = p
			}
		default:
			return Decision{Policy: p.Name, Reason: fmt.Sprintf("denied by policy %v: its action is not known to this version", p.Name)}
		}
	}
	switch {
	case matched != nil:
		return Decision{Allowed: true, Policy: matched.Name, Reason: "allowed by policy " + matched.Name.String()}
	case allows == 0:
		return Decision{Allowed: true, Reason: "allowed: no policy forbids it"}
	case allows == 1:
		return Decision{Policy: allow.Name, Reason: fmt.Sprintf("denied: allow policy %v does not match", allow.Name)}
	}
	return Decision{Reason: fmt.Sprintf("denied: none of %d allow policies matches", allows)}
}

// notKnown denies because policy n is not here.
func notKnown(n mesh.Name) Decision {
	if n == (mesh.Name{}) {
		return Decision{Reason: "denied: the policies for this workload are not known yet"}
	}
	return Decision{Policy: n, Reason: fmt.Sprintf("denied: policy %v applies, but has not arrived", n)}
}

// dryRun returns the policies in dry run that would have denied. Allow
// policies deny together: if any one matches, enforced or not, none does.
func dryRun(ps []*mesh.Policy, f Facts) []mesh.Name {
	var deny, allow []mesh.Name
	for _, p := range ps {
		if p == nil || !p.DryRun {
			continue
		}
		switch p.Action {
		case mesh.Allow:
			allow = append(allow, p.Name)
		case mesh.Deny:
			if matches(p, f) {
				deny = append(deny, p.Name)
			}
		default:
			deny = append(deny, p.Name)
		}
	}
	if len(allow) > 0 && !anyAllows(ps, f) {
		return append(deny, allow...)
	}
	return deny
}

// anyAllows reports whether an allow policy matches, in dry run or not.
func anyAllows(ps []*mesh.Policy, f Facts) bool {
	for _, p := range ps {
		if p != nil && p.Action == mesh.Allow && matches(p, f) {
			return true
		}
	}
	return false
}
