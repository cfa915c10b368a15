package hbone

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"runtime"
	"time"

	"github.com/weft-mesh/weft/hbone/record"
	"github.com/weft-mesh/weft/identity"
	"github.com/weft-mesh/weft/mesh"
	"golang.org/x/sync/semaphore"
)

// PeerFunc returns who the other end of a finished handshake is. What it
// reads was verified by the configuration's VerifyConnection, without which
// there is no handshake.
type PeerFunc func(tls.ConnectionState) (mesh.Identity, error)

// orIdentity returns f, or the default.
func (f PeerFunc) orIdentity() PeerFunc {
	if f == nil {
		return identity.PeerIdentity
	}
	return f
}

// newHandshakes returns a bound for handshakes: they may keep half of the
// processors busy, so that a storm of them does not starve open connections.
func newHandshakes() *semaphore.Weighted {
	return semaphore.NewWeighted(int64(max(1, runtime.GOMAXPROCS(0)/2)))
}

// A slotConn holds a slot of a semaphore while the handshake over it computes
// and gives it back while it waits for the peer. So a peer that is slow, or
// silent on purpose, keeps nobody else from shaking hands.
type slotConn struct {
	net.Conn
	ctx   context.Context
	slots *semaphore.Weighted // nil once the handshake is over
}

// Read gives the slot back while it waits.
func (c *slotConn) Read(p []byte) (int, error) { return c.without(c.Conn.Read, p) }

// Write gives the slot back while it waits.
func (c *slotConn) Write(p []byte) (int, error) { return c.without(c.Conn.Write, p) }

// CloseWrite ends our direction, if the connection below has a half-close.
func (c *slotConn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return errors.ErrUnsupported
}

// without calls f without the slot.
func (c *slotConn) without(f func([]byte) (int, error), p []byte) (int, error) {
	if c.slots == nil {
		return f(p)
	}
	c.slots.Release(1)
	n, err := f(p)
	if aerr := c.slots.Acquire(c.ctx, 1); aerr != nil {
		c.slots = nil // nothing to give back
		return n, aerr
	}
	return n, err
}

// shake runs the TLS handshake over c, which it closes if it fails. The
// handshake ends with ctx or after timeout.
func shake(ctx context.Context, c net.Conn, cfg *tls.Config, role Role, timeout time.Duration, slots *semaphore.Weighted, who PeerFunc) (*record.Conn, mesh.Identity, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("no handshake within %v", timeout))
	defer cancel()
	conn, peer, err := shakeNow(ctx, c, cfg, role, slots, who)
	if err != nil {
		_ = c.Close() // the handshake's error is the one that matters
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		return nil, mesh.Identity{}, fmt.Errorf("handshake with %v: %w", c.RemoteAddr(), err)
	}
	return conn, peer, nil
}

func shakeNow(ctx context.Context, c net.Conn, cfg *tls.Config, role Role, slots *semaphore.Weighted, who PeerFunc) (*record.Conn, mesh.Identity, error) {
	if cfg == nil || cfg.VerifyConnection == nil {
		return nil, mesh.Identity{}, errors.New("no TLS configuration that verifies the peer")
	}
	if err := slots.Acquire(ctx, 1); err != nil {
		return nil, mesh.Identity{}, err
	}
	slot := &slotConn{Conn: c, ctx: ctx, slots: slots}
	defer func() {
		if slot.slots != nil {
			slot.slots.Release(1)
			slot.slots = nil
		}
	}()
	handshake := record.Client
	if role == ServerRole {
		handshake = record.Server
	}
	conn, err := handshake(ctx, slot, cfg)
	if err != nil {
		return nil, mesh.Identity{}, err
	}
	peer, err := identify(conn.ConnectionState(), who)
	if err != nil {
		conn.Wipe()
		return nil, mesh.Identity{}, err
	}
	return conn, peer, nil
}

// identify returns who is at the other end of a finished handshake.
func identify(cs tls.ConnectionState, who PeerFunc) (mesh.Identity, error) {
	if cs.Version != tls.VersionTLS13 || cs.NegotiatedProtocol != "h2" {
		return mesh.Identity{}, fmt.Errorf("want TLS 1.3 and ALPN h2, got %s and ALPN %q", tls.VersionName(cs.Version), cs.NegotiatedProtocol)
	}
	peer, err := who(cs)
	if err == nil && peer.IsZero() {
		err = errors.New("the peer has no identity")
	}
	return peer, err
}

// tlsConfig returns cfg with what the tunnel itself needs of TLS. The rest is
// package record's: TLS 1.3 only, and no session is resumed.
func tlsConfig(cfg *tls.Config) *tls.Config {
	if cfg == nil {
		return nil
	}
	cfg = cfg.Clone()
	cfg.NextProtos = []string{"h2"}
	return cfg
}
