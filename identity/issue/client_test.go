package issue

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"istio.io/api/security/v1alpha1"

	"github.com/weft-mesh/weft/identity"
	"github.com/weft-mesh/weft/internal/testca"
	"github.com/weft-mesh/weft/mesh"
)

var cart = mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "cart"}

const serverName = "weft-control.weft-system.svc"

// A fakeServer is a certificate service over TLS on a loopback port.
type fakeServer struct {
	v1alpha1.UnimplementedIstioCertificateServiceServer
	ca *testca.CA

	mu   sync.Mutex // guards what follows
	fail error
	hang bool
	cert tls.Certificate
	seen []call
}

type call struct {
	req *v1alpha1.IstioCertificateRequest
	md  metadata.MD
}

func (s *fakeServer) CreateCertificate(ctx context.Context, req *v1alpha1.IstioCertificateRequest) (*v1alpha1.IstioCertificateResponse, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	s.mu.Lock()
	s.seen = append(s.seen, call{req, md})
	fail, hang := s.fail, s.hang
	s.mu.Unlock()
	if hang {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	if fail != nil {
		return nil, fail
	}
	block, _ := pem.Decode([]byte(req.Csr))
	if block == nil {
		return nil, status.Error(codes.InvalidArgument, "no PEM")
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	leaf := s.ca.Sign(cart, csr.PublicKey, nil)
	return &v1alpha1.IstioCertificateResponse{CertChain: []string{
		string(identity.FormatCertificates([]*x509.Certificate{leaf})), string(s.ca.PEM()),
	}}, nil
}

func (s *fakeServer) set(change func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
}

func (s *fakeServer) last() call {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.seen[len(s.seen)-1]
}

// serve starts a server known by serverName and returns it with a Config that
// reaches it.
func serve(t *testing.T) (*fakeServer, Config) {
	t.Helper()
	s := &fakeServer{ca: testca.New(t, "cluster.local")}
	s.cert = s.ca.IssueAs(cart, asServer)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			s.mu.Lock()
			defer s.mu.Unlock()
			cert := s.cert
			return &cert, nil
		},
	})))
	v1alpha1.RegisterIstioCertificateServiceServer(g, s)
	done := make(chan struct{})
	go func() {
		defer close(done)
		g.Serve(l)
	}()
	t.Cleanup(func() { g.Stop(); <-done })

	dir := t.TempDir()
	roots, token := filepath.Join(dir, "root-cert.pem"), filepath.Join(dir, "token")
	write(t, roots, s.ca.PEM())
	write(t, token, []byte("first\n"))
	return s, Config{Address: l.Addr().String(), TLS: identity.ControlTLS(roots, serverName), TokenFile: token, OnBehalf: true}
}

func asServer(c *x509.Certificate) { c.URIs, c.DNSNames = nil, []string{serverName} }

func write(t *testing.T, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func client(t *testing.T, cfg Config) *Client {
	t.Helper()
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func newCSR(t *testing.T) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return csr
}

func TestIssue(t *testing.T) {
	s, cfg := serve(t)
	cfg.TTL = 2 * time.Hour
	c := client(t, cfg)
	issued, err := c.Issue(t.Context(), cart, newCSR(t))
	if err != nil {
		t.Fatal(err)
	}
	if len(issued.Chain) != 1 || len(issued.Roots) != 1 || !bytes.Equal(issued.Roots[0], s.ca.Certificate().Raw) {
		t.Errorf("chain of %d, roots of %d", len(issued.Chain), len(issued.Roots))
	}
	got := s.last()
	if v := got.req.Metadata.AsMap()["ImpersonatedIdentity"]; v != "spiffe://cluster.local/ns/shop/sa/cart" {
		t.Errorf("ImpersonatedIdentity = %v", v)
	}
	if got.req.ValidityDuration != 7200 {
		t.Errorf("validity_duration = %d, want 7200", got.req.ValidityDuration)
	}
	if a, id := got.md.Get("authorization"), got.md.Get("clusterid"); len(a) != 1 || a[0] != "Bearer first" || len(id) != 1 || id[0] != "Kubernetes" {
		t.Errorf("authorization %q, clusterid %q", a, id)
	}

	// kubelet has replaced the token.
	write(t, cfg.TokenFile, []byte("second"))
	if _, err := c.Issue(t.Context(), cart, newCSR(t)); err != nil {
		t.Fatal(err)
	}
	if a := s.last().md.Get("authorization"); a[0] != "Bearer second" {
		t.Errorf("authorization %q after the token changed", a)
	}
}

func TestIssueForOurselves(t *testing.T) {
	s, cfg := serve(t)
	cfg.OnBehalf = false
	if _, err := client(t, cfg).Issue(t.Context(), cart, newCSR(t)); err != nil {
		t.Fatal(err)
	}
	if m := s.last().req.Metadata; m != nil {
		t.Errorf("metadata %v, want none", m)
	}
}

// The whole way: a Manager obtains and checks what the service signs.
func TestManagerOverTheWire(t *testing.T) {
	_, cfg := serve(t)
	m := identity.NewManager(identity.Config{Issuer: client(t, cfg), Roots: new(identity.Roots), TrustDomain: "cluster.local"})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	done := make(chan error)
	go func() { done <- m.Run(ctx) }()
	cert, err := m.Certificate(ctx, cart)
	if err != nil {
		t.Fatal(err)
	}
	if id, err := identity.PeerIdentity(tls.ConnectionState{PeerCertificates: []*x509.Certificate{cert.Leaf}}); err != nil || id != cart {
		t.Errorf("certificate of %v, %v", id, err)
	}
	cancel()
	<-done
}

func TestRefusalsAreExplained(t *testing.T) {
	s, cfg := serve(t)
	cfg.Timeout = 2 * time.Second
	c := client(t, cfg)
	tests := []struct {
		code codes.Code
		want string
	}{
		{codes.Unauthenticated, "expired"},
		{codes.PermissionDenied, "does a pod with this service account run on this node"},
		{codes.InvalidArgument, "does not like the request"},
		{codes.Unavailable, "cannot be reached"},
		{codes.Unimplemented, "is the address right"},
		{codes.Internal, "it failed"},
	}
	for _, tt := range tests {
		t.Run(tt.code.String(), func(t *testing.T) {
			s.set(func() { s.fail = status.Error(tt.code, "because") })
			_, err := c.Issue(t.Context(), cart, newCSR(t))
			for _, want := range []string{tt.want, "because", cart.String(), cfg.Address} {
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("Issue error = %v, want one with %q", err, want)
				}
			}
			if got := status.Code(err); got != tt.code {
				t.Errorf("status.Code = %v, want %v", got, tt.code)
			}
			if strings.Contains(err.Error(), "first") {
				t.Errorf("the error quotes the token: %v", err)
			}
		})
	}
}

func TestACAThatHangsIsGivenUp(t *testing.T) {
	s, cfg := serve(t)
	cfg.Timeout = 200 * time.Millisecond
	s.set(func() { s.hang = true })
	_, err := client(t, cfg).Issue(t.Context(), cart, newCSR(t))
	if status.Code(err) != codes.DeadlineExceeded || !strings.Contains(err.Error(), "did not answer within 200ms") {
		t.Errorf("Issue error = %v, want the deadline", err)
	}
}

// TestServerIsVerified lets servers answer that are not the control service.
// The token must not reach them.
func TestServerIsVerified(t *testing.T) {
	tests := []struct {
		name string
		cert func(ours, other *testca.CA) tls.Certificate
	}{
		{"another root", func(_, other *testca.CA) tls.Certificate { return other.IssueAs(cart, asServer) }},
		{"another name", func(ours, _ *testca.CA) tls.Certificate {
			return ours.IssueAs(cart, func(c *x509.Certificate) { c.URIs, c.DNSNames = nil, []string{"cart.shop.svc"} })
		}},
		{"a workload's certificate", func(ours, _ *testca.CA) tls.Certificate { return ours.Issue(cart) }},
		{"expired", func(ours, _ *testca.CA) tls.Certificate {
			return ours.IssueAs(cart, func(c *x509.Certificate) { asServer(c); c.NotAfter = time.Now().Add(-time.Second) })
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s, cfg := serve(t)
			s.set(func() { s.cert = tt.cert(s.ca, testca.New(t, "cluster.local")) })
			_, err := client(t, cfg).Issue(t.Context(), cart, newCSR(t))
			if status.Code(err) != codes.Unavailable {
				t.Errorf("Issue error = %v, want Unavailable", err)
			}
			if len(s.seen) != 0 {
				t.Error("the impostor was sent a request with our token")
			}
		})
	}
}

func TestRootsAreReadAgain(t *testing.T) {
	s, cfg := serve(t)
	rootsFile := filepath.Join(filepath.Dir(cfg.TokenFile), "root-cert.pem")
	write(t, rootsFile, testca.New(t, "cluster.local").PEM())
	c := client(t, cfg)
	if _, err := c.Issue(t.Context(), cart, newCSR(t)); err == nil {
		t.Fatal("the server was trusted without its root")
	}
	write(t, rootsFile, s.ca.PEM())
	deadline := time.Now().Add(20 * time.Second)
	for {
		_, err := c.Issue(t.Context(), cart, newCSR(t))
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the new root is not used: %v", err)
		}
	}
}

func TestWithoutTokenNothingIsAsked(t *testing.T) {
	s, cfg := serve(t)
	write(t, cfg.TokenFile, []byte(" \n"))
	c := client(t, cfg)
	if _, err := c.Issue(t.Context(), cart, newCSR(t)); err == nil || !strings.Contains(err.Error(), "is empty") {
		t.Errorf("Issue error = %v, want an empty token", err)
	}
	os.Remove(cfg.TokenFile)
	if _, err := c.Issue(t.Context(), cart, newCSR(t)); err == nil || !strings.Contains(err.Error(), cfg.TokenFile) {
		t.Errorf("Issue error = %v, want the missing file", err)
	}
	if len(s.seen) != 0 {
		t.Error("the CA was asked")
	}
}

func TestConfigIsChecked(t *testing.T) {
	_, err := New(Config{TTL: -1})
	for _, want := range []string{"address", "TLS", "token file", "negative"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("New error = %v, want one with %q", err, want)
		}
	}
}

func TestRead(t *testing.T) {
	ca, old := testca.New(t, "cluster.local"), testca.New(t, "cluster.local")
	inter := ca.Intermediate()
	leaf := inter.Issue(cart).Leaf
	text := func(certs ...*x509.Certificate) string { return string(identity.FormatCertificates(certs)) }
	tests := []struct {
		name         string
		elements     []string
		chain, roots int
		err          string
	}{
		{"one certificate per element", []string{text(leaf), text(inter.Certificate()), text(ca.Certificate())}, 2, 1, ""},
		{"chain in one element", []string{text(leaf, inter.Certificate()), text(ca.Certificate())}, 2, 1, ""},
		{"several roots", []string{text(leaf), text(ca.Certificate(), old.Certificate())}, 1, 2, ""},
		{"the root also in the chain", []string{text(leaf), text(inter.Certificate()), text(ca.Certificate()), text(ca.Certificate())}, 2, 1, ""},
		{"no root", []string{text(leaf)}, 1, 0, ""},
		{"nothing", nil, 0, 0, "no certificate"},
		{"an empty leaf", []string{"", text(ca.Certificate())}, 0, 0, "element 1"},
		{"rubbish for a root", []string{text(leaf), "x"}, 0, 0, "its roots"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := read(tt.elements)
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Errorf("read error = %v, want one with %q", err, tt.err)
				}
				return
			}
			if err != nil || len(got.Chain) != tt.chain || len(got.Roots) != tt.roots {
				t.Errorf("read = chain of %d, roots of %d, %v; want %d and %d", len(got.Chain), len(got.Roots), err, tt.chain, tt.roots)
			}
		})
	}
}

func FuzzRead(f *testing.F) {
	ca := testca.New(f, "cluster.local")
	leaf := string(identity.FormatCertificates([]*x509.Certificate{ca.Issue(cart).Leaf}))
	f.Add(leaf, string(ca.PEM()))
	f.Add("", "-----BEGIN CERTIFICATE-----")
	f.Fuzz(func(t *testing.T, first, last string) {
		issued, err := read([]string{first, last})
		if err == nil && len(issued.Roots) == 0 {
			t.Fatal("the roots were lost")
		}
	})
}
