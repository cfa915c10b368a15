package identity

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
)

// ParseCertificates reads every certificate of a PEM text. Text between the
// blocks is passed over, but a block that is broken or is not a certificate
// is an error: half of a trust bundle is not one. An empty text is an error.
func ParseCertificates(text []byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	begins := bytes.Count(text, []byte("-----BEGIN "))
	for {
		var block *pem.Block
		block, text = pem.Decode(text)
		if block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("parse certificates: block %d is a %q, want a CERTIFICATE", len(certs)+1, block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("parse certificates: certificate %d: %w", len(certs)+1, err)
		}
		certs = append(certs, cert)
	}
	if len(certs) == 0 {
		return nil, errors.New("parse certificates: no PEM certificate found")
	}
	// pem.Decode skips a block that it cannot read.
	if begins != len(certs) {
		return nil, fmt.Errorf("parse certificates: %d of %d PEM blocks cannot be read", begins-len(certs), begins)
	}
	return certs, nil
}

// FormatCertificates is the inverse of ParseCertificates.
func FormatCertificates(certs []*x509.Certificate) []byte {
	var b bytes.Buffer
	for _, c := range certs {
		b.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
	}
	return b.Bytes()
}
