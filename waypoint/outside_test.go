package waypoint

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/weft-mesh/weft/internal/testca"
	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/view"
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

// What a name stands for is reached as if it had been written in its place: in
// clear only outside of the mesh, and never in the waypoint's own container.
func TestPlanNamed(t *testing.T) {
	pod := mesh.Workload{UID: "k//Pod/shop/cart-1", Name: mesh.Name{Namespace: "shop", Name: "cart-1"}, Identity: cart,
		Addresses: []netip.Addr{netip.MustParseAddr("10.244.1.7")}, Transport: mesh.HBONE, Healthy: true}
	vm := mesh.Workload{UID: "k/vm", Addresses: []netip.Addr{netip.MustParseAddr("10.244.1.8")}, Transport: mesh.PlainTCP, Healthy: true}
	s := mesh.Service{Name: mesh.ServiceName{Namespace: "shop", Host: "cart.shop.svc.cluster.local"}, VIPs: []mesh.VIP{{Prefix: netip.MustParsePrefix("10.96.0.1/32")}}}
	v := view.Of("1", []*mesh.Workload{&pod, &vm}, []*mesh.Service{&s}, nil)
	for address, want := range map[string]hop{
		"203.0.113.9": inClear, "2001:db8::9": inClear, "10.244.1.8": inClear, "10.244.1.7": tunnel, "10.96.0.1": reject,
		"127.0.0.1": reject, "127.9.9.9": reject, "::1": reject, "0.0.0.0": reject, "::": reject, "169.254.169.254": reject, "fe80::1": reject, "224.0.0.1": reject,
	} {
		p := planNamed(v, "", l7.Target{Address: netip.AddrPortFrom(netip.MustParseAddr(address), 80)})
		if p.hop != want {
			t.Errorf("%s: %+v, want %v", address, p, want)
		}
	}
}

// A name whose addresses cannot be, or that nobody knows, is told why.
func TestDialNamed(t *testing.T) {
	w := newWorld(t, cart)
	db := mesh.Workload{UID: "k/db", Host: "db.example.com", Transport: mesh.PlainTCP, Healthy: true}
	w.store.Set(view.Of("1", []*mesh.Workload{&db}, nil, nil))
	for _, tt := range []struct {
		found string
		err   error
		want  []string
	}{
		{"", errors.New("no such host"), []string{"look up db.example.com: no such host"}},
		{"127.0.0.1 169.254.169.254", nil, []string{"127.0.0.1 is what no host of a network has", "169.254.169.254 is what no host"}},
		{"::ffff:127.0.0.1", nil, []string{"127.0.0.1 is what no host"}},
	} {
		w.proxy.lookup = func(_ context.Context, host string) (found []netip.Addr, err error) {
			for f := range strings.FieldsSeq(tt.found) {
				found = append(found, netip.MustParseAddr(f))
			}
			return found, tt.err
		}
		_, err := w.proxy.Dialer().Dial(t.Context(), l7.Target{Workload: &db, Address: netip.AddrPortFrom(netip.Addr{}, 80)})
		for _, want := range tt.want {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%q: %v, want %s", tt.found, err, want)
			}
		}
	}
}

// Addresses get their shares, and those of IPv6, which are often not there, come
// last.
func TestInTurn(t *testing.T) {
	var found []netip.Addr
	for _, a := range []string{"2001:db8::1", "192.0.2.1", "::ffff:192.0.2.2", "192.0.2.3"} {
		found = append(found, netip.MustParseAddr(a))
	}
	first := map[string]int{}
	for range 3000 {
		got := inTurn(found, rand.Shuffle)
		if len(got) != 4 || got[3].String() != "2001:db8::1" {
			t.Fatalf("%v", got)
		}
		first[got[0].String()]++
	}
	for a, n := range first {
		if n < 880 || n > 1120 { // 4.6 standard deviations
			t.Errorf("%s came first %d times of 3000", a, n)
		}
	}
	if len(first) != 3 || found[0] != netip.MustParseAddr("2001:db8::1") {
		t.Errorf("%v came first, of %v", first, found)
	}
}
