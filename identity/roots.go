package identity

import (
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/weft-mesh/weft/mesh"
)

// Roots are the certificates that we trust, by trust domain. The zero Roots
// trust nobody. Roots are safe for concurrent use.
type Roots struct {
	mu  sync.Mutex // guards the making of set, and one Update at a time
	set *x509bundle.Set
}

// NewRoots returns Roots that trust the certificates of the PEM text for
// trustDomain, and nothing else.
func NewRoots(trustDomain string, pem []byte) (*Roots, error) {
	r := new(Roots)
	return r, r.Update(trustDomain, pem)
}

// Update replaces what is trusted for trustDomain. On an error nothing has
// changed. Connections that exist already are not looked at again.
func (r *Roots) Update(trustDomain string, pem []byte) error {
	certs, err := ParseCertificates(pem)
	if err != nil {
		return fmt.Errorf("trust bundle of %s: %w", trustDomain, err)
	}
	_, err = r.replace(trustDomain, certs)
	return err
}

// Certificates returns what is trusted for trustDomain; nil if nothing is.
func (r *Roots) Certificates(trustDomain string) []*x509.Certificate {
	td, err := spiffeid.TrustDomainFromString(trustDomain)
	if err != nil {
		return nil
	}
	if b, ok := r.bundles().Get(td); ok {
		return b.X509Authorities()
	}
	return nil
}

// Verify checks that chain, leaf first, proves an identity at time now for
// the given use, and returns that identity. It follows the X509-SVID
// standard, sections 3 to 5: exactly one URI name, which is a SPIFFE ID; a
// leaf that can sign no certificates; and a path to a root of the identity's
// own trust domain, never of another one.
func (r *Roots) Verify(chain []*x509.Certificate, now time.Time, usage x509.ExtKeyUsage) (mesh.Identity, error) {
	if len(chain) == 0 {
		return mesh.Identity{}, errors.New("verify certificate: there is none")
	}
	leaf := chain[0]
	id, err := leafIdentity(leaf)
	if err != nil {
		return mesh.Identity{}, fmt.Errorf("verify certificate: %w", err)
	}
	switch {
	case leaf.IsCA:
		return mesh.Identity{}, fmt.Errorf("verify certificate of %s: it is a CA certificate, not a workload's", id)
	case leaf.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0:
		return mesh.Identity{}, fmt.Errorf("verify certificate of %s: its key may sign certificates, so it is not a workload's", id)
	case leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return mesh.Identity{}, fmt.Errorf("verify certificate of %s: its key usage lacks digitalSignature", id)
	}
	anchors := r.Certificates(id.TrustDomain)
	if len(anchors) == 0 {
		return mesh.Identity{}, fmt.Errorf("verify certificate of %s: trust domain %q is not trusted here", id, id.TrustDomain)
	}
	if _, err := leaf.Verify(x509.VerifyOptions{
		Roots:         pool(anchors),
		Intermediates: pool(chain[1:]),
		CurrentTime:   now,
		KeyUsages:     []x509.ExtKeyUsage{usage},
	}); err != nil {
		return mesh.Identity{}, fmt.Errorf("verify certificate of %s: %w", id, err)
	}
	return id, nil
}

// replace makes certs the trusted ones of trustDomain and reports whether
// they differ from those before.
func (r *Roots) replace(trustDomain string, certs []*x509.Certificate) (changed bool, err error) {
	td, err := spiffeid.TrustDomainFromString(trustDomain)
	if err != nil {
		return false, fmt.Errorf("trust bundle of %q: %w", trustDomain, err)
	}
	if len(certs) == 0 {
		return false, fmt.Errorf("trust bundle of %s: it is empty", trustDomain)
	}
	for _, c := range certs {
		if !c.BasicConstraintsValid || !c.IsCA {
			return false, fmt.Errorf("trust bundle of %s: %q is not a CA certificate", trustDomain, c.Subject)
		}
	}
	set := r.bundles()
	r.mu.Lock()
	defer r.mu.Unlock()
	if old, ok := set.Get(td); ok && slices.EqualFunc(old.X509Authorities(), certs, (*x509.Certificate).Equal) {
		return false, nil
	}
	set.Add(x509bundle.FromX509Authorities(td, certs))
	return true, nil
}

func (r *Roots) bundles() *x509bundle.Set {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.set == nil {
		r.set = x509bundle.NewSet()
	}
	return r.set
}

// leafIdentity reads the identity that cert claims. It verifies nothing.
func leafIdentity(cert *x509.Certificate) (mesh.Identity, error) {
	sid, err := x509svid.IDFromCert(cert)
	if err != nil {
		return mesh.Identity{}, fmt.Errorf("read its identity from URI names %v: %w", cert.URIs, err)
	}
	return mesh.ParseIdentity(sid.String())
}

func pool(certs []*x509.Certificate) *x509.CertPool {
	p := x509.NewCertPool()
	for _, c := range certs {
		p.AddCert(c)
	}
	return p
}
