package cluster

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"os"
	"path/filepath"
	"testing"
)

func TestPKI(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pki")
	if err := makePKI(dir); err != nil {
		t.Fatal(err)
	}
	ca, err := os.ReadFile(filepath.Join(dir, "ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	for _, r := range []struct {
		name, host string
		usage      x509.ExtKeyUsage
	}{
		{"apiserver", "kubernetes.default.svc", x509.ExtKeyUsageServerAuth},
		{"apiserver", apiServiceIP, x509.ExtKeyUsageServerAuth},
		{"apiserver", "127.0.0.1", x509.ExtKeyUsageServerAuth}, // the forwarded port
		{"node1", nodeAddresses(1)[1], x509.ExtKeyUsageServerAuth},
		{"node2", "", x509.ExtKeyUsageClientAuth},
		{"admin", "", x509.ExtKeyUsageClientAuth},
	} {
		pair, err := tls.LoadX509KeyPair(filepath.Join(dir, r.name+".crt"), filepath.Join(dir, r.name+".key"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := pair.Leaf.Verify(x509.VerifyOptions{DNSName: r.host, Roots: roots, KeyUsages: []x509.ExtKeyUsage{r.usage}}); err != nil {
			t.Errorf("%s as %q: %v", r.name, r.host, err)
		}
	}
	if err := makePKI(dir); err != nil {
		t.Fatal(err)
	}
	if again, _ := os.ReadFile(filepath.Join(dir, "ca.crt")); !bytes.Equal(ca, again) {
		t.Error("a second makePKI replaced the CA of a complete directory")
	}
}
