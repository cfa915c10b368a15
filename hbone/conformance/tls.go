package conformance

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"time"

	h2 "golang.org/x/net/http2"
)

// tls returns the configuration of an honest client.
func (s *suite) tls() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: []string{"h2"},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return s.Certificate, nil
		},
		// Certificates of the mesh name no host: VerifyConnection looks at
		// what they do name.
		InsecureSkipVerify: true,
		VerifyConnection:   s.verify,
	}
}

// verify checks who the server is. A server that is not who it should be is
// not tested any further.
func (s *suite) verify(cs tls.ConnectionState) error {
	if len(cs.PeerCertificates) == 0 {
		return errors.New("the server presents no certificate")
	}
	leaf := cs.PeerCertificates[0]
	if len(leaf.URIs) != 1 || leaf.URIs[0].Scheme != "spiffe" {
		return fmt.Errorf("the server's certificate names the URIs %v, want one SPIFFE ID", leaf.URIs)
	}
	if id := leaf.URIs[0].String(); s.Peer != "" && id != s.Peer {
		return fmt.Errorf("the server is %s, want %s", id, s.Peer)
	}
	if s.Roots == nil {
		return nil
	}
	between := x509.NewCertPool()
	for _, c := range cs.PeerCertificates[1:] {
		between.AddCert(c)
	}
	_, err := leaf.Verify(x509.VerifyOptions{Roots: s.Roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	return err
}

func tlsChecks() []check {
	return []check{
		{"tls.identity", "3.4", Must, func(s *suite) error {
			c, err := s.dial(nil)
			if err != nil {
				return err
			}
			return c.Close()
		}},
		{"tls.version", "3.1", Must, (*suite).onlyTLS13},
		{"tls.alpn", "3.3", Must, (*suite).agreesOnH2},
		{"tls.alpn.http1", "3.3", Must, func(s *suite) error {
			return s.takesNobody("ALPN http/1.1", func(c *tls.Config) { c.NextProtos = []string{"http/1.1"} })
		}},
		{"tls.group.x25519", "3.2", Must, group(tls.X25519)},
		{"tls.group.p256", "3.2", Should, group(tls.CurveP256)},
		{"tls.group.x25519mlkem768", "3.2", Should, group(tls.X25519MLKEM768)},
		{"tls.client.none", "3.4", Must, func(s *suite) error {
			return s.takesNobody("a client without a certificate", func(c *tls.Config) {
				c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return new(tls.Certificate), nil }
			})
		}},
		{"tls.client.untrusted", "3.4", Must, func(s *suite) error {
			forged, err := s.forge()
			if err != nil {
				return err
			}
			return s.takesNobody("a certificate that nobody trusted has signed", func(c *tls.Config) {
				c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return forged, nil }
			})
		}},
		{"tls.tickets", "3.5", Should, (*suite).resumesNothing},
		{"tls.keyupdate", "3.6", Must, (*suite).followsKeyUpdates},
	}
}

// group wants a handshake with one group only.
func group(id tls.CurveID) func(*suite) error {
	return func(s *suite) error {
		c, err := s.dial(func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{id} })
		if err != nil {
			return err
		}
		return c.Close()
	}
}

func (s *suite) onlyTLS13() error {
	c, err := s.dial(func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 })
	if err != nil {
		return nil
	}
	_ = c.Close() // it should not exist
	return errors.New("the server speaks TLS 1.2")
}

func (s *suite) agreesOnH2() error {
	c, err := s.dial(nil)
	if err != nil {
		return err
	}
	defer c.Close()
	if got := c.ConnectionState().NegotiatedProtocol; got != "h2" {
		return fmt.Errorf("ALPN is %q, want h2", got)
	}
	return nil
}

// takesNobody wants a client as changed to get no tunnel: no handshake, or an
// end before anything is answered. With TLS 1.3 a client's handshake is over
// before the server has looked at its certificate.
func (s *suite) takesNobody(whom string, change func(*tls.Config)) error {
	c, err := s.dial(change)
	if err != nil {
		return nil
	}
	p := s.peer(c)
	defer p.close()
	p.write([]byte(h2.ClientPreface))
	p.said(p.fr.WriteSettings())
	authority := s.Target
	if authority == "" {
		authority = s.Foreign
	}
	st := p.ask(false, connectTo(authority)...)
	p.said(p.fr.WritePing(false, [8]byte{1}))
	err = p.wait("an end", func() bool { return st.status != "" || st.reset || p.acked || len(p.pongs) > 0 })
	if err == nil || p.ended == nil {
		return fmt.Errorf("%s was taken: the server has answered it, or keeps it", whom)
	}
	return nil
}

// forge returns a certificate with our own identity that signs itself.
func (s *suite) forge() (*tls.Certificate, error) {
	leaf, err := x509.ParseCertificate(s.Certificate.Certificate[0])
	if err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), URIs: append([]*url.URL(nil), leaf.URIs...),
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}

// tickets is a session cache that counts.
type tickets struct{ n int }

func (t *tickets) Get(string) (*tls.ClientSessionState, bool) { return nil, false }
func (t *tickets) Put(_ string, state *tls.ClientSessionState) {
	if state != nil {
		t.n++
	}
}

func (s *suite) resumesNothing() error {
	got := &tickets{}
	c, err := s.dial(func(c *tls.Config) { c.ClientSessionCache, c.ServerName = got, "hbone.invalid" })
	if err != nil {
		return err
	}
	p, err := s.greetOver(c)
	if err != nil {
		return err
	}
	defer p.close()
	if got.n > 0 {
		return fmt.Errorf("the server gives out %d session tickets: a resumed session outlives the certificates", got.n)
	}
	return nil
}
