package hbone

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"testing"

	"golang.org/x/sync/semaphore"

	"github.com/weft-mesh/weft/mesh"
)

// A handshake whose peer is not wanted, in the end, leaves no connection and no
// secret.
func TestUnwantedPeerLeavesNothing(t *testing.T) {
	w := newWorld(t, echo)
	shake := func(who PeerFunc) (Secured, net.Conn, error) {
		a, b := socketPipe(t)
		served := make(chan error, 1)
		go func() { served <- w.server.ServeConn(t.Context(), b) }()
		t.Cleanup(func() { _ = a.Close(); <-served })
		s, err := Handshake(t.Context(), a, w.clientTLS(web, cart), w.pool.cfg.DialTimeout, semaphore.NewWeighted(1), who)
		return s, a, err
	}
	s, c, err := shake(nil)
	if err != nil {
		t.Fatal(err)
	}
	s.Discard(c)
	if _, err := c.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the connection below is open: %v", err)
	}
	seal, open, _ := s.Conn.Detach()
	if _, err := seal.State(); err == nil {
		t.Error("our secret is still there")
	}
	if _, err := open.State(); err == nil {
		t.Error("the peer's secret is still there")
	}
	for name, who := range map[string]PeerFunc{
		"unreadable": func(tls.ConnectionState) (mesh.Identity, error) { return mesh.Identity{}, context.Canceled },
		"nobody":     func(tls.ConnectionState) (mesh.Identity, error) { return mesh.Identity{}, nil },
	} {
		if s, c, err := shake(who); err == nil || s.Conn != nil {
			t.Errorf("%s: taken, %v", name, err)
		} else if _, err := c.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
			t.Errorf("%s: the connection is open: %v", name, err)
		}
	}
}
