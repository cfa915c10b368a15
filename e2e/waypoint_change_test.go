package e2e

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/weft-mesh/weft/e2e/score"
)

// shopYAML is a service of behind of which the pods come and go. They end as
// servers do that lose nothing: a moment after they were told to, because until
// then a request may be on its way that nobody may send twice.
func shopYAML() string {
	return fmt.Sprintf(`---
apiVersion: apps/v1
kind: Deployment
metadata: {name: shop, namespace: %s}
spec:
  replicas: 2
  selector: {matchLabels: {app: shop}}
  template:
    metadata: {labels: {app: shop}}
    spec:
      containers:
      - name: app
        image: weft.test/testapp:1
        imagePullPolicy: Never
        args: [server, -text, shop]
        readinessProbe: {httpGet: {port: 8080, path: /healthz}, periodSeconds: 1}
        lifecycle: {preStop: {sleep: {seconds: 2}}}
`, behind) + serviceYAML(behind, "shop", "shop", "")
}

// ofWaypoint selects the pods of behind's waypoint.
const ofWaypoint = "gateway.networking.k8s.io/gateway-name=waypoint"

// scaled makes a Deployment of behind have n pods, and waits until there are no
// others.
func scaled(t *testing.T, deployment, selector string, n int) {
	t.Helper()
	kubectl(t, "scale", "deployment", "-n", behind, deployment, fmt.Sprintf("--replicas=%d", n))
	settled(t, deployment, selector, n)
}

// replaced makes all pods of a Deployment of behind others.
func replaced(t *testing.T, deployment, selector string, n int) {
	t.Helper()
	kubectl(t, "rollout", "restart", "-n", behind, "deployment/"+deployment)
	settled(t, deployment, selector, n)
}

func settled(t *testing.T, deployment, selector string, n int) {
	t.Helper()
	kubectl(t, "rollout", "status", "-n", behind, "deployment/"+deployment, "--timeout=120s")
	poll(t, patience, func() error {
		if pods := podsOf(t, selector); len(pods) != n {
			return fmt.Errorf("%s has %d pods, want %d", deployment, len(pods), n)
		}
		return nil
	})
}

// podsOf returns behind's pods of a selector, also those that are ending.
func podsOf(t *testing.T, selector string) []corev1.Pod {
	t.Helper()
	pods, err := world.kube.CoreV1().Pods(behind).List(t.Context(), metav1.ListOptions{LabelSelector: selector})
	if err != nil {
		t.Fatal(err)
	}
	return pods.Items
}

// changedYAML is objects that all change what the waypoint does with requests
// to shop, other ones for each i.
func changedYAML(i int) string {
	return fmt.Sprintf(`---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: shop, namespace: %[1]s}
spec:
  hosts: [shop]
  http: [{headers: {response: {set: {x-change: "%[2]d"}}}, route: [{destination: {host: shop}}]}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: shop, namespace: %[1]s}
spec:
  host: shop
  trafficPolicy: {loadBalancer: {simple: %[3]s}, connectionPool: {http: {maxRequestsPerConnection: %[4]d}}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: shop, namespace: %[1]s}
spec:
  targetRefs: [{kind: Service, group: "", name: shop}]
  action: ALLOW
  rules: [{from: [{source: {namespaces: [%[1]s]}}], to: [{operation: {methods: [GET, POST], notPaths: ["/%[2]d"]}}]}]
`, behind, i, []string{"ROUND_ROBIN", "LEAST_REQUEST", "RANDOM"}[i%3], 10*i)
}

// waypointChanges changes everything around a waypoint while 500 requests a
// second go through it: objects, endpoints, its own replicas, and both of their
// programs. None may fail. Then one of two replicas is killed: only what it had
// in its hands may, and not what clients ask again.
func waypointChanges(t *testing.T) (rows []score.Row) {
	scaled(t, "waypoint", ofWaypoint, 2)
	v4, _ := clusterIPs(t, behind, "shop")
	to := []string{"-to", v4.String() + ":80", "-host", "shop"}
	gets := startVerb(t, behind, "client", "press", append(to, "-rate", "450", "-slow", "/slow/200ms")...)
	posts := startVerb(t, behind, "client2", "press", append(to, "-rate", "50", "-conns", "4", "-method", "POST")...)
	gets.waitReady(t)
	posts.waitReady(t)
	step := func(name string, change func()) {
		from := time.Now()
		change()
		to := time.Now()
		row := score.Row{Name: name, Attempted: score.N(0), Broken: score.N(0)}
		for _, l := range []*load{gets, posts} {
			l.told(t, to)
			p := l.pressed(from, to)
			*row.Attempted += p.answered + len(p.failed)
			*row.Broken += len(p.failed) + len(p.cut) // what was cut would have failed but for the client
			for i, e := range slices.Concat(p.failed, p.cut) {
				if i < 3 {
					t.Logf("%s: %s of %s, %v after it began: %s", name, e.Load, l.name, time.Unix(0, e.Start).Sub(from).Round(time.Millisecond), e.Error)
				}
			}
			t.Logf("%s: %s: %d answered in %v, the longest after %v", name, l.name, p.answered, to.Sub(from).Round(time.Millisecond), p.longest.Round(time.Millisecond))
		}
		if *row.Broken > 0 || *row.Attempted == 0 {
			t.Errorf("%s: %d of %d requests failed", name, *row.Broken, *row.Attempted)
		}
		rows = append(rows, row)
	}
	step("waypoint.change.objects", func() {
		var y string
		for i := range 4 {
			y = changedYAML(i + 1)
			if _, err := world.c.KubectlInput(t.Context(), y, "apply", "-f", "-"); err != nil {
				t.Fatal(err)
			}
			applied(t, func() error {
				if a := ask(t, "http://shop/")[0]; a.Header.Get("X-Change") != strconv.Itoa(i+1) {
					return fmt.Errorf("change %d is not seen: %+v", i+1, a)
				}
				return nil
			})
		}
		if _, err := world.c.KubectlInput(t.Context(), y, "delete", "-f", "-"); err != nil {
			t.Fatal(err)
		}
	})
	step("waypoint.change.endpoints", func() {
		for _, n := range []int{4, 1, 2} {
			scaled(t, "shop", "app=shop", n)
		}
	})
	step("waypoint.change.backend", func() { replaced(t, "shop", "app=shop", 2) })
	step("waypoint.change.replicas", func() {
		for _, n := range []int{3, 1, 2} {
			scaled(t, "waypoint", ofWaypoint, n)
		}
	})
	step("waypoint.change.rollout", func() { replaced(t, "waypoint", ofWaypoint, 2) })
	rows = append(rows, waypointKill(t, gets, posts)...)
	gets.end(t)
	posts.end(t)
	return rows
}

// waypointKill kills one of two replicas.
func waypointKill(t *testing.T, gets, posts *load) []score.Row {
	victim := podsOf(t, ofWaypoint)[0]
	id := strings.TrimPrefix(victim.Status.ContainerStatuses[0].ContainerID, "containerd://")
	const script = `set -- $(ctr --namespace k8s.io task ls | grep "^$1")
date +%s%N
kill -9 $2
while kill -0 $2; do :; done 2>/dev/null
date +%s%N`
	out, err := world.c.NodeCommand(t.Context(), victim.Spec.NodeName, "sh", "-c", script, "kill", id).CombinedOutput()
	f := strings.Fields(string(out))
	if err != nil || len(f) != 2 {
		t.Fatalf("kill a waypoint: %v: %s", err, out)
	}
	killed, _ := strconv.ParseInt(f[0], 10, 64)
	dead, _ := strconv.ParseInt(f[1], 10, 64)
	// Until its death is known at both ends, it has in hands what they send.
	known := dead + (100 * time.Millisecond).Nanoseconds()
	gets.told(t, time.Unix(0, dead).Add(3*time.Second))
	settled(t, "waypoint", ofWaypoint, 2)
	to := time.Now()
	var rows []score.Row
	for name, l := range map[string]*load{"waypoint.kill": gets, "waypoint.kill.post": posts} {
		l.told(t, to)
		p := l.pressed(time.Unix(0, killed), to)
		row := score.Row{Name: name, Attempted: score.N(p.answered + len(p.failed)), Broken: score.N(0), RecoveredMS: score.N(int(p.longest.Milliseconds()))}
		inHands := 0
		for _, e := range slices.Concat(p.failed, p.cut) {
			switch {
			case e.Load == "failed" && l == gets, e.Start > known: // a GET is asked again
				*row.Broken++
				t.Logf("%s: %s, from %v to %v after the kill: %s", name, e.Load, time.Duration(e.Start-killed), time.Duration(e.End-killed), e.Error)
			default:
				inHands++
			}
		}
		t.Logf("%s: %d answered; %d were in its hands; the longest took %v", name, p.answered, inHands, p.longest.Round(time.Millisecond))
		if *row.Broken > 0 || p.answered == 0 {
			t.Errorf("%s: %d of %d requests failed that were not in the hands of the one that was killed, or can be asked again", name, *row.Broken, *row.Attempted)
		}
		rows = append(rows, row)
	}
	return rows
}

// A toggle is an object that is changed, and how clients see it.
type toggle struct {
	name, path string // of the object in the API
	patch      func(i int) string
	loads      []*load
	conns      int // of each load
	sees       func(i int, text string) bool
}

// How often waypointEnforced changes each of its objects.
const toggles = 34

// waypointEnforced changes a route, a policy about requests and one about
// connections a hundred times, and measures how long it takes from the write to
// the API until every client, on both nodes, at every proxy that enforces it,
// has seen it.
func waypointEnforced(t *testing.T) []score.Row {
	apply(t, fmt.Sprintf(`---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: generation, namespace: %[1]s}
spec:
  parentRefs: [{group: "", kind: Service, name: shop, port: 80}]
  rules: [{backendRefs: [{name: shop, port: 80}]}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: gate, namespace: %[1]s}
spec:
  targetRefs: [{kind: Service, group: "", name: shop}]
  action: DENY
  rules: [{to: [{operation: {paths: [/elsewhere]}}]}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: gate, namespace: %[2]s}
spec:
  action: DENY
  rules: [{from: [{source: {namespaces: [elsewhere]}}]}]
`, behind, meshed))
	shop, _ := clusterIPs(t, behind, "shop")
	near, _ := addresses(t, meshed, "near")
	far, _ := addresses(t, meshed, "far")
	watch := func(args ...string) (loads []*load) {
		for _, client := range []string{"client", "client2"} {
			l := startVerb(t, behind, client, "press", append([]string{"-changes", "-retries", "0", "-tell", "X-Generation", "-timeout", "5s"}, args...)...)
			loads = append(loads, l)
		}
		for _, l := range loads {
			l.waitReady(t)
		}
		return loads
	}
	// Several connections, each for some requests, so that all replicas are seen.
	behindWaypoint := []string{"-to", shop.String() + ":80", "-host", "shop", "-conns", "4", "-per", "20", "-rate", "160"}
	direct := []string{"-conns", "1", "-per", "1", "-rate", "40"} // new connections
	before := convergence(t)
	kinds := []struct {
		toggle
		watch func() []*load
	}{
		{toggle{
			name: "route", path: "/apis/gateway.networking.k8s.io/v1/namespaces/" + behind + "/httproutes/generation", conns: 4,
			patch: func(i int) string {
				return fmt.Sprintf(`{"spec": {"rules": [{"filters": [{"type": "ResponseHeaderModifier", "responseHeaderModifier": {"set": [{"name": "x-generation", "value": "g%d"}]}}],
					"backendRefs": [{"name": "shop", "port": 80}]}]}}`, i)
			},
			sees: func(i int, text string) bool { return strings.HasPrefix(text, fmt.Sprintf("200 g%d ", i)) },
		}, func() []*load { return watch(behindWaypoint...) }},
		{toggle{
			name: "policy", path: "/apis/security.istio.io/v1/namespaces/" + behind + "/authorizationpolicies/gate", conns: 4,
			patch: func(i int) string {
				return fmt.Sprintf(`{"spec": {"rules": [{"to": [{"operation": {"paths": ["/%s"]}}]}]}}`, []string{"elsewhere", "gate"}[i%2])
			},
			sees: func(i int, text string) bool { return strings.HasPrefix(text, []string{"200 ", "403 "}[i%2]) },
		}, func() []*load { return watch(append(behindWaypoint, "-path", "/gate")...) }},
		{toggle{
			name: "connections", path: "/apis/security.istio.io/v1/namespaces/" + meshed + "/authorizationpolicies/gate", conns: 1,
			patch: func(i int) string {
				return fmt.Sprintf(`{"spec": {"rules": [{"from": [{"source": {"namespaces": ["%s"]}}]}]}}`, []string{"elsewhere", behind}[i%2])
			},
			sees: func(i int, text string) bool {
				return strings.HasPrefix(text, "200 ") != (i%2 == 1)
			},
		}, func() []*load {
			return append(watch(append(direct, "-to", near.String()+":8080")...), watch(append(direct, "-to", far.String()+":8080")...)...)
		}},
	}
	var all []time.Duration
	var rows []score.Row
	for _, k := range kinds {
		k.loads = k.watch()
		took := k.change(t)
		for _, l := range k.loads {
			l.end(t)
		}
		all = append(all, took...)
		p50, p99, worst := quantiles(took)
		t.Logf("a change of %s is seen everywhere after: p50 %v, p99 %v, worst %v of %d", k.name, p50, p99, worst, len(took))
		rows = append(rows, score.Row{Name: "waypoint.change.enforced." + k.name, Attempted: score.N(toggles), Broken: score.N(toggles - len(took)), RecoveredMS: score.N(int(p99.Milliseconds()))})
	}
	p50, p99, worst := quantiles(all)
	t.Logf("all: p50 %v, p99 %v, worst %v of %d", p50, p99, worst, len(all))
	t.Logf("pilot_proxy_convergence_time: %v", convergence(t).since(before))
	if p99 > 500*time.Millisecond {
		t.Errorf("p99 of a change until it is enforced: %v, want at most 500 ms", p99)
	}
	return append(rows, score.Row{Name: "waypoint.change.enforced", Attempted: score.N(len(kinds) * toggles), Broken: score.N(len(kinds)*toggles - len(all)), RecoveredMS: score.N(int(p99.Milliseconds()))})
}

// change changes the object again and again, and returns how long each change
// took, from when the API had written it until the last connection had an answer
// that shows it.
func (k toggle) change(t *testing.T) (took []time.Duration) {
	t.Helper()
	var writes, both []time.Duration
	for i := 1; i <= toggles; i++ {
		sent := time.Now()
		if _, err := world.kube.CoreV1().RESTClient().Patch(types.MergePatchType).AbsPath(k.path).Body([]byte(k.patch(i))).DoRaw(t.Context()); err != nil {
			t.Fatalf("change %s: %v", k.name, err)
		}
		written := time.Now()
		writes = append(writes, written.Sub(sent))
		var last time.Time
		poll(t, patience, func() error {
			for _, l := range k.loads {
				seen, at := l.seen(sent, func(text string) bool { return k.sees(i, text) })
				if seen < k.conns {
					return fmt.Errorf("change %d of %s: %d of %d connections of %s have seen it", i, k.name, seen, k.conns, l.name)
				}
				if at.After(last) {
					last = at
				}
			}
			return nil
		})
		took = append(took, max(0, last.Sub(written)))
		both = append(both, last.Sub(sent))
	}
	_, write99, _ := quantiles(writes)
	_, both99, _ := quantiles(both)
	t.Logf("%s: p99 of the API's time for a write: %v; of both: %v", k.name, write99, both99)
	return took
}

// seen returns how many connections have seen something that began after a
// moment, and when the last of them saw it for the first time.
func (l *load) seen(after time.Time, is func(text string) bool) (n int, at time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	first := map[string]int64{}
	for i := len(l.events) - 1; i >= 0 && l.events[i].End >= after.UnixNano(); i-- {
		if e := l.events[i]; e.Load == "seen" && is(e.Text) {
			first[e.To] = e.End
		}
	}
	var latest int64
	for _, end := range first {
		latest = max(latest, end)
	}
	return len(first), time.Unix(0, latest)
}

func quantiles(ds []time.Duration) (p50, p99, worst time.Duration) {
	if len(ds) == 0 {
		return 0, 0, 0
	}
	s := slices.Sorted(slices.Values(ds))
	for i := range s {
		s[i] = s[i].Round(time.Millisecond)
	}
	return s[len(s)/2], s[(len(s)*99+99)/100-1], s[len(s)-1]
}

// A histogram is the counts of weft-control's pilot_proxy_convergence_time, by
// the upper ends of its buckets.
type histogram map[string]int

// convergence asks weft-control what it has measured itself.
func convergence(t *testing.T) histogram {
	t.Helper()
	pods, err := world.kube.CoreV1().Pods("weft-system").List(t.Context(), metav1.ListOptions{LabelSelector: "app=weft-control"})
	if err != nil || len(pods.Items) == 0 {
		t.Fatalf("find weft-control: %v", err)
	}
	b, err := world.kube.CoreV1().Pods("weft-system").ProxyGet("http", pods.Items[0].Name, "15014", "/metrics", nil).DoRaw(t.Context())
	if err != nil {
		t.Fatalf("ask weft-control for its metrics: %v", err)
	}
	h := histogram{}
	for line := range strings.Lines(string(b)) {
		rest, ok := strings.CutPrefix(line, `pilot_proxy_convergence_time_bucket{le="`)
		if le, n, found := strings.Cut(rest, `"} `); ok && found {
			h[le], _ = strconv.Atoi(strings.TrimSpace(n))
		}
	}
	if len(h) == 0 {
		t.Error("weft-control has no histogram pilot_proxy_convergence_time")
	}
	return h
}

// since says what was counted since an earlier time.
func (h histogram) since(before histogram) string {
	count := func(le string) int { return h[le] - before[le] }
	return fmt.Sprintf("%d of proxies; within 50 ms %d, 100 ms %d, 200 ms %d, 500 ms %d, 1 s %d", count("+Inf"), count("0.05"), count("0.1"), count("0.2"), count("0.5"), count("1"))
}
