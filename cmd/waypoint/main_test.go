package main

import (
	"bytes"
	"context"
	"crypto/x509"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/view"
)

// environment is what a Deployment sets.
func environment(key string) string {
	return map[string]string{
		"GATEWAY_NAME": "waypoint", "POD_NAME": "waypoint-x", "POD_NAMESPACE": "shop", "INSTANCE_IP": "10.0.0.1", "NODE_NAME": "n1", "SERVICE_ACCOUNT": "waypoint",
	}[key]
}

func TestParseConfig(t *testing.T) {
	c, err := parseConfig([]string{"--drain=5s"}, environment)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := c.serverName(), "weft-control.weft-system.svc"; got != want {
		t.Errorf("server name %q, want %q", got, want)
	}
	if c.drain != 5*time.Second || c.linger != time.Second || !c.accessLog {
		t.Errorf("%+v", c)
	}
	if got := c.id().String(); got != "spiffe://cluster.local/ns/shop/sa/waypoint" {
		t.Errorf("identity %s", got)
	}
	if c.gatewayName() != (mesh.Name{Namespace: "shop", Name: "waypoint"}) {
		t.Errorf("gateway %v", c.gatewayName())
	}
}

func TestParseConfigComplainsOfAll(t *testing.T) {
	env := map[string]string{"INSTANCE_IP": "here", "CONTROL_ADDRESS": "nowhere", "DRAIN_TIMEOUT": "soon", "LINGER": "-1s", "ACCESS_LOG": "maybe", "LOG_LEVEL": "loud", "LOG_FORMAT": "prose"}
	_, err := parseConfig([]string{"--trust-domain=", "--admin=15000", "what"}, func(k string) string { return env[k] })
	if err == nil {
		t.Fatal("no error")
	}
	for _, want := range []string{"GATEWAY_NAME", "INSTANCE_IP", "control-address", "drain is", "linger is", "access-log", "log-level", "log-format", "trust-domain", "POD_NAME", "SERVICE_ACCOUNT", "admin is", `"what"`} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("no complaint about %s in:\n%v", want, err)
		}
	}
}

// A waypoint that cannot reach the control service says so, and ends when asked.
func TestNotReadyWithoutControl(t *testing.T) {
	free := func() string {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		return l.Addr().String()
	}
	ready := free()
	c, err := parseConfig([]string{"--roots=/nonexistent", "--token=/nonexistent", "--control-address=127.0.0.1:1",
		"--admin=" + free(), "--stats=" + free(), "--envoy-stats=" + free(), "--ready=" + ready, "--listen=" + free()}, environment)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- serve(ctx, c, io.Discard) }()
	for deadline := time.Now().Add(10 * time.Second); ; {
		r, err := http.Get("http://" + ready + "/healthz/ready")
		if err == nil {
			b, _ := io.ReadAll(r.Body)
			r.Body.Close()
			if r.StatusCode != 503 || !bytes.Contains(b, []byte("roots")) {
				t.Errorf("%d %s", r.StatusCode, b)
			}
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("serve = %v", err)
	}
}

func TestDump(t *testing.T) {
	c, err := parseConfig(nil, environment)
	if err != nil {
		t.Fatal(err)
	}
	wp := mesh.ServiceName{Namespace: "shop", Host: "waypoint.shop.svc.cluster.local"}
	cart, other := mesh.ServiceName{Namespace: "shop", Host: "cart"}, mesh.ServiceName{Namespace: "shop", Host: "other"}
	v := view.WithL7("1", nil, []*mesh.Service{{Name: cart, Waypoint: mesh.GatewayRef{Service: wp}}, {Name: other}}, nil, view.L7{
		Routes:    []*mesh.Route{{RouteKey: mesh.RouteKey{Service: cart, Protocol: mesh.RouteHTTP}}, {RouteKey: mesh.RouteKey{Service: other, Protocol: mesh.RouteHTTP}}},
		Waypoints: []*mesh.Waypoint{{Name: c.gatewayName(), Service: wp}},
	})
	if d := dump(c, v); len(d.Services) != 1 || d.Services[0] != cart || len(d.Routes) != 1 || d.Routes[0].Service != cart {
		t.Errorf("dump %+v", d)
	}
	if d := dump(c, new(view.View)); d.Waypoint != nil || len(d.Services) != 0 {
		t.Errorf("dump of nothing %+v", d)
	}
}

// The image holds the program and nothing else. It verifies servers outside of
// the mesh all the same.
func TestAuthoritiesOfAnEmptyImage(t *testing.T) {
	if os.Getenv("SSL_CERT_FILE") != "/nowhere" {
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
		cmd.Env = append(os.Environ(), "SSL_CERT_FILE=/nowhere", "SSL_CERT_DIR=/nowhere")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	pool, err := x509.SystemCertPool()
	if err != nil {
		t.Fatal(err)
	}
	if pool.Equal(x509.NewCertPool()) {
		t.Error("there are no authorities, so nobody outside of the mesh can be verified")
	}
}
