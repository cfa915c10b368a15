package issue

import (
	"context"
	"crypto/tls"
	"errors"
	"net"

	"google.golang.org/grpc/credentials"
)

// transport is TLS whose configuration is made anew for each connection.
type transport struct {
	config func() (*tls.Config, error)
}

// ClientHandshake implements credentials.TransportCredentials. It verifies the
// server by the name in the configuration: gRPC would take the one in the
// address.
func (t transport) ClientHandshake(ctx context.Context, _ string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c, err := t.config()
	if err != nil {
		return nil, nil, err
	}
	return credentials.NewTLS(c).ClientHandshake(ctx, c.ServerName, conn)
}

// ServerHandshake implements credentials.TransportCredentials; a client has
// no use for it.
func (transport) ServerHandshake(net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("these credentials are a client's")
}

// Info implements credentials.TransportCredentials.
func (transport) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

// Clone implements credentials.TransportCredentials.
func (t transport) Clone() credentials.TransportCredentials { return t }

// OverrideServerName implements credentials.TransportCredentials. The name is
// the configuration's.
func (transport) OverrideServerName(string) error {
	return errors.New("the server name is set in the TLS configuration")
}

// bearer puts the token on a request.
type bearer struct {
	token   string
	cluster string
}

// GetRequestMetadata implements credentials.PerRPCCredentials.
func (b bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + b.token, "clusterid": b.cluster}, nil
}

// RequireTransportSecurity implements credentials.PerRPCCredentials: a token
// is never sent in clear.
func (bearer) RequireTransportSecurity() bool { return true }
