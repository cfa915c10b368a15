package ztunnel

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/weft-mesh/weft/hbone"
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
	// accept returns the connection. The application is connected by then.
	accept() (net.Conn, error)
	// refuse ends it.
	refuse(status int)
}

// plainCaller is a TCP connection without a tunnel around it.
type plainCaller struct{ conn *net.TCPConn }

func (c plainCaller) accept() (net.Conn, error) { return c.conn, nil }
func (c plainCaller) refuse(int)                { abort(c.conn) }

// tunnelCaller is a CONNECT.
type tunnelCaller struct{ request *hbone.Request }

func (c tunnelCaller) accept() (net.Conn, error) {
	s, err := c.request.Accept(hbone.Header{})
	if err != nil {
		return nil, err
	}
	return s, nil
}

// The tunnel is gone when the refusal cannot be sent; then there is nobody to
// tell.
func (c tunnelCaller) refuse(status int) { _ = c.request.Reject(status) }

// servePlain serves one plain connection from outside the mesh. It passes the
// same decision as a tunnelled one, as nobody.
func (q *pod) servePlain(c *net.TCPConn) {
	src, dst := addrPort(c.RemoteAddr()), addrPort(c.LocalAddr())
	q.plain.add(src)
	defer q.plain.remove(src)
	q.receive(q.alive, &flow{
		direction: inbound, pod: q, src: src, dst: dst,
		facts: authz.Facts{Source: src, Destination: dst},
		start: time.Now(), stats: new(relay.Stats),
	}, plainCaller{c})
}

// serveTunnel serves one CONNECT. Its target must be the address that the
// tunnel was opened to.
func (q *pod) serveTunnel(ctx context.Context, r *hbone.Request) {
	target := r.Authority.AddrPort()
	f := &flow{
		direction: inbound, pod: q, src: unmap(r.Remote), dst: unmap(r.Local), target: target,
		sourceID: r.Peer, destinationID: q.id, mutualTLS: true,
		facts: authz.Facts{Peer: r.Peer, Source: unmap(r.Remote), Destination: target},
		start: time.Now(), stats: new(relay.Stats),
	}
	if target.Addr() != f.dst.Addr() { // also when the target is a host name
		q.carry(f, func() error {
			tunnelCaller{r}.refuse(statusBadRequest)
			return denyf("refused: the tunnel asks for %v, this pod is %v", r.Authority, f.dst.Addr())
		})
		return
	}
	q.receive(ctx, f, tunnelCaller{r})
}

// receive decides on an inbound flow and carries it to the application. It
// returns when the connection is over, with the reason if it failed.
func (q *pod) receive(ctx context.Context, f *flow, from caller) error {
	v := q.proxy.cfg.View.Load()
	f.source = sourceOf(v, f.src.Addr(), f.sourceID)
	f.destination = ownWorkload(v, *q.info.Load(), q.id)
	return q.carry(f, func() error {
		if status, err := q.admit(ctx, f); err != nil {
			from.refuse(status)
			return err
		}
		app, err := q.dialApp(ctx, f.src.Addr(), f.facts.Destination)
		if err != nil {
			from.refuse(statusUnavailable)
			return connectError(fmt.Errorf("the application does not answer: %w", err))
		}
		down, err := from.accept()
		if err != nil {
			abort(app)
			return err
		}
		return f.copy(ctx, down, app)
	})
}

// admit waits for the decision on f and returns an error, with the status for
// the client, unless it is admitted. From then on changes of the View are
// applied to f.
func (q *pod) admit(ctx context.Context, f *flow) (status int, err error) {
	var a admission
	decided := q.proxy.await(ctx, func(v *view.View) bool {
		a = admit(v, *q.info.Load(), q.id, f.facts)
		return a.verdict != unresolved
	})
	f.admitted.Store(true)
	if now := q.proxy.cfg.View.Load(); now != decided && a.verdict == admitted {
		a = admit(now, *q.info.Load(), q.id, f.facts) // the recheck may have passed f by
	}
	if len(a.dryRun) > 0 {
		q.proxy.cfg.Log.Info("policies in dry run would have denied a connection", "policies", a.dryRun, "src", f.src, "identity", f.sourceID, "dst", f.facts.Destination)
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
