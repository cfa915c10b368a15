package cluster

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"text/template"
	"time"
)

// validity is how long the certificates of a test cluster last.
const validity = 365 * 24 * time.Hour

// makePKI makes the keys, certificates and kubeconfigs of the control plane and
// the nodes in dir. It leaves a complete directory as it is.
func makePKI(dir string) error {
	done := filepath.Join(dir, "complete")
	if _, err := os.Stat(done); err == nil {
		return nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	ca, err := newAuthority(dir)
	if err != nil {
		return err
	}
	if err := serviceAccountKey(dir); err != nil {
		return err
	}
	leaves := []leaf{
		{name: "apiserver", subject: pkix.Name{CommonName: "kube-apiserver"},
			dns: []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"},
			ips: []string{"127.0.0.1", "::1", controlIP4, controlIP6, apiServiceIP}},
		{name: "kubelet-client", subject: pkix.Name{CommonName: "kube-apiserver-kubelet-client", Organization: []string{"system:masters"}}},
		{name: "front-proxy", subject: pkix.Name{CommonName: "front-proxy-client"}},
		{name: "admin", subject: pkix.Name{CommonName: "admin", Organization: []string{"system:masters"}}},
		{name: "controllers", subject: pkix.Name{CommonName: "system:kube-controller-manager"}},
		{name: "scheduler", subject: pkix.Name{CommonName: "system:kube-scheduler"}},
		{name: "kube-proxy", subject: pkix.Name{CommonName: "system:kube-proxy"}},
	}
	for i := 1; i <= nodes; i++ {
		n := NodeName(i)
		leaves = append(leaves, leaf{name: n, dns: []string{n}, ips: nodeAddresses(i),
			subject: pkix.Name{CommonName: "system:node:" + n, Organization: []string{"system:nodes"}}})
	}
	for _, l := range leaves {
		if err := ca.sign(l); err != nil {
			return fmt.Errorf("make certificate %s: %w", l.name, err)
		}
		server := fmt.Sprintf("https://%s:%d", controlIP4, apiPort)
		if err := writeKubeconfig(filepath.Join(dir, l.name+".kubeconfig"), dir, l.name, server); err != nil {
			return err
		}
	}
	return os.WriteFile(done, nil, 0o600)
}

// A leaf is a certificate to make. It is good for client and server alike.
type leaf struct {
	name    string
	subject pkix.Name
	dns     []string
	ips     []string
}

type authority struct {
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(dir string) (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "weft-cluster"},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(validity),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign | x509.KeyUsageDigitalSignature,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &authority{dir: dir, cert: cert, key: key}, writePair(dir, "ca", der, key)
}

func (a *authority) sign(l leaf) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber: serial,
		Subject:      l.subject,
		NotBefore:    a.cert.NotBefore,
		NotAfter:     a.cert.NotAfter,
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		DNSNames:     l.dns,
	}
	for _, ip := range l.ips {
		template.IPAddresses = append(template.IPAddresses, net.ParseIP(ip))
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	if err != nil {
		return err
	}
	return writePair(a.dir, l.name, der, key)
}

// serviceAccountKey makes the key pair that signs service account tokens.
func serviceAccountKey(dir string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	pub, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return err
	}
	if err := writePEM(filepath.Join(dir, "sa.pub"), "PUBLIC KEY", pub); err != nil {
		return err
	}
	return writeKey(filepath.Join(dir, "sa.key"), key)
}

func writePair(dir, name string, cert []byte, key *ecdsa.PrivateKey) error {
	if err := writePEM(filepath.Join(dir, name+".crt"), "CERTIFICATE", cert); err != nil {
		return err
	}
	return writeKey(filepath.Join(dir, name+".key"), key)
}

func writeKey(path string, key *ecdsa.PrivateKey) error {
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	return writePEM(path, "EC PRIVATE KEY", der)
}

func writePEM(path, kind string, der []byte) error {
	return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
}

// writeKubeconfig writes a kubeconfig with the certificate called name of the
// directory pki.
func writeKubeconfig(path, pki, name, server string) error {
	t := template.Must(template.New("").Parse(`apiVersion: v1
kind: Config
clusters: [{name: weft, cluster: {server: "{{.Server}}", certificate-authority: "{{.PKI}}/ca.crt"}}]
users: [{name: weft, user: {client-certificate: "{{.PKI}}/{{.Name}}.crt", client-key: "{{.PKI}}/{{.Name}}.key"}}]
contexts: [{name: weft, context: {cluster: weft, user: weft}}]
current-context: weft
`))
	f, err := os.OpenFile(path+".next", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := t.Execute(f, struct{ PKI, Name, Server string }{pki, name, server}); err != nil {
		return err
	}
	return os.Rename(path+".next", path)
}
