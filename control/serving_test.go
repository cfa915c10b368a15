package control

import (
	"crypto/tls"
	"crypto/x509"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/weft-mesh/weft/identity/ca"
)

func TestServing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		authority, err := ca.New("cluster.local")
		if err != nil {
			t.Fatal(err)
		}
		names := []string{"weft-control", "weft-control.weft-system", "weft-control.weft-system.svc"}
		conf := NewServing(authority, names, nil).TLS()
		serial := func() string { return leafOf(t, conf, authority, names[2]).SerialNumber.String() }

		first := serial()
		time.Sleep(11 * time.Hour)
		if serial() != first {
			t.Error("renewed before half of its life")
		}
		time.Sleep(time.Hour)
		if serial() == first {
			t.Error("not renewed at half of its life")
		}
		for _, n := range names {
			leafOf(t, conf, authority, n)
		}

		// Near the end of the CA there is nothing new to be had. What is
		// there is used to the end, and then nothing is.
		time.Sleep(time.Until(authority.Expiry()) - time.Hour)
		last := serial()
		time.Sleep(time.Hour - 30*time.Second)
		if serial() != last {
			t.Error("a certificate changed although the CA cannot sign")
		}
		time.Sleep(30 * time.Second)
		if _, err := conf.GetCertificate(nil); err == nil || !strings.Contains(err.Error(), "replace it") {
			t.Errorf("GetCertificate error = %v, want one that says to replace the CA", err)
		}
	})
}

// leafOf shakes hands as a proxy does and returns the server's certificate.
func leafOf(t *testing.T, conf *tls.Config, authority *ca.Authority, name string) *x509.Certificate {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(authority.RootPEM())
	a, b := net.Pipe()
	defer a.Close()
	served := make(chan error, 1)
	go func() {
		defer b.Close()
		conn := tls.Server(b, conf)
		err := conn.Handshake()
		if err == nil {
			_, err = conn.Write([]byte("x"))
		}
		served <- err
	}()
	client := tls.Client(a, &tls.Config{RootCAs: roots, ServerName: name, NextProtos: []string{"h2"}})
	if _, err := client.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	if err := <-served; err != nil {
		t.Fatal(err)
	}
	cs := client.ConnectionState()
	if cs.Version != tls.VersionTLS13 || cs.NegotiatedProtocol != "h2" {
		t.Errorf("agreed on %s, %q", tls.VersionName(cs.Version), cs.NegotiatedProtocol)
	}
	return cs.PeerCertificates[0]
}

func TestServingRefusesOldTLS(t *testing.T) {
	authority, err := ca.New("cluster.local")
	if err != nil {
		t.Fatal(err)
	}
	if v := NewServing(authority, []string{"weft-control"}, nil).TLS().MinVersion; v != tls.VersionTLS13 {
		t.Errorf("MinVersion is %s", tls.VersionName(v))
	}
}
