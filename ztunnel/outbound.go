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
	"github.com/weft-mesh/weft/mesh/authz"
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
	f := &flow{
		direction: outbound, pod: q, src: src, dst: plan.dial, target: plan.authority,
		source: own, destination: plan.workload, service: plan.service,
		start: time.Now(), stats: new(relay.Stats),
	}
	if !f.dst.IsValid() {
		f.dst = dst
	}
	peer := q.shortCut(plan)
	if len(plan.peers) > 0 {
		f.sourceID, f.mutualTLS = q.id, peer == nil
	}
	q.carry(f, func() error {
		switch {
		case peer != nil:
			return q.crossOver(ctx, peer, plan, f, c)
		case plan.hop == toPeer, plan.hop == toWaypoint:
			return q.tunnel(ctx, plan, f, c)
		case plan.hop == passthrough && dst.Port() == domainPort && q.resolver != nil:
			return q.resolve(ctx, plan, f, c)
		case plan.hop == passthrough:
			return q.passOn(ctx, plan, f, c)
		}
		return connectError(fmt.Errorf("refused: %s", plan.why))
	})
	abort(c) // unless it has ended in order already
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
func (q *pod) carry(f *flow, do func() error) error {
	p := q.proxy
	p.telemetry.begin(f)
	p.flows.add(f)
	err := f.outcome(do())
	p.flows.remove(f)
	p.telemetry.progress(f)
	p.telemetry.end(f, err)
	return err
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
	}, f.stats)
}

// copy relays between the client's side a and the server's side b.
func (f *flow) copy(ctx context.Context, a, b net.Conn) error {
	if !f.carry(a, b) {
		return nil // outcome says why
	}
	return relay.Copy(ctx, a, b, f.stats)
}

// tunnel carries c through a tunnel to one of the plan's peers. There is no way
// in clear when that fails.
func (q *pod) tunnel(ctx context.Context, plan plan, f *flow, c *net.TCPConn) error {
	opening, cancel := context.WithTimeout(ctx, tunnelTimeout)
	defer cancel()
	up, err := q.proxy.pool.Connect(opening, hbone.Target{
		Owner: q.owner, Source: q.id, Peers: plan.peers, Address: plan.dial,
	}, plan.authority.String(), hbone.Header{
		Forwarded:   forwarded(f.src),
		Baggage:     baggage(f.source, q.proxy.cfg.Cluster),
		Traceparent: traceparent(),
	})
	if err != nil {
		return connectError(explain(err))
	}
	f.destinationID = up.Peer()
	return f.copy(ctx, c, up)
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
	f.destinationID = peer.id
	src, err := q.sourceTowards(plan.authority.Addr(), f.src)
	if err != nil {
		return connectError(err)
	}
	if !f.carry(c) {
		return nil // outcome says why
	}
	return peer.receive(ctx, &flow{
		direction: inbound, pod: peer, src: src, dst: plan.authority,
		sourceID: q.id, destinationID: peer.id,
		facts: authz.Facts{Peer: q.id, Source: src, Destination: plan.authority},
		start: f.start, stats: f.stats,
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
