// Package testca is a toy certificate authority for tests: it signs whatever
// it is told to, also what no honest authority would.
package testca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net/url"
	"testing"
	"time"

	"github.com/weft-mesh/weft/mesh"
)

// A CA signs certificates for one trust domain. Inside a synctest bubble it
// lives by the bubble's clock.
type CA struct {
	TrustDomain string

	t    testing.TB
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

// New returns a CA with a root of its own, valid for ten years.
func New(t testing.TB, trustDomain string) *CA {
	t.Helper()
	ca := &CA{TrustDomain: trustDomain, t: t, key: newKey(t)}
	template := &x509.Certificate{
		SerialNumber:          serial(t),
		Subject:               pkix.Name{CommonName: "toy root of " + trustDomain},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().AddDate(10, 0, 0),
		KeyUsage:              x509.KeyUsageCertSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	ca.cert = ca.sign(template, template, ca.key.Public(), ca.key)
	return ca
}

// Issue returns a certificate for id with a new key, valid for a day.
func (ca *CA) Issue(id mesh.Identity) tls.Certificate {
	ca.t.Helper()
	return ca.IssueAs(id, nil)
}

// IssueAs is Issue with a chance to spoil the certificate before it is
// signed. A nil change is none.
func (ca *CA) IssueAs(id mesh.Identity, change func(*x509.Certificate)) tls.Certificate {
	ca.t.Helper()
	key := newKey(ca.t)
	leaf := ca.Sign(id, key.Public(), change)
	return tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key, Leaf: leaf}
}

// Sign returns a certificate for id and somebody else's key. A nil change is
// none.
func (ca *CA) Sign(id mesh.Identity, key crypto.PublicKey, change func(*x509.Certificate)) *x509.Certificate {
	ca.t.Helper()
	template := &x509.Certificate{
		SerialNumber:          serial(ca.t),
		NotBefore:             time.Now().Add(-time.Minute),
		NotAfter:              time.Now().Add(24 * time.Hour),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
		URIs:                  []*url.URL{URI(ca.t, id.String())},
	}
	if change != nil {
		change(template)
	}
	return ca.sign(template, ca.cert, key, ca.key)
}

// Intermediate returns a CA whose certificate ca has signed. What it issues
// verifies only together with its Certificate.
func (ca *CA) Intermediate() *CA {
	ca.t.Helper()
	key := newKey(ca.t)
	template := &x509.Certificate{
		SerialNumber:          serial(ca.t),
		Subject:               pkix.Name{CommonName: "toy intermediate of " + ca.TrustDomain},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().AddDate(1, 0, 0),
		KeyUsage:              x509.KeyUsageCertSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	return &CA{TrustDomain: ca.TrustDomain, t: ca.t, key: key, cert: ca.sign(template, ca.cert, key.Public(), ca.key)}
}

// Certificate returns the CA's own certificate.
func (ca *CA) Certificate() *x509.Certificate { return ca.cert }

// Bundle returns what those who trust the CA must hold.
func (ca *CA) Bundle() []*x509.Certificate { return []*x509.Certificate{ca.cert} }

// PEM returns Bundle as a PEM text.
func (ca *CA) PEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.cert.Raw})
}

// KeyPEM returns the CA's private key as a PEM text.
func (ca *CA) KeyPEM() []byte {
	ca.t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(ca.key)
	if err != nil {
		ca.t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

// URI parses a URI that a test wrote.
func URI(t testing.TB, s string) *url.URL {
	t.Helper()
	u, err := url.Parse(s)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func (ca *CA) sign(template, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	ca.t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, key)
	if err != nil {
		ca.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		ca.t.Fatal(err)
	}
	return cert
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func serial(t testing.TB) *big.Int {
	t.Helper()
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 128))
	if err != nil {
		t.Fatal(err)
	}
	return n
}
