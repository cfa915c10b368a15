package l7

import (
	"github.com/weft-mesh/weft/mesh/authz"
)

// authorize asks the policies that protect what the client asked for. What they
// say of requests is not known to it, and denies.
type authorize struct {
	Pass
	e *Engine
}

// OnRequest decides on a request.
func (a *authorize) OnRequest(x *Exchange) Verdict {
	d := a.e.decide(x)
	if !d.Allowed {
		x.Failure = d.Reason
		return x.Answer(403, "RBAC: access denied", 0, "rbac_access_denied_matched_policy["+d.Policy.Name+"]")
	}
	return Continue
}

// decide asks the policies about the connection.
func (e *Engine) decide(x *Exchange) authz.Decision {
	f := x.Facts
	return authz.Decide(x.View.Targeted(f.Service, e.cfg.Waypoint), nil, authz.Facts{Peer: f.Peer, Source: f.Source, Destination: f.Destination})
}

// connectionAllowed decides on a connection that is passed through.
func (e *Engine) connectionAllowed(x *Exchange) Verdict {
	if d := e.decide(x); !d.Allowed {
		x.Failure, x.Details = d.Reason, "rbac_access_denied_matched_policy["+d.Policy.Name+"]"
		return Close
	}
	return Continue
}
