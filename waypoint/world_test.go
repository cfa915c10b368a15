package waypoint

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/weft-mesh/weft/hbone"
	"github.com/weft-mesh/weft/identity"
	"github.com/weft-mesh/weft/internal/relay"
	"github.com/weft-mesh/weft/internal/testca"
	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/view"
	"github.com/weft-mesh/weft/waypoint/l7"
)

// A world is a waypoint between a client's tunnels and one pod's, on loopback
// addresses.
type world struct {
	t     *testing.T
	ca    *testca.CA
	roots *identity.Roots
	store *view.Store
	proxy *Proxy
	at    netip.AddrPort // of the waypoint
	pod   netip.Addr     // of the cart
	end   func()         // asks the waypoint to end
	ended chan error
	pool  *hbone.Pool

	mu    sync.Mutex
	facts []l7.Facts // of every connection
	asked []hbone.Request
}

var nextAddr atomic.Uint32

func freshAddr() netip.Addr {
	n := nextAddr.Add(1)
	return netip.AddrFrom4([4]byte{127, 78, byte(n >> 8), byte(n)})
}

type issuer struct{ ca *testca.CA }

func (i issuer) Issue(_ context.Context, id mesh.Identity, csr []byte) (identity.Issued, error) {
	r, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return identity.Issued{}, err
	}
	return identity.Issued{Chain: [][]byte{i.ca.Sign(id, r.PublicKey, nil).Raw}}, nil
}

// newWorld starts a waypoint whose engine passes connections through to the
// pod, and the pod, which proves to be podID and echoes.
func newWorld(t *testing.T, podID mesh.Identity) *world {
	t.Helper()
	w := &world{t: t, ca: testca.New(t, "cluster.local"), store: new(view.Store), pod: freshAddr(), ended: make(chan error, 1)}
	var err error
	if w.roots, err = identity.NewRoots("cluster.local", w.ca.PEM()); err != nil {
		t.Fatal(err)
	}
	w.servePod(podID)
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	manager := identity.NewManager(identity.Config{Issuer: issuer{w.ca}, Roots: w.roots, TrustDomain: "cluster.local", Log: log})
	w.background(manager.Run)
	w.proxy, err = New(Config{
		View: w.store, Identity: manager, Roots: w.roots, ID: ours, Gateway: shopWaypoint, Pod: mesh.Name{Namespace: "shop", Name: "waypoint-1"},
		Log: log, Linger: time.Millisecond, Drain: 5 * time.Second,
	})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", netip.AddrPortFrom(freshAddr(), 0).String())
	if err != nil {
		t.Fatal(err)
	}
	w.at = l.Addr().(*net.TCPAddr).AddrPort()
	ctx, cancel := context.WithCancel(context.Background())
	w.end = cancel
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.ended <- w.proxy.Run(ctx, l, passThrough{w})
	}()
	w.pool = hbone.NewPool(hbone.PoolConfig{
		Dial: func(ctx context.Context, t hbone.Target) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", t.Address.String())
		},
		TLS: func(t hbone.Target) (*tls.Config, error) {
			return identity.ClientTLS(w.own(t.Source), w.roots, t.Peers), nil
		},
	})
	t.Cleanup(func() {
		w.pool.Close()
		cancel()
		<-done
	})
	return w
}

func (w *world) own(id mesh.Identity) identity.CertFunc {
	c := w.ca.Issue(id)
	return func(context.Context) (*tls.Certificate, error) { return &c, nil }
}

// background runs f until the test ends.
func (w *world) background(f func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); f(ctx) }()
	w.t.Cleanup(func() { cancel(); <-done })
}

// servePod takes tunnels for the pod, and echoes what is in them.
func (w *world) servePod(id mesh.Identity) {
	l, err := net.Listen("tcp", netip.AddrPortFrom(w.pod, hbone.Port).String())
	if err != nil {
		w.t.Fatal(err)
	}
	server := hbone.NewServer(hbone.ServerConfig{TLS: identity.ServerTLS(w.own(id), w.roots, "cluster.local"), Handle: func(_ context.Context, r *hbone.Request) {
		w.mu.Lock()
		w.asked = append(w.asked, hbone.Request{Authority: r.Authority, Peer: r.Peer, Header: r.Header})
		w.mu.Unlock()
		s, err := r.Accept(hbone.Header{})
		if err != nil {
			return
		}
		defer s.Close()
		io.Copy(s, s)
		s.CloseWrite()
	}})
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { server.ServeConn(ctx, c) })
		}
	})
	w.t.Cleanup(func() { cancel(); l.Close(); wg.Wait() })
}

// passThrough is an engine that takes the pod for the endpoint of everything.
type passThrough struct{ *world }

func (w passThrough) Drain() {}

func (w passThrough) Serve(ctx context.Context, c net.Conn, f l7.Facts) error {
	w.mu.Lock()
	w.facts = append(w.facts, f)
	w.mu.Unlock()
	v := w.store.Load()
	up, err := w.proxy.Dialer().Dial(ctx, l7.Target{Workload: v.Workload(w.pod), Address: netip.AddrPortFrom(w.pod, 8080), Service: f.Service})
	if err != nil {
		c.(interface{ Reset() }).Reset()
		return err
	}
	return relay.Copy(context.WithoutCancel(ctx), c, up, nil)
}

// publish makes a mesh of one service, the cart, behind the waypoint if bound,
// with one pod.
func (w *world) publish(version string, ref mesh.GatewayRef, edit func(*mesh.Workload)) {
	p := workload("cart", w.pod.String(), mesh.HBONE, cart, mesh.GatewayRef{})
	if edit != nil {
		edit(p)
	}
	w.store.Set(view.WithL7(version, []*mesh.Workload{p},
		[]*mesh.Service{svc("shop", "cart.shop.svc.cluster.local", "10.96.0.1", ref), svc("shop", string(wpService.Host), "10.96.0.9", mesh.GatewayRef{})}, nil,
		view.L7{Waypoints: []*mesh.Waypoint{{Name: shopWaypoint, Service: wpService, Identity: ours, For: "service"}}}))
}

// noted waits until the waypoint has noted that a service is bound to it, which it
// does beside its work.
func (w *world) noted(n mesh.ServiceName) {
	w.t.Helper()
	r := &w.proxy.recent
	bound := func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.bound[n]
	}
	deadline := time.Now().Add(30 * time.Second)
	for !bound() {
		if time.Now().After(deadline) {
			w.t.Fatalf("the waypoint has not noted that %v is bound to it", n)
		}
		runtime.Gosched()
	}
}

// connect opens a connection through the waypoint.
func (w *world) connect(authority string, h hbone.Header) (*hbone.Stream, error) {
	ctx, cancel := context.WithTimeout(w.t.Context(), 10*time.Second)
	defer cancel()
	return w.pool.Connect(ctx, hbone.Target{Owner: "c", Source: client, Peers: []mesh.Identity{ours}, Address: w.at}, authority, h)
}

// echoed checks that what s says comes back.
func echoed(s net.Conn, text string) error {
	if _, err := io.WriteString(s, text); err != nil {
		return err
	}
	b := make([]byte, len(text))
	if _, err := io.ReadFull(s, b); err != nil {
		return err
	}
	if string(b) != text {
		return errors.New("received " + string(b))
	}
	return nil
}
