package identity

import (
	"bytes"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"strings"
	"testing"
	"time"

	"github.com/weft-mesh/weft/internal/testca"
	"github.com/weft-mesh/weft/mesh"
)

var (
	cart = mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "cart"}
	web  = mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "web"}
	evil = mesh.Identity{TrustDomain: "evil.example", Namespace: "shop", ServiceAccount: "cart"}
)

func rootsOf(t testing.TB, cas ...*testca.CA) *Roots {
	t.Helper()
	r := new(Roots)
	for _, ca := range cas {
		if err := r.Update(ca.TrustDomain, ca.PEM()); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

func TestVerify(t *testing.T) {
	ca := testca.New(t, "cluster.local")
	twin := testca.New(t, "cluster.local") // same trust domain, another root
	foreign := testca.New(t, "evil.example")
	intermediate := ca.Intermediate()
	roots := rootsOf(t, ca, foreign)
	uris := func(ss ...string) func(*x509.Certificate) {
		return func(c *x509.Certificate) {
			c.URIs = nil
			for _, s := range ss {
				c.URIs = append(c.URIs, testca.URI(t, s))
			}
		}
	}
	leaf := func(from *testca.CA, id mesh.Identity, change func(*x509.Certificate)) []*x509.Certificate {
		return []*x509.Certificate{from.IssueAs(id, change).Leaf}
	}

	tests := []struct {
		name  string
		chain []*x509.Certificate
		want  string // of the error; "" is success
	}{
		{"an honest certificate", leaf(ca, cart, nil), ""},
		{"by an intermediate that comes along", append(leaf(intermediate, cart, nil), intermediate.Certificate()), ""},
		{"a DNS name beside the URI does not matter", leaf(ca, cart, func(c *x509.Certificate) { c.DNSNames = []string{"evil.example"} }), ""},
		{"no certificate", nil, "there is none"},
		{"by an intermediate that is missing", leaf(intermediate, cart, nil), "unknown authority"},
		{"our trust domain signed by the root of another one", leaf(foreign, cart, nil), "unknown authority"},
		{"another trust domain signed by our root", leaf(ca, evil, nil), "unknown authority"},
		{"a trust domain nobody knows", leaf(ca, mesh.Identity{TrustDomain: "else.where", Namespace: "a", ServiceAccount: "b"}, nil), "not trusted here"},
		{"another root of the same trust domain", leaf(twin, cart, nil), "unknown authority"},
		{"another root that comes along", append(leaf(twin, cart, nil), twin.Certificate()), "unknown authority"},
		{"two URI names", leaf(ca, cart, uris(cart.String(), web.String())), "more than one URI SAN"},
		{"the same URI name twice", leaf(ca, cart, uris(cart.String(), cart.String())), "more than one URI SAN"},
		{"no name at all", leaf(ca, cart, uris()), "no URI SAN"},
		{"a DNS name only", leaf(ca, cart, func(c *x509.Certificate) { c.URIs, c.DNSNames = nil, []string{"cart.shop"} }), "no URI SAN"},
		{"identity in the common name only", leaf(ca, cart, func(c *x509.Certificate) { c.URIs = nil; c.Subject.CommonName = cart.String() }), "no URI SAN"},
		{"a URI that is not SPIFFE", leaf(ca, cart, uris("https://cluster.local/ns/shop/sa/cart")), "scheme"},
		{"a SPIFFE ID that is not a workload's", leaf(ca, cart, uris("spiffe://cluster.local/shop/cart")), "want spiffe://"},
		{"a SPIFFE ID with a query", leaf(ca, cart, uris("spiffe://cluster.local/ns/shop/sa/cart?x=1")), "limited to"},
		{"a SPIFFE ID with a port", leaf(ca, cart, uris("spiffe://cluster.local:443/ns/shop/sa/cart")), "limited to"},
		{"a SPIFFE ID with an escaped slash", leaf(ca, cart, uris("spiffe://cluster.local/ns/shop%2fsa%2fcart/sa/x")), "limited to"},
		{"a SPIFFE ID with dots", leaf(ca, cart, uris("spiffe://cluster.local/ns/../sa/cart")), "dot segments"},
		{"a CA certificate", leaf(ca, cart, func(c *x509.Certificate) { c.IsCA = true }), "it is a CA certificate"},
		{"the root itself", []*x509.Certificate{ca.Certificate()}, "no URI SAN"},
		{"a key that may sign certificates", leaf(ca, cart, func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }), "may sign certificates"},
		{"a key that may sign revocations", leaf(ca, cart, func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign }), "may sign certificates"},
		{"a key that may not sign", leaf(ca, cart, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment }), "lacks digitalSignature"},
		{"expired", leaf(ca, cart, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }), "expired"},
		{"not yet valid", leaf(ca, cart, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Hour) }), "not yet valid"},
		{"for another use", leaf(ca, cart, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }), "incompatible key usage"},
		{"for code signing", leaf(ca, cart, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning} }), "incompatible key usage"},
		{"a critical extension nobody knows", leaf(ca, cart, func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3, 4}, Critical: true, Value: []byte{5, 0}}}
		}), "unhandled critical extension"},
		{"self-signed", []*x509.Certificate{selfSigned(t, cart)}, "unknown authority"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := roots.Verify(tt.chain, time.Now(), x509.ExtKeyUsageClientAuth)
			if tt.want == "" {
				if err != nil || got != cart {
					t.Fatalf("Verify = %v, %v; want %v", got, err, cart)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Verify error = %v, want one with %q", err, tt.want)
			}
			if !got.IsZero() {
				t.Errorf("Verify failed and still returned %v", got)
			}
		})
	}
}

func TestVerifyZeroRootsTrustNobody(t *testing.T) {
	ca := testca.New(t, "cluster.local")
	_, err := new(Roots).Verify([]*x509.Certificate{ca.Issue(cart).Leaf}, time.Now(), x509.ExtKeyUsageClientAuth)
	if err == nil || !strings.Contains(err.Error(), "not trusted here") {
		t.Errorf("Verify error = %v, want not trusted", err)
	}
}

func TestUpdateReplacesTheOldRoot(t *testing.T) {
	first, second := testca.New(t, "cluster.local"), testca.New(t, "cluster.local")
	roots := rootsOf(t, first)
	if err := roots.Update("cluster.local", second.PEM()); err != nil {
		t.Fatal(err)
	}
	if _, err := roots.Verify([]*x509.Certificate{first.Issue(cart).Leaf}, time.Now(), x509.ExtKeyUsageClientAuth); err == nil {
		t.Error("a certificate of the root that was removed still verifies")
	}
	if _, err := roots.Verify([]*x509.Certificate{second.Issue(cart).Leaf}, time.Now(), x509.ExtKeyUsageClientAuth); err != nil {
		t.Error(err)
	}
}

func TestUpdateRefusesAndKeeps(t *testing.T) {
	ca := testca.New(t, "cluster.local")
	key := ca.KeyPEM()
	leaf := FormatCertificates([]*x509.Certificate{ca.Issue(cart).Leaf})
	cut := bytes.Replace(ca.PEM(), []byte("-----END CERTIFICATE-----"), nil, 1)
	tests := []struct {
		name, trustDomain string
		pem               []byte
		want              string
	}{
		{"empty", "cluster.local", nil, "no PEM certificate"},
		{"not PEM", "cluster.local", []byte("hello"), "no PEM certificate"},
		{"a private key", "cluster.local", key, "PRIVATE KEY"},
		{"a leaf", "cluster.local", leaf, "not a CA certificate"},
		{"a second block that is cut short", "cluster.local", append(bytes.Clone(ca.PEM()), cut...), "cannot be read"},
		{"a trust domain that cannot be", "Cluster Local", ca.PEM(), "trust bundle of"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			roots := rootsOf(t, ca)
			err := roots.Update(tt.trustDomain, tt.pem)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Update error = %v, want one with %q", err, tt.want)
			}
			if got := roots.Certificates("cluster.local"); len(got) != 1 || !got[0].Equal(ca.Certificate()) {
				t.Errorf("roots changed to %v", got)
			}
		})
	}
}

func FuzzParseCertificates(f *testing.F) {
	ca := testca.New(f, "cluster.local")
	f.Add(ca.PEM())
	f.Add(append([]byte("a comment\n"), bytes.Repeat(ca.PEM(), 2)...))
	f.Add(ca.KeyPEM())
	f.Add([]byte("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		certs, err := ParseCertificates(text)
		if err != nil {
			return
		}
		again, err := ParseCertificates(FormatCertificates(certs))
		if err != nil || len(again) != len(certs) {
			t.Fatalf("what was parsed does not survive a round trip: %d certificates, %v", len(again), err)
		}
	})
}

// FuzzVerify feeds certificates that a peer could send: none may be accepted
// unless our root signed it, and none may crash.
func FuzzVerify(f *testing.F) {
	ca := testca.New(f, "cluster.local")
	roots := new(Roots)
	if err := roots.Update("cluster.local", ca.PEM()); err != nil {
		f.Fatal(err)
	}
	good := ca.Issue(cart).Leaf
	f.Add(uint16(0), byte(0), []byte{})
	f.Add(uint16(200), byte(1), []byte{})
	f.Add(uint16(0), byte(0), testca.New(f, "cluster.local").Issue(cart).Leaf.Raw)
	// Keys differ from process to process, so what is fuzzed of a good
	// certificate is one byte of it.
	f.Fuzz(func(t *testing.T, at uint16, flip byte, der []byte) {
		if len(der) == 0 {
			der = bytes.Clone(good.Raw)
			der[int(at)%len(der)] ^= flip
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return
		}
		id, err := roots.Verify([]*x509.Certificate{cert}, time.Now(), x509.ExtKeyUsageClientAuth)
		if err == nil && !bytes.Equal(cert.RawTBSCertificate, good.RawTBSCertificate) {
			t.Fatalf("accepted a forged certificate of %s", id)
		}
		_, _ = PeerIdentity(tls.ConnectionState{PeerCertificates: []*x509.Certificate{cert}})
	})
}

func FuzzParseIdentity(f *testing.F) {
	f.Add(cart.String())
	f.Add("spiffe://a/ns/b/sa/c/d")
	f.Add("spiffe://a/ns//sa/c")
	f.Add("spiffe://a/ns/../sa/%2e")
	f.Fuzz(func(t *testing.T, s string) {
		id, err := mesh.ParseIdentity(s)
		if err != nil {
			return
		}
		if id.String() != s {
			t.Fatalf("ParseIdentity(%q).String() = %q", s, id)
		}
	})
}

func selfSigned(t testing.TB, id mesh.Identity) *x509.Certificate {
	t.Helper()
	key := newTestKey(t)
	template := testca.New(t, id.TrustDomain).Issue(id).Leaf
	template.PublicKey = nil
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}
