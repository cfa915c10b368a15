package ztunnel

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// idleOf returns after how long c probes a quiet peer.
func idleOf(t *testing.T, c *net.TCPConn) time.Duration {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var on, idle int
	err = raw.Control(func(fd uintptr) {
		on, _ = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_KEEPALIVE)
		idle, _ = unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_KEEPIDLE)
	})
	if err != nil {
		t.Fatal(err)
	}
	if on == 0 {
		t.Error("the socket has no keepalive at all")
	}
	return time.Duration(idle) * time.Second
}

// TestKeepAliveOfApplications: a connection that leaves the mesh is probed as
// its application would, once it has settled.
func TestKeepAliveOfApplications(t *testing.T) {
	for _, c := range []struct {
		name string
		due  time.Duration // of the application's socket
		want time.Duration
	}{
		{"like the application", 42*time.Second + 300*time.Millisecond, 42 * time.Second},
		{"not too often", 10 * time.Millisecond, leastKeepAlive},
		{"no less than others", time.Hour, defaultKeepAlive},
		{"not asked for", 0, defaultKeepAlive},
	} {
		t.Run("out, "+c.name, func(t *testing.T) {
			w := newWorld(t)
			n := w.node(nil)
			client := n.add("client", nil)
			outside := startApp(t, freshAddr().String()+":0", echo)
			target := netip.AddrPortFrom(freshAddr(), client.port)
			client.outlet.route(target, outside)
			conn := client.dial(target)
			hello(t, conn)
			local, remote := addrPort(conn.LocalAddr()), addrPort(conn.RemoteAddr())
			client.outlet.probe(local, remote, c.due)

			f := n.onlyFlow()
			app, outer := f.sides()
			if app == nil || addrPort(app.RemoteAddr()) != local {
				t.Fatalf("the application's side is %v", app)
			}
			f.adoptKeepAlive(time.Unix(0, f.start).Add(settled - 1))
			if got := idleOf(t, outer); got != defaultKeepAlive {
				t.Errorf("before it has settled it probes after %v", got)
			}
			f.adoptKeepAlive(time.Unix(0, f.start).Add(settled))
			if got := idleOf(t, outer); got != c.want {
				t.Errorf("it probes after %v, want %v", got, c.want)
			}
			client.outlet.probe(local, remote, 7*time.Second)
			f.adoptKeepAlive(time.Unix(0, f.start).Add(2 * settled))
			if got := idleOf(t, outer); got != c.want {
				t.Errorf("it was looked at again: %v", got)
			}
		})
	}
	t.Run("in", func(t *testing.T) {
		w := newWorld(t)
		n := w.node(nil)
		server := n.add("server", nil)
		server.app(echo)
		conn, err := net.Dial("tcp", server.plain.String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		hello(t, conn)
		f := n.onlyFlow()
		app, outer := f.sides()
		if outer == nil || addrPort(outer.RemoteAddr()) != addrPort(conn.LocalAddr()) {
			t.Fatalf("the outer side is %v", outer)
		}
		server.outlet.probe(addrPort(app.RemoteAddr()), addrPort(app.LocalAddr()), 33*time.Second)
		f.adoptKeepAlive(time.Unix(0, f.start).Add(settled))
		if got := idleOf(t, outer); got != 33*time.Second {
			t.Errorf("it probes after %v, want 33 s", got)
		}
	})
	t.Run("not within the node", func(t *testing.T) {
		w := newWorld(t)
		n := w.node(func(c *Config) { c.SameNode = true })
		client, server := n.add("client", nil), n.add("server", nil)
		vip := w.publish("server", client, server, server.app(echo).Port(), nil)
		conn := client.dial(vip)
		hello(t, conn)
		for _, f := range n.flows.all() {
			if app, outer := f.sides(); app != nil || outer != nil {
				t.Errorf("a flow that does not leave the node has the sides %v and %v", app, outer)
			}
		}
	})
	t.Run("not in a tunnel", func(t *testing.T) {
		w := newWorld(t)
		n := w.node(nil)
		client, server := n.add("client", nil), n.add("server", nil)
		vip := w.publish("server", client, server, server.app(echo).Port(), nil)
		hello(t, client.dial(vip))
		for _, f := range n.flows.all() {
			f.adoptKeepAlive(time.Now().Add(time.Hour)) // it has nothing to look at
		}
	})
}

func hello(t *testing.T, c net.Conn) {
	t.Helper()
	if err := roundTrip(c, "hello"); err != nil {
		t.Fatal(err)
	}
}

// onlyFlow returns the one flow that carries bytes, once it does.
func (n *node) onlyFlow() *flow {
	n.world.t.Helper()
	var found *flow
	eventually(n.world.t, "the flow", func() bool {
		fs := n.flows.all()
		if len(fs) == 1 {
			found = fs[0]
			app, _ := found.sides()
			return app != nil
		}
		return false
	})
	return found
}

// probe says when the pod's socket will probe.
func (o *fakeOutlet) probe(local, remote netip.AddrPort, due time.Duration) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.probes == nil {
		o.probes = make(map[[2]netip.AddrPort]time.Duration)
	}
	o.probes[[2]netip.AddrPort{local, remote}] = due
}
