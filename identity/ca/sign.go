package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/url"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/weft-mesh/weft/identity"
	"github.com/weft-mesh/weft/mesh"
)

const (
	// MaxTTL is how long a certificate lives at most, and also if the request
	// does not say.
	MaxTTL = 24 * time.Hour
	// minTTL is the life that must be left in the CA for a signature to be
	// worth anything.
	minTTL = time.Minute
)

// ErrRequest says that a signing request is not one that an Authority signs;
// the same request will fail again.
var ErrRequest = errors.New("signing request refused")

// Sign issues a certificate that proves id for the key of csr, which is PEM
// or DER. It lives for ttl, but not longer than MaxTTL nor than the Authority
// itself; a ttl of 0 or less is MaxTTL. The result is in DER, leaf first,
// without the root.
//
// The caller has made sure that whoever asks may be id. Of the request only
// the key counts: names and extensions in it are passed over, but a URI name
// that is not id is an error, since it shows that the two do not agree on
// what is asked. Errors that the request is to blame for wrap ErrRequest.
func (a *Authority) Sign(csr []byte, id mesh.Identity, ttl time.Duration) ([][]byte, error) {
	if id.TrustDomain != a.trustDomain {
		return nil, fmt.Errorf("sign %s: %w: this CA signs for trust domain %q", id, ErrRequest, a.trustDomain)
	}
	if err := wellFormed(id); err != nil {
		return nil, fmt.Errorf("sign %q: %w: %w", id, ErrRequest, err)
	}
	key, err := readRequest(csr, id)
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w: %w", id, ErrRequest, err)
	}
	uri, err := url.Parse(id.String())
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w: %w", id, ErrRequest, err)
	}
	chain, err := a.issue(key, ttl, x509.Certificate{
		// The subject stays empty, which makes the name extension critical
		// (RFC 5280, 4.2.1.6).
		URIs:        []*url.URL{uri},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	})
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", id, err)
	}
	return chain, nil
}

// SignServer issues a certificate with a new key for a server that is known
// by DNS names, for example the control service itself. It is no workload
// identity. It lives for MaxTTL, or as long as the Authority.
func (a *Authority) SignServer(dnsNames []string) (*tls.Certificate, error) {
	if len(dnsNames) == 0 {
		return nil, errors.New("sign a server certificate: it needs a DNS name")
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("sign a server certificate: %w", err)
	}
	chain, err := a.issue(key.Public(), MaxTTL, x509.Certificate{
		DNSNames:    dnsNames,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
	if err != nil {
		return nil, fmt.Errorf("sign a server certificate for %v: %w", dnsNames, err)
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return nil, fmt.Errorf("sign a server certificate for %v: %w", dnsNames, err)
	}
	return &tls.Certificate{Certificate: chain, PrivateKey: key, Leaf: leaf}, nil
}

// issue signs a leaf with the names and uses of template.
func (a *Authority) issue(key crypto.PublicKey, ttl time.Duration, template x509.Certificate) ([][]byte, error) {
	now := time.Now()
	end, err := a.leafEnd(now, ttl)
	if err != nil {
		return nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	template.SerialNumber = serial
	template.NotBefore = now.Add(-backdate)
	template.NotAfter = end
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.BasicConstraintsValid = true // and not a CA
	leaf, err := x509.CreateCertificate(rand.Reader, &template, a.cert, key, a.key)
	if err != nil {
		return nil, err
	}
	chain := [][]byte{leaf}
	for _, c := range a.chain {
		chain = append(chain, c.Raw)
	}
	return chain, nil
}

// leafEnd decides when a certificate made at now ends.
func (a *Authority) leafEnd(now time.Time, ttl time.Duration) (time.Time, error) {
	if ttl <= 0 || ttl > MaxTTL {
		ttl = MaxTTL
	}
	end := now.Add(ttl)
	if end.Before(a.until) {
		return end, nil
	}
	if a.until.Sub(now) < minTTL {
		return time.Time{}, fmt.Errorf("the CA's own certificate or a root above it ends at %s: replace it", a.until.Format(time.RFC3339))
	}
	return a.until, nil
}

// wellFormed refuses an identity that its own SPIFFE ID does not lead back to,
// or that the standard does not allow, such as one with a part "..".
func wellFormed(id mesh.Identity) error {
	again, err := mesh.ParseIdentity(id.String())
	if err != nil {
		return err
	}
	if again != id {
		return fmt.Errorf("it reads as %q", again)
	}
	_, err = spiffeid.FromString(id.String())
	return err
}

// readRequest checks csr and returns its key.
func readRequest(csr []byte, id mesh.Identity) (crypto.PublicKey, error) {
	der, err := requestDER(csr)
	if err != nil {
		return nil, err
	}
	req, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, fmt.Errorf("it cannot be read: %w", err)
	}
	// Proof that the key is the requester's own.
	if err := req.CheckSignature(); err != nil {
		return nil, fmt.Errorf("its signature is wrong: %w", err)
	}
	if err := checkKey(req.PublicKey); err != nil {
		return nil, err
	}
	for _, u := range req.URIs {
		if u.String() != id.String() {
			return nil, fmt.Errorf("it names %s", u)
		}
	}
	return req.PublicKey, nil
}

// requestDER strips the PEM around a request, if there is any.
func requestDER(csr []byte) ([]byte, error) {
	block, rest := pem.Decode(csr)
	switch {
	case block == nil && len(csr) > 0 && csr[0] == 0x30: // a DER sequence
		return csr, nil
	case block == nil:
		return nil, errors.New("it is neither PEM nor DER")
	case block.Type != "CERTIFICATE REQUEST" && block.Type != "NEW CERTIFICATE REQUEST":
		return nil, fmt.Errorf("it is a %q, want a CERTIFICATE REQUEST", block.Type)
	case len(bytes.TrimSpace(rest)) > 0:
		return nil, errors.New("something follows it")
	}
	return block.Bytes, nil
}

// checkKey allows the keys that are neither weak nor, in size, a burden to
// everyone who verifies them.
func checkKey(key crypto.PublicKey) error {
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		if k.Curve == elliptic.P256() || k.Curve == elliptic.P384() {
			return nil
		}
		return fmt.Errorf("ECDSA keys on %s are not allowed, use P-256 or P-384", k.Curve.Params().Name)
	case *rsa.PublicKey:
		if bits := k.N.BitLen(); bits < 2048 || bits > 8192 {
			return fmt.Errorf("RSA keys of %d bits are not allowed, use 2048 to 8192", bits)
		}
		return nil
	case ed25519.PublicKey:
		return nil
	}
	return fmt.Errorf("keys of type %T are not allowed, use ECDSA P-256", key)
}

// rehearse signs a certificate and verifies it as a peer would. It catches
// what no single file shows: path lengths, name constraints, key uses.
func (a *Authority) rehearse() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return err
	}
	id := mesh.Identity{TrustDomain: a.trustDomain, Namespace: "default", ServiceAccount: "default"}
	ders, err := a.Sign(csr, id, 0)
	if err != nil {
		return err
	}
	var chain []*x509.Certificate
	for _, der := range ders {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return err
		}
		chain = append(chain, c)
	}
	roots, err := identity.NewRoots(a.trustDomain, a.RootPEM())
	if err != nil {
		return err
	}
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth} {
		if _, err := roots.Verify(chain, time.Now(), usage); err != nil {
			return fmt.Errorf("peers would refuse what this CA signs: %w", err)
		}
	}
	return nil
}
