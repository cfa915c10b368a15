package ztunnel

import (
	"bytes"
	"context"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/identity"
	"github.com/weft-mesh/weft/internal/handoff"
	"github.com/weft-mesh/weft/internal/testca"
	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/view"
)

// A world is a mesh on loopback addresses, without root: each pod has one of
// its own, 127.x.y.z, on which its application and its listeners are. What a
// client dials is the port of its pod's outbound listener at the target's
// address: that listener is on every address, so the accepted connection's
// local address is the target, as with capture.
type world struct {
	t     *testing.T
	ca    *testca.CA
	roots *identity.Roots
	view  *view.Store

	mu       sync.Mutex
	version  int
	ws       []mesh.Workload
	ss       []mesh.Service
	policies []mesh.Policy
}

const trustDomain = "cluster.local"

func newWorld(t *testing.T) *world {
	t.Helper()
	ca := testca.New(t, trustDomain)
	roots, err := identity.NewRoots(trustDomain, ca.PEM())
	if err != nil {
		t.Fatal(err)
	}
	return &world{t: t, ca: ca, roots: roots, view: new(view.Store)}
}

// ownNetwork returns the x of 127.x.0.0/16, where this process has its pods, and
// what keeps others that run the same tests out of it until the process ends.
var ownNetwork = sync.OnceValues(func() (byte, net.Listener) {
	for x := byte(77); x < 255; x++ {
		if l, err := net.Listen("tcp4", fmt.Sprintf("127.%d.0.0:15008", x)); err == nil {
			return x, l
		}
	}
	panic("no network 127.x.0.0/16 is free for the pods of these tests")
})

// nextAddr gives every pod of the test binary an address of its own.
var nextAddr atomic.Uint32

func freshAddr() netip.Addr {
	n := nextAddr.Add(1)
	x, _ := ownNetwork()
	return netip.AddrFrom4([4]byte{127, x, byte(n >> 8), byte(n)})
}

// change edits the state of the mesh and publishes it.
func (w *world) change(edit func(w *world)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	edit(w)
	w.version++
	w.view.Set(view.New(fmt.Sprint(w.version), append([]mesh.Workload(nil), w.ws...),
		append([]mesh.Service(nil), w.ss...), append([]mesh.Policy(nil), w.policies...)))
}

// setPolicies replaces all policies.
func (w *world) setPolicies(ps ...mesh.Policy) { w.change(func(w *world) { w.policies = ps }) }

// issuer signs with the world's CA.
type issuer struct{ ca *testca.CA }

func (i issuer) Issue(_ context.Context, id mesh.Identity, csr []byte) (identity.Issued, error) {
	r, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return identity.Issued{}, err
	}
	return identity.Issued{Chain: [][]byte{i.ca.Sign(id, r.PublicKey, nil).Raw}}, nil
}

// node is a running proxy.
type node struct {
	*Proxy
	world   *world
	log     *lockedBuffer // access log
	metrics *prometheus.Registry
	stop    func() // ends Run and waits for it
}

// lockedBuffer is a bytes.Buffer for concurrent use.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) lines() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return strings.Split(strings.TrimRight(b.b.String(), "\n"), "\n")
}

// node starts a proxy; change may edit its configuration.
func (w *world) node(change func(*Config)) *node {
	w.t.Helper()
	log := slog.New(slog.NewTextHandler(w.t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	n := &node{world: w, log: new(lockedBuffer), metrics: prometheus.NewRegistry()}
	manager := identity.NewManager(identity.Config{Issuer: issuer{w.ca}, Roots: w.roots, TrustDomain: trustDomain, Log: log})
	cfg := Config{
		View: w.view, Identity: manager, Roots: w.roots, TrustDomain: trustDomain, Cluster: "Kubernetes",
		Log: log, AccessLog: n.log, Metrics: n.metrics, DrainTimeout: 5 * time.Second,
	}
	if change != nil {
		change(&cfg)
	}
	n.Proxy = New(cfg)
	stopManager := background(w.t, manager.Run)
	stopProxy := background(w.t, n.Run)
	n.stop = func() { stopProxy(); stopManager() }
	return n
}

// background runs f until the test or the returned func ends it.
func background(t *testing.T, f func(context.Context) error) (stop func()) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(stop)
	return stop
}

// testPod is a pod of the world.
type testPod struct {
	node   *node
	name   string
	uid    string
	addr   netip.Addr
	port   uint16         // of the outbound listener
	plain  netip.AddrPort // the listener for plain connections
	outlet *fakeOutlet
}

// fakeOutlet dials from the pod's address, without marks.
type fakeOutlet struct {
	addr netip.Addr
	mu   sync.Mutex
	to   map[netip.AddrPort]netip.AddrPort // where a target really is
	seen []netip.AddrPort                  // targets that were dialed
	// probes are when sockets of the pod probe, by local and remote address.
	probes map[[2]netip.AddrPort]time.Duration
}

func (o *fakeOutlet) Dial(ctx context.Context, network string, _, remote netip.AddrPort, _ func(int) error) (*net.TCPConn, error) {
	o.mu.Lock()
	o.seen = append(o.seen, remote)
	if to, ok := o.to[remote]; ok {
		remote = to
	}
	o.mu.Unlock()
	d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(o.addr, 0))}
	c, err := d.DialContext(ctx, network, remote.String())
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// Begin connects as Dial does, and does not wait.
func (o *fakeOutlet) Begin(_, remote netip.AddrPort, _ func(int) error) (int, error) {
	o.mu.Lock()
	o.seen = append(o.seen, remote)
	if to, ok := o.to[remote]; ok {
		remote = to
	}
	o.mu.Unlock()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	err = unix.Bind(fd, &unix.SockaddrInet4{Addr: o.addr.As4()})
	if err == nil {
		err = unix.Connect(fd, &unix.SockaddrInet4{Addr: remote.Addr().As4(), Port: int(remote.Port())})
	}
	if err != nil && err != unix.EINPROGRESS {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// route makes target lead to to.
func (o *fakeOutlet) route(target, to netip.AddrPort) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.to[target] = to
}

func (o *fakeOutlet) dialed() []netip.AddrPort {
	o.mu.Lock()
	defer o.mu.Unlock()
	return append([]netip.AddrPort(nil), o.seen...)
}

// enterWith gives a proxy the fake outlet of the pod that is added next.
func enterWith(p *testPod) func(handoff.Files) (outlet, error) {
	return func(handoff.Files) (outlet, error) { return p.outlet, nil }
}

func (o *fakeOutlet) Holds(a netip.Addr, _ bool) (bool, error) { return a == o.addr, nil }
func (o *fakeOutlet) Close() error                             { return nil }
func (o *fakeOutlet) KeepAlive(local, remote netip.AddrPort) (time.Duration, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.probes[[2]netip.AddrPort{local, remote}], nil
}

// entry makes the listeners of a pod at addr.
func (w *world) entry(name string, addr netip.Addr) (handoff.Entry, *testPod) {
	w.t.Helper()
	p := &testPod{name: name, uid: "uid-" + name, addr: addr, outlet: &fakeOutlet{addr: addr, to: map[netip.AddrPort]netip.AddrPort{}}}
	e := handoff.Entry{Pod: handoff.Pod{UID: p.uid, Name: name, Namespace: "shop", ServiceAccount: name, Addresses: []netip.Addr{addr}}}
	listen := func(r handoff.Role, at string) netip.AddrPort {
		l, err := net.Listen("tcp4", at)
		if err != nil {
			w.t.Fatal(err)
		}
		defer l.Close()
		if e.Files.Listeners[r], err = l.(*net.TCPListener).File(); err != nil {
			w.t.Fatal(err)
		}
		return l.Addr().(*net.TCPAddr).AddrPort()
	}
	p.port = listen(handoff.Out4, "0.0.0.0:0").Port()
	p.plain = listen(handoff.In4, addr.String()+":0")
	listen(handoff.HB4, addr.String()+":15008")
	var err error
	if e.Files.Netns, err = os.Open("/proc/self/ns/net"); err != nil {
		w.t.Fatal(err)
	}
	if e.Files.Blessed, err = os.Open(os.DevNull); err != nil {
		w.t.Fatal(err)
	}
	return e, p
}

// add makes a pod on n, with its workload in the View. edit may change the
// workload before.
func (n *node) add(name string, edit func(*mesh.Workload)) *testPod {
	n.world.t.Helper()
	e, p := n.world.entry(name, freshAddr())
	n.enter = enterWith(p)
	if err := n.Add(n.world.t.Context(), e.Pod, e.Files); err != nil {
		n.world.t.Fatal(err)
	}
	p.node = n
	w := workload(name, p.addr.String())
	if edit != nil {
		edit(&w)
	}
	n.world.change(func(world *world) { world.ws = append(world.ws, w) })
	return p
}

// app starts an application of the pod on a port of its own. serve owns each
// connection. The pod's plain listener takes connections for it.
func (p *testPod) app(serve func(*net.TCPConn)) netip.AddrPort {
	t := p.node.world.t
	t.Helper()
	at := startApp(t, p.addr.String()+":0", serve)
	p.outlet.route(p.plain, at)
	return at
}

// startApp serves TCP connections at addr until the test ends.
func startApp(t *testing.T, addr string, serve func(*net.TCPConn)) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	var accepting, serving sync.WaitGroup
	var mu sync.Mutex
	open := map[net.Conn]bool{}
	accepting.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open[c] = true
			mu.Unlock()
			serving.Go(func() {
				defer c.Close()
				serve(c.(*net.TCPConn))
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		accepting.Wait() // so that none is left out
		mu.Lock()
		for c := range open {
			c.Close()
		}
		mu.Unlock()
		serving.Wait()
	})
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// echo sends back what it reads until the end, then closes.
func echo(c *net.TCPConn) {
	io.Copy(c, c)
	c.CloseWrite()
}

// publish makes a service whose port is the client's outbound listener's, so
// that the client can dial it. Its endpoint is port to of pod p.
func (w *world) publish(name string, client, p *testPod, to uint16, edit func(*mesh.Service)) netip.AddrPort {
	vip := freshAddr()
	s := mesh.Service{
		Name: serviceName(name), ShortName: name, VIPs: []mesh.VIP{{Prefix: netip.PrefixFrom(vip, 32)}},
		Ports: []mesh.Port{{Service: client.port, Target: to}},
	}
	if edit != nil {
		edit(&s)
	}
	w.change(func(w *world) {
		w.ss = append(w.ss, s)
		for i := range w.ws {
			if w.ws[i].Name.Name == p.name {
				w.ws[i].Services = append(append([]mesh.Membership(nil), w.ws[i].Services...), mesh.Membership{
					Service: s.Name, Ports: []mesh.Port{{Service: client.port, Target: to}},
				})
			}
		}
	})
	return netip.AddrPortFrom(vip, client.port)
}

// dial connects as a process of pod p does. The proxy may refuse a connection
// before connect has returned, which net.Dial says, and others only notice when
// they use it: here all do that.
func (p *testPod) dial(to netip.AddrPort) *net.TCPConn {
	t := p.node.world.t
	t.Helper()
	var c net.Conn
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrInet4{Addr: p.addr.As4()})
	}
	if err == nil {
		if err = unix.Connect(fd, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}); err == unix.ECONNRESET {
			err = nil
		}
	}
	if err == nil {
		f := os.NewFile(uintptr(fd), "tcp")
		c, err = net.FileConn(f)
		f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(30 * time.Second))
	return c.(*net.TCPConn)
}

// talk makes round trips on connection i until stop is closed, each with some
// words as often as times says.
func talk(t testing.TB, c net.Conn, i, times int, stop <-chan struct{}) {
	for k := 0; ; k++ {
		if err := roundTrip(c, strings.Repeat(fmt.Sprint("talk ", i, k), times)); err != nil {
			t.Errorf("connection %d, after %d: %v", i, k, err)
			return
		}
		select {
		case <-stop:
			return
		default:
		}
	}
}

// roundTrip sends s over c and wants it back.
func roundTrip(c net.Conn, s string) error {
	if _, err := io.WriteString(c, s); err != nil {
		return err
	}
	b := make([]byte, len(s))
	if _, err := io.ReadFull(c, b); err != nil {
		return err
	}
	if string(b) != s {
		return fmt.Errorf("got %q, want %q", b, s)
	}
	return nil
}

// eventually waits for a condition.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(15 * time.Second)
	for !ok() {
		select {
		case <-deadline:
			t.Fatalf("%s: it did not come", what)
		case <-time.After(time.Millisecond):
		}
	}
}

// logged waits for an access line that has all of these.
func (n *node) logged(parts ...string) string {
	n.world.t.Helper()
	var found string
	eventually(n.world.t, fmt.Sprintf("an access line with %q in %q", parts, n.log.lines()), func() bool {
		for _, l := range n.log.lines() {
			all := true
			for _, p := range parts {
				all = all && strings.Contains(l, p)
			}
			if all {
				found = l
				return true
			}
		}
		return false
	})
	return found
}
