package waypoint

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/weft-mesh/weft/internal/testca"
	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/waypoint/l7"
)

// A stranger is a server outside of the mesh.
type stranger struct {
	at  netip.AddrPort
	saw chan string // the server name of each handshake that went well, and its protocol
}

// newStranger starts a server with a certificate; without one it is in clear.
// It echoes.
func newStranger(t *testing.T, cert *tls.Certificate) *stranger {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &stranger{at: l.Addr().(*net.TCPAddr).AddrPort(), saw: make(chan string, 8)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			s.serve(c, cert)
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	return s
}

func (s *stranger) serve(c net.Conn, cert *tls.Certificate) {
	defer c.Close()
	if cert != nil {
		tc := tls.Server(c, &tls.Config{Certificates: []tls.Certificate{*cert}, NextProtos: []string{"h2", "http/1.1"}})
		if tc.Handshake() != nil {
			return
		}
		s.saw <- tc.ConnectionState().ServerName + " " + tc.ConnectionState().NegotiatedProtocol
		c = tc
	} else {
		s.saw <- "in clear"
	}
	_, _ = io.Copy(c, c)
}

// TLS to what is outside of the mesh is as the policy says, and whoever cannot
// prove to be whom it names gets nothing.
func TestDialOutside(t *testing.T) {
	ca, other := testca.New(t, "example.com"), testca.New(t, "example.com")
	id := mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "vm"}
	issue := func(ca *testca.CA, change func(*x509.Certificate)) *tls.Certificate {
		c := ca.IssueAs(id, func(c *x509.Certificate) {
			c.DNSNames, c.IPAddresses = []string{"api.example.com", "*.wild.example.com"}, []net.IP{{203, 0, 113, 9}}
			if change != nil {
				change(c)
			}
		})
		return &c
	}
	good := issue(ca, nil)
	below := ca.Intermediate()
	chained := issue(below, nil)
	chained.Certificate = append(chained.Certificate, below.Certificate().Raw)
	roots := string(ca.PEM())
	simple := func(names ...string) *mesh.UpstreamTLS {
		return &mesh.UpstreamTLS{Mode: mesh.TLSSimple, Roots: roots, SubjectAltNames: names}
	}
	with := func(f func(*mesh.UpstreamTLS)) *mesh.UpstreamTLS {
		u := simple()
		f(u)
		return u
	}
	tests := []struct {
		name string
		cert *tls.Certificate
		tls  *mesh.UpstreamTLS
		host string
		alpn string
		want string // what the server saw, or the error
	}{
		{"in clear", nil, nil, "", "", "in clear"},
		{"in clear, and said so", nil, &mesh.UpstreamTLS{Mode: mesh.TLSDisable}, "", "", "in clear"},
		{"its name", good, simple(), "api.example.com", "http/1.1", "api.example.com http/1.1"},
		{"HTTP/2", good, simple(), "api.example.com", "h2", "api.example.com h2"},
		{"a star", good, simple(), "a.wild.example.com", "http/1.1", "a.wild.example.com http/1.1"},
		{"an authority between", chained, simple(), "api.example.com", "http/1.1", "api.example.com http/1.1"},
		{"another name of its own", good, simple("api.example.com"), "shown.example.com", "http/1.1", "shown.example.com http/1.1"},
		{"one of several names", good, simple("no.example.com", "api.example.com"), "api.example.com", "http/1.1", "api.example.com http/1.1"},
		{"an identity", good, simple(id.String()), "shown.example.com", "http/1.1", "shown.example.com http/1.1"},
		{"an address", good, simple("203.0.113.9"), "shown.example.com", "http/1.1", "shown.example.com http/1.1"},
		{"names behind an authority between", chained, simple(id.String()), "api.example.com", "http/1.1", "api.example.com http/1.1"},

		{"attack: another name", good, simple(), "bank.example.com", "http/1.1", "is valid for api.example.com"},
		{"attack: below a star", good, simple(), "a.b.wild.example.com", "http/1.1", "is valid for"},
		{"attack: another authority", issue(other, nil), simple(), "api.example.com", "http/1.1", "unknown authority"},
		{"attack: names of another authority", issue(other, nil), simple("api.example.com"), "api.example.com", "http/1.1", "unknown authority"},
		{"attack: the system's authorities", good, with(func(u *mesh.UpstreamTLS) { u.Roots = "" }), "api.example.com", "http/1.1", "unknown authority"},
		{"attack: names by the system's authorities", good, with(func(u *mesh.UpstreamTLS) { u.Roots, u.SubjectAltNames = "", []string{"api.example.com"} }), "api.example.com", "http/1.1", "unknown authority"},
		{"attack: none of the names", good, simple("bank.example.com", "spiffe://cluster.local/ns/bank/sa/vm"), "api.example.com", "http/1.1", "none of the names"},
		{"attack: part of an identity", good, simple(strings.TrimSuffix(id.String(), "m")), "api.example.com", "http/1.1", "none of the names"},
		{"attack: expired", issue(ca, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }), simple(), "api.example.com", "http/1.1", "expired"},
		{"attack: expired, by name", issue(ca, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }), simple("api.example.com"), "api.example.com", "http/1.1", "expired"},
		{"attack: a client's certificate", issue(ca, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }), simple("api.example.com"), "api.example.com", "http/1.1", "incompatible key usage"},
		{"attack: in clear", nil, simple(), "api.example.com", "http/1.1", "tls: received unexpected handshake message"},
		{"attack: nobody is expected", good, simple(), "", "http/1.1", "the server name is empty"},

		{"roots that are none", good, with(func(u *mesh.UpstreamTLS) { u.Roots = "x" }), "api.example.com", "http/1.1", "cannot be read"},
		{"the mesh's own", good, &mesh.UpstreamTLS{Mode: mesh.TLSMesh}, "api.example.com", "http/1.1", "mutual TLS of the mesh cannot be spoken"},
		{"mutual", good, with(func(u *mesh.UpstreamTLS) { u.Mode = mesh.TLSMutual }), "api.example.com", "http/1.1", "cannot be had here"},
		{"a mode that is none", good, with(func(u *mesh.UpstreamTLS) { u.Mode = "x" }), "api.example.com", "http/1.1", `mode "x" is not known`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := newStranger(t, tt.cert)
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			target := l7.Target{TLS: tt.tls, ServerName: tt.host, ALPN: []string{tt.alpn}}
			c, err := dialOutside(ctx, plan{hop: inClear, address: s.at}, target)
			if err != nil {
				if !strings.Contains(err.Error(), tt.want) {
					t.Errorf("%v, want %s", err, tt.want)
				}
				return
			}
			defer c.Close()
			if err := echoed(c, "hello"); err != nil {
				t.Error(err)
			}
			if saw := <-s.saw; saw != tt.want {
				t.Errorf("the server saw %q, want %s", saw, tt.want)
			}
		})
	}
}

// Names of others are looked up as they are, without the search path of the
// waypoint's pod.
func TestAbsolute(t *testing.T) {
	for host, want := range map[string]string{"api.com": "api.com.", "api.com.": "api.com.", "db.shop.svc.cluster.local": "db.shop.svc.cluster.local.", "db": "db"} {
		if got := absolute(host); got != want {
			t.Errorf("%s is looked up as %s, want %s", host, got, want)
		}
	}
}

// What has a host name only is looked up.
func TestDialOutsideByName(t *testing.T) {
	s := newStranger(t, nil)
	c, err := dialOutside(t.Context(), plan{hop: inClear, host: "localhost", address: netip.AddrPortFrom(netip.Addr{}, s.at.Port())}, l7.Target{Keepalive: &mesh.Keepalive{Probes: 3, Time: mesh.Duration(time.Hour), Interval: mesh.Duration(time.Minute)}})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := echoed(c, "hello"); err != nil {
		t.Error(err)
	}
}
