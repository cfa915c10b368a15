package ztunnel

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/weft-mesh/weft/hbone"
	"github.com/weft-mesh/weft/identity"
	"github.com/weft-mesh/weft/internal/testca"
	"github.com/weft-mesh/weft/mesh"
)

// foreign returns a pool that opens tunnels as identity id with certificates
// of ca, from anywhere: an attacker's, or another implementation's.
func (w *world) foreign(ca *testca.CA, id mesh.Identity) *hbone.Pool {
	cert := ca.Issue(id)
	pool := hbone.NewPool(hbone.PoolConfig{
		Dial: func(ctx context.Context, t hbone.Target) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", t.Address.String())
		},
		TLS: func(t hbone.Target) (*tls.Config, error) {
			return identity.ClientTLS(func(context.Context) (*tls.Certificate, error) { return &cert, nil }, w.roots, t.Peers), nil
		},
	})
	w.t.Cleanup(pool.Close)
	return pool
}

// connect asks for authority through a tunnel to pod p.
func connect(p *testPod, pool *hbone.Pool, authority string) (*hbone.Stream, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancel()
	return pool.Connect(ctx, hbone.Target{
		Owner: "test", Source: identityOf("shop", "x"), Peers: []mesh.Identity{identityOf("shop", p.name)},
		Address: netip.AddrPortFrom(p.addr, hbone.Port),
	}, authority, hbone.Header{Forwarded: `for="10.9.9.9:1"`})
}

// status returns the answer to a CONNECT: 200, or the refusal.
func status(t *testing.T, s *hbone.Stream, err error) int {
	t.Helper()
	var refused *hbone.StatusError
	switch {
	case err == nil:
		s.Reset()
		return 200
	case errors.As(err, &refused):
		return refused.Code
	}
	t.Errorf("connect: %v, want an answer", err)
	return 0
}

func TestTunnelTargets(t *testing.T) {
	p := newPair(t, echo)
	score := newCard(t)
	other := p.serverNode.add("other", nil) // on the same node
	otherApp := other.app(echo)
	pool := p.foreign(p.ca, identityOf("shop", "x"))
	onServer := func(port string) string { return p.server.addr.String() + ":" + port }
	for _, tt := range []struct {
		name      string
		authority string
		want      int
	}{
		{"the pod's application", p.app.String(), 200},
		{"another pod of the node", otherApp.String(), 400},
		{"an address outside", "192.0.2.1:80", 400},
		{"loopback", "127.0.0.1:" + portOf(p.app), 400},
		{"unspecified", "0.0.0.0:" + portOf(p.app), 400},
		{"IPv6 loopback", "[::1]:" + portOf(p.app), 400},
		{"a host name", "server.shop.svc.cluster.local:80", 400},
		{"localhost", "localhost:80", 400},
		{"our outbound listener", onServer("15001"), 400},
		{"our plain listener", onServer("15006"), 400},
		{"our tunnel listener", onServer("15008"), 400},
		{"nobody listens", onServer("1"), 503},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for range 3 {
				s, err := connect(p.server, pool, tt.authority)
				got := status(t, s, err)
				if got != tt.want {
					t.Errorf("status %d, want %d", got, tt.want)
				}
				if tt.want == 400 {
					score.attack("attack.connect_foreign_address", got == 400)
				}
			}
		})
	}
	for _, target := range p.server.outlet.dialed() {
		if target.Addr() != p.server.addr {
			t.Errorf("the pod's node dialed %v", target)
		}
	}
}

func portOf(a netip.AddrPort) string {
	_, port, _ := strings.Cut(a.String(), ":")
	return port
}

func TestPolicyOverTunnel(t *testing.T) {
	p := newPair(t, echo)
	p.setPolicies(denyFrom("no-client", "client"))
	p.client.refused(p.service)
	line := p.serverNode.logged(`error="denied by policy shop/no-client"`)
	for _, want := range []string{`src.identity="spiffe://cluster.local/ns/shop/sa/client"`, `dst.identity="spiffe://cluster.local/ns/shop/sa/server"`} {
		if !strings.Contains(line, want) {
			t.Errorf("access line lacks %s: %s", want, line)
		}
	}
	p.clientNode.logged("denied by the policies of the destination")
	if n := p.counter("istio_tcp_connections_closed_total", p.serverNode, "response_flags", flagDeny); n != 1 {
		t.Errorf("%v connections closed with %s, want 1", n, flagDeny)
	}
	if got := p.server.outlet.dialed(); len(got) != 0 {
		t.Errorf("the application was dialed: %v", got)
	}

	s, err := connect(p.server, p.foreign(p.ca, identityOf("shop", "web")), p.app.String())
	if got := status(t, s, err); got != 200 {
		t.Errorf("somebody else: status %d, want 200", got)
	}
	s, err = connect(p.server, p.foreign(p.ca, identityOf("shop", "client")), p.app.String())
	if got := status(t, s, err); got != 401 {
		t.Errorf("the denied one, from another address: status %d, want 401", got)
	}
}

// The client's certificate says who it is; what it writes in headers does not.
func TestForwardedIsNotBelieved(t *testing.T) {
	p := newPair(t, echo)
	p.setPolicies(mesh.Policy{Name: mesh.Name{Namespace: "shop", Name: "by-ip"}, Scope: mesh.ScopeNamespace, Action: mesh.Allow,
		Groups: []mesh.Group{{Clauses: []mesh.Clause{{Matches: []mesh.Match{{SourceIPs: []netip.Prefix{netip.MustParsePrefix("10.9.9.9/32")}}}}}}}})
	score := newCard(t)
	for range 3 {
		s, err := connect(p.server, p.foreign(p.ca, identityOf("shop", "x")), p.app.String())
		got := status(t, s, err)
		score.attack("attack.forwarded_header", got == 401)
		if got != 401 {
			t.Errorf("status %d, want 401", got)
		}
	}
}

func TestForeignCertificatesAreRefused(t *testing.T) {
	p := newPair(t, echo)
	score := newCard(t)
	stranger := testca.New(t, trustDomain) // says it is ours, with another root
	elsewhere := testca.New(t, "other.domain")
	for name, pool := range map[string]*hbone.Pool{
		"root that is not trusted": p.foreign(stranger, identityOf("shop", "client")),
		"another trust domain":     p.foreign(elsewhere, mesh.Identity{TrustDomain: "other.domain", Namespace: "shop", ServiceAccount: "client"}),
		"our root, another domain": p.foreign(p.ca, mesh.Identity{TrustDomain: "other.domain", Namespace: "shop", ServiceAccount: "client"}),
	} {
		s, err := connect(p.server, pool, p.app.String())
		score.attack("attack.foreign_certificate", err != nil)
		if err == nil {
			s.Reset()
			t.Errorf("%s: connected", name)
		}
		var answered *hbone.StatusError
		if errors.As(err, &answered) {
			t.Errorf("%s: answered %d, want no tunnel at all", name, answered.Code)
		}
	}
	if got := p.server.outlet.dialed(); len(got) != 0 {
		t.Errorf("the application was dialed: %v", got)
	}
}

func TestPlainInbound(t *testing.T) {
	p := newPair(t, echo)
	outsider := p.clientNode.add("outsider", func(w *mesh.Workload) { w.Transport = mesh.PlainTCP })
	c := outsider.dial(p.server.plain)
	if err := roundTrip(c, "in clear"); err != nil {
		t.Fatalf("PERMISSIVE: %v", err)
	}
	c.CloseWrite()
	io.ReadAll(c)
	line := p.serverNode.logged(`direction="inbound"`)
	if strings.Contains(line, "identity") {
		t.Errorf("a plain connection was logged with an identity: %s", line)
	}
	if n := p.counter("istio_tcp_connections_opened_total", p.serverNode, "connection_security_policy", "unknown"); n != 1 {
		t.Errorf("%v plain connections, want 1", n)
	}

	p.setPolicies(strict())
	outsider.refused(p.server.plain)
	p.serverNode.logged("denied by policy shop/strict")
	if err := roundTrip(p.client.dial(p.service), "through the tunnel"); err != nil {
		t.Errorf("STRICT: the mesh client: %v", err)
	}
}

// Somebody dials our own plain listener: the connection must not be sent on to
// it again.
func TestPlainToOurOwnPort(t *testing.T) {
	w := newWorld(t)
	n := w.node(nil)
	e, p := w.entry("server", freshAddr())
	e.Files.Listeners[2].Close()
	l, err := net.Listen("tcp4", p.addr.String()+":15006")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if e.Files.Listeners[2], err = l.(*net.TCPListener).File(); err != nil {
		t.Fatal(err)
	}
	p.node = n
	n.enter = enterWith(p)
	if err := n.Add(t.Context(), e.Pod, e.Files); err != nil {
		t.Fatal(err)
	}
	w.change(func(w *world) { w.ws = append(w.ws, workload("server", p.addr.String())) })
	p.refused(netip.AddrPortFrom(p.addr, 15006))
	if got := p.outlet.dialed(); len(got) != 0 {
		t.Errorf("dialed %v", got)
	}
}

func TestUnknownPolicyHoldsThenDenies(t *testing.T) {
	p := newPair(t, echo)
	missing := mesh.Name{Namespace: "shop", Name: "allow-client"}
	p.change(func(w *world) {
		for i := range w.ws {
			if w.ws[i].Name.Name == "server" {
				w.ws[i].Policies = []mesh.Name{missing}
			}
		}
	})
	// Held while it has not arrived ...
	c := p.client.dial(p.service)
	io.WriteString(c, "hello")
	c.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	if n, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
		t.Fatalf("read %d, %v before the policy came", n, err)
	}
	if got := p.server.outlet.dialed(); len(got) != 0 {
		t.Fatalf("the application was dialed before the policy came: %v", got)
	}
	// ... and decided by it when it has.
	allow := allowOnly("allow-client", "client")
	allow.Scope = mesh.ScopeSelector
	p.setPolicies(allow)
	c.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.ReadFull(c, make([]byte, 5)); err != nil {
		t.Fatalf("after the policy came: %v", err)
	}
	// One that never comes denies.
	p.setPolicies()
	p.client.refused(p.service)
	p.serverNode.logged("policy shop/allow-client applies, but has not arrived")
}

func TestPodThatTheViewDoesNotKnowYet(t *testing.T) {
	w := newWorld(t)
	n := w.node(nil)
	w.change(func(*world) {})
	e, p := w.entry("server", freshAddr())
	p.node = n
	n.enter = enterWith(p)
	if err := n.Add(t.Context(), e.Pod, e.Files); err != nil {
		t.Fatal(err)
	}
	app := p.app(echo)
	type answer struct {
		s   *hbone.Stream
		err error
	}
	got := make(chan answer, 1)
	pool := w.foreign(w.ca, identityOf("shop", "x"))
	go func() {
		s, err := connect(p, pool, app.String())
		got <- answer{s, err}
	}()
	select {
	case a := <-got:
		t.Fatalf("answered %v before the pod was known", a.err)
	case <-time.After(100 * time.Millisecond):
	}
	w.change(func(w *world) { w.ws = append(w.ws, workload("server", p.addr.String())) })
	a := <-got
	if s := status(t, a.s, a.err); s != 200 {
		t.Errorf("status %d, want 200", s)
	}
}
