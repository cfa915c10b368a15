// Package authz decides whether a connection, or a request, may pass. The
// decision is a pure function of the policies that apply and of what is known.
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
	// HTTP is the request. Nil is a connection of which no request is known:
	// conditions on requests are unknown there.
	HTTP *Request
}

// A Request is what is known of a request beyond its connection.
type Request struct {
	Method []byte
	Host   []byte // the authority as it was sent
	// Path is the normalized path without the query. Unslashed is what a server
	// sees that takes %2F and %5C for slashes, empty if that is the same.
	Path, Unslashed []byte
	Fields          Fields // nil is none
	// RemoteIP is the client behind trusted proxies.
	RemoteIP netip.Addr
	// Scratch is room for fields that are sent more than once. It may be nil,
	// and then such fields cost an allocation.
	Scratch []byte
}

// Fields are the header fields of a request. A head of any version of HTTP
// satisfies it as it is.
type Fields interface {
	// Joined returns the values of the field of that name, which is in lower
	// case, joined with commas, and false if there is none. It may use scratch.
	Joined(name string, scratch []byte) ([]byte, bool)
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
	d := enforce(ps, missing, &f).decision()
	d.DryRun = dryRun(ps, &f)
	return d
}

// Allows is Decide for who wants no reasons: it returns Decision.Allowed, and
// allocates nothing.
func Allows(ps []*mesh.Policy, missing []mesh.Name, f *Facts) bool {
	return enforce(ps, missing, f).allowed
}

// A ruling is a Decision before it is put into words.
type ruling struct {
	allowed bool
	policy  mesh.Name
	cause   cause
	allows  int // allow policies that did not match
}

type cause uint8

const (
	notArrived cause = iota
	denied
	matched
	noPolicy
	noMatch
	strangeAction
)

func (r ruling) decision() Decision {
	d := Decision{Allowed: r.allowed, Policy: r.policy}
	switch n := r.policy.String(); r.cause {
	case denied:
		d.Reason = "denied by policy " + n
	case matched:
		d.Reason = "allowed by policy " + n
	case noPolicy:
		d.Reason = "allowed: no policy forbids it"
	case noMatch:
		d.Reason = fmt.Sprintf("denied: none of %d allow policies matches", r.allows)
		if r.allows == 1 {
			d.Reason = fmt.Sprintf("denied: allow policy %s does not match", n)
		}
	case strangeAction:
		d.Reason = fmt.Sprintf("denied by policy %s: its action is not known to this version", n)
	default:
		d.Reason = fmt.Sprintf("denied: policy %s applies, but has not arrived", n)
		if r.policy == (mesh.Name{}) {
			d.Reason = "denied: the policies for this workload are not known yet"
		}
	}
	return d
}

// enforce decides by the policies that are not in dry run.
func enforce(ps []*mesh.Policy, missing []mesh.Name, f *Facts) ruling {
	if len(missing) > 0 {
		return ruling{policy: missing[0]}
	}
	var allow, match *mesh.Policy
	allows := 0
	for _, p := range ps {
		switch {
		case p == nil:
			return ruling{}
		case p.DryRun:
		case p.Action == mesh.Deny:
			if matches(p, f) {
				return ruling{policy: p.Name, cause: denied}
			}
		case p.Action == mesh.Allow:
			allow = p
			allows++
			if match == nil && matches(p, f) {
				match = p
			}
		default:
			return ruling{policy: p.Name, cause: strangeAction}
		}
	}
	switch {
	case match != nil:
		return ruling{allowed: true, policy: match.Name, cause: matched}
	case allows == 0:
		return ruling{allowed: true, cause: noPolicy}
	case allows == 1:
		return ruling{policy: allow.Name, cause: noMatch, allows: 1}
	}
	return ruling{cause: noMatch, allows: allows}
}

// dryRun returns the policies in dry run that would have denied. Allow
// policies deny together: if any one matches, enforced or not, none does.
func dryRun(ps []*mesh.Policy, f *Facts) []mesh.Name {
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
func anyAllows(ps []*mesh.Policy, f *Facts) bool {
	for _, p := range ps {
		if p != nil && p.Action == mesh.Allow && matches(p, f) {
			return true
		}
	}
	return false
}
