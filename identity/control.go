package identity

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
)

// ControlTLS returns a function that makes the configuration for one
// connection to the control service, which is known by DNS name, not by a
// SPIFFE ID. Each call reads rootsFile, a PEM text, again: a new root counts
// from the next connection on. The client side presents no certificate; it
// authenticates by token.
func ControlTLS(rootsFile, serverName string) func() (*tls.Config, error) {
	return func() (*tls.Config, error) {
		text, err := os.ReadFile(rootsFile)
		if err != nil {
			return nil, fmt.Errorf("read the roots that the control service is verified by: %w", err)
		}
		certs, err := ParseCertificates(text)
		if err != nil {
			return nil, fmt.Errorf("read the roots that the control service is verified by from %s: %w", rootsFile, err)
		}
		roots := x509.NewCertPool()
		for _, c := range certs {
			roots.AddCert(c)
		}
		return &tls.Config{
			MinVersion: tls.VersionTLS13,
			ServerName: serverName,
			RootCAs:    roots,
		}, nil
	}
}
