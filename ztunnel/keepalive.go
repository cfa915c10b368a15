package ztunnel

import (
	"errors"
	"net"
	"time"
)

// Keepalive. What crosses a tunnel needs none of its own: the tunnel's PING
// keeps the way open and notices a dead peer. Sockets towards an application
// stay on the node, where no packet is lost and no peer vanishes. That leaves
// the connections that leave the mesh as they are: an application that keeps
// one alive speaks to this proxy alone, so the proxy does it in its place.

const (
	// defaultKeepAlive is for sockets whose application has not asked for more,
	// as other implementations of the tunnel have it.
	defaultKeepAlive = 180 * time.Second
	// leastKeepAlive bounds how often a quiet connection is probed.
	leastKeepAlive = 5 * time.Second
	// settled is the age at which a connection is looked at. By then an
	// application has set its options, and most connections are over.
	settled = 5 * time.Second
)

// keepAlive makes c probe a peer that is quiet for so long, and give up after
// nine probes.
func keepAlive(c *net.TCPConn, idle time.Duration) error {
	return c.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: idle, Interval: idle, Count: 9})
}

// tune sets the options that every connection has.
func tune(c *net.TCPConn) error {
	return errors.Join(c.SetNoDelay(true), keepAlive(c, defaultKeepAlive))
}

// adoptKeepAlive gives the outer socket of a flow without a tunnel the
// keepalive of the application's socket, once, when the flow has settled. The
// kernel does not tell the setting of another's socket, but when its next probe
// is due, which is never later than the setting: so the outside is probed at
// least as often as the application would.
func (f *flow) adoptKeepAlive(now time.Time) {
	if f.plain == nil || now.UnixNano()-f.start < int64(settled) || f.plain.looked.Swap(true) {
		return
	}
	app, outer := f.sides()
	if app == nil || outer == nil {
		return
	}
	due, err := f.pod().keepAliveOf(app)
	if err != nil {
		f.pod().proxy.cfg.Log.Debug("the keepalive of an application is not known", "pod", f.pod().info.Load().Name, "error", err)
		return
	}
	if due > 0 && due < defaultKeepAlive {
		_ = keepAlive(outer, max(due.Truncate(time.Second), leastKeepAlive)) // it fails if the connection is over
	}
}

// sides returns the proxy's ends of a flow between an application and the
// outside: the one towards the application, and the other. They are nil for a
// flow that does not leave the node, or whose ends are not known yet.
func (f *flow) sides() (app, outer *net.TCPConn) {
	f.plain.mu.Lock()
	defer f.plain.mu.Unlock()
	if len(f.plain.ends) != 2 || !f.who.Value().sourceID.IsZero() {
		return nil, nil
	}
	client, _ := f.plain.ends[0].(*net.TCPConn)
	server, _ := f.plain.ends[1].(*net.TCPConn)
	if f.direction == inbound {
		return server, client
	}
	return client, server
}

// keepAliveOf returns when the pod's socket at the other end of c will probe, or
// 0 if it does not.
func (q *pod) keepAliveOf(c *net.TCPConn) (time.Duration, error) {
	q.inUse.RLock()
	defer q.inUse.RUnlock()
	if q.closed {
		return 0, errPodLeft
	}
	return q.out.KeepAlive(addrPort(c.RemoteAddr()), addrPort(c.LocalAddr()))
}
