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
	"github.com/weft-mesh/weft/hbone/loop"
	"github.com/weft-mesh/weft/identity"
	"github.com/weft-mesh/weft/internal/handoff"
	"github.com/weft-mesh/weft/internal/relay"
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

// serveOutbound serves one connection of the pod's processes. Who calls is the
// pod, whatever the connection's remote address is.
func (q *pod) serveOutbound(c *net.TCPConn) {
	ctx := q.alive
	src, dst := addrPort(c.RemoteAddr()), addrPort(c.LocalAddr())
	info := q.info.Load()
	if err := q.loops(info, src.Addr(), dst.Addr()); err != nil {
		q.proxy.cfg.Log.Warn("a connection was refused", "pod", info.Name, "namespace", info.Namespace, "target", dst, "error", err)
		q.proxy.arriving.Add(-1)
		abort(c)
		return
	}
	v := q.proxy.await(ctx, (*view.View).Synced)
	from := client{addresses: info.Addresses, network: q.proxy.cfg.Network}
	own := ownWorkload(v, *info, q.id)
	if own != nil {
		from.workload = *own
	}
	plan := planOutbound(v, from, dst, rand.Uint64())
	if plan.hop == toWaypoint || plan.hold {
		plan = q.awaitWaypoint(ctx, from, dst, plan)
	}
	f := &flow{
		direction: outbound, pod: q, src: endpointOf(src), dst: endpointOf(plan.dial), target: endpointOf(plan.authority),
		source: own, destination: plan.workload, service: plan.service, start: time.Now().UnixNano(),
	}
	if !plan.dial.IsValid() {
		f.dst = endpointOf(dst)
	}
	peer := q.shortCut(plan)
	if len(plan.peers) > 0 {
		f.sourceID, f.mutualTLS = &q.id, peer == nil
	}
	if peer != nil || plan.hop == passthrough {
		f.plain = &plainFlow{stats: new(relay.Stats)}
	}
	q.carry(f, func() (bool, error) {
		q.proxy.arriving.Add(-1) // the flow is in the books
		if err := q.room(f); err != nil {
			return false, err
		}
		switch {
		case peer != nil:
			return false, q.crossOver(ctx, peer, plan, f, c)
		case plan.hop == toPeer, plan.hop == toWaypoint:
			return q.tunnel(ctx, plan, f, c)
		case plan.hop == passthrough && dst.Port() == domainPort && q.resolver != nil:
			return false, q.resolve(ctx, plan, f, c)
		case plan.hop == passthrough:
			return false, q.passOn(ctx, plan, f, c)
		}
		return false, connectError(fmt.Errorf("refused: %s", plan.why))
	})
	abort(c) // unless it has ended in order already, or is an event loop's
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
	q.proxy.telemetry.begin(f)
	q.proxy.flows.add(f)
	q.open.Add(1)
	carried, err := do()
	if carried {
		return nil
	}
	return q.over(f, err)
}

// over counts and logs the end of a flow, and returns why it failed, if it did.
func (q *pod) over(f *flow, err error) error {
	err = f.outcome(err)
	if errors.Is(err, relay.ErrLeft) {
		q.movedOn(f)
		return nil
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
	limit := int64(q.proxy.cfg.MaxConnections)
	if q.open.Load() <= limit {
		return nil
	}
	info := q.info.Load()
	if now := time.Now().UnixNano(); q.complain(now) {
		q.proxy.cfg.Log.Error("a pod has as many connections as it may: new ones are refused", "pod", info.Name, "namespace", info.Namespace, "limit", limit, "direction", f.direction)
	}
	return connectError(fmt.Errorf("refused: the pod %s/%s has %d connections, as many as it may", info.Namespace, info.Name, limit))
}

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
	return q.resolver.serveStream(ctx, c, func(ctx context.Context) (net.Conn, error) {
		up, err := q.dialOut(ctx, plan.dial)
		if err != nil {
			return nil, connectError(err)
		}
		return up, nil
	}, f.plain.stats)
}

// copy relays between the client's side a and the server's side b.
func (f *flow) copy(ctx context.Context, a, b net.Conn) error {
	if !f.carry(a, b) {
		return nil // outcome says why
	}
	return relay.CopyUntil(ctx, a, b, f.plain.stats, &f.plain.halter)
}

// tunnel gives c to an event loop, which carries it through a tunnel to one of
// the plan's peers. There is no way in clear when that fails.
func (q *pod) tunnel(ctx context.Context, plan plan, f *flow, c *net.TCPConn) (carried bool, err error) {
	fd, err := loop.Detach(c)
	if err != nil {
		return false, connectError(err)
	}
	opening, cancel := context.WithTimeout(ctx, tunnelTimeout)
	defer cancel()
	f.counted = true
	q.conns.Add(1)
	err = q.proxy.pool.Connect(opening, hbone.Target{
		Owner: q.owner, Source: q.id, Peers: plan.peers, Address: plan.dial,
	}, plan.authority.String(), hbone.Header{
		Forwarded:   forwarded(f.src.addrPort()),
		Baggage:     baggage(f.source, q.proxy.cfg.Cluster),
		Traceparent: traceparent(),
	}, &f.conn, fd, f)
	if err != nil {
		q.conns.Done()
		loop.Abort(fd)
		return false, connectError(explain(err))
	}
	return true, nil
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
	src, err := q.sourceTowards(plan.authority.Addr(), f.src.addrPort())
	if err != nil {
		return connectError(err)
	}
	if !f.carry(c) {
		return nil // outcome says why
	}
	return peer.receive(ctx, &flow{
		direction: inbound, pod: peer, src: endpointOf(src), dst: endpointOf(plan.authority),
		sourceID: &q.id, destinationID: &peer.id,
		start: f.start, plain: &plainFlow{stats: f.plain.stats},
	}, plainCaller{c})
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
