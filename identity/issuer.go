package identity

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"time"

	"github.com/weft-mesh/weft/mesh"
)

// An Issuer signs certificates. It is all that a Manager needs of a CA.
type Issuer interface {
	// Issue asks for a certificate that proves id for the key that signed
	// csr, which is DER. It returns when ctx ends, at the latest. The answer
	// is not trusted: the Manager checks it before use.
	Issue(ctx context.Context, id mesh.Identity, csr []byte) (Issued, error)
}

// Issued is the answer of an Issuer.
type Issued struct {
	// Chain is the certificate and its intermediates in DER, leaf first,
	// without the root.
	Chain [][]byte
	// Roots are what is to be trusted for our trust domain from now on, in
	// DER. Empty means no change.
	Roots [][]byte
}

// A grant is a certificate that has passed every check.
type grant struct {
	cert  *tls.Certificate
	roots []*x509.Certificate // nil: no change
}

// request makes a key, has a certificate for it issued, and checks what came
// back.
func request(ctx context.Context, issuer Issuer, roots *Roots, id mesh.Identity) (grant, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return grant{}, fmt.Errorf("make a key: %w", err)
	}
	csr, err := signingRequest(key, id)
	if err != nil {
		return grant{}, err
	}
	issued, err := issuer.Issue(ctx, id, csr)
	if err != nil {
		return grant{}, err
	}
	g, err := accept(key, id, issued, roots, time.Now())
	if err != nil {
		return grant{}, fmt.Errorf("the CA's answer is not usable: %w", err)
	}
	return g, nil
}

// signingRequest makes the CSR for id, signed by key. The subject is empty:
// an identity is only ever in the URI name.
func signingRequest(key crypto.Signer, id mesh.Identity) ([]byte, error) {
	uri, err := url.Parse(id.String())
	if err != nil {
		return nil, fmt.Errorf("make a signing request for %s: %w", id, err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{uri}}, key)
	if err != nil {
		return nil, fmt.Errorf("make a signing request for %s: %w", id, err)
	}
	return csr, nil
}

// accept checks that an answer is a certificate for our key and for id, and
// that peers who trust the roots that came with it (or, without any, those
// we have) will accept it on either side of a connection.
func accept(key crypto.Signer, id mesh.Identity, issued Issued, current *Roots, now time.Time) (grant, error) {
	chain, err := parseAll(issued.Chain)
	if err != nil {
		return grant{}, fmt.Errorf("certificate chain: %w", err)
	}
	if len(chain) == 0 {
		return grant{}, errors.New("it holds no certificate")
	}
	if pub, ok := chain[0].PublicKey.(*ecdsa.PublicKey); !ok || !pub.Equal(key.Public()) {
		return grant{}, errors.New("the certificate is for a key that is not ours")
	}
	roots, err := parseAll(issued.Roots)
	if err != nil {
		return grant{}, fmt.Errorf("roots: %w", err)
	}
	against := current
	if len(roots) > 0 {
		against = new(Roots)
		if _, err := against.replace(id.TrustDomain, roots); err != nil {
			return grant{}, err
		}
	}
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth} {
		got, err := against.Verify(chain, now, usage)
		if err != nil {
			return grant{}, err
		}
		if got != id {
			return grant{}, fmt.Errorf("the certificate is for %s, want %s", got, id)
		}
	}
	return grant{
		cert:  &tls.Certificate{Certificate: issued.Chain, PrivateKey: key, Leaf: chain[0]},
		roots: roots,
	}, nil
}

func parseAll(ders [][]byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for i, der := range ders {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", i+1, err)
		}
		certs = append(certs, c)
	}
	return certs, nil
}
