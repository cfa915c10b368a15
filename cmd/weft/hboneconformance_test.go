package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/weft-mesh/weft/hbone"
	"github.com/weft-mesh/weft/hbone/conformance"
	"github.com/weft-mesh/weft/identity"
	"github.com/weft-mesh/weft/internal/testca"
	"github.com/weft-mesh/weft/mesh"
)

// hboneWorld starts a server that refuses every target, and returns the flags
// with which it is tested. A lax one takes any target instead.
func hboneWorld(t *testing.T, lax bool) []string {
	t.Helper()
	ca := testca.New(t, "cluster.local")
	cart := mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "cart"}
	dir := t.TempDir()
	client := ca.Issue(mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "web"})
	key, err := x509.MarshalPKCS8PrivateKey(client.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	flags := []string{"hbone-conformance"}
	for name, b := range map[string][]byte{
		"cert":  pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: client.Certificate[0]}),
		"key":   pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}),
		"roots": ca.PEM(),
	} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		flags = append(flags, "--"+name, path)
	}
	roots, err := identity.NewRoots("cluster.local", ca.PEM())
	if err != nil {
		t.Fatal(err)
	}
	own := ca.Issue(cart)
	srv := hbone.NewServer(hbone.ServerConfig{
		TLS: identity.ServerTLS(func(context.Context) (*tls.Certificate, error) { return &own, nil }, roots, "cluster.local"),
		Handle: func(_ context.Context, r *hbone.Request) {
			if lax {
				_, _ = r.Accept(hbone.Header{})
				return
			}
			_ = r.Reject(400)
		},
	})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { _ = srv.ServeConn(ctx, c) })
		}
	})
	t.Cleanup(func() {
		stop()
		_ = ln.Close()
		wg.Wait()
	})
	return append(flags, "--peer", cart.String(), ln.Addr().String())
}

func weft(t *testing.T, args []string) (code int, out, errOut string) {
	t.Helper()
	var o, e strings.Builder
	code = run(t.Context(), args, &o, &e)
	return code, o.String(), e.String()
}

func TestHBONEConformance(t *testing.T) {
	flags := hboneWorld(t, false)
	code, out, errOut := weft(t, append(flags, "--only", "connect."))
	if code != 0 || errOut != "" {
		t.Errorf("code %d, %s", code, errOut)
	}
	for _, want := range []string{"LEVEL   SECTION  CHECK", "pass  must    5.4      connect.foreign", "skip  must    5.5      connect.ok", "0 failed"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	code, out, _ = weft(t, append(flags, "--only", "connect.foreign", "-o", "json"))
	var rs []conformance.Result
	if err := json.Unmarshal([]byte(out), &rs); err != nil || code != 0 || len(rs) != 2 || rs[0].Verdict != conformance.Pass {
		t.Errorf("code %d, %v, %s", code, err, out)
	}
}

func TestHBONEConformanceFails(t *testing.T) {
	code, out, errOut := weft(t, append(hboneWorld(t, true), "--only", "connect."))
	if code != 1 || !strings.Contains(out, "fail  must    5.4      connect.foreign") || !strings.Contains(errOut, "does not conform") {
		t.Errorf("code %d, %s\n%s", code, errOut, out)
	}
}

func TestHBONEConformanceComplains(t *testing.T) {
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"hbone-conformance", "nowhere"}, `address is "nowhere"`},
		{[]string{"hbone-conformance", "127.0.0.1:1"}, "--roots is missing"},
		{[]string{"hbone-conformance", "127.0.0.1:1", "--roots", "x"}, "--cert and --key are missing"},
		{[]string{"hbone-conformance", "127.0.0.1:1", "--target", "here"}, `--target is "here"`},
		{[]string{"hbone-conformance", "127.0.0.1:1", "--peer", "web"}, `--peer is "web"`},
		{[]string{"hbone-conformance", "127.0.0.1:1", "--timeout", "-1s"}, "--timeout is -1s"},
		{append(hboneWorld(t, false), "--only", "nonsense"), "no check begins with"},
	} {
		if code, _, errOut := weft(t, tt.args); code != 1 || !strings.Contains(errOut, tt.want) {
			t.Errorf("%v: code %d, %s, want %s", tt.args, code, errOut, tt.want)
		}
	}
}
