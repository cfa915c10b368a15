package blackbox

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/weft-mesh/weft/hbone"
	"github.com/weft-mesh/weft/identity"
	"github.com/weft-mesh/weft/internal/bench"
	"github.com/weft-mesh/weft/internal/relay"
	"github.com/weft-mesh/weft/internal/testca"
	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/view"
	"github.com/weft-mesh/weft/waypoint"
	"github.com/weft-mesh/weft/waypoint/l7"
)

const trustDomain = "cluster.local"

var (
	clientID   = mesh.Identity{TrustDomain: trustDomain, Namespace: "bench", ServiceAccount: "client"}
	appID      = mesh.Identity{TrustDomain: trustDomain, Namespace: "bench", ServiceAccount: "app"}
	waypointID = mesh.Identity{TrustDomain: trustDomain, Namespace: "bench", ServiceAccount: "waypoint"}
	gateway    = mesh.Name{Namespace: "bench", Name: "waypoint"}
	app        = mesh.ServiceName{Namespace: "bench", Host: "app"}
	wpService  = mesh.ServiceName{Namespace: "bench", Host: "waypoint"}
)

// The ports of the service: one for each protocol.
const (
	httpPort uint16 = 80
	grpcPort uint16 = 50051
)

// self is this program.
const self = "/proc/self/exe"

// chosen reports whether the environment names what with others, or nothing.
func chosen(env, what string) bool {
	v := os.Getenv(env)
	return v == "" || slices.Contains(strings.Split(v, ","), what)
}

// A stage is a backend with all contenders in front of it.
type stage struct{ all []*contender }

func newStage(t *testing.T) *stage {
	t.Helper()
	dir := t.TempDir()
	ca := testca.New(t, trustDomain)
	for name, b := range map[string][]byte{"roots.pem": ca.PEM(), "key.pem": ca.KeyPEM()} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	play := func(program, role string, at netip.AddrPort) *bench.Process {
		if at != (netip.AddrPort{}) {
			role += "@" + at.String()
		}
		p, err := bench.StartOf(program, benchTest, role, dir, nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(p.Stop)
		return p
	}
	play(self, "backend", netip.AddrPort{})
	s := &stage{all: []*contender{{name: "direct", open: dialTo(backendAddr)}}}
	engine := func(name, program string, at netip.AddrPort) {
		if chosen("WEFT_BENCH_PEERS", name) {
			s.all = append(s.all, &contender{name: name, open: dialTo(at), proxy: play(program, "engine", at)})
		}
	}
	tunnel := func(name, program string, at netip.AddrPort) {
		if chosen("WEFT_BENCH_PEERS", name) {
			s.all = append(s.all, &contender{name: name, open: tunnelTo(t, ca, at), proxy: play(program, "waypoint", at)})
		}
	}
	engine("weft", self, weftAddr)
	before := os.Getenv("WEFT_BENCH_BEFORE")
	if before != "" {
		engine("before", before, beforeAddr)
	}
	for name, k := range map[string]struct {
		at     netip.AddrPort
		config string
		args   []string
	}{"nginx": {nginxAddr, nginxConfig(dir), []string{"-c"}}, "haproxy": {haproxyAddr, haproxyConfig, []string{"-f"}}} {
		if !chosen("WEFT_BENCH_PEERS", name) {
			continue
		}
		path, err := exec.LookPath(name)
		if err != nil {
			fmt.Printf("%s is left out: %v (.ci/deps-bench installs it)\n", name, err)
			continue
		}
		file := filepath.Join(dir, name+".conf")
		if err := os.WriteFile(file, []byte(k.config), 0o600); err != nil {
			t.Fatal(err)
		}
		p, err := bench.Exec(path, append(k.args, file), nil, t.Output())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(p.Stop)
		s.all = append(s.all, &contender{name: name, open: dialTo(k.at), proxy: p})
	}
	tunnel("waypoint", self, waypointAddr)
	if before != "" {
		tunnel("waypoint_before", before, waypointBeforeAddr)
	}
	for _, c := range s.all {
		for deadline := time.Now().Add(10 * time.Second); ; {
			u, err := cases[0].open(c.open, 1)
			if err == nil {
				_, err = u.run(time.Millisecond)
				u.close()
			}
			if err == nil {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s does not work: %v", c.name, err)
			}
		}
	}
	return s
}

// dialTo opens plain connections; proxies take gRPC one port higher.
func dialTo(at netip.AddrPort) opener {
	return func(ctx context.Context, grpc bool) (net.Conn, error) {
		to := at
		if grpc {
			to = netip.AddrPortFrom(at.Addr(), at.Port()+1)
		}
		return new(net.Dialer).DialContext(ctx, "tcp", to.String())
	}
}

// tunnelTo opens connections in tunnels, as ztunnel does.
func tunnelTo(t *testing.T, ca *testca.CA, at netip.AddrPort) opener {
	roots, err := identity.NewRoots(trustDomain, ca.PEM())
	if err != nil {
		t.Fatal(err)
	}
	cert := ca.Issue(clientID)
	own := func(context.Context) (*tls.Certificate, error) { return &cert, nil }
	pool := hbone.NewPool(hbone.PoolConfig{
		Dial: func(ctx context.Context, t hbone.Target) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", t.Address.String())
		},
		TLS: func(t hbone.Target) (*tls.Config, error) { return identity.ClientTLS(own, roots, t.Peers), nil },
	})
	t.Cleanup(pool.Close)
	return func(ctx context.Context, grpc bool) (net.Conn, error) {
		port := httpPort
		if grpc {
			port = grpcPort
		}
		s, err := pool.Connect(ctx, hbone.Target{Owner: "c", Source: clientID, Peers: []mesh.Identity{waypointID}, Address: at},
			netip.AddrPortFrom(netip.MustParseAddr("10.96.0.1"), port).String(), hbone.Header{})
		if err != nil {
			return nil, err
		}
		return s, nil
	}
}

// nginxConfig and haproxyConfig make one worker proxy what the engine proxies,
// with an access log.
func nginxConfig(dir string) string {
	var rules strings.Builder
	for i := range 20 {
		fmt.Fprintf(&rules, "    location /rule%d/ { proxy_pass http://app; }\n", i)
	}
	return fmt.Sprintf(`daemon off; master_process off; error_log stderr error; pid %[1]s/nginx.pid;
events { worker_connections 4096; }
http {
  access_log %[1]s/nginx.log combined buffer=64k;
  client_body_temp_path %[1]s/b; proxy_temp_path %[1]s/p; fastcgi_temp_path %[1]s/f; uwsgi_temp_path %[1]s/u; scgi_temp_path %[1]s/s;
  keepalive_requests 100000000; tcp_nodelay on; proxy_http_version 1.1; proxy_max_temp_file_size 0; client_body_buffer_size 64k;
  upstream app { server %[2]v; keepalive 256; keepalive_requests 100000000; }
  upstream grpcapp { server %[2]v; keepalive 256; keepalive_requests 100000000; }
  server { listen %[3]v backlog=4096;
%[4]s    location / { proxy_pass http://app; proxy_set_header Connection ""; proxy_set_header X-Forwarded-For $remote_addr; }
  }
  server { listen %[5]v http2 backlog=4096; location / { grpc_pass grpc://grpcapp; } }
}
`, dir, backendAddr, nginxAddr, rules.String(), netip.AddrPortFrom(nginxAddr.Addr(), nginxAddr.Port()+1))
}

var haproxyConfig = fmt.Sprintf(`global
  nbthread 1
  maxconn 4096
  log stderr format raw local0 emerg
defaults
  mode http
  option httplog
  log global
  option forwardfor
  http-reuse always
  timeout connect 10s
  timeout client 1h
  timeout server 1h
  timeout http-keep-alive 1h
frontend h1
  bind %v
  default_backend h1
backend h1
  server s %v
frontend h2
  bind %v proto h2
  default_backend h2
backend h2
  server s %v proto h2
`, haproxyAddr, backendAddr, netip.AddrPortFrom(haproxyAddr.Addr(), haproxyAddr.Port()+1), backendAddr)

// playRole does what this process was started for, and then does not return.
func playRole() {
	role, arg := bench.Role()
	var err error
	dir := strings.Trim(arg, `"`)
	role, address, _ := strings.Cut(role, "@")
	at, _ := netip.ParseAddrPort(address) // the backend has none
	switch role {
	case "backend":
		bench.EndWithParent()
		err = playBackend(dir)
	case "engine":
		bench.EndWithParent()
		err = playEngine(dir, at)
	case "waypoint":
		bench.EndWithParent()
		err = playWaypoint(dir, at)
	default:
		return
	}
	fmt.Fprintf(os.Stderr, "%s: %v\n", role, err)
	os.Exit(1)
}

// playBackend serves the application, plain and in tunnels.
func playBackend(dir string) error {
	kib := []byte(strings.Repeat("k", 1024))
	chunk := make([]byte, 64<<10)
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { w.Write(kib) })
	mux.HandleFunc("/post", func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		io.WriteString(w, "ok")
	})
	mux.HandleFunc("/stream", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(streamLen))
		for sent := 0; sent < streamLen; sent += len(chunk) {
			if _, err := w.Write(chunk); err != nil {
				return
			}
		}
	})
	mux.HandleFunc("/bench.Service/", func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		w.Header().Set("Content-Type", "application/grpc")
		w.Header().Set("Trailer", "Grpc-Status")
		w.Write(b)
		w.Header().Set("Grpc-Status", "0")
	})
	s := &http.Server{Handler: mux, Protocols: new(http.Protocols)}
	s.Protocols.SetHTTP1(true)
	s.Protocols.SetUnencryptedHTTP2(true)
	l, err := net.Listen("tcp", backendAddr.String())
	if err != nil {
		return err
	}
	l2, err := net.Listen("tcp", netip.AddrPortFrom(backendAddr.Addr(), backendAddr.Port()+1).String())
	if err != nil {
		return err
	}
	tunnels, err := net.Listen("tcp", netip.AddrPortFrom(backendAddr.Addr(), hbone.Port).String())
	if err != nil {
		return err
	}
	roots, own, err := certificates(dir, appID)
	if err != nil {
		return err
	}
	server := hbone.NewServer(hbone.ServerConfig{TLS: identity.ServerTLS(own, roots, trustDomain), Handle: func(ctx context.Context, r *hbone.Request) {
		up, err := new(net.Dialer).DialContext(ctx, "tcp", backendAddr.String())
		if err != nil {
			r.Reject(503)
			return
		}
		s, err := r.Accept(hbone.Header{})
		if err != nil {
			up.Close()
			return
		}
		relay.Copy(ctx, s, up, nil)
	}})
	go s.Serve(l2)
	go func() {
		for {
			c, err := tunnels.Accept()
			if err != nil {
				return
			}
			go server.ServeConn(context.Background(), c)
		}
	}()
	bench.Ready()
	return s.Serve(l)
}

// certificates returns the roots in dir, and a certificate for id.
func certificates(dir string, id mesh.Identity) (*identity.Roots, identity.CertFunc, error) {
	i, roots, err := readIssuer(dir)
	if err != nil {
		return nil, nil, err
	}
	key, err := ecdsa.GenerateKey(i.key.Curve, rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	der, err := i.sign(id, key.Public())
	if err != nil {
		return nil, nil, err
	}
	c := &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	return roots, func(context.Context) (*tls.Certificate, error) { return c, nil }, nil
}

// An issuer signs with the CA of the stage.
type issuer struct {
	root *x509.Certificate
	key  *ecdsa.PrivateKey
}

func readIssuer(dir string) (*issuer, *identity.Roots, error) {
	text, err := os.ReadFile(filepath.Join(dir, "roots.pem"))
	if err != nil {
		return nil, nil, err
	}
	roots, err := identity.NewRoots(trustDomain, text)
	if err != nil {
		return nil, nil, err
	}
	k, err := os.ReadFile(filepath.Join(dir, "key.pem"))
	if err != nil {
		return nil, nil, err
	}
	block, _ := pem.Decode(k)
	if block == nil {
		return nil, nil, errors.New("key.pem is not PEM")
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, nil, err
	}
	return &issuer{roots.Certificates(trustDomain)[0], key.(*ecdsa.PrivateKey)}, roots, nil
}

func (i *issuer) sign(id mesh.Identity, public any) ([]byte, error) {
	u, err := url.Parse(id.String())
	if err != nil {
		return nil, err
	}
	return x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(24 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true, URIs: []*url.URL{u},
	}, i.root, public, i.key)
}

// Issue signs what is asked for.
func (i *issuer) Issue(_ context.Context, id mesh.Identity, csr []byte) (identity.Issued, error) {
	r, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return identity.Issued{}, err
	}
	der, err := i.sign(id, r.PublicKey)
	return identity.Issued{Chain: [][]byte{der}}, err
}

// world is the mesh of the stage: the service with routes, and its one endpoint.
func world(transport mesh.Transport) *view.Store {
	rules := func(n int) []mesh.Rule {
		var rs []mesh.Rule
		for i := range n {
			rs = append(rs, mesh.Rule{
				Name: fmt.Sprint("rule", i), Backends: []mesh.Backend{{Service: app, Weight: 1}},
				Matches: []mesh.RequestMatch{{Path: &mesh.PathMatch{Kind: mesh.PathPrefix, Value: fmt.Sprintf("/rule%d/", i)}}},
			})
		}
		return append(rs, mesh.Rule{Name: "rest", Backends: []mesh.Backend{{Service: app, Weight: 1}}, Retry: &mesh.Retry{Attempts: 2, On: []string{"connect-failure", "refused-stream", "unavailable", "cancelled"}}})
	}
	ports := []mesh.Port{{Service: httpPort, Target: backendAddr.Port(), AppProtocol: "http"}, {Service: grpcPort, Target: backendAddr.Port(), AppProtocol: "grpc"}}
	store := new(view.Store)
	store.Set(view.WithL7("1", []*mesh.Workload{{
		UID: "bench//Pod/bench/app", Name: mesh.Name{Namespace: "bench", Name: "app"}, Addresses: []netip.Addr{backendAddr.Addr()}, Healthy: true,
		Transport: transport, Identity: appID, CanonicalName: "app", Services: []mesh.Membership{{Service: app, Ports: ports}},
	}}, []*mesh.Service{
		{Name: app, ShortName: "app", VIPs: []mesh.VIP{{Prefix: netip.MustParsePrefix("10.96.0.1/32")}}, Ports: ports, Waypoint: mesh.GatewayRef{Service: wpService}},
		{Name: wpService, ShortName: "waypoint"},
	}, nil, view.L7{
		Routes: []*mesh.Route{
			{RouteKey: mesh.RouteKey{Service: app, Port: httpPort, Protocol: mesh.RouteHTTP}, Rules: rules(20)},
			{RouteKey: mesh.RouteKey{Service: app, Port: grpcPort, Protocol: mesh.RouteHTTP}, Rules: rules(20)},
		},
		Waypoints: []*mesh.Waypoint{{Name: gateway, Service: wpService, Identity: waypointID, For: "service", AccessLog: "text"}},
	}))
	return store
}

// newEngine makes the engine with all that it has in production, and its log in
// a directory of its own.
func newEngine(dir string, store *view.Store, dialer l7.Dialer) (*l7.Engine, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	log, err := os.Create(filepath.Join(dir, "access.log"))
	if err != nil {
		return nil, err
	}
	e, err := l7.New(l7.Config{Store: store, Dialer: dialer, Waypoint: gateway, AccessLog: log, Metrics: prometheus.NewRegistry()})
	if err == nil {
		go e.Run(context.Background())
	}
	return e, err
}

type plainDialer struct{ net.Dialer }

func (d *plainDialer) Dial(ctx context.Context, to l7.Target) (net.Conn, error) {
	return d.DialContext(ctx, "tcp", to.Address.String())
}

// playEngine is the engine between plain connections.
func playEngine(dir string, at netip.AddrPort) error {
	e, err := newEngine(filepath.Join(dir, at.Addr().String()), world(mesh.PlainTCP), new(plainDialer))
	if err != nil {
		return err
	}
	serve := func(l net.Listener, port uint16) error {
		for {
			c, err := l.Accept()
			if err != nil {
				return err
			}
			go e.Serve(context.Background(), c, l7.Facts{Peer: clientID, Service: app, Port: port, Source: c.RemoteAddr().(*net.TCPAddr).AddrPort(), Destination: netip.AddrPortFrom(netip.MustParseAddr("10.96.0.1"), port)})
		}
	}
	l, err := net.Listen("tcp", at.String())
	if err != nil {
		return err
	}
	l2, err := net.Listen("tcp", netip.AddrPortFrom(at.Addr(), at.Port()+1).String())
	if err != nil {
		return err
	}
	go serve(l2, grpcPort)
	bench.Ready()
	return serve(l, httpPort)
}

// playWaypoint is a waypoint between tunnels.
func playWaypoint(dir string, at netip.AddrPort) error {
	i, roots, err := readIssuer(dir)
	if err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	manager := identity.NewManager(identity.Config{Issuer: i, Roots: roots, TrustDomain: trustDomain, Log: log})
	go manager.Run(context.Background())
	store := world(mesh.HBONE)
	p, err := waypoint.New(waypoint.Config{View: store, Identity: manager, Roots: roots, ID: waypointID, Gateway: gateway, Log: log})
	if err != nil {
		return err
	}
	e, err := newEngine(filepath.Join(dir, at.Addr().String()), store, p.Dialer())
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", at.String())
	if err != nil {
		return err
	}
	bench.Ready()
	return p.Run(context.Background(), l, e)
}
