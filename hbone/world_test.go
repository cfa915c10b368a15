package hbone

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/weft-mesh/weft/identity"
	"github.com/weft-mesh/weft/internal/testca"
	"github.com/weft-mesh/weft/mesh"
)

var (
	cart = mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "cart"}
	web  = mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "web"}
)

const target = "10.0.0.7:8080"

// A world is one server, cart, and one pool, of web, joined by pipes or real
// sockets.
type world struct {
	t      testing.TB
	ca     *testca.CA
	server *Server
	pool   *Pool
	stop   context.CancelFunc // ends the server
	errs   chan error         // what ServeConn returned
	dials  atomic.Int64
	conns  sync.Mutex
	raw    []net.Conn // client ends
}

type option func(*world, *ServerConfig, *PoolConfig)

func newWorld(t testing.TB, handle func(context.Context, *Request), opts ...option) *world {
	t.Helper()
	w := &world{t: t, ca: testca.New(t, "cluster.local"), errs: make(chan error, 4096)}
	ctx, stop := context.WithCancel(context.Background())
	w.stop = stop
	sc := ServerConfig{TLS: w.serverTLS(cart), Handle: handle, Log: slog.New(slog.DiscardHandler)}
	var wg sync.WaitGroup
	pc := PoolConfig{
		TLS: func(tg Target) (*tls.Config, error) { return w.clientTLS(tg.Source, tg.Peers...), nil },
	}
	pc.Dial = func(context.Context, Target) (net.Conn, error) {
		w.dials.Add(1)
		a, b := pipe(t)
		w.conns.Lock()
		w.raw = append(w.raw, a)
		w.conns.Unlock()
		wg.Go(func() { w.errs <- w.server.ServeConn(ctx, b) })
		return a, nil
	}
	for _, o := range opts {
		o(w, &sc, &pc)
	}
	w.server, w.pool = NewServer(sc), NewPool(pc)
	t.Cleanup(func() {
		stop()
		w.pool.Close()
		wg.Wait()
	})
	return w
}

// pipe returns two ends of a connection that is synchronous, so that tests see
// every stall.
func pipe(testing.TB) (net.Conn, net.Conn) { return net.Pipe() }

// socketPipe returns two ends of a TCP connection on loopback.
func socketPipe(t testing.TB) (net.Conn, net.Conn) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	a, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return a, b
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

func (w *world) target() Target {
	return Target{Owner: "pod-1", Source: web, Peers: []mesh.Identity{cart}, Address: netip.MustParseAddrPort("10.0.0.7:15008")}
}

func (w *world) connect() *Stream {
	w.t.Helper()
	s, err := w.pool.Connect(w.t.Context(), w.target(), target, Header{})
	if err != nil {
		w.t.Fatalf("Connect: %v", err)
	}
	w.t.Cleanup(func() { _ = s.Close() })
	return s
}

// echo accepts and sends back what comes, and the end with it.
func echo(_ context.Context, r *Request) {
	s, err := r.Accept(Header{})
	if err != nil {
		return
	}
	defer s.Close()
	if _, err := io.Copy(s, s); err != nil {
		s.Reset()
		return
	}
	_ = s.CloseWrite()
}

// exchange writes p, ends, and checks that all of it comes back.
func exchange(t testing.TB, s net.Conn, p []byte) {
	t.Helper()
	sent := make(chan error, 1)
	go func() {
		_, err := s.Write(p)
		if err == nil {
			err = s.(interface{ CloseWrite() error }).CloseWrite()
		}
		sent <- err
	}()
	got, err := io.ReadAll(s)
	if err := errors.Join(err, <-sent); err != nil {
		t.Fatalf("echo of %d bytes: %v", len(p), err)
	}
	if !bytes.Equal(got, p) {
		t.Fatalf("echo of %d bytes came back as %d others", len(p), len(got))
	}
}
