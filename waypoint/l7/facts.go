package l7

import (
	"context"
	"net"
	"net/netip"

	"github.com/weft-mesh/weft/mesh"
)

// Facts are what is known of a connection before its first byte is read. The
// zero Facts are of a connection by nobody to nothing: it is closed.
type Facts struct {
	// Peer is who called, as mutual TLS proved it; zero is nobody, and then no
	// policy that asks for a peer lets it in.
	Peer mesh.Identity
	// Source is the client's address, and Destination the address that it
	// asked for, as the application sees them: not those of a tunnel. They may
	// be zero where they are not known.
	Source, Destination netip.AddrPort
	// Service is what the client asked for. Zero if it asked for the workload
	// UID by an address of its own.
	Service  mesh.ServiceName
	Workload mesh.UID
	// Port is the service's port, or the workload's.
	Port uint16
	// Scheme is "https" if the bytes came out of TLS that this proxy ended, and
	// "" else, which is http. A tunnel of the mesh does not count.
	Scheme string
}

// A Target is one endpoint that is to be connected to.
type Target struct {
	// Workload is the endpoint; nil if it is none that the mesh knows, and
	// Address is then all that is known of it.
	Workload *mesh.Workload
	// Address is where the workload, or the address that the client asked for,
	// takes the connection. Only its port is set if the workload has no address
	// of its own but a host name.
	Address netip.AddrPort
	// Service is that on whose behalf, zero if none.
	Service mesh.ServiceName
	// TLS says how to speak to an endpoint outside of the mesh; nil is in clear.
	// ServerName is its SNI: never empty if TLS is to be spoken.
	TLS        *mesh.UpstreamTLS
	ServerName string
	// Keepalive of the TCP connection, nil for the system's.
	Keepalive *mesh.Keepalive
	// ALPN are the protocols to offer in TLS, most wanted first.
	ALPN []string
}

// A Dialer opens a connection to one endpoint. ctx bounds the set-up only. The
// connection is the engine's, which closes it; if it has a method
// CloseWrite() error, half-closes are passed on. An error is final for this try:
// the Dialer does not try again by itself.
type Dialer interface {
	Dial(ctx context.Context, to Target) (net.Conn, error)
}
