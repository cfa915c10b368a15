package ztunnel

import (
	"context"
	"fmt"
	"net"
	"net/netip"

	"github.com/weft-mesh/weft/hbone/loop"
	"github.com/weft-mesh/weft/internal/netns"
	"github.com/weft-mesh/weft/internal/relay"
	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/authz"
	"github.com/weft-mesh/weft/mesh/view"
)

// The statuses with which a CONNECT is refused.
const (
	statusBadRequest   = 400 // the target is not this pod's
	statusUnauthorized = 401 // by policy
	statusUnavailable  = 503 // the application does not answer
)

// caller is the client's side of an inbound connection, until its fate is
// known.
type caller interface {
	// carry joins it to the application's connection app, which it takes over.
	// carried says that an event loop has the flow and will say how it ends;
	// else it has ended, with err.
	carry(ctx context.Context, f *flow, app *net.TCPConn) (carried bool, err error)
	// refuse ends it.
	refuse(status int)
}

// plainCaller is a TCP connection without a tunnel around it.
type plainCaller struct{ conn *net.TCPConn }

func (c plainCaller) carry(ctx context.Context, f *flow, app *net.TCPConn) (bool, error) {
	return false, f.copy(ctx, c.conn, app)
}
func (c plainCaller) refuse(int) { abort(c.conn) }

// tunnelCaller is a CONNECT.
type tunnelCaller struct{ request *loop.Request }

func (c tunnelCaller) carry(_ context.Context, f *flow, app *net.TCPConn) (bool, error) {
	fd, err := loop.Detach(app)
	if err != nil {
		c.refuse(statusUnavailable)
		return false, connectError(fmt.Errorf("the application's connection: %w", err))
	}
	c.request.Accept(&f.conn, fd, f)
	return true, nil
}

// A second answer cannot be given, and a peer that is gone needs none.
func (c tunnelCaller) refuse(status int) { _ = c.request.Reject(status) }

// servePlain serves one plain connection from outside the mesh. It passes the
// same decision as a tunnelled one, as nobody.
func (q *pod) servePlain(c *net.TCPConn) {
	q.proxy.arriving.Add(-1) // it stays with this process
	src, dst := addrPort(c.RemoteAddr()), addrPort(c.LocalAddr())
	q.clients.add(src)
	defer q.clients.remove(src)
	f := q.inboundFlow(q.proxy.cfg.View.Load(), src, parties{dst: dst})
	f.plain = &plainFlow{stats: new(relay.Stats)}
	q.receive(q.alive, f, plainCaller{c})
}

// beginTunnel decides on one CONNECT on the event loop, and connects to the
// application there, if that needs no wait. Otherwise it returns what does.
func (q *pod) beginTunnel(r *loop.Request) (rest func()) {
	if r.Authority.Addr != r.Local.Addr() {
		return func() { q.serveTunnel(r) }
	}
	v := q.proxy.cfg.View.Load()
	f := q.tunnelFlow(v, r)
	facts := f.facts()
	a := admit(v, *q.info.Load(), q.id, facts)
	if a.verdict != admitted || len(a.dryRun) > 0 || f.toldOf(facts) {
		return func() { q.serveTunnel(r) }
	}
	q.enter(f)
	from := tunnelCaller{r}
	if q.full() {
		return q.decideLater(f, from)
	}
	f.admitted.Store(true)
	if q.proxy.cfg.View.Load() != v { // the recheck may have passed f by
		f.admitted.Store(false)
		return q.decideLater(f, from)
	}
	fd, err := q.beginApp(facts.Source.Addr(), facts.Destination)
	if err != nil {
		return q.decideLater(f, from) // which tries more than once
	}
	if netns.Connected(fd) {
		r.Accept(&f.conn, fd, f)
		return nil
	}
	return func() {
		q.goOn(f, func() (bool, error) {
			app, err := q.finishApp(q.alive, fd)
			return q.join(q.alive, f, from, app, err)
		})
	}
}

// decideLater returns what goes on where beginTunnel could not.
func (q *pod) decideLater(f *flow, from caller) (rest func()) {
	return func() { q.goOn(f, func() (bool, error) { return q.decide(q.alive, f, from) }) }
}

// serveTunnel decides on one CONNECT, and gives it to an event loop. Its target
// must be the address that the tunnel was opened to.
func (q *pod) serveTunnel(r *loop.Request) {
	if r.Authority.Addr != r.Local.Addr() { // also when the target is a host name
		q.carry(q.tunnelFlow(new(view.View), r), func() (bool, error) { // which knows nobody
			tunnelCaller{r}.refuse(statusBadRequest)
			return false, denyf("refused: the tunnel asks for %v, this pod is %v", r.Authority, r.Local.Addr())
		})
		return
	}
	q.receive(q.alive, q.tunnelFlow(q.proxy.cfg.View.Load(), r), tunnelCaller{r})
}

// tunnelFlow returns the flow of a CONNECT.
func (q *pod) tunnelFlow(v *view.View, r *loop.Request) *flow {
	f := q.inboundFlow(v, r.Remote, parties{sourceID: *r.Peer, dst: r.Local, target: r.Authority.AddrPort()})
	f.destinationID, f.mutualTLS = &q.id, true
	return f
}

// inboundFlow returns a flow to the pod from src, with what v knows of its ends.
func (q *pod) inboundFlow(v *view.View, src netip.AddrPort, p parties) *flow {
	p.pod, p.source, p.destination = q, sourceOf(v, src.Addr().WithZone(""), p.sourceID), ownWorkload(v, *q.info.Load(), q.id)
	return newFlow(inbound, src, p)
}

// receive decides on an inbound flow and carries it to the application. It
// returns when the connection is over, with the reason if it failed, or when an
// event loop has it.
func (q *pod) receive(ctx context.Context, f *flow, from caller) error {
	return q.carry(f, func() (bool, error) { return q.decide(ctx, f, from) })
}

// decide lets an inbound flow in, or refuses it.
func (q *pod) decide(ctx context.Context, f *flow, from caller) (carried bool, err error) {
	if err := q.room(f); err != nil {
		from.refuse(statusUnavailable)
		return false, err
	}
	facts := f.facts()
	if status, err := q.admit(ctx, f, facts); err != nil {
		from.refuse(status)
		return false, err
	}
	app, err := q.connectApp(ctx, f, facts)
	return q.join(ctx, f, from, app, err)
}

// join carries an inbound flow to the application, unless connecting to that
// has failed with err.
func (q *pod) join(ctx context.Context, f *flow, from caller, app *net.TCPConn, err error) (carried bool, _ error) {
	if err != nil {
		from.refuse(statusUnavailable)
		return false, connectError(fmt.Errorf("the application does not answer: %w", err))
	}
	return from.carry(ctx, f, app)
}

// admit waits for the decision on f and returns an error, with the status for
// the client, unless it is admitted. From then on changes of the View are
// applied to f.
func (q *pod) admit(ctx context.Context, f *flow, facts authz.Facts) (status int, err error) {
	var a admission
	decided := q.proxy.await(ctx, func(v *view.View) bool {
		a = admit(v, *q.info.Load(), q.id, facts)
		return a.verdict != unresolved
	})
	f.admitted.Store(true)
	if now := q.proxy.cfg.View.Load(); now != decided && a.verdict == admitted {
		a = admit(now, *q.info.Load(), q.id, facts) // the recheck may have passed f by
	}
	if len(a.dryRun) > 0 {
		q.proxy.cfg.Log.Info("policies in dry run would have denied a connection", "policies", a.dryRun, "src", facts.Source, "identity", facts.Peer, "dst", facts.Destination)
	}
	switch a.verdict {
	case admitted:
		return 0, nil
	case notOurs:
		return statusBadRequest, denyf("refused: %s", a.reason)
	}
	return statusUnauthorized, denyf("%s", a.reason)
}

// sourceOf returns the workload at address a, if it has the identity that was
// proved: an address may have changed hands. A zero identity proves nothing
// and contradicts nothing.
func sourceOf(v *view.View, a netip.Addr, id mesh.Identity) *mesh.Workload {
	w := v.Workload(a)
	if w == nil || !id.IsZero() && w.Identity != id {
		return nil
	}
	return w
}

func unmap(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}
