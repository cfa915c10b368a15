package waypoint

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/view"
	"github.com/weft-mesh/weft/waypoint/l7"
)

// dialOutside connects to what is outside of the mesh, in TLS if the target
// says so.
func dialOutside(ctx context.Context, p plan, t l7.Target) (net.Conn, error) {
	address := p.address.String()
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

// dialNamed connects to what is known by its name only: to its addresses in
// turn, until one takes the connection. Each is planned as if it had been written
// in the name's place, so that a name leads nowhere that an address would not.
func (d Dialer) dialNamed(ctx context.Context, v *view.View, p plan, t l7.Target) (net.Conn, error) {
	found, err := d.proxy.lookup(ctx, p.host)
	if err != nil {
		return nil, fmt.Errorf("look up %s: %w", p.host, err)
	}
	errs := []error{fmt.Errorf("no address of %s took the connection", p.host)}
	found = inTurn(found, rand.Shuffle)
	for i, a := range found {
		next := t
		next.Workload, next.Address = nil, netip.AddrPortFrom(a, p.address.Port())
		c, err := d.dialPart(ctx, v, planNamed(v, d.proxy.cfg.Network, next), next, len(found)-i)
		if err == nil {
			return c, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

// dialPart dials with one of so many parts of the time that is left.
func (d Dialer) dialPart(ctx context.Context, v *view.View, p plan, t l7.Target, parts int) (net.Conn, error) {
	if end, ok := ctx.Deadline(); ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Until(end)/time.Duration(parts))
		defer cancel()
	}
	return d.dial(ctx, v, p, t)
}

// planNamed plans a connection to an address that a name stands for.
func planNamed(v *view.View, network string, t l7.Target) plan {
	if a := t.Address.Addr(); a.IsUnspecified() || a.IsLoopback() || a.IsLinkLocalUnicast() || a.IsMulticast() {
		return rejected("%v is what no host of a network has", a)
	}
	return planDial(v, network, t)
}

// inTurn returns addresses in the order to try them: those of IPv4 first, and of
// each family by chance, so that all get their share.
func inTurn(found []netip.Addr, shuffle func(n int, swap func(i, j int))) []netip.Addr {
	out := make([]netip.Addr, 0, len(found))
	for _, a := range found {
		out = append(out, a.Unmap())
	}
	shuffle(len(out), func(i, j int) { out[i], out[j] = out[j], out[i] })
	slices.SortStableFunc(out, func(a, b netip.Addr) int { return cmp.Compare(a.BitLen(), b.BitLen()) })
	return out
}

// lookup asks the name servers of the waypoint's pod.
func lookup(ctx context.Context, host string) ([]netip.Addr, error) {
	return net.DefaultResolver.LookupNetIP(ctx, "ip", absolute(host))
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
