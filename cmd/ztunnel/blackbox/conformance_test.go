package blackbox

import (
	"context"
	"crypto/x509"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/weft-mesh/weft/hbone/conformance"
)

// ztunnel speaks on the wire what docs/hbone.md says, also while it is under
// attack, and what others have open through it goes on.
func TestConformance(t *testing.T) {
	s := newStreet(t)
	cert := s.ca.Issue(identityOf("client"))
	roots := x509.NewCertPool()
	roots.AddCert(s.ca.Certificate())
	bystander := s.process(t, "client", nil, s.client)
	if err := bystander.Open(s.apps[0], 20, 1000); err != nil {
		t.Fatal(err)
	}
	at := netip.AddrPortFrom(s.server.V4, 15008)
	rs, err := conformance.Run(t.Context(), conformance.Config{
		Address: at.String(), Certificate: &cert, Roots: roots, Peer: identityOf("server").String(),
		Target: s.apps[0].String(), Closed: netip.AddrPortFrom(s.server.V4, 9).String(), Timeout: time.Minute,
		Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return s.bareClient.NS.Dial(ctx, "tcp", netip.AddrPort{}, at, nil)
		},
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range rs {
		if r.Verdict != conformance.Pass && r.Name != "h2.liveness" {
			t.Errorf("%s (%s %s): %s: %s", r.Name, r.Level, r.Section, r.Verdict, r.Detail)
		}
	}
	if _, err := bystander.Requests(100 * time.Millisecond); err != nil {
		t.Errorf("connections of somebody else: %v", err)
	}
}
