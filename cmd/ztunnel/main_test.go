package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/weft-mesh/weft/internal/testca"
)

// environment is what a DaemonSet sets.
func environment(key string) string {
	return map[string]string{
		"POD_NAME": "ztunnel-x", "POD_NAMESPACE": "weft-system", "INSTANCE_IP": "10.0.0.1", "NODE_NAME": "n1",
	}[key]
}

func TestParseConfig(t *testing.T) {
	c, err := parseConfig(nil, environment)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := c.serverName(), "weft-control.weft-system.svc"; got != want {
		t.Errorf("server name %q, want %q", got, want)
	}
	if c.sameNode {
		t.Error("the same-node short cut is on by default")
	}
	if c.drain != 20*time.Second || !c.accessLog {
		t.Errorf("defaults: drain %v, access log %v", c.drain, c.accessLog)
	}
	c, err = parseConfig([]string{"--drain=5s", "--control-name=istiod.istio-system.svc", "--same-node"}, func(k string) string {
		if k == "DRAIN_TIMEOUT" {
			return "7s"
		}
		return environment(k)
	})
	if err != nil {
		t.Fatal(err)
	}
	if c.drain != 5*time.Second || c.serverName() != "istiod.istio-system.svc" || !c.sameNode {
		t.Errorf("flags do not go before the environment: %+v", c)
	}
}

func TestParseConfigComplainsOfAll(t *testing.T) {
	env := map[string]string{"SAME_NODE": "maybe", "INSTANCE_IP": "here", "CONTROL_ADDRESS": "nowhere", "DRAIN_TIMEOUT": "soon", "LOG_LEVEL": "loud", "LOG_FORMAT": "prose"}
	_, err := parseConfig([]string{"--trust-domain=", "--admin=15000", "what"}, func(k string) string { return env[k] })
	if err == nil {
		t.Fatal("no error")
	}
	for _, want := range []string{"SAME_NODE", "INSTANCE_IP", "control-address", "drain is", "log-level", "log-format", "trust-domain", "POD_NAME", "NODE_NAME", "admin is", `"what"`} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("no complaint about %s in:\n%v", want, err)
		}
	}
}

// get returns a page's status and text.
func get(url string) (int, string, error) {
	r, err := http.Get(url)
	if err != nil {
		return 0, "", err
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	return r.StatusCode, string(b), err
}

// freeAddr returns an address that nobody listens on, nor will: its port is none
// that the kernel chooses for others.
func freeAddr() string {
	return fmt.Sprintf("127.%d.%d.%d:15020", 128+rand.IntN(127), rand.IntN(256), 1+rand.IntN(254))
}

// With nobody to talk to, the process lives, says why it is not ready, and
// ends when it is told to.
func TestServeAlone(t *testing.T) {
	dir := t.TempDir()
	rootsPath := filepath.Join(dir, "root-cert.pem")
	if err := os.WriteFile(rootsPath, testca.New(t, "cluster.local").PEM(), 0o600); err != nil {
		t.Fatal(err)
	}
	admin, stats, health := freeAddr(), freeAddr(), freeAddr()
	c, err := parseConfig([]string{
		"--control-address=" + freeAddr(), "--control-name=x", "--roots=" + rootsPath, "--token=" + dir + "/token", "--handoff=" + dir + "/handoff.sock", "--handover=" + dir + "/handover.sock",
		"--admin=" + admin, "--stats=" + stats, "--ready=" + health,
	}, environment)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- serve(ctx, c, t.Output()) }()
	deadline := time.Now().Add(10 * time.Second)
	for {
		code, _, err := get("http://" + health + "/healthz/live")
		for _, other := range []string{admin, stats} { // each has a server of its own
			if err == nil {
				_, _, err = get("http://" + other + "/")
			}
		}
		if err == nil && code == 200 {
			break
		}
		select {
		case err := <-done:
			t.Fatalf("serve: %v", err)
		case <-time.After(5 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			t.Fatal("it does not live")
		}
	}
	if code, text, err := get("http://" + health + "/healthz/ready"); err != nil || code != 503 || !strings.Contains(text, "control service") {
		t.Errorf("ready: %d %q %v, want 503 with the reason", code, text, err)
	}
	var dump struct {
		Workloads, Services, Policies, Certificates []any
		WorkloadState                               map[string]any
	}
	if _, text, err := get("http://" + admin + "/config_dump"); err != nil || json.Unmarshal([]byte(text), &dump) != nil || dump.Workloads == nil || dump.WorkloadState == nil {
		t.Errorf("config_dump: %s, %v", text, err)
	}
	if code, text, err := get("http://" + admin + "/debug/view"); err != nil || code != 200 || !strings.Contains(text, `"version"`) {
		t.Errorf("view: %d %s, %v", code, text, err)
	}
	for _, path := range []string{"/metrics", "/stats/prometheus"} {
		if _, text, err := get("http://" + stats + path); err != nil || !strings.Contains(text, "workload_manager_active_proxy_count 0") || !strings.Contains(text, `istio_build{component="ztunnel"`) {
			t.Errorf("%s lacks our metrics: %v", path, err)
		}
	}
	cancel()
	select {
	case err := <-done:
		if err != nil {
			t.Errorf("serve: %v", err)
		}
	case <-time.After(20 * time.Second):
		t.Error("it does not end")
	}
}

// A ztunnel is ready when nothing is missing, and says what is.
func TestReadiness(t *testing.T) {
	there, missing := make(chan struct{}), make(chan struct{})
	close(there)
	yes, no := func() bool { return true }, func() bool { return false }
	for want, change := range map[string]func(*readiness){
		"":                        func(*readiness) {},
		"the control service":     func(r *readiness) { r.view = missing },
		"its pods":                func(r *readiness) { r.pods = missing },
		"is not connected":        func(r *readiness) { r.agent = no },
		"no roots":                func(r *readiness) { r.roots = no },
		"the ztunnel before this": func(r *readiness) { r.joined = missing },
	} {
		r := readiness{view: there, pods: there, agent: yes, roots: yes, joined: there}
		change(&r)
		err := r.missing()
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}

// A port may be the other ztunnel's of the pair for a while: it is waited for,
// and the log says which.
func TestServeWaitsForAPortThatIsTaken(t *testing.T) {
	addr := freeAddr()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := parseConfig([]string{
		"--ready=" + addr, "--stats=" + freeAddr(), "--admin=" + freeAddr(), "--roots=/nonexistent", "--control-address=" + freeAddr(),
		"--handover=" + filepath.Join(t.TempDir(), "handover.sock"),
	}, environment)
	if err != nil {
		t.Fatal(err)
	}
	log := &lines{found: make(chan struct{}), want: addr}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- serve(ctx, c, log) }()
	select {
	case <-log.found:
	case <-time.After(10 * time.Second):
		t.Error("the log does not say which port is taken")
	}
	l.Close()
	alive(t, addr, true)
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// lines closes found at the first write that has want in it.
type lines struct {
	want  string
	found chan struct{}
	once  sync.Once
}

func (l *lines) Write(b []byte) (int, error) {
	if strings.Contains(string(b), l.want) {
		l.once.Do(func() { close(l.found) })
	}
	return len(b), nil
}

// alive waits until somebody serves at addr, or nobody.
func alive(t *testing.T, addr string, want bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; {
		_, _, err := get("http://" + addr + "/")
		if (err == nil) == want {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("served at %s: %v, want %v", addr, err == nil, want)
		}
		select {
		case <-t.Context().Done():
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// Of two ztunnels of a pod the active one has the ports.
func TestPortsGoToTheActiveOne(t *testing.T) {
	addr := freeAddr()
	start := func(standby bool) (t2 *turnstile, synced chan struct{}, stop func()) {
		synced = make(chan struct{})
		t2 = &turnstile{standby: standby, synced: synced, activated: make(chan struct{}), log: discard()}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		name := fmt.Sprint("standby ", standby)
		h := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, name) })
		go func() { done <- t2.serve(ctx, addr, h) }()
		stop = sync.OnceFunc(func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
		t.Cleanup(stop)
		return t2, synced, stop
	}
	is := func(want string) {
		t.Helper()
		alive(t, addr, true)
		if _, got, err := get("http://" + addr + "/"); err != nil || got != want {
			t.Errorf("%q answers, %v, want %q", got, err, want)
		}
	}
	first, synced, stop := start(false)
	is("standby false") // it says why it is not ready, before it is
	second, _, _ := start(true)
	first.activate()
	close(synced)
	is("standby false")
	second.activate() // the first one drains
	stop()
	is("standby true")

	third, synced3, stop3 := start(false) // waits for the port
	close(synced3)
	is("standby true")
	stop3()
	if third.active() {
		t.Error("active without being told")
	}
}

// One that is not to have a port any more in the moment in which it finds it
// taken does not end because of that.
func TestPortThatIsTakenAtTheEnd(t *testing.T) {
	l, err := net.Listen("tcp", freeAddr())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := (&turnstile{log: discard()}).serveWhenFree(ctx, l.Addr().String(), http.NotFoundHandler()); err != nil {
		t.Error(err)
	}
}

// One that is not to be active gives the ports back.
func TestPortsAreGivenBack(t *testing.T) {
	addr, synced := freeAddr(), make(chan struct{})
	s := &turnstile{synced: synced, activated: make(chan struct{}), log: discard()}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.serve(ctx, addr, http.NotFoundHandler()) }()
	alive(t, addr, true)
	close(synced)
	alive(t, addr, false)
	s.activate()
	alive(t, addr, true)
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }
