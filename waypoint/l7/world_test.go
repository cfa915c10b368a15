package l7

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/view"
)

// A world is an engine with a mesh around it, made of pipes. It is to be used
// within a synctest bubble.
type world struct {
	t      *testing.T
	e      *Engine
	store  *view.Store
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	pools  sync.Once // empties those of x/net

	mu       sync.Mutex
	backends map[netip.AddrPort]func(net.Conn) // who takes connections
	dials    []Target
	dialed   []net.Conn
	ended    []Exchange // parts of those that ended
}

var (
	cart = mesh.ServiceName{Namespace: "shop", Host: "cart.shop.svc.cluster.local"}
	v2   = mesh.ServiceName{Namespace: "shop", Host: "cart-v2.shop.svc.cluster.local"}
)

// workload makes an endpoint of services, with the port 8080 for their port 80.
func workload(name, address string, services ...mesh.ServiceName) mesh.Workload {
	w := mesh.Workload{UID: mesh.UID("k//Pod/shop/" + name), Name: mesh.Name{Namespace: "shop", Name: name},
		Addresses: []netip.Addr{netip.MustParseAddr(address)}, Healthy: true, Transport: mesh.HBONE}
	for _, s := range services {
		w.Services = append(w.Services, mesh.Membership{Service: s, Ports: []mesh.Port{{Service: 80, Target: 8080}, {Service: 81, Target: 8081}}})
	}
	return w
}

func service(n mesh.ServiceName, protocol string) mesh.Service {
	return mesh.Service{Name: n, Ports: []mesh.Port{{Service: 80, AppProtocol: protocol}, {Service: 81, AppProtocol: ""}}}
}

// newWorld makes a world with the services cart (two pods) and cart-v2 (one).
func newWorld(t *testing.T, rules ...mesh.Rule) *world {
	return newWorldWith(t, Config{}, rules, nil)
}

func newWorldWith(t *testing.T, cfg Config, rules []mesh.Rule, policies []*mesh.TrafficPolicy) *world {
	t.Helper()
	w := &world{t: t, store: &view.Store{}, backends: map[netip.AddrPort]func(net.Conn){}}
	w.set(rules, policies)
	cfg.Store, cfg.Dialer = w.store, w
	e, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	e.filters = append(e.filters, &recorder{w: w})
	e.noFlow = strings.HasSuffix(t.Name(), strings.ReplaceAll(byGoroutines, " ", "_"))
	w.e = e
	w.ctx, w.cancel = context.WithCancel(t.Context())
	run, stop := context.WithCancel(context.Background())
	var runs sync.WaitGroup
	runs.Go(func() { e.Run(run) })
	t.Cleanup(func() {
		w.cancel()
		w.wg.Wait()
		stop()
		runs.Wait()
	})
	return w
}

// set gives the engine a new View.
func (w *world) set(rules []mesh.Rule, policies []*mesh.TrafficPolicy) {
	ws := []mesh.Workload{workload("a", "10.0.0.1", cart), workload("b", "10.0.0.2", cart), workload("c", "10.0.0.3", v2)}
	ss := []mesh.Service{service(cart, "http"), service(v2, "http")}
	l := view.L7{TrafficPolicies: policies}
	if rules != nil {
		l.Routes = append(l.Routes, &mesh.Route{RouteKey: mesh.RouteKey{Service: cart, Port: 80, Protocol: mesh.RouteHTTP}, Rules: rules})
	}
	w.store.Set(view.WithL7("1", pointersTo(ws), pointersTo(ss), nil, l))
}

func pointersTo[T any](list []T) (out []*T) {
	for i := range list {
		out = append(out, &list[i])
	}
	return out
}

// Dial implements Dialer.
func (w *world) Dial(ctx context.Context, to Target) (net.Conn, error) {
	w.mu.Lock()
	w.dials = append(w.dials, to)
	f := w.backends[to.Address]
	w.mu.Unlock()
	if f == nil {
		return nil, errors.New("nobody listens")
	}
	near, far := net.Pipe()
	w.mu.Lock()
	w.dialed = append(w.dialed, far)
	w.mu.Unlock()
	w.wg.Go(func() {
		defer far.Close()
		f(far)
	})
	return near, nil
}

// hangUp ends the connections to all backends.
func (w *world) hangUp() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, c := range w.dialed {
		c.Close()
	}
}

// backend serves HTTP/1 at an address with net/http.
func (w *world) backend(address string, h http.HandlerFunc) {
	w.raw(address, func(c net.Conn) { serveHTTP(c, h) })
}

// raw lets f take the connections to an address.
func (w *world) raw(address string, f func(net.Conn)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.backends[netip.MustParseAddrPort(address)] = f
}

// serveHTTP serves one connection with net/http.
func serveHTTP(c net.Conn, h http.Handler) {
	l := &oneListener{conn: c, done: make(chan struct{})}
	s := &http.Server{Handler: h, ConnState: func(_ net.Conn, st http.ConnState) {
		if st == http.StateClosed || st == http.StateHijacked {
			l.end()
		}
	}}
	s.Serve(l)
}

// oneListener accepts one connection and ends with it.
type oneListener struct {
	mu   sync.Mutex
	conn net.Conn
	once sync.Once
	done chan struct{}
}

func (l *oneListener) end() { l.once.Do(func() { close(l.done) }) }

func (l *oneListener) Accept() (net.Conn, error) {
	l.mu.Lock()
	c := l.conn
	l.conn = nil
	l.mu.Unlock()
	if c != nil {
		return c, nil
	}
	<-l.done
	return nil, io.EOF
}
func (l *oneListener) Close() error   { l.end(); return nil }
func (l *oneListener) Addr() net.Addr { return &net.TCPAddr{} }

// client connects a client to a port of cart.
func (w *world) client(port uint16) *testClient {
	near, far := net.Pipe()
	w.wg.Go(func() {
		w.e.Serve(w.ctx, far, Facts{Service: cart, Port: port, Source: netip.MustParseAddrPort("10.0.9.9:4000"),
			Destination: netip.MustParseAddrPort("10.96.0.1:80"), Peer: mesh.Identity{TrustDomain: "td", Namespace: "web", ServiceAccount: "front"}})
	})
	c := &testClient{t: w.t, Conn: near, r: bufio.NewReader(near)}
	w.t.Cleanup(func() { near.Close() })
	return c
}

// testClient is a client that says exactly what it is told.
type testClient struct {
	net.Conn
	t *testing.T
	r *bufio.Reader
}

// say sends text while the test goes on.
func (c *testClient) say(text string) {
	go io.WriteString(c.Conn, text)
}

// answer reads one response, and its body.
func (c *testClient) answer(method string) (*http.Response, string) {
	c.t.Helper()
	r, err := http.ReadResponse(c.r, &http.Request{Method: method})
	if err != nil {
		c.t.Fatalf("no answer: %v", err)
	}
	b, err := io.ReadAll(r.Body)
	if err != nil {
		c.t.Fatalf("answer is cut short: %v after %q", err, b)
	}
	return r, string(b)
}

// get is one request without a body and its answer.
func (c *testClient) get(path string, lines ...string) (*http.Response, string) {
	c.t.Helper()
	c.say("GET " + path + " HTTP/1.1\r\nHost: cart\r\n" + strings.Join(append(lines, ""), "\r\n") + "\r\n")
	return c.answer("GET")
}

// expect reads exactly text.
func (c *testClient) expect(text string) {
	c.t.Helper()
	b := make([]byte, len(text))
	if n, err := io.ReadFull(c.r, b); err != nil || string(b) != text {
		c.t.Errorf("got %q, %v, want %q", b[:n], err, text)
	}
}

// closed reports that the proxy has closed the connection.
func (c *testClient) closed() {
	c.t.Helper()
	if b, err := io.ReadAll(c.r); len(b) > 0 || err != nil && !errors.Is(err, io.ErrClosedPipe) {
		c.t.Fatalf("connection is not just closed: %q, %v", b, err)
	}
}

// recorder keeps what tests ask of exchanges.
type recorder struct {
	Pass
	w *world
}

func (r *recorder) OnEnd(x *Exchange) {
	r.w.mu.Lock()
	defer r.w.mu.Unlock()
	r.w.ended = append(r.w.ended, Exchange{Flags: x.Flags, Details: x.Details, Failure: x.Failure, Attempts: x.Attempts,
		RequestBytes: x.RequestBytes, ResponseBytes: x.ResponseBytes, Endpoint: x.Endpoint})
}

// last returns what the last exchange left.
func (w *world) last() *Exchange {
	synctest.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.ended) == 0 {
		w.t.Fatal("no exchange has ended")
	}
	return &w.ended[len(w.ended)-1]
}

// echo answers with what it was asked.
func echo(name string) http.HandlerFunc {
	return func(rw http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		rw.Header().Set("X-Backend", name)
		fmt.Fprintf(rw, "%s %s %s %d:%s", r.Method, r.Host, r.URL.RequestURI(), len(b), b)
	}
}
