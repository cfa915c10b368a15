package l7

import (
	"context"
	"log/slog"

	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/authz"
)

// authorize asks the policies that protect what the client asked for.
type authorize struct {
	Pass
	e *Engine
}

// OnRequest decides on a request.
func (a *authorize) OnRequest(x *Exchange) Verdict {
	ps := x.known.policies
	if len(ps) == 0 {
		return Continue
	}
	// The client is who is connected: there is no proxy that is trusted to say
	// of another. What it says of itself in X-Forwarded-For decides nothing.
	r := authz.Request{Method: x.Request.Method, Host: x.Request.Authority, Path: x.Path(), Fields: &x.Request,
		RemoteIP: x.Facts.Source.Addr()}
	r.Unslashed = unslashed(r.Path, nil)
	return a.e.decide(x, ps, &r)
}

// connectionAllowed decides on a connection that is passed through. What
// policies say of requests is not known of it, and denies.
func (e *Engine) connectionAllowed(x *Exchange) Verdict {
	return e.decide(x, x.known.policies, nil)
}

// decide asks ps, and says why if they refuse.
func (e *Engine) decide(x *Exchange, ps []*mesh.Policy, r *authz.Request) Verdict {
	f := authz.Facts{Peer: x.Facts.Peer, Source: x.Facts.Source, Destination: x.Facts.Destination, HTTP: r}
	if authz.Allows(ps, nil, &f) {
		e.dryRun(x, ps, f)
		return Continue
	}
	d := authz.Decide(ps, nil, f)
	x.Failure = d.Reason
	policy := "none"
	if d.Policy != (mesh.Name{}) {
		policy = "ns[" + d.Policy.Namespace + "]-policy[" + d.Policy.Name + "]"
	}
	details := "rbac_access_denied_matched_policy[" + policy + "]"
	if r == nil {
		x.Details = details
		return Close
	}
	return x.Answer(403, "RBAC: access denied", 0, details)
}

// dryRun tells of policies that would have refused.
func (e *Engine) dryRun(x *Exchange, ps []*mesh.Policy, f authz.Facts) {
	for _, p := range ps {
		if !p.DryRun {
			continue
		}
		if d := authz.Decide(ps, nil, f); len(d.DryRun) > 0 {
			e.log.LogAttrs(context.Background(), slog.LevelInfo, "a policy in dry run would have refused",
				slog.Any("policies", d.DryRun), slog.String("peer", x.Facts.Peer.String()), slog.String("service", x.Facts.Service.String()))
		}
		return
	}
}
