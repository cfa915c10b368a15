package ztunnel

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"time"

	"github.com/weft-mesh/weft/hbone"
)

const (
	// replicaTimeout bounds the way to one replica of a waypoint, as long as
	// there is time for another.
	replicaTimeout = 2 * time.Second
	// replicaPause is how long all replicas are left alone when none could be
	// reached.
	replicaPause = 250 * time.Millisecond
)

// awaitWaypoint returns the plan for a connection that must go through a
// waypoint: to a replica that has been reached, or, after Config.HoldTimeout, a
// rejection. Until then the connection is held, and planned anew whenever the
// View changes: the client waits, and nothing goes around the waypoint.
func (q *pod) awaitWaypoint(ctx context.Context, from client, dst netip.AddrPort, p plan) plan {
	if q.open.Load() > int64(q.proxy.cfg.MaxConnections) {
		return p // it is refused for that
	}
	q.open.Add(1)
	defer q.open.Add(-1)
	// Who hands over need not wait for it.
	q.proxy.arriving.Add(-1)
	defer q.proxy.arriving.Add(1)
	start := time.Now()
	ctx, cancel := context.WithTimeout(ctx, q.proxy.cfg.HoldTimeout)
	defer cancel()
	for {
		changed := q.proxy.cfg.View.Changed()
		if v := q.proxy.cfg.View.Load(); v.Synced() {
			p = planOutbound(v, from, dst, rand.Uint64())
		}
		if !p.hold && p.hop != toWaypoint {
			return p // the service has no waypoint any more
		}
		var again <-chan time.Time
		why := errors.New(p.why)
		if p.hop == toWaypoint {
			if why = q.reach(ctx, p); why == nil {
				return p
			}
			from.avoid = append(from.avoid, p.dial)
			again = time.After(pauseAfter(len(from.avoid)))
		}
		select {
		case <-changed:
			from.avoid = nil
		case <-again:
		case <-ctx.Done():
			return q.giveUp(p, why, time.Since(start))
		}
	}
}

// pauseAfter returns how long to wait after so many replicas have failed: not at
// all for the first ones.
func pauseAfter(failed int) time.Duration {
	if failed < 3 {
		return 0
	}
	return replicaPause
}

// reach makes sure that there is a tunnel for the plan.
func (q *pod) reach(ctx context.Context, p plan) error {
	ctx, cancel := context.WithTimeoutCause(ctx, replicaTimeout, errors.New("the replica does not answer"))
	defer cancel()
	return q.proxy.pool.Reach(ctx, hbone.Target{Owner: q.owner, Source: q.id, Peers: p.peers, Address: p.dial})
}

// giveUp returns the rejection of a connection that was held in vain.
func (q *pod) giveUp(p plan, why error, held time.Duration) plan {
	held = held.Round(100 * time.Millisecond)
	info := q.info.Load()
	if q.complain(time.Now().UnixNano()) {
		q.proxy.cfg.Log.Error("a connection is refused because its waypoint cannot be reached; it never goes around it",
			"pod", info.Name, "namespace", info.Namespace, "held", held, "error", why)
	}
	return plan{
		why:     fmt.Sprintf("held for %v because of its waypoint, which a connection never goes around: %v", held, why),
		service: p.service, workload: p.workload,
	}
}
