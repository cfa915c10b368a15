package ztunnel

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/weft-mesh/weft/hbone"
	"github.com/weft-mesh/weft/identity"
	"github.com/weft-mesh/weft/internal/handoff"
	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/view"
)

// closed wants c to end with an RST. How soon is for tests that have a machine of
// their own.
func closed(t *testing.T, c *net.TCPConn) {
	t.Helper()
	began := time.Now()
	c.SetReadDeadline(began.Add(30 * time.Second))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("after %v: %v, want a reset", time.Since(began), err)
	}
}

func TestPolicyChangeClosesWhatItForbids(t *testing.T) {
	p := newPair(t, echo)
	p.setPolicies(allowOnly("a", "client"))
	tunnelled := p.client.dial(p.service)
	if err := roundTrip(tunnelled, "before"); err != nil {
		t.Fatal(err)
	}
	p.setPolicies(allowOnly("a", "client"), denyFrom("d", "nobody-here"))
	if err := roundTrip(tunnelled, "an unrelated change"); err != nil {
		t.Fatal(err)
	}
	p.setPolicies(denyFrom("d", "client"))
	closed(t, tunnelled)
	p.serverNode.logged(`error="closed: no longer allowed: denied by policy shop/d"`)
}

func TestStrictClosesPlainConnections(t *testing.T) {
	p := newPair(t, echo)
	outsider := p.clientNode.add("outsider", func(w *mesh.Workload) { w.Transport = mesh.PlainTCP })
	plain, tunnelled := outsider.dial(p.server.plain), p.client.dial(p.service)
	for _, c := range []*net.TCPConn{plain, tunnelled} {
		if err := roundTrip(c, "before"); err != nil {
			t.Fatal(err)
		}
	}
	p.setPolicies(strict())
	closed(t, plain)
	if err := roundTrip(tunnelled, "after"); err != nil {
		t.Errorf("the tunnelled connection: %v", err)
	}
}

// A policy and the workload that lists it come separately: an open connection
// survives the moment in between, but not a policy that never comes.
func TestListedPolicyThatComesLater(t *testing.T) {
	p := newPair(t, echo)
	c := p.client.dial(p.service)
	if err := roundTrip(c, "before"); err != nil {
		t.Fatal(err)
	}
	list := func(names ...mesh.Name) {
		p.change(func(w *world) {
			for i := range w.ws {
				if w.ws[i].Name.Name == "server" {
					w.ws[i].Policies = names
				}
			}
		})
	}
	allow := allowOnly("allow", "client")
	allow.Scope = mesh.ScopeSelector
	list(allow.Name)
	if n := p.serverNode.recheckAll(true); n != 1 { // in between, which must not last
		t.Errorf("%d open connections wait for the policy, want 1", n)
	}
	p.setPolicies(allow)
	if err := roundTrip(c, "after"); err != nil {
		t.Fatal(err)
	}
	list(allow.Name, mesh.Name{Namespace: "shop", Name: "never"})
	closed(t, c)
}

// A pod that is taken out of the View while it ends keeps its connections.
func TestPodThatLeavesTheView(t *testing.T) {
	p := newPair(t, echo)
	c := p.client.dial(p.service)
	if err := roundTrip(c, "before"); err != nil {
		t.Fatal(err)
	}
	p.change(func(w *world) { w.ws = nil })
	p.serverNode.recheckAll(false)
	if err := roundTrip(c, "after"); err != nil {
		t.Error(err)
	}
}

func TestDelStopsAcceptingAndLetsConnectionsEnd(t *testing.T) {
	p := newPair(t, echo)
	c := p.client.dial(p.service)
	if err := roundTrip(c, "before"); err != nil {
		t.Fatal(err)
	}
	p.serverNode.Del(p.server.uid)
	if conn, err := net.Dial("tcp", netip.AddrPortFrom(p.server.addr, hbone.Port).String()); err == nil {
		conn.Close()
		t.Error("the tunnel listener still accepts after Del")
	}
	if err := roundTrip(c, "after"); err != nil {
		t.Errorf("the open connection: %v", err)
	}
	c.CloseWrite()
	if _, err := io.ReadAll(c); err != nil {
		t.Errorf("the end of the open connection: %v", err)
	}
	eventually(t, "that nothing is left of the pod", func() bool {
		p.serverNode.mu.Lock()
		defer p.serverNode.mu.Unlock()
		return len(p.serverNode.owners) == 0
	})
	p.serverNode.Del(p.server.uid) // once more is no error
}

// A connection whose handshake is over but that was not accepted yet when its
// pod leaves is served, not reset.
func TestDelServesTheBacklog(t *testing.T) {
	w := newWorld(t)
	n := w.node(nil)
	w.change(func(*world) {})
	e, p := w.entry("client", freshAddr())
	p.node = n
	n.enter = enterWith(p)
	id := identityOf("shop", "client")
	q, err := newPod(n.Proxy, e.Pod, id, "slow", e.Files)
	if err != nil {
		t.Fatal(err)
	}
	outside := netip.AddrPortFrom(freshAddr(), p.port)
	p.outlet.route(outside, startApp(t, "127.0.0.1:0", echo))
	c := p.dial(outside) // nobody accepts yet
	// As Del does it, but with time for an acceptor that has to wait for its turn.
	n.mu.Lock()
	n.owners[q.owner] = q
	n.cfg.Identity.Warm(id)
	q.start()
	stopped := n.leave(q, time.Second, time.Hour)
	n.mu.Unlock()
	<-stopped
	if err := roundTrip(c, "late"); err != nil {
		t.Error(err)
	}
}

// A listener that cannot accept does not fill the log, nor keep the pod from
// leaving.
func TestAcceptFailuresAreSaidOnce(t *testing.T) {
	var out lockedBuffer
	w := newWorld(t)
	n := w.node(func(c *Config) { c.Log = slog.New(slog.NewTextHandler(&out, nil)) })
	e, p := w.entry("server", freshAddr())
	n.enter = enterWith(p)
	raw, err := e.Files.Listeners[handoff.In4].SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	// accept(2) fails from here on, as it does without descriptors.
	if err := raw.Control(func(fd uintptr) { err = syscall.Shutdown(int(fd), syscall.SHUT_RD) }); err != nil {
		t.Fatal(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	said := func() int { return strings.Count(strings.Join(out.lines(), "\n"), "cannot accept") }
	if err := n.Add(t.Context(), e.Pod, e.Files); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the complaint", func() bool { return said() > 0 })
	<-time.After(200 * time.Millisecond) // several attempts
	n.Del(p.uid)
	if said() != 1 {
		t.Errorf("%d lines, want 1", said())
	}
}

func TestLeaveTimeoutEndsTheRest(t *testing.T) {
	w := newWorld(t)
	n := w.node(func(c *Config) { c.LeaveTimeout = 50 * time.Millisecond })
	server := n.add("server", nil)
	app := server.app(echo)
	client := w.node(nil).add("client", nil)
	c := client.dial(w.publish("server", client, server, app.Port(), nil))
	if err := roundTrip(c, "before"); err != nil {
		t.Fatal(err)
	}
	n.Del(server.uid)
	closed(t, c)
	n.logged("drain time is over")
}

// slowOutlet is still dialing after its context has ended.
type slowOutlet struct {
	*fakeOutlet
	t               *testing.T
	dialing, closed chan struct{}
	dialed          atomic.Bool
}

func (o *slowOutlet) Dial(ctx context.Context, _ string, _, _ netip.AddrPort, _ func(int) error) (*net.TCPConn, error) {
	close(o.dialing)
	<-ctx.Done()
	select {
	case <-o.closed:
		o.t.Error("the namespace was closed while somebody dialed from it: its descriptor may be another pod's by now")
	case <-time.After(100 * time.Millisecond):
	}
	o.dialed.Store(true)
	return nil, ctx.Err()
}

func (o *slowOutlet) Close() error { close(o.closed); return nil }

// A dial for a tunnel is nobody's in particular, and may last longer than the
// pod's last connection.
func TestPodIsNotClosedUnderADial(t *testing.T) {
	w := newWorld(t)
	n := w.node(func(c *Config) { c.LeaveTimeout = 10 * time.Millisecond })
	server := w.node(nil).add("server", nil)
	e, client := w.entry("client", freshAddr())
	slow := &slowOutlet{fakeOutlet: client.outlet, t: t, dialing: make(chan struct{}), closed: make(chan struct{})}
	n.enter = func(handoff.Files) (outlet, error) { return slow, nil }
	if err := n.Add(t.Context(), e.Pod, e.Files); err != nil {
		t.Fatal(err)
	}
	client.node = n
	client.dial(w.publish("server", client, server, 80, nil))
	<-slow.dialing
	n.Del(client.uid)
	eventually(t, "that the pod is closed", func() bool {
		select {
		case <-slow.closed:
			return slow.dialed.Load()
		default:
			return false
		}
	})
}

func TestShutdownDrains(t *testing.T) {
	w := newWorld(t)
	n := w.node(func(c *Config) { c.DrainTimeout = 30 * time.Second })
	server := n.add("server", nil)
	app := server.app(echo)
	client := w.node(nil).add("client", nil)
	c := client.dial(w.publish("server", client, server, app.Port(), nil))
	if err := roundTrip(c, "before"); err != nil {
		t.Fatal(err)
	}
	stopped := make(chan struct{})
	go func() {
		n.stop()
		close(stopped)
	}()
	eventually(t, "that it stops accepting", func() bool {
		conn, err := net.Dial("tcp", netip.AddrPortFrom(server.addr, hbone.Port).String())
		if err == nil {
			conn.Close()
		}
		return err != nil
	})
	if err := roundTrip(c, "while draining"); err != nil {
		t.Error(err)
	}
	select {
	case <-stopped:
		t.Error("it stopped before its connection ended")
	default:
	}
	e, _ := w.entry("late", freshAddr())
	if err := n.Add(t.Context(), e.Pod, e.Files); err == nil {
		t.Error("a pod was added while draining")
	}
	c.CloseWrite()
	io.ReadAll(c)
	c.Close()
	<-stopped
}

func TestShutdownForcesTheRest(t *testing.T) {
	w := newWorld(t)
	n := w.node(func(c *Config) { c.DrainTimeout = 50 * time.Millisecond })
	server := n.add("server", nil)
	app := server.app(echo)
	client := w.node(nil).add("client", nil)
	c := client.dial(w.publish("server", client, server, app.Port(), nil))
	if err := roundTrip(c, "before"); err != nil {
		t.Fatal(err)
	}
	n.Del(server.uid) // has an hour, were it not for the shutdown
	n.stop()
	closed(t, c)
}

func TestAddIsIdempotent(t *testing.T) {
	w := newWorld(t)
	n := w.node(nil)
	e, p := w.entry("server", freshAddr())
	n.enter = enterWith(p)
	again := handoff.Entry{Pod: e.Pod}
	copyFiles(t, &again.Files, e.Files)
	if err := n.Add(t.Context(), e.Pod, e.Files); err != nil {
		t.Fatal(err)
	}
	first := n.pods[p.uid]
	again.Pod.Addresses = append(addrs("fd00::1"), again.Pod.Addresses...)
	if err := n.Add(t.Context(), again.Pod, again.Files); err != nil {
		t.Fatal(err)
	}
	if n.pods[p.uid] != first {
		t.Error("the same sockets again made a new pod")
	}
	if got := len(first.info.Load().Addresses); got != 2 {
		t.Errorf("%d addresses, want the 2 of the correction", got)
	}
	if got := n.world.gauge("workload_manager_active_proxy_count", n); got != 1 {
		t.Errorf("%v pods counted, want 1", got)
	}

	// Other sockets replace the old ones.
	other, q := w.entry("server", freshAddr())
	n.enter = enterWith(q)
	if err := n.Add(t.Context(), other.Pod, other.Files); err != nil {
		t.Fatal(err)
	}
	if n.pods[p.uid] == first {
		t.Error("other sockets did not replace the old ones")
	}
}

// copyFiles fills to with descriptors of the files in from.
func copyFiles(t *testing.T, to *handoff.Files, from handoff.Files) {
	t.Helper()
	one := func(to **os.File, from *os.File) {
		if from == nil {
			return
		}
		fd, err := dupFD(from)
		if err != nil {
			t.Fatal(err)
		}
		*to = os.NewFile(uintptr(fd), from.Name())
	}
	one(&to.Netns, from.Netns)
	one(&to.Blessed, from.Blessed)
	for i := range from.Listeners {
		one(&to.Listeners[i], from.Listeners[i])
	}
}

func TestAddOfBadPods(t *testing.T) {
	n := newWorld(t).node(nil)
	for name, change := range map[string]func(*handoff.Entry){
		"no service account": func(e *handoff.Entry) { e.Pod.ServiceAccount = "" },
		"no UID":             func(e *handoff.Entry) { e.Pod.UID = "" },
		"a listener that is no socket": func(e *handoff.Entry) {
			e.Files.Listeners[handoff.Out4].Close()
			e.Files.Listeners[handoff.Out4], _ = os.Open(os.DevNull)
		},
		"a namespace that is none": func(e *handoff.Entry) {
			n.enter = enterNamespace
			e.Files.Netns.Close()
			e.Files.Netns, _ = os.Open(os.DevNull)
		},
	} {
		e, p := n.world.entry("x", freshAddr())
		n.enter = enterWith(p)
		change(&e)
		if err := n.Add(t.Context(), e.Pod, e.Files); err == nil {
			t.Errorf("%s: no error", name)
		}
		if len(n.pods) != 0 {
			t.Errorf("%s: it is served", name)
		}
		if e.Files.Netns.Close() == nil {
			t.Errorf("%s: its files are open", name)
		}
	}
}

func TestSnapshotEndAndHeld(t *testing.T) {
	w := newWorld(t)
	n := w.node(nil)
	a, b := n.add("a", nil), n.add("b", nil)
	held := n.Held()
	if len(held) != 2 {
		t.Fatalf("%d pods held, want 2", len(held))
	}
	for _, e := range held {
		if err := e.Pod.Validate(); err != nil {
			t.Error(err)
		}
		l, err := net.FileListener(e.Files.Listeners[handoff.HB4])
		if err != nil {
			t.Fatal(err)
		}
		if addr := l.Addr().(*net.TCPAddr).AddrPort(); addr.Addr() != e.Pod.Addresses[0] || addr.Port() != hbone.Port {
			t.Errorf("pod %s is held with listener %v", e.Pod.Name, addr)
		}
		l.Close()
		e.Files.Close()
	}
	n.SnapshotEnd(map[string]bool{a.uid: true})
	n.mu.Lock()
	_, hasA := n.pods[a.uid]
	_, hasB := n.pods[b.uid]
	n.mu.Unlock()
	if !hasA || hasB {
		t.Errorf("after the snapshot: a %v, b %v, want only a", hasA, hasB)
	}
}

func TestIdentityComesFromTheAgent(t *testing.T) {
	p := newPair(t, echo)
	// The View claims that the client pod is somebody else.
	p.change(func(w *world) {
		for i := range w.ws {
			if w.ws[i].Name.Name == "client" {
				w.ws[i].Identity = identityOf("shop", "admin")
			}
		}
	})
	p.setPolicies(allowOnly("a", "admin"))
	p.client.refused(p.service)
	p.serverNode.logged(`src.identity="spiffe://cluster.local/ns/shop/sa/client"`, "denied")
}

func TestSameNodeShortCut(t *testing.T) {
	w := newWorld(t)
	n := w.node(func(c *Config) { c.SameNode = true })
	client, server := n.add("client", nil), n.add("server", nil)
	app := server.app(echo)
	service := w.publish("server", client, server, app.Port(), nil)
	w.setPolicies(allowOnly("a", "client"))
	c := client.dial(service)
	if err := roundTrip(c, "straight"); err != nil {
		t.Fatal(err)
	}
	if got := client.outlet.dialed(); len(got) != 0 {
		t.Errorf("the client's pod dialed %v, want nothing", got)
	}
	if got := server.outlet.dialed(); len(got) != 1 || got[0] != app {
		t.Errorf("the server's pod dialed %v, want its application", got)
	}
	w.setPolicies(denyFrom("d", "client"))
	closed(t, c)
	out := n.logged(`direction="outbound"`, "no longer allowed")
	in := n.logged(`direction="inbound"`, "no longer allowed")
	for _, line := range []string{out, in} {
		if !strings.Contains(line, `src.identity="spiffe://cluster.local/ns/shop/sa/client"`) {
			t.Errorf("line without the client's identity: %s", line)
		}
	}
	client.refused(service)
	if got := server.outlet.dialed(); len(got) != 1 {
		t.Errorf("a denied connection reached the application: %v", got)
	}

	// The pod at the address is not who the View says.
	w.setPolicies()
	w.change(func(w *world) {
		for i := range w.ws {
			if w.ws[i].Name.Name == "server" {
				w.ws[i].Identity.ServiceAccount = "other"
			}
		}
	})
	client.refused(service)
	n.logged(identity.ErrWrongPeer.Error())
}

// A process may bind its socket to any address that it can give its pod. Without
// a tunnel nobody but us says where the connection comes from.
func TestSameNodeSourceIsThePods(t *testing.T) {
	w := newWorld(t)
	n := w.node(func(c *Config) { c.SameNode = true })
	client, server := n.add("client", nil), n.add("server", nil)
	service := w.publish("server", client, server, server.app(echo).Port(), nil)
	from := func(a netip.Addr) mesh.Policy {
		return mesh.Policy{
			Name: mesh.Name{Namespace: "shop", Name: "by-address"}, Scope: mesh.ScopeNamespace, Action: mesh.Allow,
			Groups: []mesh.Group{{Clauses: []mesh.Clause{{Matches: []mesh.Match{{SourceIPs: []netip.Prefix{netip.PrefixFrom(a, 32)}}}}}}},
		}
	}
	lie := &testPod{node: n, addr: netip.MustParseAddr("127.0.0.1")} // the client, by another of its addresses
	w.setPolicies(from(lie.addr))
	lie.refused(service)
	w.setPolicies(from(client.addr))
	c := lie.dial(service)
	if err := roundTrip(c, "hello"); err != nil {
		t.Fatal(err)
	}
	c.Close()
	n.logged(`direction="inbound"`, "src.addr="+client.addr.String()+":", "bytes_recv=5")
}

func TestSameNodeIsOffByDefault(t *testing.T) {
	w := newWorld(t)
	n := w.node(nil)
	client, server := n.add("client", nil), n.add("server", nil)
	app := server.app(echo)
	if err := roundTrip(client.dial(w.publish("server", client, server, app.Port(), nil)), "tunnel"); err != nil {
		t.Fatal(err)
	}
	if got := client.outlet.dialed(); len(got) != 1 || got[0].Port() != hbone.Port {
		t.Errorf("dialed %v, want a tunnel", got)
	}
}

// The ports of plain clients must not be taken for connections in their name.
func TestPlainClients(t *testing.T) {
	var p plainClients
	a := netip.MustParseAddrPort("10.0.0.2:4000")
	if p.has(a) {
		t.Error("the zero value has a client")
	}
	p.add(a)
	p.add(a)
	p.remove(a)
	if !p.has(a) {
		t.Error("gone after one of two ended")
	}
	p.remove(a)
	if p.has(a) || len(p.open) != 0 {
		t.Error("still there")
	}
}

func TestPoolsNeverCrossPods(t *testing.T) {
	w := newWorld(t)
	n := w.node(nil)
	a := n.add("a", nil)
	q := n.pods[a.uid]
	if _, err := n.tunnelTLS(hbone.Target{Owner: q.owner, Source: identityOf("shop", "b")}); err == nil {
		t.Error("a tunnel of pod a was given the certificate of b")
	}
	if _, err := n.tunnelTLS(hbone.Target{Owner: "gone", Source: q.id}); err == nil {
		t.Error("a tunnel of nobody was given a certificate")
	}
	if _, err := n.dialTunnel(t.Context(), hbone.Target{Owner: "gone"}); err == nil {
		t.Error("a tunnel of nobody was dialed")
	}
}

func TestOwnWorkloadOfAnEmptyView(t *testing.T) {
	if w := ownWorkload(new(view.View), handoff.Pod{}, mesh.Identity{}); w != nil {
		t.Errorf("the zero view knows %v", w)
	}
}
