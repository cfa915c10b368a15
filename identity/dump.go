package identity

import (
	"crypto/x509"
	"encoding/pem"
	"slices"
	"strings"
	"time"

	"github.com/weft-mesh/weft/mesh"
)

// The states of an identity.
const (
	Available    = "Available"    // there is a valid certificate
	Initializing = "Initializing" // the first one has not come yet
	Unavailable  = "Unavailable"  // attempts fail, and there is none that is valid
)

// A State is what a Manager tells about one identity. It holds no key. Its
// JSON is what "istioctl ztunnel-config certificates" reads.
type State struct {
	Identity mesh.Identity `json:"identity"`
	State    string        `json:"state"`
	Chain    []CertInfo    `json:"certChain"` // leaf first; nil without a certificate
	Roots    []CertInfo    `json:"rootCerts"` // what we trust for its trust domain
	Pods     int           `json:"pods"`      // local pods that have it
	Next     time.Time     `json:"nextAttempt,omitzero"`
	Error    string        `json:"error,omitempty"` // of the last attempt
}

// A CertInfo describes one certificate.
type CertInfo struct {
	PEM     []byte    `json:"pem"` // base64 in JSON
	Serial  string    `json:"serialNumber"`
	From    time.Time `json:"validFrom"`
	Expires time.Time `json:"expirationTime"`
}

// Dump returns the state of every identity, sorted by name.
func (m *Manager) Dump() []State {
	roots := describe(m.cfg.Roots.Certificates(m.cfg.TrustDomain))
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	states := make([]State, 0, len(m.entries))
	for _, e := range m.entries {
		s := State{Identity: e.id, State: e.state(now), Roots: roots, Pods: e.pods, Next: e.due}
		if e.err != nil {
			s.Error = e.err.Error()
		}
		if e.cert != nil {
			// The chain was parsed when it was accepted.
			chain, _ := parseAll(e.cert.Certificate)
			s.Chain = describe(chain)
		}
		states = append(states, s)
	}
	slices.SortFunc(states, func(a, b State) int {
		return strings.Compare(a.Identity.String(), b.Identity.String())
	})
	return states
}

func (e *entry) state(now time.Time) string {
	switch {
	case e.valid(now):
		return Available
	case e.failures > 0 || e.cert != nil:
		return Unavailable
	}
	return Initializing
}

func describe(certs []*x509.Certificate) []CertInfo {
	var infos []CertInfo
	for _, c := range certs {
		infos = append(infos, CertInfo{
			PEM:     pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}),
			Serial:  c.SerialNumber.String(),
			From:    c.NotBefore,
			Expires: c.NotAfter,
		})
	}
	return infos
}
