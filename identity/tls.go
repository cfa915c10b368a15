package identity

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/weft-mesh/weft/mesh"
)

// ErrWrongPeer says that the peer proved an identity, but not one that was
// asked for. Whoever meets it must not try again in clear or elsewhere.
var ErrWrongPeer = errors.New("peer is not who was expected")

// protocol is the only application protocol of the tunnel.
const protocol = "h2"

// longestWait bounds how long a handshake waits for our own certificate, also
// when whoever began it gave it no deadline.
const longestWait = 10 * time.Second

// A CertFunc returns the certificate to present. It may wait for one until
// ctx ends.
type CertFunc func(ctx context.Context) (*tls.Certificate, error)

// ClientTLS returns the configuration of the dialing side. It presents the
// certificate of own, and accepts exactly a peer that proves one of the
// identities in want; with no want, or none but the zero Identity, every
// handshake fails. A peer that proved another identity is ErrWrongPeer.
func ClientTLS(own CertFunc, roots *Roots, want []mesh.Identity) *tls.Config {
	want = slices.DeleteFunc(slices.Clone(want), mesh.Identity.IsZero)
	c := base()
	c.GetClientCertificate = func(r *tls.CertificateRequestInfo) (*tls.Certificate, error) {
		return present(r.Context(), own)
	}
	verifyInsteadOfHostName(c, func(cs tls.ConnectionState) error {
		got, err := verify(cs, roots, x509.ExtKeyUsageServerAuth)
		if err != nil {
			return err
		}
		if !slices.Contains(want, got) {
			return fmt.Errorf("verify peer: %w: got %s, want %s", ErrWrongPeer, got, names(want))
		}
		return nil
	})
	return c
}

// ServerTLS returns the configuration of the accepting side. It presents the
// certificate of own and accepts any peer that proves an identity of
// trustDomain; a peer of another trusted domain is ErrWrongPeer. Who may do
// what is authorization's question, not TLS's.
func ServerTLS(own CertFunc, roots *Roots, trustDomain string) *tls.Config {
	c := base()
	c.GetCertificate = func(h *tls.ClientHelloInfo) (*tls.Certificate, error) {
		return present(h.Context(), own)
	}
	// RequireAndVerifyClientCert would verify against one fixed pool; ours
	// depends on the trust domain and changes while we run.
	c.ClientAuth = tls.RequireAnyClientCert
	c.VerifyConnection = func(cs tls.ConnectionState) error {
		got, err := verify(cs, roots, x509.ExtKeyUsageClientAuth)
		if err != nil {
			return err
		}
		if got.TrustDomain != trustDomain {
			return fmt.Errorf("verify peer: %w: got %s, want trust domain %q", ErrWrongPeer, got, trustDomain)
		}
		return nil
	}
	return c
}

// PeerIdentity returns the identity of the peer of a finished handshake made
// with a configuration of this package, which has verified it. It fails when
// there is no peer certificate or it names no identity.
func PeerIdentity(cs tls.ConnectionState) (mesh.Identity, error) {
	if len(cs.PeerCertificates) == 0 {
		return mesh.Identity{}, errors.New("read peer identity: the peer presented no certificate")
	}
	id, err := leafIdentity(cs.PeerCertificates[0])
	if err != nil {
		return mesh.Identity{}, fmt.Errorf("read peer identity: %w", err)
	}
	return id, nil
}

// present returns our own certificate for a handshake.
func present(ctx context.Context, own CertFunc) (*tls.Certificate, error) {
	ctx, cancel := context.WithTimeout(ctx, longestWait)
	defer cancel()
	return own(ctx)
}

// base is what both sides share: TLS 1.3, h2, no resumption. A resumed
// session would outlive the certificate it was made with, and server-side
// tickets are shared between the configurations of different pods.
func base() *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		MaxVersion:             tls.VersionTLS13,
		NextProtos:             []string{protocol},
		SessionTicketsDisabled: true,
		CurvePreferences:       []tls.CurveID{tls.X25519MLKEM768, tls.X25519, tls.CurveP256},
		// Small first records serve web pages. Here they would send the first
		// 128 KiB of every tunnel in pieces of one segment.
		DynamicRecordSizingDisabled: true,
	}
}

// verifyInsteadOfHostName makes c verify servers with f and not by host name.
// crypto/tls can only check a server's certificate against a DNS name or an
// IP address; ours carry neither, only a SPIFFE ID. InsecureSkipVerify is the
// documented way to turn that off, and VerifyConnection, which runs in every
// handshake, resumed or not, takes its place. This is the only function that
// may do so.
func verifyInsteadOfHostName(c *tls.Config, f func(tls.ConnectionState) error) {
	c.InsecureSkipVerify = true
	c.VerifyConnection = f
}

// verify checks everything about a peer but which identity it should have.
func verify(cs tls.ConnectionState, roots *Roots, usage x509.ExtKeyUsage) (mesh.Identity, error) {
	switch {
	case cs.Version != tls.VersionTLS13:
		return mesh.Identity{}, fmt.Errorf("verify peer: it speaks %s, want TLS 1.3", tls.VersionName(cs.Version))
	case cs.DidResume:
		return mesh.Identity{}, errors.New("verify peer: it resumed a session, and we allow none")
	case cs.NegotiatedProtocol != protocol:
		return mesh.Identity{}, fmt.Errorf("verify peer: it agreed on application protocol %q, want %q", cs.NegotiatedProtocol, protocol)
	}
	id, err := roots.Verify(cs.PeerCertificates, time.Now(), usage)
	if err != nil {
		return mesh.Identity{}, fmt.Errorf("verify peer: %w", err)
	}
	return id, nil
}

// names lists identities for an error message.
func names(ids []mesh.Identity) string {
	switch len(ids) {
	case 0:
		return "nobody"
	case 1:
		return ids[0].String()
	}
	return fmt.Sprintf("one of %v", ids)
}
