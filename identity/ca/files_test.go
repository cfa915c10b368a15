package ca

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/weft-mesh/weft/identity"
	"github.com/weft-mesh/weft/internal/testca"
)

// A pki is a root made by hand with an intermediate below it.
type pki struct {
	rootKey, interKey *ecdsa.PrivateKey
	root, inter       *x509.Certificate
}

func newPKI(t testing.TB, change func(*x509.Certificate)) pki {
	t.Helper()
	p := pki{rootKey: newKey(t, elliptic.P384()), interKey: newKey(t, elliptic.P256())}
	p.root = certify(t, caTemplate("corporate root", 20), nil, &p.rootKey.PublicKey, p.rootKey)
	template := caTemplate("mesh intermediate", 1)
	if change != nil {
		change(template)
	}
	p.inter = certify(t, template, p.root, &p.interKey.PublicKey, p.rootKey)
	return p
}

func caTemplate(name string, years int) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber:          big.NewInt(time.Now().UnixNano()),
		Subject:               pkix.Name{CommonName: name},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().AddDate(years, 0, 0),
		KeyUsage:              x509.KeyUsageCertSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
}

func certify(t testing.TB, template, parent *x509.Certificate, pub *ecdsa.PublicKey, key *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func text(certs ...*x509.Certificate) []byte { return identity.FormatCertificates(certs) }

func (p pki) files(t testing.TB) Files {
	return Files{Cert: text(p.inter), Key: keyPEM(t, p.interKey), Root: text(p.root), Chain: text(p.inter, p.root)}
}

func TestFilesRoundTrip(t *testing.T) {
	a := newAuthorityT(t)
	f, err := a.Files()
	if err != nil {
		t.Fatal(err)
	}
	b, err := Parse("cluster.local", FilesOf(f.Data()))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(a.RootPEM(), b.RootPEM()) || !b.Expiry().Equal(a.Expiry()) || !b.RootExpiry().Equal(a.RootExpiry()) {
		t.Error("the Authority came back changed")
	}
	chain, err := b.Sign(request(t, newKey(t, elliptic.P256()), nil), cart, 0)
	if err != nil {
		t.Fatal(err)
	}
	if len(chain) != 1 {
		t.Errorf("a self-signed CA sends %d certificates, want the leaf alone", len(chain))
	}
	verify(t, a, chain, cart)
}

func TestPlugIn(t *testing.T) {
	p := newPKI(t, nil)
	other := newPKI(t, nil)
	ecKey, err := x509.MarshalECPrivateKey(p.interKey)
	if err != nil {
		t.Fatal(err)
	}
	with := func(change func(*Files)) Files { f := p.files(t); change(&f); return f }
	tests := []struct {
		name  string
		files Files
	}{
		{"chain with the root at its end", p.files(t)},
		{"no chain", with(func(f *Files) { f.Chain = nil })},
		{"chain of the intermediate alone", with(func(f *Files) { f.Chain = text(p.inter) })},
		{"two roots, for a rotation", with(func(f *Files) { f.Root = text(other.root, p.root) })},
		{"an openssl key", with(func(f *Files) {
			f.Key = append(pemOf("EC PARAMETERS", []byte{6, 8}), pemOf("EC PRIVATE KEY", ecKey)...)
		})},
		{"the chain in ca-cert.pem", with(func(f *Files) { f.Cert, f.Chain = text(p.inter, p.root), nil })},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			a, err := Parse("cluster.local", tt.files)
			if err != nil {
				t.Fatal(err)
			}
			chain, err := a.Sign(request(t, newKey(t, elliptic.P256()), nil), cart, 0)
			if err != nil {
				t.Fatal(err)
			}
			if len(chain) != 2 || !bytes.Equal(chain[1], p.inter.Raw) {
				t.Errorf("the chain has %d certificates, want leaf and intermediate", len(chain))
			}
			verify(t, a, chain, cart)
			if !a.Expiry().Equal(p.inter.NotAfter) {
				t.Errorf("Expiry = %v, want the intermediate's %v", a.Expiry(), p.inter.NotAfter)
			}
		})
	}
}

func TestPlugInRefuses(t *testing.T) {
	p, other := newPKI(t, nil), newPKI(t, nil)
	with := func(change func(*Files)) Files { f := p.files(t); change(&f); return f }
	spoilt := func(change func(*x509.Certificate)) Files { return newPKI(t, change).files(t) }
	leaf := testca.New(t, "cluster.local").Issue(cart).Leaf
	p521 := newKey(t, elliptic.P521())

	tests := []struct {
		name  string
		files Files
		want  []string
	}{
		{"nothing", Files{}, []string{"ca-cert.pem: it is missing", "ca-key.pem: it is missing", "root-cert.pem: it is missing"}},
		{"the key of another certificate", with(func(f *Files) { f.Key = keyPEM(t, other.interKey) }), []string{"ca-key.pem: it is not the key"}},
		{"a certificate where the key should be", with(func(f *Files) { f.Key = f.Cert }), []string{`ca-key.pem: it holds a "CERTIFICATE"`}},
		{"a key where the certificate should be", with(func(f *Files) { f.Cert = f.Key }), []string{"ca-cert.pem: parse certificates", "PRIVATE KEY"}},
		{"an encrypted key", with(func(f *Files) { f.Key = pemOf("ENCRYPTED PRIVATE KEY", []byte{1}) }), []string{"ENCRYPTED", "unencrypted"}},
		{"a key cut short", with(func(f *Files) { f.Key = pemOf("PRIVATE KEY", []byte{48, 1}) }), []string{"ca-key.pem: the private key cannot be read"}},
		{"a key that is not PEM", with(func(f *Files) { f.Key = []byte("secret-material") }), []string{"no PEM private key"}},
		{"a key on a curve that is not allowed", Files{Cert: text(certify(t, caTemplate("x", 1), nil, &p521.PublicKey, p521)), Key: keyPEM(t, p521), Root: text(p.root)}, []string{"P-521"}},
		{"another root", with(func(f *Files) { f.Root = text(other.root) }), []string{"do not fit together", "does not chain up to a root"}},
		{"a leaf for a CA", with(func(f *Files) { f.Cert = text(leaf) }), []string{"ca-cert.pem", "not a CA certificate"}},
		{"a leaf for a root", with(func(f *Files) { f.Root = text(leaf) }), []string{"root-cert.pem", "not a CA certificate"}},
		{"a leaf in the chain", with(func(f *Files) { f.Chain = text(leaf) }), []string{"cert-chain.pem", "not a CA certificate"}},
		{"a CA that may not sign", spoilt(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageDigitalSignature }), []string{"lacks keyCertSign"}},
		{"an expired CA", spoilt(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }), []string{"ca-cert.pem", "expired at"}},
		{"a CA of tomorrow", spoilt(func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Hour) }), []string{"ca-cert.pem", "not valid before"}},
		{"a CA for web servers only", spoilt(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }), []string{"peers would refuse"}},
		{"a CA for other URIs only", spoilt(func(c *x509.Certificate) {
			c.PermittedURIDomains, c.PermittedDNSDomainsCritical = []string{"else.where"}, true
		}), []string{"peers would refuse"}},
		{"a CA about to end", spoilt(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(20 * time.Second) }), []string{"replace it"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			a, err := Parse("cluster.local", tt.files)
			if a != nil || err == nil {
				t.Fatal("Parse succeeded")
			}
			for _, want := range tt.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("Parse error = %v, want one with %q", err, want)
				}
			}
			if strings.Contains(err.Error(), "secret-material") {
				t.Errorf("the error quotes the key: %v", err)
			}
		})
	}
	if _, err := Parse("No Domain", p.files(t)); err == nil || !strings.Contains(err.Error(), "trust domain") {
		t.Errorf("Parse error = %v, want the trust domain", err)
	}
}

func TestFilesPrintNoKey(t *testing.T) {
	f := newPKI(t, nil).files(t)
	for _, s := range []string{fmt.Sprint(f), fmt.Sprintf("%v %+v %#v %s", f, f, f, f)} {
		if strings.Contains(s, "PRIVATE") || len(s) > 100 {
			t.Errorf("printed: %s", s)
		}
	}
}

func FuzzParse(f *testing.F) {
	p := newPKI(f, nil)
	files := p.files(f)
	f.Add(files.Cert, files.Key, files.Root, files.Chain)
	f.Add(files.Root, files.Key, files.Root, []byte{})
	f.Add([]byte("-----BEGIN CERTIFICATE-----"), []byte("-----BEGIN EC PRIVATE KEY-----\n-----END EC PRIVATE KEY-----"), []byte{}, []byte{})
	csr := request(f, newKey(f, elliptic.P256()), nil)
	f.Fuzz(func(t *testing.T, cert, key, root, chain []byte) {
		a, err := Parse("cluster.local", Files{Cert: cert, Key: key, Root: root, Chain: chain})
		if err != nil {
			return
		}
		signed, err := a.Sign(csr, cart, 0)
		if err != nil {
			t.Fatal(err)
		}
		verify(t, a, signed, cart)
	})
}
