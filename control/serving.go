package control

import (
	"crypto/tls"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/weft-mesh/weft/identity/ca"
)

// renewRetry is the pause after a renewal of our own certificate failed.
const renewRetry = time.Minute

// Serving holds the certificate by which proxies know the control service. It
// has the mesh's own Authority sign one when a handshake needs it, and a new
// one at half its life.
type Serving struct {
	authority *ca.Authority
	names     []string
	log       *slog.Logger

	mu      sync.Mutex // guards what follows
	cert    *tls.Certificate
	renewAt time.Time
}

// NewServing returns a Serving for the DNS names, signed by a. A nil log
// discards.
func NewServing(a *ca.Authority, names []string, log *slog.Logger) *Serving {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Serving{authority: a, names: slices.Clone(names), log: log}
}

// TLS returns the configuration of the gRPC port. Callers prove who they are
// by token, so no certificate is asked of them.
func (s *Serving) TLS() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: []string{"h2"},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return s.certificate(time.Now())
		},
	}
}

// certificate returns one that is valid at now. A renewal that fails keeps the
// old one as long as it lasts.
func (s *Serving) certificate(now time.Time) (*tls.Certificate, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	valid := s.cert != nil && now.Before(s.cert.Leaf.NotAfter)
	if valid && now.Before(s.renewAt) {
		return s.cert, nil
	}
	cert, err := s.authority.SignServer(s.names)
	if err != nil && !valid {
		return nil, fmt.Errorf("certificate of the control service: %w", err)
	}
	if err != nil {
		s.log.Error("cannot renew the certificate of the control service", "expires", s.cert.Leaf.NotAfter, "err", err)
		s.renewAt = now.Add(renewRetry)
		return s.cert, nil
	}
	s.cert = cert
	s.renewAt = now.Add(cert.Leaf.NotAfter.Sub(now) / 2).Round(0) // by the wall clock, like expiry
	return cert, nil
}
