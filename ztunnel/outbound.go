package ztunnel

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/weft-mesh/weft/hbone"
	"github.com/weft-mesh/weft/identity"
	"github.com/weft-mesh/weft/internal/handoff"
	"github.com/weft-mesh/weft/internal/relay"
	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/view"
)

// addrPort returns a as the mesh writes addresses.
func addrPort(a net.Addr) netip.AddrPort {
	tcp, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	return unmap(tcp.AddrPort())
}

// beginOutbound serves one connection of the pod's processes if that needs no
// wait: its target is in the mesh, and there is a tunnel to it. Otherwise it
// returns what serves it, and has a then.
func (q *pod) beginOutbound(a *arrival) (rest func()) {
	info, v := q.info.Load(), q.proxy.cfg.View.Load()
	if !v.Synced() || !slices.Contains(info.Addresses, a.src.Addr()) || q.loops(info, a.src.Addr(), a.dst.Addr()) != nil {
		return func() { q.serveOutbound(a) }
	}
	from, own := q.asClient(v, info)
	plan := planOutbound(v, from, a.dst, rand.Uint64())
	if plan.hop != toPeer || q.shortCut(plan) != nil {
		return func() { q.serveOutbound(a) }
	}
	f := q.outboundFlow(a, plan, own, nil)
	q.enter(f)
	q.proxy.arriving.Add(-1) // the flow is in the books
	if !q.full() && q.connect(q.proxy.atOnce, plan, f, a) == nil {
		return nil
	}
	return q.waitForTunnel(plan, f, a)
}

// waitForTunnel returns what goes on where beginOutbound could not. It stands
// alone so that a plan costs memory only here.
func (q *pod) waitForTunnel(plan plan, f *flow, a *arrival) (rest func()) {
	return func() {
		defer a.refuse() // unless somebody else has it
		q.goOn(f, func() (bool, error) {
			if err := q.room(f); err != nil {
				return false, err
			}
			return q.tunnel(q.alive, plan, f, a)
		})
	}
}

// serveOutbound serves one connection of the pod's processes. Who calls is the
// pod, whatever the connection's remote address is.
func (q *pod) serveOutbound(a *arrival) {
	defer a.refuse() // unless somebody else has it
	ctx, info := q.alive, q.info.Load()
	if err := q.loops(info, a.src.Addr(), a.dst.Addr()); err != nil {
		q.proxy.cfg.Log.Warn("a connection was refused", "pod", info.Name, "namespace", info.Namespace, "target", a.dst, "error", err)
		q.proxy.arriving.Add(-1)
		return
	}
	v := q.proxy.await(ctx, (*view.View).Synced)
	from, own := q.asClient(v, info)
	plan := planOutbound(v, from, a.dst, rand.Uint64())
	if plan.hop == toWaypoint || plan.hold {
		plan = q.awaitWaypoint(ctx, from, a.dst, plan)
	}
	peer := q.shortCut(plan)
	f := q.outboundFlow(a, plan, own, peer)
	q.carry(f, func() (bool, error) {
		q.proxy.arriving.Add(-1) // the flow is in the books
		if err := q.room(f); err != nil {
			return false, err
		}
		switch {
		case peer == nil && (plan.hop == toPeer || plan.hop == toWaypoint):
			return q.tunnel(ctx, plan, f, a)
		case peer == nil && plan.hop != passthrough:
			return false, connectError(fmt.Errorf("refused: %s", plan.why))
		}
		c, err := a.conn()
		if err != nil {
			return false, connectError(err)
		}
		defer abort(c) // unless it has ended in order already
		switch {
		case peer != nil:
			return false, q.crossOver(ctx, peer, plan, f, c)
		case a.dst.Port() == domainPort && q.resolver != nil:
			return false, q.resolve(ctx, plan, f, c)
		}
		return false, q.passOn(ctx, plan, f, c)
	})
}

// asClient returns the pod as planOutbound wants it, and as v knows it.
func (q *pod) asClient(v *view.View, info *handoff.Pod) (client, *mesh.Workload) {
	from := client{addresses: info.Addresses, network: q.proxy.cfg.Network}
	own := ownWorkload(v, *info, q.id)
	if own != nil {
		from.workload = *own
	}
	return from, own
}

// outboundFlow returns the flow of an arrival with a plan. peer is the pod of
// this node that it goes to without a tunnel, if it does.
func (q *pod) outboundFlow(a *arrival, plan plan, own *mesh.Workload, peer *pod) *flow {
	p := parties{pod: q, source: own, destination: plan.workload, service: plan.service, dst: plan.dial, target: plan.authority}
	if !plan.dial.IsValid() {
		p.dst = a.dst
	}
	if len(plan.peers) > 0 {
		p.sourceID = q.id
	}
	f := newFlow(outbound, a.src, p)
	f.mutualTLS = len(plan.peers) > 0 && peer == nil
	if peer != nil || plan.hop == passthrough {
		f.plain = &plainFlow{stats: new(relay.Stats)}
	}
	return f
}

// loops returns an error if a connection to dst would come back here: a
// process has dialed our listener itself, or an address that the pod holds
// beside those that capture leaves alone, which are the ones the agent knows.
func (q *pod) loops(info *handoff.Pod, src, dst netip.Addr) error {
	// What comes back has the address it went to as its source: then it must
	// be known for sure.
	stays, err := q.out.Holds(dst, !slices.Contains(info.Addresses, src))
	if err == nil && (stays || slices.Contains(info.Addresses, dst)) {
		err = errors.New("the target is inside the pod itself: sending the connection on would bring it back")
	}
	return err
}

// carry counts and logs a flow around do, and returns why it failed, if it did.
// A flow that do has given to an event loop is counted and logged by that.
func (q *pod) carry(f *flow, do func() (carried bool, err error)) error {
	q.enter(f)
	return q.goOn(f, do)
}

// enter writes f into the books, in which it stays until over.
func (q *pod) enter(f *flow) {
	q.proxy.telemetry.begin(f)
	q.proxy.flows.add(f)
	q.open.Add(1)
}

// goOn is carry for a flow that is in the books.
func (q *pod) goOn(f *flow, do func() (carried bool, err error)) error {
	carried, err := do()
	if carried {
		return nil
	}
	return q.over(f, err)
}

// over counts and logs the end of a flow, and returns why it failed, if it did.
// With relay.ErrLeft it has not ended, and another process has it in its books.
func (q *pod) over(f *flow, err error) error {
	err = f.outcome(err)
	if errors.Is(err, relay.ErrLeft) {
		q.movedOn(f)
		return err
	}
	q.open.Add(-1)
	q.proxy.flows.remove(f)
	q.proxy.telemetry.progress(f)
	q.proxy.telemetry.end(f, err)
	return err
}

// room returns an error if the pod has more connections than it may. One pod
// must not use up the descriptors of all.
func (q *pod) room(f *flow) error {
	if !q.full() {
		return nil
	}
	limit, info := q.proxy.cfg.MaxConnections, q.info.Load()
	if now := time.Now().UnixNano(); q.complain(now) {
		q.proxy.cfg.Log.Error("a pod has as many connections as it may: new ones are refused", "pod", info.Name, "namespace", info.Namespace, "limit", limit, "direction", f.direction)
	}
	return connectError(fmt.Errorf("refused: the pod %s/%s has %d connections, as many as it may", info.Namespace, info.Name, limit))
}

// full reports whether the pod has more connections than it may.
func (q *pod) full() bool { return q.open.Load() > int64(q.proxy.cfg.MaxConnections) }

// complain reports whether a minute has passed since it last did.
func (q *pod) complain(now int64) bool {
	last := q.complained.Load()
	return now-last >= int64(time.Minute) && q.complained.CompareAndSwap(last, now)
}

// shortCut returns the pod of this node that the plan leads to, if it may be
// reached without a tunnel.
func (q *pod) shortCut(plan plan) *pod {
	if plan.hop != toPeer || !q.proxy.cfg.SameNode && !plan.direct {
		return nil
	}
	return q.proxy.podAt(plan.authority.Addr())
}

// passOn carries c to the plan's address as it is.
func (q *pod) passOn(ctx context.Context, plan plan, f *flow, c *net.TCPConn) error {
	up, err := q.dialOut(ctx, plan.dial)
	if err != nil {
		return connectError(err)
	}
	return f.copy(ctx, c, up)
}

// resolve answers the name queries that arrive on c, or has them answered at
// the plan's address.
func (q *pod) resolve(ctx context.Context, plan plan, f *flow, c *net.TCPConn) error {
	if !f.carry(c) {
		return nil // outcome says why
	}
	return q.resolver.serveStream(ctx, f, c, func(ctx context.Context) (net.Conn, error) {
		up, err := q.dialOut(ctx, plan.dial)
		if err != nil {
			return nil, connectError(err)
		}
		return up, nil
	})
}

// copy relays between the client's side a and the server's side b.
func (f *flow) copy(ctx context.Context, a, b net.Conn) error {
	if !f.carry(a, b) {
		return nil // outcome says why
	}
	return relay.CopyUntil(ctx, a, b, f.plain.stats, &f.plain.halter)
}

// tunnel gives a connection to an event loop, which carries it through a tunnel
// to one of the plan's peers. There is no way in clear when that fails.
func (q *pod) tunnel(ctx context.Context, plan plan, f *flow, a *arrival) (carried bool, err error) {
	opening, cancel := context.WithTimeout(ctx, tunnelTimeout)
	defer cancel()
	if err := q.connect(opening, plan, f, a); err != nil {
		return false, connectError(explain(err))
	}
	return true, nil
}

// connect gives a connection to a tunnel, and waits for one until ctx ends. If it
// fails the connection is still a's.
func (q *pod) connect(ctx context.Context, plan plan, f *flow, a *arrival) error {
	f.counted = true
	q.conns.Add(1)
	err := q.proxy.pool.Connect(ctx, hbone.Target{
		Owner: q.owner, Source: q.id, Peers: plan.peers, Address: plan.dial,
	}, plan.authority.String(), hbone.Header{
		Forwarded:   forwarded(f.src()),
		Baggage:     q.baggageOf(f.who.Value().source),
		Traceparent: traceparent(),
	}, &f.conn, a.fd, f)
	if err != nil {
		f.counted = false
		q.conns.Done()
		return err
	}
	a.take()
	return nil
}

// explain says what an answer of the other end means.
func explain(err error) error {
	var status *hbone.StatusError
	switch {
	case errors.Is(err, identity.ErrWrongPeer):
		return err
	case !errors.As(err, &status):
		return err
	case status.Code == statusUnauthorized || status.Code == 403:
		return fmt.Errorf("denied by the policies of the destination: its ztunnel or waypoint says why: %w", err)
	case status.Code == statusBadRequest:
		return fmt.Errorf("the destination is not who was asked for: its address may be in other hands by now: %w", err)
	case status.Code == statusUnavailable:
		return fmt.Errorf("the destination's application cannot be reached: %w", err)
	}
	return err
}

// crossOver carries c to a pod of this node without a tunnel. It is decided on
// as if it had come through one.
func (q *pod) crossOver(ctx context.Context, peer *pod, plan plan, f *flow, c *net.TCPConn) error {
	if !slices.Contains(plan.peers, peer.id) {
		return connectError(fmt.Errorf("%w: got %s, want %v", identity.ErrWrongPeer, peer.id, plan.peers))
	}
	f.destinationID = &peer.id
	src, err := q.sourceTowards(plan.authority.Addr(), f.src())
	if err != nil {
		return connectError(err)
	}
	if !f.carry(c) {
		return nil // outcome says why
	}
	in := peer.inboundFlow(q.proxy.cfg.View.Load(), src, parties{sourceID: q.id, dst: plan.authority})
	in.destinationID, in.start, in.plain = &peer.id, f.start, &plainFlow{stats: f.plain.stats, outer: f}
	return peer.receive(ctx, in, plainCaller{c})
}

// sourceTowards returns the address that a connection from src to dst shows to
// policies and to the application. It is one of the pod's, of dst's family, as
// it would be behind a tunnel: a process can bind to others, 127.0.0.1 among
// them, which policies or applications may trust.
func (q *pod) sourceTowards(dst netip.Addr, src netip.AddrPort) (netip.AddrPort, error) {
	var own netip.Addr
	for _, a := range q.info.Load().Addresses {
		if a.Is4() == dst.Is4() && (!own.IsValid() || a == src.Addr()) {
			own = a
		}
	}
	if !own.IsValid() {
		return netip.AddrPort{}, fmt.Errorf("the pod has no address of the family of %v", dst)
	}
	return netip.AddrPortFrom(own, src.Port()), nil
}
