package capture

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/bpf"
	"github.com/weft-mesh/weft/internal/netns"
	"github.com/weft-mesh/weft/internal/testnet"
)

// soon bounds what should happen at once, also on a machine that is busy with
// something else for seconds. What should never happen gets a hundred times what
// it takes when it does happen.
const (
	soon  = 20 * time.Second
	never = 300 * time.Millisecond
)

// patience is how long to wait for what an attack does: never, or, where nothing
// is in its way and it must work, soon.
func patience(guarded bool) time.Duration {
	if guarded {
		return never
	}
	return soon
}

// disableEnv is how a test runs others on another rung: t.Setenv.
const disableEnv = "WEFT_TEST_DISABLE"

// A stage is a world with one node, a pod to be captured, and peers.
type stage struct {
	t       testing.TB
	world   *testnet.World
	node    *testnet.Node
	pod     *testnet.Pod  // the one that is captured
	peer    *testnet.Pod  // another on the same node, not in the mesh
	outside *testnet.Host // beyond the node
	cfg     Config
	capture *Capture
}

func newStage(t testing.TB, kind testnet.Kind) *stage {
	t.Helper()
	return shapedStage(t, kind, testnet.Shape{})
}

// shapedStage makes a stage whose pod has the shape.
func shapedStage(t testing.TB, kind testnet.Kind, shape testnet.Shape) *stage {
	t.Helper()
	s := &stage{t: t, world: testnet.New(t)}
	s.node = s.world.Node("node")
	s.outside = s.world.Host("outside")
	s.pod = s.node.ShapedPod("pod", kind, shape)
	s.peer = s.node.Pod("peer", kind)
	s.cfg = Config{
		BPFRoot:  testnet.BPFFS(t) + "/v1",
		ProcRoot: "/proc",
		HostNS:   s.node.NS,
		Log:      slog.New(slog.NewTextHandler(t.Output(), nil)),
		Disable:  strings.Fields(os.Getenv(disableEnv)),
	}
	s.capture = s.agent()
	return s
}

// agent starts a (new) agent on the stage.
func (s *stage) agent() *Capture {
	s.t.Helper()
	c, err := New(s.cfg)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { c.Close() })
	return c
}

func (s *stage) target() Target { return targetOf(s.pod) }

func targetOf(p *testnet.Pod) Target {
	t := Target{UID: "uid-" + p.Name, Netns: p.NS}
	for _, a := range []netip.Addr{p.V4, p.V6} {
		if a.IsValid() {
			t.Addrs = append(t.Addrs, a)
		}
	}
	return t
}

// prepare readies the pod and starts a proxy for it.
func (s *stage) prepare() (*Pod, *proxy) {
	s.t.Helper()
	p, err := s.capture.Prepare(context.Background(), s.target(), nil)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { p.Close() })
	return p, startProxy(s.t, p)
}

func (s *stage) captured(m Mode) (*Pod, *proxy) {
	s.t.Helper()
	p, x := s.prepare()
	s.attach(p, m)
	return p, x
}

// attach captures and waits until what goes on in the background is done too.
func (s *stage) attach(p *Pod, m Mode) {
	s.t.Helper()
	if err := p.Attach(context.Background(), m); err != nil {
		s.t.Fatal(err)
	}
	p.background.Wait()
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// A proxy is a small honest stand-in for ztunnel: it relays what it accepts on
// the listeners to where it was meant for, and remembers it.
type proxy struct {
	t       testing.TB
	files   Files
	ns      *netns.NS
	mu      sync.Mutex
	seen    []seen
	conns   map[net.Conn]bool
	closing bool
	alive   context.Context // ends with kill
	die     context.CancelFunc
	work    sync.WaitGroup
	stop    []io.Closer
}

// seen is a connection that the proxy accepted.
type seen struct {
	role          string // out, in, hb
	local, remote netip.AddrPort
}

func startProxy(t testing.TB, p *Pod) *proxy {
	t.Helper()
	f, err := p.Files()
	if err != nil {
		t.Fatal(err)
	}
	return serve(t, f)
}

// serve starts a proxy with descriptors that it then owns.
func serve(t testing.TB, f Files) *proxy {
	t.Helper()
	x := &proxy{t: t, files: f, conns: map[net.Conn]bool{}}
	x.alive, x.die = context.WithCancel(context.Background())
	x.ns = must(netns.Open(fmt.Sprintf("/proc/self/fd/%d", f.Netns.Fd())))
	for i, lf := range f.Listeners {
		if lf == nil || i >= int(bpf.CaptureRoleROLE_DNS4) {
			continue
		}
		l := must(net.FileListener(lf)).(*net.TCPListener)
		x.stop = append(x.stop, l)
		role := []string{"out", "in", "hb"}[i/2]
		x.work.Go(func() { x.accept(l, role) })
	}
	t.Cleanup(x.kill)
	return x
}

// kill is kill -9: every descriptor of the proxy is closed.
func (x *proxy) kill() {
	x.mu.Lock()
	if x.closing {
		x.mu.Unlock()
		return
	}
	x.closing = true
	for _, l := range x.stop {
		l.Close()
	}
	for c := range x.conns {
		c.Close()
	}
	x.mu.Unlock()
	x.files.Listeners.Close()
	x.die()
	x.work.Wait()
	x.files.Close()
	x.ns.Close()
}

func (x *proxy) accept(l *net.TCPListener, role string) {
	for {
		c, err := l.AcceptTCP()
		if err != nil {
			return
		}
		s := seen{role, addrPort(c.LocalAddr()), addrPort(c.RemoteAddr())}
		x.mu.Lock()
		x.seen = append(x.seen, s)
		x.mu.Unlock()
		x.work.Go(func() { x.relay(c, s) })
	}
}

func addrPort(a net.Addr) netip.AddrPort {
	ap := a.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// hold makes kill close c. It reports false if the proxy is dead already.
func (x *proxy) hold(c net.Conn) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.conns[c] = true
	if x.closing {
		c.Close()
	}
	return !x.closing
}

func (x *proxy) relay(c *net.TCPConn, s seen) {
	defer c.Close()
	if !x.hold(c) {
		return
	}
	if s.role == "hb" {
		io.Copy(io.Discard, c) // a tunnel; nobody speaks that here
		return
	}
	u, err := x.dial(s)
	if err != nil {
		c.SetLinger(0)
		return
	}
	defer u.Close()
	if !x.hold(u) {
		return
	}
	var wg sync.WaitGroup
	wg.Go(func() { io.Copy(u, c); u.CloseWrite() })
	io.Copy(c, u)
	c.CloseWrite()
	wg.Wait()
}

// dial does what the proxy does with an accepted connection.
func (x *proxy) dial(s seen) (*net.TCPConn, error) {
	ctx, cancel := context.WithTimeout(x.alive, soon)
	defer cancel()
	if s.role == "out" {
		return x.ns.Dial(ctx, "tcp", netip.AddrPort{}, s.local, x.toWire)
	}
	return x.ns.Dial(ctx, "tcp", netip.AddrPortFrom(s.remote.Addr(), 0), s.local, toApp)
}

// toWire makes a socket one that may leave the pod.
func (x *proxy) toWire(fd int) error {
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, MarkProxy); err != nil {
		return err
	}
	return bless(int(x.files.Blessed.Fd()), fd)
}

// toApp makes a socket one that connects to the app in the client's name.
func toApp(fd int) error {
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, MarkLocal); err != nil {
		return err
	}
	return unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_TRANSPARENT, 1)
}

// last returns the last connection accepted in the role.
func (x *proxy) last(role string) (seen, bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for i := len(x.seen) - 1; i >= 0; i-- {
		if x.seen[i].role == role {
			return x.seen[i], true
		}
	}
	return seen{}, false
}

func (x *proxy) count(role string) (n int) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, s := range x.seen {
		if s.role == role {
			n++
		}
	}
	return n
}

// An app answers each connection with its own and the peer's address in a
// line, and then echoes.
type app struct {
	*net.TCPListener
	mu    sync.Mutex
	peers []netip.AddrPort
}

func startApp(t testing.TB, h *testnet.Host, address string) *app {
	t.Helper()
	a := &app{TCPListener: h.Listen(address)}
	var wg sync.WaitGroup
	t.Cleanup(wg.Wait)
	var mu sync.Mutex
	conns := map[net.Conn]bool{}
	t.Cleanup(func() {
		a.Close()
		mu.Lock()
		defer mu.Unlock()
		for c := range conns {
			c.Close()
		}
	})
	wg.Go(func() {
		for {
			c, err := a.AcceptTCP()
			if err != nil {
				return
			}
			a.mu.Lock()
			a.peers = append(a.peers, addrPort(c.RemoteAddr()))
			a.mu.Unlock()
			mu.Lock()
			conns[c] = true
			mu.Unlock()
			wg.Go(func() {
				fmt.Fprintf(c, "%v %v\n", addrPort(c.LocalAddr()), addrPort(c.RemoteAddr()))
				io.Copy(c, c)
				c.Close()
				mu.Lock()
				delete(conns, c)
				mu.Unlock()
			})
		}
	})
	return a
}

// accepted returns whom the app has accepted.
func (a *app) accepted() []netip.AddrPort {
	a.mu.Lock()
	defer a.mu.Unlock()
	return append([]netip.AddrPort(nil), a.peers...)
}

// A talk is a client's connection to an app.
type talk struct {
	*net.TCPConn
	server, client netip.AddrPort // as the app sees them
}

// connect connects and reads the app's greeting.
func connect(h *testnet.Host, to netip.AddrPort) (talk, error) {
	c, err := h.Dial(to)
	if err != nil {
		return talk{}, err
	}
	return greet(c)
}

func greet(c *net.TCPConn) (talk, error) {
	c.SetDeadline(time.Now().Add(soon))
	defer c.SetDeadline(time.Time{})
	var line []byte
	for b := make([]byte, 1); ; {
		if _, err := c.Read(b); err != nil {
			return talk{}, err
		}
		if b[0] == '\n' {
			break
		}
		line = append(line, b[0])
	}
	var server, client string
	if _, err := fmt.Sscan(string(line), &server, &client); err != nil {
		return talk{}, fmt.Errorf("greeting %q: %w", line, err)
	}
	return talk{c, netip.MustParseAddrPort(server), netip.MustParseAddrPort(client)}, nil
}

// echo sends a word and waits for it to come back.
func (k talk) echo(word string) error {
	k.SetDeadline(time.Now().Add(soon))
	defer k.SetDeadline(time.Time{})
	if _, err := io.WriteString(k.TCPConn, word); err != nil {
		return err
	}
	b := make([]byte, len(word))
	if _, err := io.ReadFull(k.TCPConn, b); err != nil {
		return err
	}
	if string(b) != word {
		return fmt.Errorf("sent %q, got %q", word, b)
	}
	return nil
}

// refused dials and fails the test if that succeeds. It waits long enough to
// see a connection that only comes with the second SYN.
func refused(t testing.TB, h *testnet.Host, to netip.AddrPort, control func(fd int) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), never)
	defer cancel()
	c, err := h.NS.Dial(ctx, "tcp", netip.AddrPort{}, to, control)
	if err == nil {
		c.Close()
		t.Errorf("%s reached %v, which should not be possible", h.Name, to)
	}
}

// eachFamily runs f for the IPv4 and the IPv6 address of a host.
func eachFamily(t *testing.T, f func(t *testing.T, addr func(h *testnet.Host) netip.Addr)) {
	t.Run("IPv4", func(t *testing.T) { f(t, func(h *testnet.Host) netip.Addr { return h.V4 }) })
	t.Run("IPv6", func(t *testing.T) { f(t, func(h *testnet.Host) netip.Addr { return h.V6 }) })
}

// eventually waits for a condition.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.NewTimer(soon)
	defer deadline.Stop()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-deadline.C:
			t.Fatalf("did not happen: %s", what)
		case <-tick.C:
		}
	}
}

func stat(t testing.TB, p *Pod, name string) uint64 {
	t.Helper()
	m, err := p.Stats()
	if err != nil {
		t.Fatal(err)
	}
	n, ok := m[name]
	if !ok {
		t.Fatalf("no counter %s", name)
	}
	return n
}

// stopAccepting closes the proxy's listeners and lets its connections end.
func (x *proxy) stopAccepting() {
	for _, l := range x.stop {
		l.Close()
	}
	x.files.Listeners.Close()
}
