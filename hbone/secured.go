package hbone

import (
	"context"
	"crypto/tls"
	"net"
	"time"

	"github.com/weft-mesh/weft/hbone/record"
	"github.com/weft-mesh/weft/mesh"
	"golang.org/x/sync/semaphore"
)

// A Secured is a TLS connection whose other end has proved who it is, and over
// which nothing has gone since.
type Secured struct {
	Conn *record.Conn
	Peer mesh.Identity
	Ends time.Time // when the peer's proof ends: its certificate is good until then
}

// Discard closes c, the connection below, over which nothing shall go, and
// forgets the secrets.
func (s Secured) Discard(c net.Conn) {
	s.Conn.Wipe()
	_ = c.Close() // nothing was sent
}

// Handshake runs the client's handshake of a tunnel over c, which it closes if
// it fails: after timeout, or when ctx ends. slots bounds how many compute at
// once. cfg verifies the peer with VerifyConnection; without that there is no
// handshake. A nil who is identity.PeerIdentity.
func Handshake(ctx context.Context, c net.Conn, cfg *tls.Config, timeout time.Duration, slots *semaphore.Weighted, who PeerFunc) (Secured, error) {
	conn, peer, err := shake(ctx, c, tlsConfig(cfg), ClientRole, timeout, slots, who.orIdentity())
	if err != nil {
		return Secured{}, err
	}
	return secured(conn, peer), nil
}

// Handshake is the first part of ServeConn, for drivers of their own: it finds
// out who is at the other end of c, within the server's bounds. It closes c if
// it fails. Handle and Limits of the configuration have no part in it.
func (s *Server) Handshake(ctx context.Context, c net.Conn) (Secured, error) {
	conn, peer, err := s.shake(ctx, c)
	if err != nil {
		return Secured{}, err
	}
	return secured(conn, peer), nil
}

func secured(conn *record.Conn, peer mesh.Identity) Secured {
	s := Secured{Conn: conn, Peer: peer}
	if chain := conn.ConnectionState().PeerCertificates; len(chain) > 0 {
		s.Ends = chain[0].NotAfter
	}
	return s
}

// NewHandshakes returns a bound for handshakes, for servers and pools to share:
// they may keep half of the processors busy, so that a storm of them does not
// starve open connections.
func NewHandshakes() *semaphore.Weighted { return newHandshakes() }
