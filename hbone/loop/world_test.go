package loop

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/weft-mesh/weft/hbone"
	"github.com/weft-mesh/weft/identity"
	"github.com/weft-mesh/weft/internal/testca"
	"github.com/weft-mesh/weft/mesh"
)

var (
	cart = mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "cart"}
	web  = mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "web"}
)

const target = "10.0.0.7:8080"

// An end is one end of a connection, as an owner keeps it.
type end struct {
	Conn
	peer  atomic.Pointer[mesh.Identity]
	ended chan error
}

func newEnd() *end { return &end{ended: make(chan error, 2)} }

func (e *end) Opened(p *mesh.Identity) { e.peer.Store(p) }
func (e *end) Ended(err error)         { e.ended <- err }

// A world is an application, the server before it, and a client's proxy, each
// proxy with an engine of its own, on loopback.
type world struct {
	t       testing.TB
	ca      *testca.CA
	app     string // where the application listens
	out     string // where the client's proxy listens
	tunnels string // where the server listens
	client  *Engine
	serving *Engine
	pool    *Pool
	server  *Server
	dials   atomic.Int64
	refuse  atomic.Int64 // a status for every request, if not 0

	mu   sync.Mutex
	outs []*end // of the client's proxy, in the order of their connections
	ins  []*end // of the server's
}

type option func(*world, *ServerConfig, *PoolConfig)

// newWorld starts a world. serve owns each connection of the application.
func newWorld(t testing.TB, serve func(*net.TCPConn), opts ...option) *world {
	t.Helper()
	w := &world{t: t, ca: testca.New(t, "cluster.local"), client: New(Config{}), serving: New(Config{})}
	w.app = listen(t, serve)
	sc := ServerConfig{Shake: hbone.ServerConfig{TLS: w.serverTLS(cart)}, Handle: w.handle}
	pc := PoolConfig{
		TLS: func(tg hbone.Target) (*tls.Config, error) { return w.clientTLS(tg.Source, tg.Peers...), nil },
		Dial: func(ctx context.Context, tg hbone.Target) (*net.TCPConn, error) {
			w.dials.Add(1)
			c, err := new(net.Dialer).DialContext(ctx, "tcp", tg.Address.String())
			if err != nil {
				return nil, err
			}
			return c.(*net.TCPConn), nil
		},
	}
	for _, o := range opts {
		o(w, &sc, &pc)
	}
	w.server, w.pool = w.serving.NewServer(sc), w.client.NewPool(pc)
	run(t, w.serving)
	run(t, w.client)
	t.Cleanup(func() {
		w.pool.Close()
		w.server.Abort(errors.New("the test is over"))
		w.server.Wait()
	})
	if w.tunnels == "" {
		w.tunnels = listen(t, func(c *net.TCPConn) {
			if err := w.server.Serve(context.Background(), c); err != nil {
				t.Logf("serve: %v", err)
			}
		})
	}
	w.out = listen(t, w.dialOut)
	return w
}

// run runs an engine until the test ends.
func run(t testing.TB, e *Engine) {
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- e.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// listen serves TCP connections until the test ends, and returns where. serve
// returns in its own time.
func listen(t testing.TB, serve func(*net.TCPConn)) string {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(wg.Wait)
	t.Cleanup(func() { _ = ln.Close() })
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { serve(c.(*net.TCPConn)) })
		}
	})
	return ln.Addr().String()
}

// handle connects a request to the application.
func (w *world) handle(r *Request) {
	if s := w.refuse.Load(); s != 0 {
		_ = r.Reject(int(s))
		return
	}
	c, err := net.Dial("tcp", w.app)
	if err != nil {
		_ = r.Reject(503)
		return
	}
	e := newEnd()
	w.mu.Lock()
	w.ins = append(w.ins, e)
	w.mu.Unlock()
	accept(r, e, c)
}

func accept(r *Request, e *end, c net.Conn) {
	fd, err := Detach(c.(*net.TCPConn))
	if err != nil {
		_ = r.Reject(503)
		return
	}
	r.Accept(&e.Conn, fd, e)
}

// dialOut sends an application's connection through the tunnel.
func (w *world) dialOut(c *net.TCPConn) {
	e := newEnd()
	w.mu.Lock()
	w.outs = append(w.outs, e)
	w.mu.Unlock()
	fd, err := Detach(c)
	if err != nil {
		e.ended <- err
		return
	}
	if err := w.pool.Connect(context.Background(), w.target(), target, hbone.Header{}, &e.Conn, fd, e); err != nil {
		Abort(fd)
		e.ended <- err
	}
}

// theOut returns the n-th connection at the client's proxy, once it is there.
func (w *world) theOut(n int) *end { return w.nth(&w.outs, n) }
func (w *world) theIn(n int) *end  { return w.nth(&w.ins, n) }

func (w *world) nth(list *[]*end, n int) *end {
	var e *end
	eventually(w.t, "the connection at the proxy", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		if len(*list) > n {
			e = (*list)[n]
		}
		return e != nil
	})
	return e
}

// over wants the connection to end within its time, and returns why.
func (w *world) over(e *end) error {
	w.t.Helper()
	select {
	case err := <-e.ended:
		return err
	case <-time.After(10 * time.Second):
		w.t.Fatal("the connection did not end")
		return nil
	}
}

func (w *world) roots() *identity.Roots {
	r, err := identity.NewRoots("cluster.local", w.ca.PEM())
	if err != nil {
		w.t.Fatal(err)
	}
	return r
}

func (w *world) own(id mesh.Identity) identity.CertFunc {
	c := w.ca.Issue(id)
	return func(context.Context) (*tls.Certificate, error) { return &c, nil }
}

func (w *world) serverTLS(id mesh.Identity) *tls.Config {
	return identity.ServerTLS(w.own(id), w.roots(), "cluster.local")
}

func (w *world) clientTLS(id mesh.Identity, peers ...mesh.Identity) *tls.Config {
	return identity.ClientTLS(w.own(id), w.roots(), peers)
}

func (w *world) target() hbone.Target {
	return hbone.Target{Owner: "pod-1", Source: web, Peers: []mesh.Identity{cart}, Address: netip.MustParseAddrPort(w.tunnels)}
}

// dial connects as the client's application.
func (w *world) dial() *net.TCPConn {
	w.t.Helper()
	c, err := net.Dial("tcp", w.out)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(60 * time.Second))
	return c.(*net.TCPConn)
}

// attempt is dial for a connection that the proxy may end before the system
// call returns.
func (w *world) attempt() {
	w.t.Helper()
	c, err := net.Dial("tcp", w.out)
	if err == nil {
		w.t.Cleanup(func() { _ = c.Close() })
	} else if !errors.Is(err, syscall.ECONNRESET) {
		w.t.Fatal(err)
	}
}

// echo sends back what comes, and the end with it.
func echo(c *net.TCPConn) {
	_, _ = io.Copy(c, c)
	_ = c.Close()
}

// exchange writes p, ends, and checks that all of it comes back.
func exchange(t testing.TB, c *net.TCPConn, p []byte) {
	t.Helper()
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(p)
		sent <- errors.Join(err, c.CloseWrite())
	}()
	got, err := io.ReadAll(c)
	if err := errors.Join(err, <-sent); err != nil {
		t.Fatalf("echo of %d bytes: %v", len(p), err)
	}
	if !bytes.Equal(got, p) {
		t.Fatalf("echo of %d bytes came back as %d others", len(p), len(got))
	}
}

// roundTrip sends s and wants it back.
func roundTrip(t testing.TB, c net.Conn, s string) {
	t.Helper()
	if err := tryRoundTrip(c, s); err != nil {
		t.Fatal(err)
	}
}

func tryRoundTrip(c net.Conn, s string) error {
	if _, err := io.WriteString(c, s); err != nil {
		return err
	}
	b := make([]byte, len(s))
	if _, err := io.ReadFull(c, b); err != nil {
		return err
	}
	if string(b) != s {
		return errors.New("something else came back")
	}
	return nil
}

// eventually waits for a condition.
func eventually(t testing.TB, what string, ok func() bool) {
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
