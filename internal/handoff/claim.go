package handoff

import (
	"context"
	"net"
	"time"
)

// While the agent is away nobody tells a ztunnel that stands by that the
// active one has died. So the active one of a pair holds a claim: an abstract
// unix socket in the network namespace of their pod, which the kernel frees
// when the process ends, however it ends. One that stands by and has lost the
// agent takes the claim if it is free for a while, and is active. At the end of
// their pod all three end at the same time, and what the one that stands by would
// accept in its last moment would drain.

// claimFree is how long the claim is free, and the agent away, before it is taken
// by one that stands by. Meanwhile the kernel keeps connections in line.
const claimFree = time.Second

// claimPause is how often an active ztunnel tries to take the claim while the
// one before it still has it.
const claimPause = 50 * time.Millisecond

func (c *Client) claimAddr() *net.UnixAddr {
	return &net.UnixAddr{Name: "@weft-ztunnel/" + c.cfg.Pair, Net: "unix"}
}

// claim takes the pair's claim if nobody has it. c.claimed keeps it.
func (c *Client) claim() bool {
	l, err := net.ListenUnix("unix", c.claimAddr())
	if err != nil {
		return false
	}
	c.claims.Lock()
	defer c.claims.Unlock()
	if c.claimed != nil { // by ourselves, just now
		l.Close()
		return true
	}
	c.claimed = l
	return true
}

func (c *Client) hasClaim() bool {
	c.claims.Lock()
	defer c.claims.Unlock()
	return c.claimed != nil
}

// keepClaim holds the claim while this ztunnel is active, until ctx ends.
func (c *Client) keepClaim(ctx context.Context) {
	defer func() {
		c.claims.Lock()
		defer c.claims.Unlock()
		if c.claimed != nil {
			c.claimed.Close()
			c.claimed = nil
		}
	}()
	select {
	case <-ctx.Done():
		return
	case <-c.activated:
	}
	tick := time.NewTicker(claimPause)
	defer tick.Stop()
	for !c.hasClaim() && !c.claim() {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
	close(c.alone)
	<-ctx.Done()
}

// twinLives reports whether this ztunnel stands by and another of the pair has
// the claim: an active one lives, although the agent may not know it yet.
func (c *Client) twinLives() bool {
	if c.Active() {
		return false
	}
	l, err := net.ListenUnix("unix", c.claimAddr())
	if err != nil {
		return true
	}
	l.Close()
	return false
}

// succeed makes this ztunnel active if it stands by, the agent is gone, and
// the active one of its pair as well, since claimFree: it returns since when,
// and wants to hear that the next time, which is soon. Before it has the agent's
// pods there is nothing that it could serve.
func (c *Client) succeed(free, now time.Time) time.Time {
	select {
	case <-c.synced:
	default:
		return time.Time{}
	}
	switch {
	case c.Active() || c.twinLives():
		return time.Time{}
	case free.IsZero():
		return now
	case now.Sub(free) < claimFree || !c.claim():
		return free
	}
	c.cfg.Log.Warn("neither the node agent nor the active ztunnel of this pod is there any more: active now", "instance", c.cfg.Instance)
	c.activate()
	return time.Time{}
}
