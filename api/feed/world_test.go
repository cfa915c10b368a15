package feed

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"

	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/view"
)

const (
	token         = "a-token"
	waypointToken = "a-waypoint's-token"
)

// A world is a control service in memory, reached over TLS.
type world struct {
	t      testing.TB
	cert   tls.Certificate
	roots  *x509.CertPool
	log    *lines
	server *Server
	reg    *prometheus.Registry

	mu       sync.Mutex
	listener *bufconn.Listener
	grpc     *grpc.Server
}

// lines is a log that a test can read.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func newWorld(t testing.TB) *world {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{"control"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, cert: tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, roots: x509.NewCertPool(), log: &lines{}}
	w.roots.AddCert(leaf)
	w.start()
	t.Cleanup(w.stop)
	return w
}

// auth is who may subscribe: the bearers of the tokens.
func auth(ctx context.Context) (Subscriber, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	switch got := md.Get("authorization"); {
	case len(got) == 1 && got[0] == "Bearer "+token:
		return Subscriber{Node: "node1"}, nil
	case len(got) == 1 && got[0] == "Bearer "+waypointToken:
		return Subscriber{Node: "node1", Role: RoleWaypoint}, nil
	default:
		return Subscriber{}, fmt.Errorf("token %q is not good", got)
	}
}

// start makes a server that knows nothing, in place of the last one.
func (w *world) start() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.reg = prometheus.NewRegistry()
	w.server = NewServer(slog.New(slog.NewTextHandler(w.log, nil)), w.reg, auth)
	w.grpc = grpc.NewServer(append(ServerOptions(), grpc.Creds(credentials.NewServerTLSFromCert(&w.cert)))...)
	w.server.Register(w.grpc)
	w.listener = bufconn.Listen(1 << 20)
	go w.grpc.Serve(w.listener) // ends with stop
}

func (w *world) stop() { w.grpc.Stop() }

func (w *world) dial(ctx context.Context, _ string) (net.Conn, error) {
	w.mu.Lock()
	l := w.listener
	w.mu.Unlock()
	return l.DialContext(ctx)
}

func (w *world) tls() (*tls.Config, error) {
	return &tls.Config{RootCAs: w.roots, ServerName: "control"}, nil
}

// proxy is a Client under test.
type proxy struct {
	*Client
	store *view.Store
	reg   *prometheus.Registry
	log   *lines
	stop  func()
}

func (w *world) proxy(edit func(*ClientConfig)) *proxy {
	w.t.Helper()
	p := &proxy{store: new(view.Store), reg: prometheus.NewRegistry(), log: &lines{}}
	cfg := ClientConfig{
		Address: "passthrough:///control", TLS: w.tls, Token: func() (string, error) { return token, nil },
		Node:  NodeMeta{PodName: "ztunnel-1", Namespace: "weft-system", IP: netip.MustParseAddr("10.0.0.5"), NodeName: "node1", Cluster: "Kubernetes"},
		Log:   slog.New(slog.NewTextHandler(p.log, nil)),
		Store: p.store, Registerer: p.reg, dial: w.dial,
	}
	if edit != nil {
		edit(&cfg)
	}
	c, err := NewClient(cfg)
	if err != nil {
		w.t.Fatal(err)
	}
	p.Client = c
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { c.Run(ctx) })
	p.stop = func() { cancel(); wg.Wait() }
	w.t.Cleanup(p.stop)
	return p
}

// until waits for the store to hold a View that is as the test wants it.
func (p *proxy) until(t testing.TB, what string, ok func(*view.View) bool) {
	t.Helper()
	timeout := time.After(20 * time.Second)
	for {
		changed := p.store.Changed()
		if ok(p.store.Load()) {
			return
		}
		select {
		case <-changed:
		case <-timeout:
			t.Fatalf("waited in vain: %s\n%s", what, p.log)
		}
	}
}

// eventually waits for a condition that nothing announces.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	timeout := time.After(20 * time.Second)
	for !ok() {
		select {
		case <-tick.C:
		case <-timeout:
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

// raw is a subscriber played by the test.
type raw struct {
	t   testing.TB
	rpc deltaClient
	in  chan *discovery.DeltaDiscoveryResponse
	end chan error
}

func (w *world) raw(bearer string) *raw {
	w.t.Helper()
	conn, err := grpc.NewClient("passthrough:///control", grpc.WithContextDialer(w.dial),
		grpc.WithTransportCredentials(credentials.NewTLS(must(w.tls()))), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxReceive)))
	if err != nil {
		w.t.Fatal(err)
	}
	ctx := metadata.AppendToOutgoingContext(context.Background(), "authorization", "Bearer "+bearer)
	rpc, err := discovery.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx)
	if err != nil {
		w.t.Fatal(err)
	}
	r := &raw{t: w.t, rpc: rpc, in: make(chan *discovery.DeltaDiscoveryResponse), end: make(chan error, 1)}
	done := make(chan struct{})
	w.t.Cleanup(func() { close(done); conn.Close() })
	go func() {
		for {
			m, err := rpc.Recv()
			if err != nil {
				r.end <- err
				return
			}
			select {
			case r.in <- m:
			case <-done:
				return
			}
		}
	}()
	return r
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func (r *raw) send(m *discovery.DeltaDiscoveryRequest) {
	r.t.Helper()
	if err := r.rpc.Send(m); err != nil {
		r.t.Fatal(err)
	}
}

// next returns the next response, not acknowledged.
func (r *raw) next() *discovery.DeltaDiscoveryResponse {
	r.t.Helper()
	select {
	case m := <-r.in:
		return m
	case err := <-r.end:
		r.t.Fatalf("the stream ended: %v", err)
	case <-time.After(20 * time.Second):
		r.t.Fatal("no response")
	}
	return nil
}

func (r *raw) ack(m *discovery.DeltaDiscoveryResponse) {
	r.t.Helper()
	r.send(&discovery.DeltaDiscoveryRequest{TypeUrl: m.TypeUrl, ResponseNonce: m.Nonce})
}

// want takes the next response, checks what is in it and acknowledges it.
func (r *raw) want(names, removed string) *discovery.DeltaDiscoveryResponse {
	r.t.Helper()
	m := r.next()
	var got []string
	for _, x := range m.Resources {
		got = append(got, x.Name)
	}
	if g := strings.Join(got, " "); g != names {
		r.t.Errorf("got resources %q, want %q", g, names)
	}
	if g := strings.Join(m.RemovedResources, " "); g != removed {
		r.t.Errorf("got removed %q, want %q", g, removed)
	}
	r.ack(m)
	return m
}

// quiet proves that nothing is under way: it asks for what does not exist and
// gets just that answer.
func (r *raw) quiet() {
	r.t.Helper()
	key := "no/such"
	r.send(&discovery.DeltaDiscoveryRequest{TypeUrl: TypeAddress, ResourceNamesSubscribe: []string{key}})
	r.want("", key)
	r.send(&discovery.DeltaDiscoveryRequest{TypeUrl: TypeAddress, ResourceNamesUnsubscribe: []string{key}})
}

func pod(i int) mesh.Workload {
	return mesh.Workload{
		UID: mesh.UID(fmt.Sprintf("c//Pod/shop/p%d", i)), Name: mesh.Name{Namespace: "shop", Name: fmt.Sprintf("p%d", i)},
		Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)})},
		Identity:  mesh.Identity{TrustDomain: "td", Namespace: "shop", ServiceAccount: "cart"},
		Transport: mesh.HBONE, Healthy: true, Node: "node1", CanonicalName: "cart", CanonicalRevision: "v1", Cluster: "c",
		Owner: mesh.Owner{Kind: "deployment", Name: "cart"},
	}
}

func in(w mesh.Workload, s mesh.Service) mesh.Workload {
	w.Services = []mesh.Membership{{Service: s.Name, Ports: []mesh.Port{{Service: 80, Target: 8080}}}}
	return w
}

func svc(name string, vips ...string) mesh.Service {
	s := mesh.Service{Name: mesh.ServiceName{Namespace: "shop", Host: mesh.Host(name)}, ShortName: name}
	for _, v := range vips {
		s.VIPs = append(s.VIPs, mesh.VIP{Prefix: netip.MustParsePrefix(v)})
	}
	return s
}

func deny(name string) mesh.Policy {
	return mesh.Policy{Name: mesh.Name{Namespace: "shop", Name: name}, Scope: mesh.ScopeSelector, Action: mesh.Deny, Groups: []mesh.Group{{}}}
}

var errNoToken = errors.New("the token file is gone")

// count returns the sum of the counters and gauges of c.
func count(c prometheus.Collector) float64 {
	metrics := make(chan prometheus.Metric)
	go func() { c.Collect(metrics); close(metrics) }()
	sum := 0.0
	for m := range metrics {
		var d dto.Metric
		if err := m.Write(&d); err != nil {
			panic(err)
		}
		sum += d.GetCounter().GetValue() + d.GetGauge().GetValue()
	}
	return sum
}

// histogram returns how many samples h has, and their sum.
func histogram(h prometheus.Histogram) (n uint64, sum float64) {
	var d dto.Metric
	if err := h.Write(&d); err != nil {
		panic(err)
	}
	return d.GetHistogram().GetSampleCount(), d.GetHistogram().GetSampleSum()
}
