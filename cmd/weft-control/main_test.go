package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/weft-mesh/weft/mesh"
)

func env(kv ...string) func(string) string {
	return func(key string) string {
		for i := 0; i < len(kv); i += 2 {
			if kv[i] == key {
				return kv[i+1]
			}
		}
		return ""
	}
}

func TestParse(t *testing.T) {
	c, err := parse([]string{"--trust-domain=example.org", "--cluster-id=c1"}, env("POD_NAMESPACE", "mesh", "POD_NAME", "weft-control-0"), io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if c.control.Namespace != "mesh" || c.identity != "weft-control-0" || c.control.TrustDomain != "example.org" || c.control.Cluster != "c1" {
		t.Errorf("parsed %+v", c)
	}
	if got := c.control.NodeAccounts; len(got) != 1 || got[0] != (mesh.Name{Namespace: "mesh", Name: "ztunnel"}) {
		t.Errorf("node accounts %v, want that of the pod's namespace", got)
	}
	if c, err = parse([]string{"--node-accounts=a/b, c/d", "--namespace=other"}, env(), io.Discard); err != nil || len(c.control.NodeAccounts) != 2 {
		t.Errorf("node accounts %v, %v, want two", c.control.NodeAccounts, err)
	}
	_, err = parse([]string{"--trust-domain=NO", "--log-level=loud", "--log-format=xml", "--grpc-address=15012"}, env(), io.Discard)
	for _, want := range []string{"trust domain", "loud", "xml", "grpc address"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("no complaint about %s in %v", want, err)
		}
	}
	for _, args := range [][]string{{"extra"}, {"--node-accounts=nonsense"}, {"--unknown"}} {
		if _, err := parse(args, env(), io.Discard); err == nil {
			t.Errorf("%q is accepted", args)
		}
	}
}

// A logBook is a program's log that a test can read.
type logBook struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBook) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBook) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// TestUnreachableAPIServer proves that the service lives, is not ready, says
// why and what to do, and stops when it is told to.
func TestUnreachableAPIServer(t *testing.T) {
	free := func() string {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		return l.Addr().String()
	}
	kubeconfig := filepath.Join(t.TempDir(), "kubeconfig")
	text := fmt.Sprintf(`{apiVersion: v1, kind: Config, current-context: c,
clusters: [{name: c, cluster: {server: "http://%s"}}], users: [{name: u}], contexts: [{name: c, context: {cluster: c, user: u}}]}`, free())
	if err := os.WriteFile(kubeconfig, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	health := free()
	var log logBook
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- program(ctx, []string{"--kubeconfig=" + kubeconfig, "--pod-name=p", "--health-address=" + health,
			"--grpc-address=127.0.0.1:0", "--metrics-address=127.0.0.1:0", "--debug-address=127.0.0.1:0"}, env(), &log)
	}()
	get := func(path string) (int, string) {
		resp, err := http.Get("http://" + health + path)
		if err != nil {
			return 0, err.Error()
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body) // the code is what counts
		return resp.StatusCode, string(b)
	}
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(20 * time.Second)
	wait := func(what string, f func() bool) {
		t.Helper()
		for !f() {
			select {
			case <-tick.C:
			case err := <-done:
				t.Fatalf("%s: the program ended: %v\n%s", what, err, log.String())
			case <-deadline:
				t.Fatalf("%s: never\n%s", what, log.String())
			}
		}
	}
	wait("live", func() bool { code, _ := get("/healthz/live"); return code == http.StatusOK })
	wait("said what to do", func() bool {
		s := log.String()
		return strings.Contains(s, "cannot use the Kubernetes API") && strings.Contains(s, "there is no CA yet") && strings.Contains(s, "check that the API server is up")
	})
	if code, body := get("/healthz/ready"); code != http.StatusServiceUnavailable || body != "waiting for the CA, the cluster\n" {
		t.Errorf("ready: %d %q", code, body)
	}
	cancel()
	select {
	case err := <-done:
		if err != nil {
			t.Errorf("stopped with %v", err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("does not stop")
	}
}
