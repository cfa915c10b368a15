package ztunnel

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/authz"
)

// connectApp connects to the pod's application for f, and tells it first who
// calls if it wants to know.
func (q *pod) connectApp(ctx context.Context, f *flow, facts authz.Facts) (*net.TCPConn, error) {
	to := facts.Destination
	tell := f.toldOf(facts)
	if tell {
		if p := f.who.Value().destination.AppTunnel.Port; p != 0 {
			to = netip.AddrPortFrom(to.Addr(), p)
		}
		if ourPort(to.Port()) {
			return nil, fmt.Errorf("port %d of its application tunnel is the proxy's own", to.Port())
		}
	}
	app, err := q.dialApp(ctx, facts.Source.Addr(), to)
	if err != nil || !tell {
		return app, err
	}
	// It fits into the buffer of a new socket.
	_ = app.SetWriteDeadline(time.Now().Add(connectTimeout)) // Write would say
	if _, err := app.Write(proxyHeader(facts.Source, facts.Destination, facts.Peer)); err != nil {
		abort(app)
		return nil, fmt.Errorf("announce the connection: %w", err)
	}
	_ = app.SetWriteDeadline(time.Time{}) // as above
	return app, nil
}

// toldOf reports whether the application wants to know who calls. Of a
// connection that nobody has proved to be his there is nothing to tell.
func (f *flow) toldOf(facts authz.Facts) bool {
	to := f.who.Value().destination
	return to != nil && to.AppTunnel.Proxy && !facts.Peer.IsZero()
}

// proxyHeader is the header of the PROXY protocol, version 2, for a TCP
// connection from src to dst, both of one family, with a TLV of the kind that
// ambient meshes use for the identity that the source has proved.
func proxyHeader(src, dst netip.AddrPort, id mesh.Identity) []byte {
	const (
		signature    = "\r\n\r\n\x00\r\nQUIT\n"
		proxy        = 0x21 // version 2, a connection for somebody else
		tcp4, tcp6   = 0x11, 0x21
		typeIdentity = 0xd0
	)
	name := id.String()
	b := append([]byte(signature), proxy, tcp4, 0, 0)
	if src.Addr().Is6() {
		b[len(signature)+1] = tcp6
	}
	b = append(b, src.Addr().AsSlice()...)
	b = append(b, dst.Addr().AsSlice()...)
	b = binary.BigEndian.AppendUint16(b, src.Port())
	b = binary.BigEndian.AppendUint16(b, dst.Port())
	b = append(b, typeIdentity)
	b = binary.BigEndian.AppendUint16(b, uint16(len(name)))
	b = append(b, name...)
	binary.BigEndian.PutUint16(b[len(signature)+2:], uint16(len(b)-len(signature)-4))
	return b
}
