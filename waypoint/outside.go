package waypoint

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/waypoint/l7"
)

// dialOutside connects to what is outside of the mesh, in TLS if the target
// says so.
func dialOutside(ctx context.Context, p plan, t l7.Target) (net.Conn, error) {
	address := p.address.String()
	if p.host != "" {
		address = net.JoinHostPort(absolute(p.host), strconv.Itoa(int(p.address.Port())))
	}
	d := net.Dialer{}
	if k := t.Keepalive; k != nil {
		d.KeepAliveConfig = net.KeepAliveConfig{Enable: true, Idle: time.Duration(k.Time), Interval: time.Duration(k.Interval), Count: int(k.Probes)}
	}
	var cfg *tls.Config
	if t.TLS != nil && t.TLS.Mode != mesh.TLSDisable {
		var err error
		if cfg, err = outsideTLS(t); err != nil {
			return nil, fmt.Errorf("connect to %s: %w", address, err)
		}
	}
	c, err := d.DialContext(ctx, "tcp", address)
	if err != nil || cfg == nil {
		return c, err
	}
	tc := tls.Client(c, cfg)
	if err := tc.HandshakeContext(ctx); err != nil {
		_ = c.Close() // nothing was sent
		return nil, fmt.Errorf("connect to %s: %w", address, err)
	}
	return tc, nil
}

// absolute returns a host name as it is asked for. The search path of the
// waypoint's pod is not for names of others: with it, whoever has the namespace
// com would be asked for api.com first. A name of one part is one of the cluster.
func absolute(host string) string {
	if !strings.Contains(host, ".") || strings.HasSuffix(host, ".") {
		return host
	}
	return host + "."
}

// outsideTLS returns how TLS is spoken to t, which must prove one of the names
// it is expected to have.
func outsideTLS(t l7.Target) (*tls.Config, error) {
	switch t.TLS.Mode {
	case mesh.TLSSimple:
	case mesh.TLSMesh:
		return nil, errors.New("the endpoint is outside of the mesh, so mutual TLS of the mesh cannot be spoken to it")
	case mesh.TLSMutual:
		return nil, fmt.Errorf("the client certificate %s cannot be had here: credentials are for gateways", t.TLS.Certificate)
	default:
		return nil, fmt.Errorf("TLS mode %q is not known", t.TLS.Mode)
	}
	if t.ServerName == "" {
		return nil, errors.New("it is not known whom to expect: the server name is empty")
	}
	cfg := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: t.ServerName, NextProtos: t.ALPN}
	if t.TLS.Roots != "" {
		cfg.RootCAs = x509.NewCertPool()
		if !cfg.RootCAs.AppendCertsFromPEM([]byte(t.TLS.Roots)) {
			return nil, errors.New("the roots of its certificate cannot be read")
		}
	}
	if len(t.TLS.SubjectAltNames) > 0 {
		expectNames(cfg, t.TLS.SubjectAltNames)
	}
	return cfg, nil
}

// expectNames makes cfg verify the server's certificate by other names than its
// ServerName, which crypto/tls can do only in VerifyConnection: it runs in
// every handshake, and does all that is turned off with InsecureSkipVerify.
func expectNames(cfg *tls.Config, names []string) {
	roots := cfg.RootCAs
	cfg.InsecureSkipVerify = true
	cfg.VerifyConnection = func(cs tls.ConnectionState) error {
		if len(cs.PeerCertificates) == 0 {
			return errors.New("verify server: it presented no certificate")
		}
		leaf := cs.PeerCertificates[0]
		between := x509.NewCertPool()
		for _, c := range cs.PeerCertificates[1:] {
			between.AddCert(c)
		}
		if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between}); err != nil {
			return fmt.Errorf("verify server: %w", err)
		}
		for _, n := range names {
			if hasName(leaf, n) {
				return nil
			}
		}
		return fmt.Errorf("verify server: it proved none of the names %q", names)
	}
}

// hasName reports whether a certificate has a name: a URI, a DNS name or an
// address.
func hasName(c *x509.Certificate, name string) bool {
	for _, u := range c.URIs {
		if u.String() == name {
			return true
		}
	}
	return c.VerifyHostname(name) == nil
}
