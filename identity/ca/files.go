package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/weft-mesh/weft/identity"
)

// The keys of a Secret that holds an Authority, as users of plug-in CAs know
// them.
const (
	CertFile  = "ca-cert.pem"
	KeyFile   = "ca-key.pem"
	RootFile  = "root-cert.pem"
	ChainFile = "cert-chain.pem"
)

// Files are an Authority as PEM texts.
type Files struct {
	Cert  []byte // ca-cert.pem: the certificate that signs
	Key   []byte // ca-key.pem: its private key. Secret.
	Root  []byte // root-cert.pem: what everyone trusts, one root or more
	Chain []byte // cert-chain.pem: Cert and what is between it and Root; may be empty
}

// FilesOf picks the Files out of the data of a Secret.
func FilesOf(data map[string][]byte) Files {
	return Files{Cert: data[CertFile], Key: data[KeyFile], Root: data[RootFile], Chain: data[ChainFile]}
}

// Data is the inverse of FilesOf.
func (f Files) Data() map[string][]byte {
	return map[string][]byte{CertFile: f.Cert, KeyFile: f.Key, RootFile: f.Root, ChainFile: f.Chain}
}

// String says nothing: Files hold a private key.
func (f Files) String() string { return "CA files" }

// GoString says nothing: Files hold a private key.
func (f Files) GoString() string { return f.String() }

// Files returns what Parse makes an equal Authority of.
func (a *Authority) Files() (Files, error) {
	der, err := x509.MarshalPKCS8PrivateKey(a.key)
	if err != nil {
		return Files{}, fmt.Errorf("encode the CA key: %w", err)
	}
	return Files{
		Cert:  identity.FormatCertificates([]*x509.Certificate{a.cert}),
		Key:   pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}),
		Root:  a.RootPEM(),
		Chain: identity.FormatCertificates(a.chain),
	}, nil
}

// Parse makes an Authority of Files that a user may have written. Its error
// names every file that is wrong and says what is wrong with it.
func Parse(trustDomain string, f Files) (*Authority, error) {
	var wrong []error
	fail := func(file string, err error) {
		wrong = append(wrong, fmt.Errorf("%s: %w", file, err))
	}
	if _, err := spiffeid.TrustDomainFromString(trustDomain); err != nil {
		wrong = append(wrong, fmt.Errorf("trust domain %q: %w", trustDomain, err))
	}
	certs, err := parseCAs(f.Cert, time.Now())
	if err != nil {
		fail(CertFile, err)
	}
	key, err := parseKey(f.Key)
	if err != nil {
		fail(KeyFile, err)
	}
	roots, err := parseCAs(f.Root, time.Now())
	if err != nil {
		fail(RootFile, err)
	}
	var above []*x509.Certificate
	if len(f.Chain) > 0 {
		if above, err = parseCAs(f.Chain, time.Now()); err != nil {
			fail(ChainFile, err)
		}
	}
	if len(certs) > 0 && key != nil && !samePublicKey(certs[0].PublicKey, key.Public()) {
		fail(KeyFile, fmt.Errorf("it is not the key of the certificate in %s", CertFile))
	}
	if len(wrong) > 0 {
		return nil, fmt.Errorf("read the CA: %w", errors.Join(wrong...))
	}
	// A ca-cert.pem with more than one certificate holds its chain, too.
	a, err := newAuthority(trustDomain, key, certs[0], append(certs[1:], above...), roots)
	if err != nil {
		return nil, fmt.Errorf("read the CA: %s, %s and %s do not fit together: %w", CertFile, ChainFile, RootFile, err)
	}
	return a, nil
}

// parseCAs reads certificates that must be able to sign others at now.
func parseCAs(text []byte, now time.Time) ([]*x509.Certificate, error) {
	if len(text) == 0 {
		return nil, errors.New("it is missing or empty")
	}
	certs, err := identity.ParseCertificates(text)
	if err != nil {
		return nil, err
	}
	for _, c := range certs {
		switch {
		case !c.BasicConstraintsValid || !c.IsCA:
			return nil, fmt.Errorf("certificate %q is not a CA certificate (it needs CA:TRUE in its basic constraints)", c.Subject)
		case c.KeyUsage != 0 && c.KeyUsage&x509.KeyUsageCertSign == 0:
			return nil, fmt.Errorf("certificate %q may not sign certificates (its key usage lacks keyCertSign)", c.Subject)
		case now.Before(c.NotBefore):
			return nil, fmt.Errorf("certificate %q is not valid before %s", c.Subject, c.NotBefore.Format(time.RFC3339))
		case now.After(c.NotAfter):
			return nil, fmt.Errorf("certificate %q expired at %s", c.Subject, c.NotAfter.Format(time.RFC3339))
		}
	}
	return certs, nil
}

// parseKey reads a private key in one of the three encodings that tools
// write. Its errors never quote the text.
func parseKey(text []byte) (crypto.Signer, error) {
	if len(text) == 0 {
		return nil, errors.New("it is missing or empty")
	}
	block := keyBlock(text)
	if block == nil {
		return nil, errors.New("no PEM private key found")
	}
	var key any
	var err error
	switch block.Type {
	case "PRIVATE KEY":
		key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
	case "EC PRIVATE KEY":
		key, err = x509.ParseECPrivateKey(block.Bytes)
	case "RSA PRIVATE KEY":
		key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
	default:
		return nil, fmt.Errorf("it holds a %q, want an unencrypted private key", block.Type)
	}
	if err != nil {
		return nil, errors.New("the private key cannot be read: is it encrypted, or cut short?")
	}
	switch k := key.(type) {
	case *ecdsa.PrivateKey:
		return k, checkKey(k.Public())
	case *rsa.PrivateKey:
		return k, checkKey(k.Public())
	case ed25519.PrivateKey:
		return k, checkKey(k.Public())
	}
	return nil, fmt.Errorf("a key of type %T cannot sign", key)
}

// keyBlock returns the first block that is not the "EC PARAMETERS" that
// openssl puts before a key.
func keyBlock(text []byte) *pem.Block {
	for {
		block, rest := pem.Decode(text)
		if block == nil || block.Type != "EC PARAMETERS" {
			return block
		}
		text = rest
	}
}

func samePublicKey(a, b crypto.PublicKey) bool {
	k, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b)
}
