package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"net"
	"net/url"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/weft-mesh/weft/identity"
	"github.com/weft-mesh/weft/internal/testca"
	"github.com/weft-mesh/weft/mesh"
)

var (
	cart = mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "cart"}
	web  = mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "web"}
)

func newKey(t testing.TB, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func request(t testing.TB, key crypto.Signer, change func(*x509.CertificateRequest)) []byte {
	t.Helper()
	template := &x509.CertificateRequest{}
	if change != nil {
		change(template)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		t.Fatal(err)
	}
	return csr
}

func pemOf(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

func newAuthorityT(t testing.TB) *Authority {
	t.Helper()
	a, err := New("cluster.local")
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func parseChain(t testing.TB, ders [][]byte) []*x509.Certificate {
	t.Helper()
	var certs []*x509.Certificate
	for _, der := range ders {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		certs = append(certs, c)
	}
	return certs
}

// verify checks a chain as a peer of the mesh would.
func verify(t testing.TB, a *Authority, ders [][]byte, want mesh.Identity) {
	t.Helper()
	roots, err := identity.NewRoots(a.TrustDomain(), a.RootPEM())
	if err != nil {
		t.Fatal(err)
	}
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth} {
		got, err := roots.Verify(parseChain(t, ders), time.Now(), usage)
		if err != nil || got != want {
			t.Errorf("Verify = %v, %v; want %v", got, err, want)
		}
	}
}

func TestSign(t *testing.T) {
	a := newAuthorityT(t)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p256 := newKey(t, elliptic.P256())
	tests := []struct {
		name string
		csr  []byte
	}{
		{"DER", request(t, p256, nil)},
		{"PEM", pemOf("CERTIFICATE REQUEST", request(t, p256, nil))},
		{"PEM with the old name", pemOf("NEW CERTIFICATE REQUEST", request(t, p256, nil))},
		{"P-384", request(t, newKey(t, elliptic.P384()), nil)},
		{"RSA", request(t, rsaKey, nil)},
		{"Ed25519", request(t, edKey, nil)},
		{"with the URI name that is asked for", request(t, p256, func(r *x509.CertificateRequest) { r.URIs = []*url.URL{testca.URI(t, cart.String())} })},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			chain, err := a.Sign(tt.csr, cart, 0)
			if err != nil {
				t.Fatal(err)
			}
			verify(t, a, chain, cart)
		})
	}
}

func TestSignRefuses(t *testing.T) {
	a := newAuthorityT(t)
	key := newKey(t, elliptic.P256())
	good := request(t, key, nil)
	forged := slices.Clone(good)
	forged[len(forged)-1] ^= 1
	uris := func(ids ...mesh.Identity) []byte {
		return request(t, key, func(r *x509.CertificateRequest) {
			for _, id := range ids {
				r.URIs = append(r.URIs, testca.URI(t, id.String()))
			}
		})
	}
	smallRSA := weakRSA(t)

	tests := []struct {
		name string
		csr  []byte
		id   mesh.Identity
		want string
	}{
		{"a signature that is wrong", forged, cart, "signature is wrong"},
		{"another identity in its URI name", uris(web), cart, "it names spiffe://cluster.local/ns/shop/sa/web"},
		{"another identity beside the right one", uris(cart, web), cart, "it names"},
		{"P-224", request(t, newKey(t, elliptic.P224()), nil), cart, "P-224"},
		{"P-521", request(t, newKey(t, elliptic.P521()), nil), cart, "P-521"},
		{"RSA with 1024 bits", smallRSA, cart, "1024 bits"},
		{"nothing", nil, cart, "neither PEM nor DER"},
		{"rubbish", []byte("hello"), cart, "neither PEM nor DER"},
		{"rubbish in DER's clothes", []byte{0x30, 1, 2}, cart, "cannot be read"},
		{"a certificate", a.RootPEM(), cart, "want a CERTIFICATE REQUEST"},
		{"two requests", append(pemOf("CERTIFICATE REQUEST", good), pemOf("CERTIFICATE REQUEST", good)...), cart, "something follows"},
		{"another trust domain", good, mesh.Identity{TrustDomain: "evil.example", Namespace: "a", ServiceAccount: "b"}, "signs for trust domain"},
		{"nobody", good, mesh.Identity{}, "signs for trust domain"},
		{"an identity without account", good, mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop"}, "want spiffe://"},
		{"an identity that reads as another", good, mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop/sa/web", ServiceAccount: "x"}, "want spiffe://"},
		{"an identity with dots", good, mesh.Identity{TrustDomain: "cluster.local", Namespace: "..", ServiceAccount: "x"}, "not a part of a path"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			chain, err := a.Sign(tt.csr, tt.id, 0)
			if err == nil || !strings.Contains(err.Error(), tt.want) || !errors.Is(err, ErrRequest) {
				t.Errorf("Sign error = %v, want ErrRequest with %q", err, tt.want)
			}
			if chain != nil {
				t.Error("Sign failed and still returned a certificate")
			}
		})
	}
}

// weakRSA is a request with an RSA key of 1024 bits, which crypto/rsa will
// not make any more.
func weakRSA(t *testing.T) []byte {
	t.Helper()
	block, _ := pem.Decode([]byte(weakRSARequest))
	if block == nil {
		t.Fatal("the weak request cannot be read")
	}
	return block.Bytes
}

// A request may ask for whatever it wants to have in its certificate: it does
// not get it.
func TestSignTakesOnlyTheKey(t *testing.T) {
	a := newAuthorityT(t)
	greedy := request(t, newKey(t, elliptic.P256()), func(r *x509.CertificateRequest) {
		r.Subject = pkix.Name{CommonName: "admin", Organization: []string{"system:masters"}}
		r.DNSNames = []string{"kubernetes.default.svc"}
		r.EmailAddresses = []string{"root@example.com"}
		r.IPAddresses = []net.IP{net.IPv4(10, 96, 0, 1)}
		r.ExtraExtensions = []pkix.Extension{
			{Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Critical: true, Value: []byte{0x30, 3, 1, 1, 0xff}}, // CA:TRUE
			{Id: asn1.ObjectIdentifier{1, 2, 3, 4}, Value: []byte{5, 0}},
		}
	})
	chain, err := a.Sign(greedy, cart, 0)
	if err != nil {
		t.Fatal(err)
	}
	verify(t, a, chain, cart)
	c := parseChain(t, chain)[0]
	if c.IsCA || !c.BasicConstraintsValid {
		t.Error("the certificate is a CA's, or does not say that it is none")
	}
	if s := c.Subject.String(); s != "" {
		t.Errorf("subject %q, want none", s)
	}
	if len(c.DNSNames)+len(c.EmailAddresses)+len(c.IPAddresses) > 0 || len(c.URIs) != 1 {
		t.Errorf("names %v %v %v %v, want one URI", c.DNSNames, c.EmailAddresses, c.IPAddresses, c.URIs)
	}
	if c.KeyUsage != x509.KeyUsageDigitalSignature {
		t.Errorf("key usage %b", c.KeyUsage)
	}
	for _, e := range c.Extensions {
		switch {
		case e.Id.Equal(asn1.ObjectIdentifier{1, 2, 3, 4}):
			t.Error("an extension of the request was copied")
		case e.Id.Equal(asn1.ObjectIdentifier{2, 5, 29, 17}) && !e.Critical:
			t.Error("the subject is empty, so the name extension must be critical (RFC 5280, 4.2.1.6)")
		}
	}
	if n := c.SerialNumber.BitLen(); n < 64 || n > 128 || c.SerialNumber.Sign() <= 0 {
		t.Errorf("serial number of %d bits", n)
	}
	again, err := a.Sign(greedy, cart, 0)
	if err != nil {
		t.Fatal(err)
	}
	if parseChain(t, again)[0].SerialNumber.Cmp(c.SerialNumber) == 0 {
		t.Error("two certificates have one serial number")
	}
}

func TestSignLifetimes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthorityT(t)
		csr := request(t, newKey(t, elliptic.P256()), nil)
		tests := []struct {
			name      string
			ttl, want time.Duration
		}{
			{"not said", 0, 24 * time.Hour},
			{"negative", -time.Hour, 24 * time.Hour},
			{"an hour", time.Hour, time.Hour},
			{"too long", 10000 * time.Hour, 24 * time.Hour},
			{"longer than time", time.Duration(1<<63 - 1), 24 * time.Hour},
		}
		for _, tt := range tests {
			chain, err := a.Sign(csr, cart, tt.ttl)
			if err != nil {
				t.Fatal(err)
			}
			c := parseChain(t, chain)[0]
			if got := time.Until(c.NotAfter); got != tt.want {
				t.Errorf("%s: lives for %v, want %v", tt.name, got, tt.want)
			}
			if got := time.Since(c.NotBefore); got != 2*time.Minute {
				t.Errorf("%s: begins %v ago, want 2m", tt.name, got)
			}
		}

		end := a.Expiry()
		time.Sleep(time.Until(end) - time.Hour)
		chain, err := a.Sign(csr, cart, 0)
		if err != nil {
			t.Fatal(err)
		}
		if c := parseChain(t, chain)[0]; !c.NotAfter.Equal(end) {
			t.Errorf("ends at %v, want not after the root at %v", c.NotAfter, end)
		}
		verify(t, a, chain, cart)
		time.Sleep(time.Until(end) - 30*time.Second)
		if _, err := a.Sign(csr, cart, 0); err == nil || errors.Is(err, ErrRequest) || !strings.Contains(err.Error(), "replace it") {
			t.Errorf("Sign error = %v, want one that says to replace the CA", err)
		}
	})
}

func TestSignServer(t *testing.T) {
	a := newAuthorityT(t)
	cert, err := a.SignServer([]string{"weft-control", "weft-control.weft-system.svc"})
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(a.RootPEM())
	if _, err := cert.Leaf.Verify(x509.VerifyOptions{Roots: pool, DNSName: "weft-control.weft-system.svc"}); err != nil {
		t.Error(err)
	}
	if _, err := cert.Leaf.Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err == nil {
		t.Error("a server's certificate is good for clients")
	}
	roots, err := identity.NewRoots("cluster.local", a.RootPEM())
	if err != nil {
		t.Fatal(err)
	}
	if id, err := roots.Verify([]*x509.Certificate{cert.Leaf}, time.Now(), x509.ExtKeyUsageServerAuth); err == nil {
		t.Errorf("a server's certificate passes for the workload %v", id)
	}
	if _, err := tls.X509KeyPair(identity.FormatCertificates([]*x509.Certificate{cert.Leaf}), keyPEM(t, cert.PrivateKey)); err != nil {
		t.Error(err)
	}
	if _, err := a.SignServer(nil); err == nil {
		t.Error("signed for no name")
	}
}

func keyPEM(t testing.TB, key crypto.PrivateKey) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pemOf("PRIVATE KEY", der)
}

func TestNewRefusesATrustDomainThatCannotBe(t *testing.T) {
	for _, td := range []string{"", "Cluster.Local", "a/b", "spiffe://x/y"} {
		if _, err := New(td); err == nil {
			t.Errorf("New(%q) succeeded", td)
		}
	}
}

// FuzzSign sends what a node could send. Whatever is signed must prove the
// identity that was authorized, and nothing else.
func FuzzSign(f *testing.F) {
	a := newAuthorityT(f)
	key := newKey(f, elliptic.P256())
	f.Add(request(f, key, nil))
	f.Add(pemOf("CERTIFICATE REQUEST", request(f, key, nil)))
	f.Add(request(f, key, func(r *x509.CertificateRequest) { r.URIs = []*url.URL{testca.URI(f, web.String())} }))
	f.Add([]byte(weakRSARequest))
	f.Fuzz(func(t *testing.T, csr []byte) {
		chain, err := a.Sign(csr, cart, time.Hour)
		if err != nil {
			return
		}
		verify(t, a, chain, cart)
	})
}

const weakRSARequest = `-----BEGIN CERTIFICATE REQUEST-----
MIIBPzCBqQIBADAAMIGfMA0GCSqGSIb3DQEBAQUAA4GNADCBiQKBgQCu9EKjetYU
J462q3KJkfrH7OQ/90Lvmmc+TES2UuybU6kM9TU3I9DD//smWNua2wLGO9VjiF10
zAFVDT4V4twRXx+20rKPq2Ih1uEmyLVpntNFWZa3FpVTePfYJttNqcfUz4eI4ZGB
q3sqtpCz0hHY3/E8bRkHAYpmhCCH9na2ewIDAQABoAAwDQYJKoZIhvcNAQELBQAD
gYEAgiAmmUYL958uB7KeRNiorUnfsWJLkf8vVU7/+kddMnynZdXgdJRodhqeir3v
SYr8aWRCoMEwRqVsYXZgGPtm3eCjWHMsH/DldgGlSyRRDXQMYd0QNc6oWKlV9h9U
GW3NnIzutgqVSXvg0NMS1Yd41J8CQjgIG38TxAcRDYse4ow=
-----END CERTIFICATE REQUEST-----
`
