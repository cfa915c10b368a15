package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/weft-mesh/weft/e2e/install"
)

// echoImage is the one that the suite's manifests name.
const echoImage = "registry.k8s.io/gateway-api/echo-advanced:v1.5.1"

// build makes the suite's program, and the image of its pods, whose archive it
// returns.
func (r *runner) build(ctx context.Context) (archive string, err error) {
	module := filepath.Join(r.root, "e2e", "conformance")
	bin := filepath.Join(r.out, "bin") + "/"
	cert, key := filepath.Join(r.out, "cert.crt"), filepath.Join(r.out, "cert.key")
	archive = filepath.Join(r.out, "echo-advanced.tar")
	if err := os.MkdirAll(bin, 0o755); err != nil {
		return "", err
	}
	if err := makeCertificate(cert, key); err != nil {
		return "", fmt.Errorf("make a certificate for the suite's pods: %w", err)
	}
	const echo = "istio.io/istio/pkg/test/echo/cmd/"
	for _, s := range []struct {
		what, dir string
		argv      []string
	}{
		{"the suite", module, []string{"go", "test", "-c", "-o", filepath.Join(r.out, "mesh.test"), "."}},
		{"the programs of its pods", filepath.Join(module, "echo"),
			[]string{"go", "build", "-ldflags", "-s -w", "-o", bin, echo + "client", echo + "server"}},
		{"the image of its pods", r.root, []string{"go", "run", "./deploy/images", "-name", echoImage, "-entrypoint", "/bin/server",
			"-add", bin + "server:/bin/server", "-add", bin + "client:/bin/client", "-add", cert + ":/cert.crt", "-add", key + ":/cert.key", "-o", archive}},
	} {
		if err := install.Make(ctx, os.Stdout, s.what, s.dir, s.argv...); err != nil {
			return "", fmt.Errorf("build %s: %w", s.what, err)
		}
	}
	return archive, nil
}

// makeCertificate makes what the suite's pods serve TLS with. No test asks who
// they are.
func makeCertificate(cert, key string) error {
	if _, err := os.Stat(cert); err == nil {
		return nil // a new one would make a new image
	}
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "echo"}, DNSNames: []string{"echo"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(10, 0, 0)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, k.Public(), k)
	if err != nil {
		return err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return err
	}
	if err := os.WriteFile(key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}), 0o644); err != nil {
		return err
	}
	return os.WriteFile(cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644)
}

// prepare loads the image and installs the kinds of the Gateway API.
func (r *runner) prepare(ctx context.Context, archive string) error {
	if err := r.c.LoadImage(ctx, archive); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "sigs.k8s.io/gateway-api")
	cmd.Dir = filepath.Join(r.root, "e2e", "conformance")
	dir, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("find the module of the Gateway API: %w", err)
	}
	crds := filepath.Join(strings.TrimSpace(string(dir)), "config", "crd", "standard")
	if _, err := r.c.Kubectl(ctx, "apply", "--server-side", "--force-conflicts", "-f", crds); err != nil {
		return err
	}
	_, err = r.c.Kubectl(ctx, "wait", "--for=condition=Established", "--timeout=60s",
		"crd/gateways.gateway.networking.k8s.io", "crd/httproutes.gateway.networking.k8s.io", "crd/grpcroutes.gateway.networking.k8s.io")
	return err
}
