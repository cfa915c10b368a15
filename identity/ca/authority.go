// Package ca is the signing side of identity: the mesh's root or an
// intermediate below somebody else's, and the rules by which it signs.
//
// An Authority decides how a certificate looks, never who may have it: that
// is settled by whoever calls Sign.
package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/weft-mesh/weft/identity"
)

const (
	rootYears = 10
	// backdate is how far back a certificate's life reaches before it is
	// made, so that a machine whose clock is a little behind accepts it.
	backdate = 2 * time.Minute
)

// An Authority signs certificates for one trust domain. It never changes and
// is safe for concurrent use.
type Authority struct {
	trustDomain string
	key         crypto.Signer
	cert        *x509.Certificate
	// chain is what goes with a leaf so that peers find the way to a root:
	// cert and its intermediates, without a root.
	chain []*x509.Certificate
	roots []*x509.Certificate
	until time.Time // the first end among cert, chain and the root above
}

// New makes an Authority with a new self-signed root, valid for ten years.
// Keep its Files: whoever has lost the root has lost every identity.
func New(trustDomain string) (*Authority, error) {
	if _, err := spiffeid.TrustDomainFromString(trustDomain); err != nil {
		return nil, fmt.Errorf("make a root for %q: %w", trustDomain, err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make a root for %s: %w", trustDomain, err)
	}
	serial, err := newSerial()
	if err != nil {
		return nil, fmt.Errorf("make a root for %s: %w", trustDomain, err)
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{Organization: []string{trustDomain}, CommonName: "Weft root"},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.AddDate(rootYears, 0, 0),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("make a root for %s: %w", trustDomain, err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("make a root for %s: %w", trustDomain, err)
	}
	return newAuthority(trustDomain, key, cert, nil, []*x509.Certificate{cert})
}

// TrustDomain is the trust domain that a signs for.
func (a *Authority) TrustDomain() string { return a.trustDomain }

// RootPEM is what those who trust a must hold: one root or more.
func (a *Authority) RootPEM() []byte { return identity.FormatCertificates(a.roots) }

// RootExpiry is when the first of the roots ends.
func (a *Authority) RootExpiry() time.Time {
	first := a.roots[0].NotAfter
	for _, r := range a.roots[1:] {
		if r.NotAfter.Before(first) {
			first = r.NotAfter
		}
	}
	return first
}

// Expiry is when a can sign no more, because its own certificate or one above
// it ends.
func (a *Authority) Expiry() time.Time { return a.until }

// newAuthority puts an Authority together from parts that fit, and proves
// that they do by making a certificate and verifying it as a peer would.
func newAuthority(trustDomain string, key crypto.Signer, cert *x509.Certificate, above, roots []*x509.Certificate) (*Authority, error) {
	a := &Authority{trustDomain: trustDomain, key: key, cert: cert, roots: roots}
	if !contains(roots, cert) {
		a.chain = append(a.chain, cert)
	}
	for _, c := range above {
		if !contains(roots, c) && !contains(a.chain, c) && !selfIssued(c) {
			a.chain = append(a.chain, c)
		}
	}
	until, err := a.pathEnd(time.Now())
	if err != nil {
		return nil, err
	}
	a.until = until
	if err := a.rehearse(); err != nil {
		return nil, err
	}
	return a, nil
}

// pathEnd finds the way from cert up to a root and returns when its first
// certificate ends. Of several ways it takes the one that lasts longest.
func (a *Authority) pathEnd(now time.Time) (time.Time, error) {
	opts := x509.VerifyOptions{
		Roots:         x509.NewCertPool(),
		Intermediates: x509.NewCertPool(),
		CurrentTime:   now,
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	}
	for _, c := range a.roots {
		opts.Roots.AddCert(c)
	}
	for _, c := range a.chain {
		opts.Intermediates.AddCert(c)
	}
	paths, err := a.cert.Verify(opts)
	if err != nil {
		return time.Time{}, fmt.Errorf("the CA certificate %q does not chain up to a root: %w", a.cert.Subject, err)
	}
	var latest time.Time
	for _, path := range paths {
		end := path[0].NotAfter
		for _, c := range path[1:] {
			if c.NotAfter.Before(end) {
				end = c.NotAfter
			}
		}
		if end.After(latest) {
			latest = end
		}
	}
	return latest, nil
}

// newSerial returns a positive random serial number of 128 bits (RFC 5280,
// 4.1.2.2 allows 159).
func newSerial() (*big.Int, error) {
	for {
		n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 128))
		if err != nil {
			return nil, errors.New("no randomness for a serial number")
		}
		if n.Sign() > 0 {
			return n, nil
		}
	}
}

func contains(certs []*x509.Certificate, c *x509.Certificate) bool {
	for _, o := range certs {
		if o.Equal(c) {
			return true
		}
	}
	return false
}

// selfIssued reports whether c is signed by its own key, as roots are.
func selfIssued(c *x509.Certificate) bool { return c.CheckSignatureFrom(c) == nil }
