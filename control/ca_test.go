package control

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
	"istio.io/api/security/v1alpha1"

	"github.com/weft-mesh/weft/identity"
	"github.com/weft-mesh/weft/identity/ca"
	"github.com/weft-mesh/weft/identity/issue"
	"github.com/weft-mesh/weft/internal/testca"
	"github.com/weft-mesh/weft/mesh"
)

var (
	cart  = mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "cart"}
	other = mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "elsewhere"}
)

// fakePods are the pods of a small cluster: ztunnel-1 and cart on node n1,
// ztunnel-2 and elsewhere on node n2.
type fakePods struct{}

func (fakePods) NodeOf(pod mesh.Name, uid string) (string, bool) {
	switch pod.String() + " " + uid {
	case "weft-system/ztunnel-1 z1", "shop/cart-1 c1":
		return "n1", true
	case "weft-system/ztunnel-2 z2":
		return "n2", true
	}
	return "", false
}

func (fakePods) RunsOn(node string, id mesh.Identity) bool {
	switch node + " " + id.Namespace + "/" + id.ServiceAccount {
	case "n1 shop/cart", "n1 weft-system/ztunnel", "n2 shop/elsewhere", "n2 weft-system/ztunnel":
		return true
	}
	return false
}

// tokens are named for whose they are.
func tokens() map[string]Review {
	z := func(pod, uid, node string) Review {
		return Review{Audiences: istioCA, Namespace: "weft-system", ServiceAccount: "ztunnel", PodName: pod, PodUID: uid, NodeName: node}
	}
	return map[string]Review{
		"ztunnel":        z("ztunnel-1", "z1", "n1"),
		"ztunnel-silent": z("ztunnel-1", "z1", ""),
		"ztunnel-lies":   z("ztunnel-1", "z1", "n2"),
		"ztunnel-dead":   z("ztunnel-1", "z0", "n1"),
		"ztunnel-loose":  z("", "", ""),
		"ztunnel-no-uid": z("ztunnel-1", "", "n1"),
		"ztunnel-kube":   {Audiences: []string{"https://kubernetes"}, Namespace: "weft-system", ServiceAccount: "ztunnel", PodName: "ztunnel-1", PodUID: "z1"},
		"impostor":       {Audiences: istioCA, Namespace: "shop", ServiceAccount: "ztunnel", PodName: "cart-1", PodUID: "c1", NodeName: "n1"},
		"cart":           {Audiences: istioCA, Namespace: "shop", ServiceAccount: "cart", PodName: "cart-1", PodUID: "c1", NodeName: "n1"},
	}
}

func newTestCA(t testing.TB, reg prometheus.Registerer) (*CA, *ca.Authority) {
	t.Helper()
	authority, err := ca.New("cluster.local")
	if err != nil {
		t.Fatal(err)
	}
	f := &fakeAPI{tokens: tokens()}
	return NewCA(CAConfig{
		Authority:     authority,
		Authenticator: NewAuthenticator(AuthenticatorConfig{Review: f.review, Registerer: reg}),
		Pods:          fakePods{},
		NodeAccounts:  []mesh.Name{{Namespace: "weft-system", Name: "ztunnel"}},
		Registerer:    reg,
	}), authority
}

func csrPEM(t testing.TB, uris ...string) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	var names []*url.URL
	for _, u := range uris {
		names = append(names, testca.URI(t, u))
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: names}, key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
}

func onBehalf(t testing.TB, v any) *structpb.Struct {
	t.Helper()
	s, err := structpb.NewStruct(map[string]any{"ImpersonatedIdentity": v})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestCreateCertificate(t *testing.T) {
	ztunnel := mesh.Identity{TrustDomain: "cluster.local", Namespace: "weft-system", ServiceAccount: "ztunnel"}
	foreign := mesh.Identity{TrustDomain: "evil.example", Namespace: "shop", ServiceAccount: "cart"}
	good := csrPEM(t)
	tests := []struct {
		name  string
		token string
		as    any // ImpersonatedIdentity; nil is none
		csr   string
		want  mesh.Identity
		code  codes.Code
		err   string
	}{
		{"a workload gets its own identity", "cart", nil, good, cart, codes.OK, ""},
		{"also when it names it, as a waypoint does", "cart", cart.String(), good, cart, codes.OK, ""},
		{"a node proxy gets its own identity", "ztunnel", nil, good, ztunnel, codes.OK, ""},
		{"a node proxy gets that of a pod on its node", "ztunnel", cart.String(), good, cart, codes.OK, ""},
		{"also when its token does not say the node", "ztunnel-silent", cart.String(), good, cart, codes.OK, ""},
		{"the request may name the identity, too", "ztunnel", cart.String(), csrPEM(t, cart.String()), cart, codes.OK, ""},

		{"an unknown token", "stolen", cart.String(), good, mesh.Identity{}, codes.Unauthenticated, "expired"},
		{"a token for another audience", "ztunnel-kube", cart.String(), good, mesh.Identity{}, codes.Unauthenticated, "audience"},
		{"an identity on another node", "ztunnel", other.String(), good, mesh.Identity{}, codes.PermissionDenied, "no pod with service account shop/elsewhere runs on its node"},
		{"an identity that nobody has", "ztunnel", "spiffe://cluster.local/ns/kube-system/sa/admin", good, mesh.Identity{}, codes.PermissionDenied, "no pod"},
		{"an identity of another trust domain", "ztunnel", foreign.String(), good, mesh.Identity{}, codes.PermissionDenied, "our trust domain"},
		{"a workload asks for another's", "cart", other.String(), good, mesh.Identity{}, codes.PermissionDenied, "not a node proxy's"},
		{"a workload's account in another trust domain", "cart", foreign.String(), good, mesh.Identity{}, codes.PermissionDenied, "not a node proxy's"},
		{"an account of the proxy's name in another namespace", "impostor", cart.String(), good, mesh.Identity{}, codes.PermissionDenied, "not a node proxy's"},
		{"a token that is not bound to a pod", "ztunnel-loose", cart.String(), good, mesh.Identity{}, codes.PermissionDenied, "not bound to a pod"},
		{"a token without the pod's UID", "ztunnel-no-uid", cart.String(), good, mesh.Identity{}, codes.PermissionDenied, "not bound to a pod"},
		{"a token of a pod that is gone", "ztunnel-dead", cart.String(), good, mesh.Identity{}, codes.PermissionDenied, "no live pod"},
		{"a token for another node than its pod's", "ztunnel-lies", cart.String(), good, mesh.Identity{}, codes.PermissionDenied, `for node "n2"`},

		{"an identity that is none", "ztunnel", "cart", good, mesh.Identity{}, codes.InvalidArgument, "parse identity"},
		{"an empty identity", "ztunnel", "", good, mesh.Identity{}, codes.InvalidArgument, "parse identity"},
		{"an identity that is a number", "ztunnel", 7, good, mesh.Identity{}, codes.InvalidArgument, "parse identity"},
		{"a request that names another", "ztunnel", cart.String(), csrPEM(t, other.String()), mesh.Identity{}, codes.InvalidArgument, "it names"},
		{"a workload's request that names another", "cart", nil, csrPEM(t, other.String()), mesh.Identity{}, codes.InvalidArgument, "it names"},
		{"no request", "cart", nil, "", mesh.Identity{}, codes.InvalidArgument, "neither PEM nor DER"},
		{"an endless request", "cart", nil, strings.Repeat("x", maxCSR+1), mesh.Identity{}, codes.InvalidArgument, "at most"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c, authority := newTestCA(t, nil)
			req := &v1alpha1.IstioCertificateRequest{Csr: tt.csr}
			if tt.as != nil {
				req.Metadata = onBehalf(t, tt.as)
			}
			resp, err := c.CreateCertificate(bearing(t.Context(), "Bearer "+tt.token), req)
			if status.Code(err) != tt.code {
				t.Fatalf("CreateCertificate error = %v, want %v", err, tt.code)
			}
			if tt.code != codes.OK {
				if resp != nil || !strings.Contains(err.Error(), tt.err) {
					t.Errorf("CreateCertificate = %v, %v; want an error with %q", resp, err, tt.err)
				}
				return
			}
			if got := proven(t, authority, resp); got != tt.want {
				t.Errorf("the certificate is for %v, want %v", got, tt.want)
			}
		})
	}
}

// proven returns the identity that an answer proves to a peer.
func proven(t testing.TB, a *ca.Authority, resp *v1alpha1.IstioCertificateResponse) mesh.Identity {
	t.Helper()
	last := len(resp.CertChain) - 1
	if resp.CertChain[last] != string(a.RootPEM()) {
		t.Errorf("the last element is not the root: %s", resp.CertChain[last])
	}
	roots, err := identity.NewRoots("cluster.local", []byte(resp.CertChain[last]))
	if err != nil {
		t.Fatal(err)
	}
	chain, err := identity.ParseCertificates([]byte(strings.Join(resp.CertChain[:last], "")))
	if err != nil {
		t.Fatal(err)
	}
	id, err := roots.Verify(chain, time.Now(), x509.ExtKeyUsageClientAuth)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func TestWithoutNodeAccountsNobodyImpersonates(t *testing.T) {
	c, _ := newTestCA(t, nil)
	c.cfg.NodeAccounts = nil
	_, err := c.CreateCertificate(bearing(t.Context(), "Bearer ztunnel"), &v1alpha1.IstioCertificateRequest{Csr: csrPEM(t), Metadata: onBehalf(t, cart.String())})
	if status.Code(err) != codes.PermissionDenied {
		t.Errorf("CreateCertificate error = %v, want PermissionDenied", err)
	}
}

func TestLifetime(t *testing.T) {
	for seconds, want := range map[int64]time.Duration{
		0: 0, -1: 0, math.MinInt64: 0, 3600: time.Hour, 86400: 24 * time.Hour, 86401: 24 * time.Hour, math.MaxInt64: 24 * time.Hour,
	} {
		if got := lifetime(seconds); got != want {
			t.Errorf("lifetime(%d) = %v, want %v", seconds, got, want)
		}
	}
}

func TestCAMetrics(t *testing.T) {
	reg := prometheus.NewPedanticRegistry()
	c, authority := newTestCA(t, reg)
	for token, as := range map[string]any{"cart": nil, "stolen": nil, "ztunnel": other.String()} {
		req := &v1alpha1.IstioCertificateRequest{Csr: csrPEM(t)}
		if as != nil {
			req.Metadata = onBehalf(t, as)
		}
		c.CreateCertificate(bearing(t.Context(), "Bearer "+token), req)
	}
	c.CreateCertificate(bearing(t.Context(), "Bearer cart"), &v1alpha1.IstioCertificateRequest{Csr: "x"})
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range families {
		m := f.GetMetric()[0]
		got[f.GetName()] = m.GetCounter().GetValue() + m.GetGauge().GetValue()
	}
	want := map[string]float64{
		"citadel_server_csr_count":                    4,
		"citadel_server_success_cert_issuance_count":  1,
		"citadel_server_authentication_failure_count": 1,
		"citadel_server_csr_sign_err_count":           1,
		"weft_ca_denied_total":                        1,
		"citadel_server_root_cert_expiry_timestamp":   float64(authority.RootExpiry().Unix()),
		"citadel_server_cert_chain_expiry_timestamp":  float64(authority.Expiry().Unix()),
	}
	for name, v := range want {
		if got[name] != v {
			t.Errorf("%s is %v, want %v", name, got[name], v)
		}
	}
}

// TestFromProxyToAuthority goes the whole way of a certificate: Manager,
// client, TLS to control, token, node check, signature, and back.
func TestFromProxyToAuthority(t *testing.T) {
	c, authority := newTestCA(t, nil)
	names := []string{"weft-control", "weft-control.weft-system.svc"}
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(NewServing(authority, names, nil).TLS())))
	c.Register(server)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	defer func() { server.Stop(); <-served }()

	dir := t.TempDir()
	rootsFile, tokenFile := filepath.Join(dir, "root-cert.pem"), filepath.Join(dir, "istio-token")
	for path, b := range map[string][]byte{rootsFile: authority.RootPEM(), tokenFile: []byte("ztunnel")} {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	client, err := issue.New(issue.Config{
		Address: l.Addr().String(), TLS: identity.ControlTLS(rootsFile, names[1]), TokenFile: tokenFile, OnBehalf: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	m := identity.NewManager(identity.Config{Issuer: client, Roots: new(identity.Roots), TrustDomain: "cluster.local"})
	ctx, cancel := context.WithCancel(t.Context())
	ran := make(chan error, 1)
	go func() { ran <- m.Run(ctx) }()
	defer func() { cancel(); <-ran }()

	enough, done := context.WithTimeout(ctx, 20*time.Second)
	defer done()
	cert, err := m.Certificate(enough, cart)
	if err != nil {
		t.Fatal(err)
	}
	if left := time.Until(cert.Leaf.NotAfter); left < 23*time.Hour || left > 24*time.Hour {
		t.Errorf("the certificate lives for %v, want 24h", left)
	}

	// Who has waited is told why there is none; on a busy machine the answer that
	// says it takes longer.
	for patience := 500 * time.Millisecond; ; patience *= 2 {
		short, done := context.WithTimeout(ctx, patience)
		_, err := m.Certificate(short, other)
		done()
		if err != nil && strings.Contains(err.Error(), "runs on its node") {
			return
		}
		if err == nil || patience > 20*time.Second {
			t.Fatalf("an identity of another node: %v, want a refusal", err)
		}
	}
}

func FuzzCreateCertificate(f *testing.F) {
	c, authority := newTestCA(f, nil)
	f.Add("ztunnel", cart.String(), csrPEM(f))
	f.Add("cart", "spiffe://cluster.local/ns/shop/sa/cart", "-----BEGIN CERTIFICATE REQUEST-----")
	f.Fuzz(func(t *testing.T, token, as, csr string) {
		field := structpb.NewStringValue(as)
		req := &v1alpha1.IstioCertificateRequest{Csr: csr, Metadata: &structpb.Struct{Fields: map[string]*structpb.Value{impersonated: field}}}
		resp, err := c.CreateCertificate(bearing(t.Context(), "Bearer "+token), req)
		if err != nil {
			return
		}
		if got := proven(t, authority, resp); got != cart && got.ServiceAccount != "ztunnel" {
			t.Fatalf("signed %v", got)
		}
	})
}
