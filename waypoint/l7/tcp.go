package l7

import (
	"context"
	"errors"
	"net"
	"time"

	"github.com/weft-mesh/weft/internal/relay"
	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/balance"
	"github.com/weft-mesh/weft/mesh/route"
)

// serveTCP passes a connection through: to the backend that a TLS or TCP route
// names, else to the service itself.
func (e *Engine) serveTCP(ctx context.Context, c *conn) error {
	x := e.newExchange(ctx, &c.facts, &c.memory)
	defer e.putExchange(x)
	c.run(x)
	defer c.run(nil)
	x.Start = time.Now()
	e.look(x)
	x.Request.Reset()
	x.Response.Reset()
	err := e.connect(x, c)
	if err != nil && x.Failure == "" {
		x.Failure = err.Error()
	}
	e.end(x)
	return err
}

// connect decides on a connection, and relays it.
func (e *Engine) connect(x *Exchange, c *conn) error {
	if v := e.connectionAllowed(x); v != Continue {
		c.reset()
		return nil
	}
	if f := e.routeConnection(x, c); f != nil {
		x.Flags |= outcomes[f.kind].flag
		return f
	}
	if !x.cluster.connection() {
		x.Flags |= FlagOverflow
		return errOverflow
	}
	defer x.cluster.disconnected()
	ep, f := e.pick(x)
	if f != nil {
		x.Flags |= outcomes[f.kind].flag
		return f
	}
	x.Endpoint = ep
	x.Attempts++
	up, err := e.dial(x.ctx, ep, x)
	if err != nil {
		x.Flags |= FlagConnectFailed
		if ep.balance != nil {
			ep.balance.Fail(time.Now())
		}
		return err
	}
	if ep.balance != nil {
		ep.balance.Begin()
		defer func() { ep.balance.End(balance.Success, time.Now()) }()
	}
	ctx := x.ctx
	if d := time.Duration(x.Policy.Connections.MaxDuration); d > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, d)
		defer cancel()
	}
	c.given.Store(true)
	e.metrics.open(x)
	return e.relay(ctx, x, withUnread(c.Conn, c.unread()), up)
}

// errIdleTCP is why a connection ends on which nothing moves.
var errIdleTCP = errors.New("nothing was sent for as long as the policy lets a connection be idle")

// relay passes bytes both ways until both directions have ended, or until none
// has come for as long as the policy says.
func (e *Engine) relay(ctx context.Context, x *Exchange, client, endpoint net.Conn) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	within := time.Duration(x.Policy.Connections.IdleTCP)
	if within <= 0 {
		within = time.Hour
	}
	const looks = 4 // in that time
	var stats relay.Stats
	var seen, still int64 // the clock's goroutine's
	idle := deadline{clock: e.clock}
	idle.passed = func() {
		if n := stats.Sent.Load() + stats.Received.Load(); n != seen {
			seen, still = n, 0
		} else if still++; still == looks {
			cancel(errIdleTCP)
			return
		}
		idle.set(within / looks)
	}
	idle.set(within / looks)
	e.clock.watch(&idle)
	defer e.clock.forget(&idle)
	err := relay.Copy(ctx, client, endpoint, &stats)
	x.RequestBytes += stats.Sent.Load()
	x.ResponseBytes += stats.Received.Load()
	return err
}

// routeConnection finds where a connection goes.
func (e *Engine) routeConnection(x *Exchange, c *conn) *tryError {
	f := x.Facts
	x.Policy = &noPolicy
	if f.Workload != "" {
		x.Matched = route.Result{Rule: e.direct, Index: -1, Name: e.direct.Spec.Name}
		x.BackendPort = x.Port
		x.cluster = e.cluster(clusterKey{port: x.Port, workload: f.Workload}, x.View)
		x.Policy = x.cluster.policy.Load()
		return nil
	}
	x.Service = x.known.service
	if x.Service == nil {
		return &tryError{kind: failedNoCluster, cause: errNotServed}
	}
	res, ok := e.matchConnection(x, c)
	if !ok {
		x.Flags |= FlagNoRoute
		return &tryError{kind: failedOther, cause: errors.New("no route for the connection")}
	}
	x.Matched = res
	if res.Rule.Broken != "" {
		return &tryError{kind: failedOther, cause: errors.New(res.Rule.Broken)}
	}
	if x.Drawn = res.Rule.Pick(e.rand()); x.Drawn == nil {
		return &tryError{kind: failedNoCluster}
	}
	m := match{e: e}
	if r := m.backend(x); r.status != 0 {
		return &tryError{kind: failedNoCluster, cause: errors.New(r.details)}
	}
	return nil
}

// matchConnection asks the routes for TLS, if the client speaks it, and then
// those for TCP.
func (e *Engine) matchConnection(x *Exchange, c *conn) (route.Result, bool) {
	q := route.Connection{SourceNamespace: x.Facts.Peer.Namespace, Destination: x.Facts.Destination.Addr()}
	if r := x.View.Route(x.Facts.Service, x.Port, mesh.RouteTLS); r != nil {
		if name, ok := c.clientHello(e.limits.HeadWait); ok {
			q.SNI = name
			t := e.table(r)
			if t.Broken != "" {
				return route.Result{}, false
			}
			return t.MatchConnection(&q)
		}
	}
	r := x.View.Route(x.Facts.Service, x.Port, mesh.RouteTCP)
	t := e.table(r)
	if t.Broken != "" {
		return route.Result{}, false
	}
	return t.MatchConnection(&q)
}
