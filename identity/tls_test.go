package identity

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/weft-mesh/weft/internal/testca"
	"github.com/weft-mesh/weft/mesh"
)

func newTestKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func fixed(c tls.Certificate) CertFunc {
	return func(context.Context) (*tls.Certificate, error) { return &c, nil }
}

// meet lets a client and a server shake hands over TCP and exchange a byte
// each way, and returns both states and both errors.
func meet(t *testing.T, client, server *tls.Config) (cs, ss tls.ConnectionState, cerr, serr error) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return meetOver(t, a, b, client, server)
}

// meetOver is meet over a given pair of connections, which it closes.
func meetOver(t *testing.T, a, b net.Conn, client, server *tls.Config) (cs, ss tls.ConnectionState, cerr, serr error) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	a.SetDeadline(deadline)
	b.SetDeadline(deadline)
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer b.Close()
		ss, serr = converse(tls.Server(b, server))
	}()
	cs, cerr = converse(tls.Client(a, client))
	a.Close()
	<-done
	return cs, ss, cerr, serr
}

func converse(conn *tls.Conn) (tls.ConnectionState, error) {
	if err := conn.Handshake(); err != nil {
		return tls.ConnectionState{}, err
	}
	if _, err := conn.Write([]byte("x")); err != nil {
		return tls.ConnectionState{}, err
	}
	if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
		return tls.ConnectionState{}, err
	}
	return conn.ConnectionState(), nil
}

func TestHandshake(t *testing.T) {
	ca := testca.New(t, "cluster.local")
	roots := rootsOf(t, ca)
	client := ClientTLS(fixed(ca.Issue(cart)), roots, []mesh.Identity{web})
	server := ServerTLS(fixed(ca.Issue(web)), roots, "cluster.local")
	server.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		if h.ServerName != "" {
			t.Errorf("the client told the network the name %q", h.ServerName)
		}
		return nil, nil
	}
	cs, ss, cerr, serr := meet(t, client, server)
	if cerr != nil || serr != nil {
		t.Fatalf("client: %v, server: %v", cerr, serr)
	}
	if got, err := PeerIdentity(cs); err != nil || got != web {
		t.Errorf("the client met %v, %v; want %v", got, err, web)
	}
	if got, err := PeerIdentity(ss); err != nil || got != cart {
		t.Errorf("the server met %v, %v; want %v", got, err, cart)
	}
	for _, s := range []tls.ConnectionState{cs, ss} {
		if s.Version != tls.VersionTLS13 || s.NegotiatedProtocol != "h2" || s.CurveID != tls.X25519MLKEM768 {
			t.Errorf("agreed on %s, %q, %v", tls.VersionName(s.Version), s.NegotiatedProtocol, s.CurveID)
		}
	}
}

func TestPeerIdentityOfNobody(t *testing.T) {
	if id, err := PeerIdentity(tls.ConnectionState{}); err == nil {
		t.Errorf("PeerIdentity = %v, want an error", id)
	}
}

// TestServerIsRefused lets servers that are not web answer a client that
// wants web.
func TestServerIsRefused(t *testing.T) {
	ca := testca.New(t, "cluster.local")
	twin := testca.New(t, "cluster.local")
	foreign := testca.New(t, "evil.example")
	clientRoots := rootsOf(t, ca, foreign)
	serverOf := func(c tls.Certificate) *tls.Config { return ServerTLS(fixed(c), rootsOf(t, ca), "cluster.local") }
	with := func(c *tls.Config, change func(*tls.Config)) *tls.Config { change(c); return c }
	evilWeb := mesh.Identity{TrustDomain: "evil.example", Namespace: web.Namespace, ServiceAccount: web.ServiceAccount}

	tests := []struct {
		name   string
		server *tls.Config
		want   []mesh.Identity
		err    string
		wrong  bool // ErrWrongPeer
	}{
		{"another identity", serverOf(ca.Issue(cart)), []mesh.Identity{web}, "not who was expected", true},
		{"the same account in another trust domain", serverOf(foreign.Issue(evilWeb)), []mesh.Identity{web}, "not who was expected", true},
		{"nobody was wanted", serverOf(ca.Issue(web)), nil, "not who was expected", true},
		{"only the zero identity was wanted", serverOf(ca.Issue(web)), []mesh.Identity{{}}, "not who was expected", true},
		{"another root of the same trust domain", serverOf(twin.Issue(web)), []mesh.Identity{web}, "unknown authority", false},
		{"self-signed", serverOf(tls.Certificate{Certificate: [][]byte{twin.Certificate().Raw}, PrivateKey: keyOf(t, twin)}), []mesh.Identity{web}, "no URI SAN", false},
		{"a certificate for clients only", serverOf(ca.IssueAs(web, func(c *x509.Certificate) {
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
		})), []mesh.Identity{web}, "incompatible key usage", false},
		{"expired", serverOf(ca.IssueAs(web, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) })), []mesh.Identity{web}, "expired", false},
		{"TLS 1.2", with(serverOf(ca.Issue(web)), func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 }), []mesh.Identity{web}, "protocol version", false},
		{"no application protocol", with(serverOf(ca.Issue(web)), func(c *tls.Config) { c.NextProtos = nil }), []mesh.Identity{web}, "application protocol", false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			client := ClientTLS(fixed(ca.Issue(cart)), clientRoots, tt.want)
			_, _, err, _ := meet(t, client, tt.server)
			if err == nil || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("client error = %v, want one with %q", err, tt.err)
			}
			if errors.Is(err, ErrWrongPeer) != tt.wrong {
				t.Errorf("client error %q is ErrWrongPeer: %v, want %v", err, !tt.wrong, tt.wrong)
			}
		})
	}
}

// TestClientIsRefused lets clients that no server may accept try.
func TestClientIsRefused(t *testing.T) {
	ca := testca.New(t, "cluster.local")
	twin := testca.New(t, "cluster.local")
	foreign := testca.New(t, "evil.example")
	serverRoots := rootsOf(t, ca, foreign)
	clientOf := func(c tls.Certificate) *tls.Config {
		return ClientTLS(fixed(c), rootsOf(t, ca), []mesh.Identity{web})
	}
	with := func(c *tls.Config, change func(*tls.Config)) *tls.Config { change(c); return c }
	spoilt := func(change func(*x509.Certificate)) *tls.Config { return clientOf(ca.IssueAs(cart, change)) }

	tests := []struct {
		name   string
		client *tls.Config
		err    string
		wrong  bool
	}{
		{"no certificate", with(clientOf(ca.Issue(cart)), func(c *tls.Config) {
			c.GetClientCertificate = nil
		}), "didn't provide a certificate", false},
		{"an empty certificate", with(clientOf(ca.Issue(cart)), func(c *tls.Config) {
			c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return new(tls.Certificate), nil }
		}), "didn't provide a certificate", false},
		{"another trust domain, which is trusted", clientOf(foreign.Issue(evil)), "not who was expected", true},
		{"another trust domain signed by our root", clientOf(ca.Issue(evil)), "unknown authority", false},
		{"another root of the same trust domain", clientOf(twin.Issue(cart)), "unknown authority", false},
		{"a certificate for servers only", spoilt(func(c *x509.Certificate) {
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		}), "incompatible key usage", false},
		{"a CA certificate", spoilt(func(c *x509.Certificate) { c.IsCA = true }), "CA certificate", false},
		{"two identities", spoilt(func(c *x509.Certificate) { c.URIs = append(c.URIs, testca.URI(t, web.String())) }), "more than one URI", false},
		{"expired", spoilt(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }), "expired", false},
		{"not yet valid", spoilt(func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Hour) }), "not yet valid", false},
		{"TLS 1.2", with(clientOf(ca.Issue(cart)), func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 }), "unsupported versions", false},
		{"no application protocol", with(clientOf(ca.Issue(cart)), func(c *tls.Config) { c.NextProtos, c.VerifyConnection = nil, nil }), "application protocol", false},
		// crypto/tls servers let this one through, on the theory that it speaks HTTP.
		{"HTTP/1.1 only", with(clientOf(ca.Issue(cart)), func(c *tls.Config) { c.NextProtos, c.VerifyConnection = []string{"http/1.1"}, nil }), "application protocol", false},
		{"someone else's certificate without its key", clientOf(tls.Certificate{
			Certificate: ca.Issue(cart).Certificate, PrivateKey: newTestKey(t),
		}), "invalid signature", false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			server := ServerTLS(fixed(ca.Issue(web)), serverRoots, "cluster.local")
			_, ss, _, err := meet(t, tt.client, server)
			if err == nil || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("server error = %v, want one with %q", err, tt.err)
			}
			if errors.Is(err, ErrWrongPeer) != tt.wrong {
				t.Errorf("server error %q is ErrWrongPeer: %v, want %v", err, !tt.wrong, tt.wrong)
			}
			if ss.HandshakeComplete {
				t.Error("the server completed the handshake")
			}
		})
	}
}

// TestNoResumption meets twice with a client that keeps sessions, also across
// two configurations of one server, and with a server that hands out tickets.
func TestNoResumption(t *testing.T) {
	ca := testca.New(t, "cluster.local")
	roots := rootsOf(t, ca)
	cache := tls.NewLRUClientSessionCache(8)
	greedy := ClientTLS(fixed(ca.Issue(cart)), roots, []mesh.Identity{web})
	greedy.ServerName, greedy.ClientSessionCache = "web", cache
	server := ServerTLS(fixed(ca.Issue(web)), roots, "cluster.local")
	for range 2 {
		_, ss, cerr, serr := meet(t, greedy, server)
		if cerr != nil || serr != nil {
			t.Fatal(cerr, serr)
		}
		if ss.DidResume {
			t.Error("our server resumed a session")
		}
		if s, ok := cache.Get("web"); ok && s != nil {
			t.Error("our server handed out a session ticket")
		}
	}

	generous := ServerTLS(fixed(ca.Issue(web)), roots, "cluster.local")
	generous.SessionTicketsDisabled = false
	client := ClientTLS(fixed(ca.Issue(cart)), roots, []mesh.Identity{web})
	for range 2 {
		cs, _, cerr, serr := meet(t, client, generous)
		if cerr != nil || serr != nil {
			t.Fatal(cerr, serr)
		}
		if cs.DidResume {
			t.Error("our client resumed a session")
		}
	}
	// Both sides lax: what is verified in every handshake refuses it still.
	lax := ClientTLS(fixed(ca.Issue(cart)), roots, []mesh.Identity{web})
	lax.ServerName, lax.ClientSessionCache, lax.SessionTicketsDisabled = "web", cache, false
	if _, _, cerr, serr := meet(t, lax, generous); cerr != nil || serr != nil {
		t.Fatal(cerr, serr)
	}
	if _, _, cerr, serr := meet(t, lax, generous); cerr == nil && serr == nil {
		t.Error("a resumed session was accepted")
	}
}

func TestOwnCertificateFails(t *testing.T) {
	ca := testca.New(t, "cluster.local")
	roots := rootsOf(t, ca)
	none := func(context.Context) (*tls.Certificate, error) { return nil, errors.New("the CA is away") }
	_, _, cerr, _ := meet(t, ClientTLS(none, roots, []mesh.Identity{web}), ServerTLS(fixed(ca.Issue(web)), roots, "cluster.local"))
	if cerr == nil || !strings.Contains(cerr.Error(), "the CA is away") {
		t.Errorf("client error = %v, want the reason", cerr)
	}
	_, _, _, serr := meet(t, ClientTLS(fixed(ca.Issue(cart)), roots, []mesh.Identity{web}), ServerTLS(none, roots, "cluster.local"))
	if serr == nil || !strings.Contains(serr.Error(), "the CA is away") {
		t.Errorf("server error = %v, want the reason", serr)
	}
}

func keyOf(t *testing.T, ca *testca.CA) *ecdsa.PrivateKey {
	t.Helper()
	pair, err := tls.X509KeyPair(ca.PEM(), ca.KeyPEM())
	if err != nil {
		t.Fatal(err)
	}
	return pair.PrivateKey.(*ecdsa.PrivateKey)
}
