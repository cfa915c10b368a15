package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/weft-mesh/weft/e2e/install"
	"github.com/weft-mesh/weft/e2e/score"
)

// behind is the namespace whose services move behind a waypoint.
const behind = "behind"

// The pods of behind: a client on each node, a service "web" of two versions,
// and what waypointChanges needs.
func behindYAML() string {
	var y strings.Builder
	y.WriteString(namespaceYAML(behind, "ambient"))
	y.WriteString(podYAML(behind, "client", "node1", "args: [sleep]"))
	y.WriteString(podYAML(behind, "client2", "node2", "args: [sleep]"))
	y.WriteString(shopYAML())
	for node, version := range map[string]string{"node1": "v1", "node2": "v2"} {
		y.WriteString(strings.ReplaceAll(podYAML(behind, "web-"+version, node, "args: [server, -text, "+version+"]"),
			"labels: {app: web-"+version+"}", "labels: {app: web, version: "+version+"}"))
	}
	fmt.Fprintf(&y, `---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: %[1]s}
spec:
  ipFamilyPolicy: RequireDualStack
  selector: {app: web}
  ports:
  - {name: http, port: 8080}
  - {name: grpc, port: 9090}
  - {name: tcp-echo, port: 9000}
  - {name: tcp-banner, port: 9001}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: web, namespace: %[1]s}
spec:
  host: web
  subsets:
  - {name: v1, labels: {version: v1}}
  - {name: v2, labels: {version: v2}}
`, behind)
	return y.String()
}

// gatewayAPI installs the resources of the Gateway API, as its users do.
func gatewayAPI(t *testing.T) {
	t.Helper()
	root, err := install.Root()
	if err != nil {
		t.Fatal(err)
	}
	list := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", "sigs.k8s.io/gateway-api")
	list.Dir = root
	dir, err := list.Output()
	if err != nil {
		t.Fatalf("find the module of the Gateway API: %v", err)
	}
	files, err := filepath.Glob(filepath.Join(strings.TrimSpace(string(dir)), "config", "crd", "standard", "gateway.networking.k8s.io_*s.yaml"))
	if err != nil || len(files) == 0 {
		t.Fatalf("the module of the Gateway API has no resources: %v", err)
	}
	args := []string{"apply", "--server-side"}
	for _, f := range files {
		args = append(args, "-f", f)
	}
	kubectl(t, args...)
	kubectl(t, "wait", "--for=condition=Established", "crd/gateways.gateway.networking.k8s.io", "--timeout=120s")
}

// An asked is what the verb "ask" says of one request.
type asked struct {
	Status  int
	Server  string
	Proto   string
	Text    string
	Header  http.Header
	Request http.Header
	MS      float64
	Error   string
}

// ask makes requests from behind's client and returns the answers.
func ask(t *testing.T, args ...string) []asked {
	t.Helper()
	return askIn(t, behind, args...)
}

// askIn makes requests from the client of a namespace.
func askIn(t *testing.T, ns string, args ...string) []asked {
	t.Helper()
	var out string
	var err error
	for range 3 { // as tryQuietly: what fails here is not a request
		if out, err = world.c.Kubectl(t.Context(), append([]string{"exec", "-n", ns, "client", "--", "/bin/testapp", "ask"}, args...)...); err == nil {
			break
		}
	}
	if err != nil {
		t.Fatalf("ask %v: %v", args, err)
	}
	var all []asked
	for d := json.NewDecoder(strings.NewReader(out)); d.More(); {
		var a asked
		if err := d.Decode(&a); err != nil {
			t.Fatalf("ask %v: %v in %s", args, err, out)
		}
		all = append(all, a)
	}
	if len(all) == 0 {
		t.Fatalf("ask %v said nothing: %s", args, out)
	}
	return all
}

// web is where behind's client finds the service.
const web = "http://web:8080"

// throughWaypoint reports whether requests to web go through a waypoint.
func throughWaypoint(t *testing.T) bool {
	a := ask(t, web+"/headers")[0]
	return a.Status == 200 && a.Header.Get("X-Envoy-Upstream-Service-Time") != ""
}

// counted makes the row of requests none of which may fail.
func counted(t *testing.T, name string, events []event) score.Row {
	t.Helper()
	broken := 0
	for _, e := range events {
		if e.Error != "" {
			if broken++; broken <= 3 {
				t.Logf("%s: a request failed: %+v", name, e)
			}
		}
	}
	if broken > 0 || len(events) == 0 {
		t.Errorf("%s: %d of %d requests failed", name, broken, len(events))
	}
	return score.Row{Name: name, Attempted: score.N(len(events)), Broken: score.N(broken)}
}

// applied waits until requests show what an object that was just applied does.
func applied(t *testing.T, hold func() error) {
	t.Helper()
	eventually(t, patience, hold)
}

// virtualService is a VirtualService of web with one list of rules, in YAML.
func virtualService(http string) string {
	return fmt.Sprintf(`---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: web, namespace: %s}
spec:
  hosts: [web]
  http: %s
`, behind, http)
}

// The life of a waypoint: services move behind it and back without a failed
// request, and meanwhile it does what the objects of users say.
func TestWaypoint(t *testing.T) {
	var rows []score.Row
	defer func() { score.Record(t, rows...) }()
	gatewayAPI(t)
	apply(t, behindYAML())
	ready(t, behind)
	kubectl(t, "rollout", "status", "-n", behind, "deployment/shop", "--timeout=120s")
	for _, p := range []string{"client", "client2", "web-v1", "web-v2"} {
		wantCaptured(t, behind, p, true)
	}
	v4, _ := clusterIPs(t, behind, "web")
	eventually(t, patience, func() error {
		if a := ask(t, web+"/")[0]; a.Status != 200 {
			return fmt.Errorf("before: %+v", a)
		}
		return nil
	})
	requests := []string{"-timeout", "30s", "-rate", "50", "-idle", "0", "-long", "0", "-bytes", "0", "-to", v4.String()}

	// What is connected directly goes on, whatever the server's pods refuse then.
	moving := startLoad(t, behind, "client", append(requests, "-long", "2")...)
	moving.waitReady(t)
	out, err := world.a.Weft(t.Context(), world.c, "waypoint", "apply", "-n", behind, "--enroll-namespace", "--wait")
	if err != nil {
		t.Fatal(err)
	}
	t.Log(out)
	applied(t, func() error {
		if !throughWaypoint(t) {
			return fmt.Errorf("requests do not go through the waypoint")
		}
		return nil
	})
	moving.served(t, time.Now().Add(7*time.Second), 1) // also after direct connections are refused
	rows = append(rows, counted(t, "waypoint.move.there", moving.end(t)))

	t.Run("status", func(t *testing.T) {
		out, err := world.a.Weft(t.Context(), world.c, "waypoint", "status", "-n", behind)
		if err != nil || !strings.Contains(out, "waypoint") || !strings.Contains(out, "yes") {
			t.Errorf("weft waypoint status: %v\n%s", err, out)
		}
	})
	t.Run("protocols", waypointProtocols)
	t.Run("routing", waypointRouting)
	t.Run("policy", waypointPolicy)
	t.Run("direct", func(t *testing.T) { rows = append(rows, waypointDirect(t)) })
	t.Run("framing", func(t *testing.T) { rows = append(rows, waypointFraming(t)) })
	t.Run("absent", func(t *testing.T) { rows = append(rows, waypointAbsent(t)) })
	t.Run("changes", func(t *testing.T) { rows = append(rows, waypointChanges(t)...) })
	t.Run("enforced", func(t *testing.T) { rows = append(rows, waypointEnforced(t)...) })

	back := startLoad(t, behind, "client", requests...)
	back.waitReady(t)
	if out, err := world.a.Weft(t.Context(), world.c, "waypoint", "delete", "-n", behind, "waypoint"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	applied(t, func() error {
		if throughWaypoint(t) {
			return fmt.Errorf("requests still go through the waypoint")
		}
		return nil
	})
	kubectl(t, "wait", "-n", behind, "--for=delete", "pod", "-l", "gateway.networking.k8s.io/gateway-name=waypoint", "--timeout=120s")
	back.served(t, time.Now(), 1)
	rows = append(rows, counted(t, "waypoint.move.back", back.end(t)))
}

func waypointProtocols(t *testing.T) {
	if a := ask(t, web+"/headers")[0]; a.Request.Get("X-Request-Id") == "" || a.Proto != "HTTP/1.1" {
		t.Errorf("HTTP/1.1: %+v", a)
	}
	if a := ask(t, "-h2c", web+"/headers")[0]; a.Status != 200 || a.Proto != "HTTP/2.0" || a.Request.Get("X-Request-Id") == "" {
		t.Errorf("HTTP/2: %+v", a)
	}
	if got := try(t, behind, "client", "grpc", "-addr", "web:9090", "-n", "20"); !got.OK {
		t.Errorf("gRPC: %+v", got)
	}
	if got := try(t, behind, "client", "upgrade", "-addr", "web:8080"); !got.OK || got.Echoes != 20 {
		t.Errorf("Upgrade: %+v", got)
	}
	if got := try(t, behind, "client", "echo", "-addr", "web:9000", "-bytes", "1000000"); !got.OK {
		t.Errorf("TCP: %+v", got)
	}
	if got := try(t, behind, "client", "banner", "-addr", "web:9001"); !got.OK {
		t.Errorf("TCP, the server speaks first: %+v", got)
	}
}

func waypointRouting(t *testing.T) {
	t.Run("90/10", func(t *testing.T) {
		apply(t, virtualService(`[{route: [{destination: {host: web, subset: v1}, weight: 90}, {destination: {host: web, subset: v2}, weight: 10}]}]`))
		const n = 2000
		applied(t, func() error {
			v2 := 0
			for _, a := range ask(t, "-n", strconv.Itoa(n), web+"/") {
				if a.Status != 200 {
					return fmt.Errorf("%+v", a)
				}
				if a.Text == "v2" {
					v2++
				}
			}
			if share := float64(v2) / n; share < 0.075 || share > 0.125 { // 3.7 standard deviations
				return fmt.Errorf("v2 got %.3f of the requests, want 0.1", share)
			}
			return nil
		})
	})
	t.Run("fault", func(t *testing.T) {
		apply(t, virtualService(`[{fault: {abort: {percentage: {value: 100}, httpStatus: 418}}, route: [{destination: {host: web}}]}]`))
		applied(t, func() error {
			if a := ask(t, web+"/")[0]; a.Status != 418 || a.Text != "fault filter abort" {
				return fmt.Errorf("%+v", a)
			}
			return nil
		})
	})
	t.Run("timeout", func(t *testing.T) {
		apply(t, virtualService(`[{timeout: 500ms, route: [{destination: {host: web}}]}]`))
		applied(t, func() error {
			if a := ask(t, web+"/slow/3s")[0]; a.Status != 504 || a.MS < 500 || a.MS > 1500 {
				return fmt.Errorf("%+v", a)
			}
			return nil
		})
	})
	t.Run("retries", func(t *testing.T) {
		apply(t, virtualService(`[{retries: {attempts: 3, retryOn: 5xx}, route: [{destination: {host: web, subset: v1}}]}]`))
		applied(t, func() error {
			key := strconv.FormatInt(time.Now().UnixNano(), 36)
			if a := ask(t, web+"/flaky/3/"+key)[0]; a.Status != 200 || a.Text != "4" {
				return fmt.Errorf("three failures: %+v, want the fourth try to succeed", a)
			}
			if a := ask(t, web+"/flaky/9/more"+key)[0]; a.Status != 503 {
				return fmt.Errorf("nine failures: %+v, want 503", a)
			}
			return nil
		})
	})
}

func waypointPolicy(t *testing.T) {
	apply(t, fmt.Sprintf(`---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: read-only, namespace: %s}
spec:
  targetRefs: [{kind: Service, group: "", name: web}]
  action: ALLOW
  rules: [{from: [{source: {principals: [cluster.local/ns/%[1]s/sa/client]}}], to: [{operation: {methods: [GET], paths: ["/", "/headers"]}}]}]
`, behind))
	applied(t, func() error {
		if a := ask(t, "-method", "DELETE", web+"/")[0]; a.Status != 403 || a.Text != "RBAC: access denied" {
			return fmt.Errorf("DELETE: %+v", a)
		}
		if a := ask(t, web+"/")[0]; a.Status != 200 {
			return fmt.Errorf("GET: %+v", a)
		}
		// The decision and the server see one path.
		for _, path := range []string{"/echo", "/headers/../echo", "/headers/%2e%2e/echo", "//echo"} {
			if a := ask(t, web+path)[0]; a.Status == 200 {
				return fmt.Errorf("%s: %+v", path, a)
			}
		}
		return nil
	})
}

// waypointDirect attacks: calls to the pods themselves go around the waypoint.
func waypointDirect(t *testing.T) score.Row {
	row := score.Row{Name: "waypoint.attack.direct", Attempted: score.N(0), Blocked: score.N(0)}
	for _, from := range []string{behind, meshed, outside} {
		for _, pod := range []string{"web-v1", "web-v2"} {
			v4, v6 := addresses(t, behind, pod)
			for _, url := range []string{"http://" + v4.String() + ":8080/", "http://[" + v6.String() + "]:8080/"} {
				*row.Attempted++
				if got := try(t, from, "client", "get", url); got.OK {
					t.Errorf("from %s to %s: %+v", from, url, got)
					continue
				}
				*row.Blocked++
			}
		}
	}
	return row
}

// waypointFraming attacks: what two servers may read differently is refused by
// the first, and the connection is closed.
func waypointFraming(t *testing.T) score.Row {
	row := score.Row{Name: "waypoint.attack.framing", Attempted: score.N(0), Blocked: score.N(0)}
	smuggled := `GET /status/299 HTTP/1.1\r\nHost: web\r\n\r\n`
	for name, send := range map[string]string{
		"two lengths":             `POST /echo HTTP/1.1\r\nHost: web\r\nContent-Length: 0\r\nContent-Length: 44\r\n\r\n` + smuggled,
		"length and chunks":       `POST /echo HTTP/1.1\r\nHost: web\r\nContent-Length: 44\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n` + smuggled,
		"chunked twice":           `POST /echo HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n` + smuggled,
		"space before the colon":  `POST /echo HTTP/1.1\r\nHost: web\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n` + smuggled,
		"chunked in HTTP/1.0":     `POST /echo HTTP/1.0\r\nHost: web\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n` + smuggled,
		"a bare LF":               `GET / HTTP/1.1\nHost: web\n\n` + smuggled,
		"a folded line":           `POST /echo HTTP/1.1\r\nHost: web\r\nTransfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n` + smuggled,
		"a length with a sign":    `POST /echo HTTP/1.1\r\nHost: web\r\nContent-Length: +0\r\n\r\n` + smuggled,
		"a bad chunk":             `POST /echo HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: chunked\r\n\r\n0x1\r\na\r\n0\r\n\r\n` + smuggled,
		"two hosts":               `GET / HTTP/1.1\r\nHost: web\r\nHost: other\r\n\r\n` + smuggled,
		"a target with a control": `GET /\x00 HTTP/1.1\r\nHost: web\r\n\r\n` + smuggled,
	} {
		out, err := world.c.Kubectl(t.Context(), "exec", "-n", behind, "client", "--", "/bin/testapp", "raw", "-addr", "web:8080", "-send", send)
		if err != nil {
			t.Fatal(err)
		}
		var got asked
		if err := json.Unmarshal([]byte(strings.TrimSpace(out)), &got); err != nil {
			t.Fatalf("%v in %q", err, out)
		}
		*row.Attempted++
		if !strings.HasPrefix(got.Text, "HTTP/1.1 400 ") || strings.Contains(got.Text, " 299 ") || got.Error != "EOF" {
			t.Errorf("%s: answered %q, then %s; want 400, and the connection closed", name, got.Text, got.Error)
			continue
		}
		*row.Blocked++
	}
	return row
}

// waypointAbsent binds a service to a waypoint that is not there: connections
// are held, and then refused.
func waypointAbsent(t *testing.T) score.Row {
	row := score.Row{Name: "waypoint.absent", Attempted: score.N(1), Blocked: score.N(0)}
	apply(t, strings.Replace(serviceYAML(behind, "lost", "web", ""), "metadata: {name: lost,", "metadata: {labels: {istio.io/use-waypoint: nowhere}, name: lost,", 1))
	applied(t, func() error {
		start := time.Now()
		got := try(t, behind, "client", "get", "-timeout", "20s", "http://lost/")
		took := time.Since(start)
		if got.OK || took < 9*time.Second || took > 17*time.Second {
			return fmt.Errorf("%+v after %v, want it refused after about 10 s", got, took)
		}
		return nil
	})
	*row.Blocked++
	return row
}
