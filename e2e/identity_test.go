package e2e

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
	security "istio.io/api/security/v1alpha1"
)

// meshCA is the mesh's own signing key, taken from its Secret as only an
// administrator can.
func meshCA(t *testing.T) (*x509.Certificate, any) {
	t.Helper()
	var secret struct{ Data map[string]string }
	if err := json.Unmarshal([]byte(kubectl(t, "get", "secret", "-n", "weft-system", "weft-ca-secret", "-o", "json")), &secret); err != nil {
		t.Fatal(err)
	}
	der := func(key string) []byte {
		raw, err := base64.StdEncoding.DecodeString(secret.Data[key])
		if err != nil {
			t.Fatal(err)
		}
		block, _ := pem.Decode(raw)
		if block == nil {
			t.Fatalf("no PEM in %s of the CA's Secret", key)
		}
		return block.Bytes
	}
	cert, err := x509.ParseCertificate(der("ca-cert.pem"))
	if err != nil {
		t.Fatal(err)
	}
	key, err := x509.ParsePKCS8PrivateKey(der("ca-key.pem"))
	if err != nil {
		key, err = x509.ParseECPrivateKey(der("ca-key.pem"))
	}
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

// leaf signs a certificate for a SPIFFE ID with the mesh's key.
func leaf(t *testing.T, spiffe string) tls.Certificate {
	t.Helper()
	ca, signer := meshCA(t)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	id, err := url.Parse(spiffe)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()),
		URIs:         []*url.URL{id},
		NotBefore:    time.Now().Add(-time.Minute),
		NotAfter:     time.Now().Add(time.Hour),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}, ca, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der, ca.Raw}, PrivateKey: key}
}

// A certificate of another trust domain is refused at port 15008, though the
// mesh's own key has signed it; one of the mesh's trust domain is taken.
func TestForeignTrustDomainIsRefused(t *testing.T) {
	v4, _ := addresses(t, meshed, "far")
	rows := []struct {
		name, spiffe string
		taken        bool
	}{
		{"our trust domain", "spiffe://cluster.local/ns/meshed/sa/client", true},
		{"another trust domain", "spiffe://evil.example/ns/meshed/sa/client", false},
		{"no workload's identity", "spiffe://cluster.local/something/else", false},
	}
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			raw, err := dialIn(t.Context(), world.c.ControlNetns(), netip.AddrPortFrom(v4, 15008).String())
			if err != nil {
				t.Fatal(err)
			}
			defer raw.Close()
			// The server's certificate is not what is tested here.
			c := tls.Client(raw, &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{leaf(t, r.spiffe)}, NextProtos: []string{"h2"}})
			if err := c.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
				t.Fatal(err)
			}
			// In TLS 1.3 a client learns of a refusal with its first read.
			_, err = c.Write([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"))
			if err == nil {
				_, err = c.Read(make([]byte, 9))
			}
			if (err == nil) != r.taken {
				t.Errorf("got error %v, want taken=%v", err, r.taken)
			}
		})
	}
}

// The CA signs for a node's proxy only identities that run on that node.
func TestCARefusesIdentitiesOfOtherNodes(t *testing.T) {
	proxy := strings.TrimSpace(kubectl(t, "get", "pods", "-n", "weft-system", "-l", "app=ztunnel", "--field-selector", "spec.nodeName=node1", "-o", "jsonpath={.items[0].metadata.name}"))
	node1 := token(t, "-n", "weft-system", "ztunnel", "--audience", "istio-ca", "--bound-object-kind", "Pod", "--bound-object-name", proxy)
	unbound := token(t, "-n", "weft-system", "ztunnel", "--audience", "istio-ca")
	other := token(t, "-n", "weft-system", "ztunnel", "--bound-object-kind", "Pod", "--bound-object-name", proxy)
	pod := token(t, "-n", meshed, "client", "--audience", "istio-ca", "--bound-object-kind", "Pod", "--bound-object-name", "client")
	rows := []struct {
		name, token, identity string
		want                  codes.Code
	}{
		{"an identity of the node", node1, "spiffe://cluster.local/ns/meshed/sa/near", codes.OK},
		{"an identity of the other node", node1, "spiffe://cluster.local/ns/meshed/sa/far", codes.PermissionDenied},
		{"an identity of no pod", node1, "spiffe://cluster.local/ns/meshed/sa/default", codes.PermissionDenied},
		{"another trust domain", node1, "spiffe://evil.example/ns/meshed/sa/near", codes.PermissionDenied},
		{"a token that is bound to no pod", unbound, "spiffe://cluster.local/ns/meshed/sa/near", codes.PermissionDenied},
		{"a token for the Kubernetes API", other, "spiffe://cluster.local/ns/meshed/sa/near", codes.Unauthenticated},
		{"a token of an ordinary pod, for another", pod, "spiffe://cluster.local/ns/meshed/sa/near", codes.PermissionDenied},
		{"a token of an ordinary pod, for itself", pod, "", codes.OK},
		{"no token", "", "spiffe://cluster.local/ns/meshed/sa/near", codes.Unauthenticated},
		{"a forged token", node1[:len(node1)-4] + "AAAA", "spiffe://cluster.local/ns/meshed/sa/near", codes.Unauthenticated},
	}
	client := security.NewIstioCertificateServiceClient(controlConn(t))
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			if r.token != "" {
				ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+r.token)
			}
			req := &security.IstioCertificateRequest{Csr: csr(t), ValidityDuration: 3600}
			if r.identity != "" {
				m, err := structpb.NewStruct(map[string]any{"ImpersonatedIdentity": r.identity})
				if err != nil {
					t.Fatal(err)
				}
				req.Metadata = m
			}
			answer, err := client.CreateCertificate(ctx, req)
			if status.Code(err) != r.want {
				t.Fatalf("got %v, want %v", err, r.want)
			}
			if err != nil {
				return
			}
			block, _ := pem.Decode([]byte(answer.CertChain[0]))
			got, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				t.Fatal(err)
			}
			want := r.identity
			if want == "" {
				want = "spiffe://cluster.local/ns/meshed/sa/client"
			}
			if len(got.URIs) != 1 || got.URIs[0].String() != want {
				t.Errorf("certificate for %v, want %s", got.URIs, want)
			}
			if life := time.Until(got.NotAfter); life > 61*time.Minute {
				t.Errorf("certificate lasts %v, asked for an hour", life)
			}
		})
	}
}

func token(t *testing.T, args ...string) string {
	t.Helper()
	return strings.TrimSpace(kubectl(t, append([]string{"create", "token"}, args...)...))
}

func csr(t *testing.T) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
}

// controlConn connects to weft-control as a proxy does.
func controlConn(t *testing.T) *grpc.ClientConn {
	t.Helper()
	root := kubectl(t, "get", "configmap", "-n", meshed, "istio-ca-root-cert", "-o", `jsonpath={.data.root-cert\.pem}`)
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(root)) {
		t.Fatalf("no root in ConfigMap istio-ca-root-cert: %q", root)
	}
	ip := strings.TrimSpace(kubectl(t, "get", "pods", "-n", "weft-system", "-l", "app=weft-control", "-o", "jsonpath={.items[0].status.podIP}"))
	conn, err := grpc.NewClient("passthrough:///"+net.JoinHostPort(ip, "15012"),
		grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: roots, ServerName: "weft-control.weft-system.svc", MinVersion: tls.VersionTLS13})),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
			return dialIn(ctx, world.c.ControlNetns(), addr)
		}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}
