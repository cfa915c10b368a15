package control

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/weft-mesh/weft/identity/ca"
)

// TestWebhook asks as the API server does: by the service's name, trusting the
// CA's root alone.
func TestWebhook(t *testing.T) {
	authority, err := ca.New("cluster.local")
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- NewWebhook(Defaults(""), authority, silent()).serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(authority.RootPEM())
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, ServerName: "weft-control.weft-system.svc"}}
	t.Cleanup(transport.CloseIdleConnections)
	ask := func(spec string) string {
		review := `{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":{"uid":"u","operation":"CREATE","namespace":"shop","object":` +
			`{"apiVersion":"networking.istio.io/v1","kind":"DestinationRule","metadata":{"name":"x","namespace":"shop"},"spec":` + spec + `}}}`
		resp, err := (&http.Client{Transport: transport}).Post("https://"+l.Addr().String()+"/validate", "application/json", strings.NewReader(review))
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	if got := ask(`{"host":"cart"}`); !strings.Contains(got, `"allowed":true`) {
		t.Errorf("a valid object: %s", got)
	}
	if got := ask(`{"hosts":"cart"}`); !strings.Contains(got, `"allowed":false`) || !strings.Contains(got, "hosts") {
		t.Errorf("an invalid object: %s", got)
	}
}
