package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/weft-mesh/weft/e2e/install"
	"github.com/weft-mesh/weft/e2e/score"
)

// bookinfo is the namespace that examples/routing is applied to.
const bookinfo = "bookinfo"

// bookinfoYAML is the pods of the services in examples/routing/bookinfo.yaml.
func bookinfoYAML() string {
	y := podYAML(bookinfo, "client", "node1", "args: [sleep]")
	for i, p := range []struct{ app, version, name, port string }{
		{"reviews", "v1", "reviews-v1", "9080"},
		{"reviews", "v2", "reviews-v2", "9080"},
		{"reviews", "v3", "reviews-v3", "9080"},
		{"ratings", "v1", "ratings-v1", "9080"},
		{"unborn", "v1", "ratings-dead", "9081"}, // nobody listens at the service's port
		{"my-svc", "v1", "my-svc-v1", "80"},
		{"my-svc", "v2", "my-svc-v2a", "80"},
		{"my-svc", "v2", "my-svc-v2b", "80"},
		{"my-svc", "v3", "my-svc-v3", "80"},
	} {
		args := fmt.Sprintf(`args: [server, -text, %s, -http, "%s", -grpc, "", -banner, "", -bulk, ""]`, p.version, p.port)
		y += strings.ReplaceAll(podYAML(bookinfo, p.name, fmt.Sprintf("node%d", i%2+1), args),
			"labels: {app: "+p.name+"}", fmt.Sprintf("labels: {app: %s, version: %s}", p.app, p.version))
	}
	return y
}

// The examples of routing do on a real cluster what they say, as they stand.
func TestExamples(t *testing.T) {
	gatewayAPI(t)
	apply(t, namespaceYAML(bookinfo, "ambient"))
	kubectl(t, "apply", "-n", bookinfo, "-f", example(t, "bookinfo"), "-f", example(t, "subsets"))
	apply(t, bookinfoYAML())
	ready(t, bookinfo)
	kubectl(t, "wait", "-n", bookinfo, "--for=condition=Programmed", "gateway/waypoint", "--timeout=120s")
	for url, server := range map[string]string{"http://reviews:9080": "reviews", "http://ratings:9080": "ratings", "http://my-svc": "my-svc"} {
		eventually(t, patience, func() error {
			a := askIn(t, bookinfo, url+"/headers")[0]
			if a.Status != 200 || a.Request.Get("X-Envoy-Attempt-Count") == "" {
				return fmt.Errorf("%s is not behind the waypoint yet: %+v", server, a)
			}
			return nil
		})
	}
	var s examples
	defer func() { score.Record(t, s.rows...) }()
	t.Run("all", func(t *testing.T) {
		t.Run("reviews", func(t *testing.T) {
			t.Parallel()
			s.reviews(t)
		})
		t.Run("ratings", func(t *testing.T) {
			t.Parallel()
			s.ratings(t)
		})
		t.Run("my-svc", func(t *testing.T) {
			t.Parallel()
			s.mySvc(t)
			t.Run("queue", s.queue)
		})
		t.Run("servers", func(t *testing.T) {
			t.Parallel()
			s.servers(t)
		})
	})
}

// example returns the path of a file of examples/routing.
func example(t *testing.T, name string) string {
	t.Helper()
	root, err := install.Root()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(root, "examples", "routing", name+".yaml")
}

// examples collects what they have shown.
type examples struct {
	mu   sync.Mutex
	rows []score.Row
}

// run applies an example and holds what it does against what it says. hold
// returns how many requests it has judged, and is asked again for a while when
// it complains: objects take a moment to be seen.
func (s *examples) run(t *testing.T, name string, hold func(t *testing.T) (requests int, err error)) {
	t.Helper()
	t.Run(name, func(t *testing.T) {
		file := example(t, name)
		kubectl(t, "apply", "--validate=warn", "-n", bookinfo, "-f", file)
		s.judge(t, name, hold)
	})
}

func (s *examples) judge(t *testing.T, name string, hold func(t *testing.T) (requests int, err error)) {
	t.Helper()
	row := score.Row{Name: "example." + name, Attempted: score.N(0), Broken: score.N(1)}
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.rows = append(s.rows, row)
	}()
	applied(t, func() (err error) {
		*row.Attempted, err = hold(t)
		return err
	})
	*row.Broken = 0
}

// remove deletes the objects of an example.
func remove(t *testing.T, name string) {
	t.Helper()
	kubectl(t, "delete", "-n", bookinfo, "-f", example(t, name))
}

// versions asks a service and wants all answers to be of one version.
func versions(t *testing.T, want string, args ...string) error {
	t.Helper()
	for _, a := range askIn(t, bookinfo, append([]string{"-n", "3"}, args...)...) {
		if a.Status != 200 || a.Text != want {
			return fmt.Errorf("%v: %+v, want %s", args, a, want)
		}
	}
	return nil
}

// reviews is behind the examples of VirtualServices that choose.
func (s *examples) reviews(t *testing.T) {
	const url = "http://reviews:9080"
	const jason = "" // in place of a path
	wants := func(t *testing.T, all [][2]string) (int, error) {
		for _, r := range all {
			args := []string{url + r[0]}
			if r[0] == jason {
				args = append([]string{"-header", "end-user: jason"}, url+"/")
			}
			if err := versions(t, r[1], args...); err != nil {
				return 0, err
			}
		}
		return 3 * len(all), nil
	}
	s.run(t, "header-routing", func(t *testing.T) (int, error) {
		return wants(t, [][2]string{{jason, "v2"}, {"/", "v3"}, {"/reviews", "v3"}})
	})
	s.run(t, "match-any", func(t *testing.T) (int, error) {
		return wants(t, [][2]string{{"/reviews", "v2"}, {"/reviewsX", "v2"}, {jason, "v2"}, {"/", "v3"}, {"/review", "v3"}})
	})
	s.run(t, "weights-90-10", func(t *testing.T) (int, error) {
		const n = 10000 // 1.5 points are five standard deviations
		if err := versions(t, "v1", "-n", "1", url+"/"); err != nil && !strings.Contains(err.Error(), "v2") {
			return 0, err // not yet seen
		}
		return n, share(t, url+"/", n, 0.1, 0.015)
	})
	s.run(t, "shift-1-80-20", func(t *testing.T) (int, error) {
		return 1000, share(t, url+"/", 1000, 0.2, 0.06)
	})
	t.Run("shift-2-done", s.shift)
	s.connections(t)
}

// share wants a share of n answers to be of v2 and all others of v1.
func share(t *testing.T, url string, n int, want, within float64) error {
	t.Helper()
	v2 := 0
	all := askIn(t, bookinfo, "-brief", "-c", "8", "-n", strconv.Itoa(n), url)
	for _, a := range all {
		if a.Status != 200 || a.Text != "v1" && a.Text != "v2" {
			return fmt.Errorf("%+v", a)
		}
		if a.Text == "v2" {
			v2++
		}
	}
	got := float64(v2) / float64(n)
	t.Logf("v2 got %.4f of %d requests", got, len(all))
	if len(all) != n || got < want-within || got > want+within {
		return fmt.Errorf("v2 got %.4f of %d requests, want %v", got, len(all), want)
	}
	return nil
}

// shift changes the weights under requests: none is lost, and within a second
// all go to v2.
func (s *examples) shift(t *testing.T) {
	v4 := strings.TrimSpace(kubectl(t, "get", "service", "-n", bookinfo, "reviews", "-o", "jsonpath={.spec.clusterIP}"))
	l := startVerb(t, bookinfo, "client", "press", "-to", v4+":9080", "-host", "reviews", "-conns", "4", "-rate", "100", "-changes", "-retries", "0")
	l.waitReady(t)
	start := time.Now()
	kubectl(t, "apply", "-n", bookinfo, "-f", example(t, "shift-2-done"))
	written := time.Now()
	l.told(t, written.Add(2*time.Second))
	row := score.Row{Name: "example.shift-2-done", Attempted: score.N(l.pressed(start.Add(-time.Hour), time.Now()).answered), Broken: score.N(0)}
	last := map[string]event{}
	for _, e := range l.end(t) {
		if e.Load != "seen" {
			continue
		}
		last[e.To] = e
		if !strings.HasPrefix(e.Text, "200 ") {
			t.Errorf("a request was lost: %+v", e)
			*row.Broken++
		}
	}
	var took time.Duration
	for _, e := range last {
		if e.Text != "200 v2" {
			t.Errorf("a connection was answered %q at the end, want v2", e.Text)
			*row.Broken++
		}
		took = max(took, time.Unix(0, e.End).Sub(written))
	}
	t.Logf("%d requests; all went to v2 %v after kubectl had written it", *row.Attempted, took.Round(time.Millisecond))
	if took > time.Second {
		t.Errorf("a request went elsewhere than to v2 %v after that was written", took)
	}
	row.RecoveredMS = score.N(max(0, int(took.Milliseconds())))
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rows = append(s.rows, row)
}

// connections is the example of a limit of connections: one more than a hundred
// is refused.
func (s *examples) connections(t *testing.T) {
	kubectl(t, "patch", "service", "-n", bookinfo, "reviews", "-p", `{"spec": {"ports": [{"name": "tcp-echo", "port": 9000}]}}`)
	apply(t, fmt.Sprintf(`---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: reviews, namespace: %s}
spec:
  hosts: [reviews]
  tcp: [{match: [{port: 9000}], route: [{destination: {host: reviews, port: {number: 9000}, subset: v1}}]}]
`, bookinfo))
	s.run(t, "connection-limit", func(t *testing.T) (int, error) {
		const n, limit = 110, 100
		out, err := world.c.Kubectl(t.Context(), "exec", "-n", bookinfo, "client", "--", "/bin/testapp", "crowd", "-addr", "reviews:9000", "-n", strconv.Itoa(n))
		if err != nil {
			t.Fatal(err)
		}
		var got struct {
			Answered, Ended int
			Error           string
		}
		if err := json.Unmarshal([]byte(out), &got); err != nil {
			t.Fatalf("%v in %q", err, out)
		}
		if got.Answered != limit || got.Ended != n-limit {
			return 0, fmt.Errorf("%+v, want %d answered and the others ended", got, limit)
		}
		return n, nil
	})
	kubectl(t, "apply", "-n", bookinfo, "-f", example(t, "subsets"))
}

// ratings is behind the examples of faults, timeouts and retries.
func (s *examples) ratings(t *testing.T) {
	const url = "http://ratings:9080"
	s.run(t, "timeout", func(t *testing.T) (int, error) {
		a := askIn(t, bookinfo, url+"/slow/15s")[0]
		if a.Status != 504 || a.Text != "upstream request timeout" || a.MS < 10_000 || a.MS > 10_500 {
			return 0, fmt.Errorf("%+v", a)
		}
		return 1, nil
	})
	remove(t, "timeout")
	t.Run("retries", s.retries)
	remove(t, "retries")
	s.run(t, "delay", func(t *testing.T) (int, error) {
		const n = 40
		held := 0
		for _, a := range askIn(t, bookinfo, "-brief", "-c", strconv.Itoa(n), "-n", strconv.Itoa(n), url+"/") {
			switch {
			case a.Status != 200 || a.MS > 6000:
				return 0, fmt.Errorf("%+v", a)
			case a.MS >= 5000:
				held++
			case a.MS > 3000:
				return 0, fmt.Errorf("%+v, want no delay, or one of 5 s", a)
			}
		}
		if held < 8 || held > 32 { // four standard deviations
			return 0, fmt.Errorf("%d of %d requests were held, want half of them", held, n)
		}
		return n, nil
	})
	key := ""
	s.run(t, "abort", func(t *testing.T) (int, error) {
		key = strconv.FormatInt(time.Now().UnixNano(), 36)
		for _, path := range []string{"/", "/slow/15s", "/flaky/0/" + key} { // the last when the route is seen
			if a := askIn(t, bookinfo, url+path)[0]; a.Status != 500 || a.Text != "fault filter abort" {
				return 0, fmt.Errorf("%s: %+v", path, a)
			}
		}
		return 3, nil
	})
	remove(t, "abort")
	applied(t, func() error {
		if a := askIn(t, bookinfo, url+"/flaky/0/"+key)[0]; a.Status != 200 || a.Text != "1" {
			return fmt.Errorf("%+v, want this to be the first that arrives", a)
		}
		return nil
	})
}

// retries: what never reached the application is tried again, elsewhere; what
// it has answered is not; and a try has two seconds.
func (s *examples) retries(t *testing.T) {
	const url = "http://ratings:9080"
	kubectl(t, "apply", "-n", bookinfo, "-f", example(t, "retries"))
	s.judge(t, "retries", func(t *testing.T) (int, error) {
		if a := askIn(t, bookinfo, url+"/slow/5s")[0]; a.Status != 504 || a.MS < 2000 || a.MS > 2900 {
			return 0, fmt.Errorf("a try of five seconds: %+v, want 504 after two", a)
		}
		key := strconv.FormatInt(time.Now().UnixNano(), 36)
		if a := askIn(t, bookinfo, url+"/flaky/1/"+key)[0]; a.Status != 503 {
			return 0, fmt.Errorf("an answer of 503: %+v, want it as it is", a)
		}
		if a := askIn(t, bookinfo, url+"/flaky/1/"+key)[0]; a.Status != 200 || a.Text != "2" {
			return 0, fmt.Errorf("%+v, want this to be the second request that arrives", a)
		}
		return 3, nil
	})
	// One of two endpoints does not answer at all.
	kubectl(t, "label", "pod", "-n", bookinfo, "ratings-dead", "app=ratings", "--overwrite")
	defer func() {
		if _, err := world.c.Kubectl(context.WithoutCancel(t.Context()), "label", "pod", "-n", bookinfo, "ratings-dead", "app=unborn", "--overwrite"); err != nil {
			t.Error(err)
		}
	}()
	s.judge(t, "retries.connect", func(t *testing.T) (int, error) {
		const n = 20
		again := 0
		for _, a := range askIn(t, bookinfo, "-n", strconv.Itoa(n), url+"/headers") {
			tries, err := strconv.Atoi(a.Request.Get("X-Envoy-Attempt-Count"))
			if a.Status != 200 || err != nil || tries > 4 {
				return 0, fmt.Errorf("%+v", a)
			}
			if tries > 1 {
				again++
			}
		}
		if again == 0 {
			return 0, fmt.Errorf("none of %d requests was tried again", n)
		}
		return n, nil
	})
}

// mySvc is behind the example of balancing.
func (s *examples) mySvc(t *testing.T) {
	const url, n = "http://my-svc/", 60
	s.run(t, "balancing", func(t *testing.T) (int, error) {
		seen := map[string]int{}
		turns := true
		before := ""
		for _, a := range askIn(t, bookinfo, "-brief", "-n", strconv.Itoa(n), url) {
			if a.Status != 200 {
				return 0, fmt.Errorf("%+v", a)
			}
			seen[a.Server]++
			turns = turns && a.Server != before
			before = a.Server
		}
		if len(seen) != 4 || turns {
			return 0, fmt.Errorf("answered by %v, in turns: %v; want all four, by chance", seen, turns)
		}
		return n, nil
	})
	apply(t, fmt.Sprintf(`---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: my-svc, namespace: %s}
spec: {hosts: [my-svc], http: [{route: [{destination: {host: my-svc, subset: v2}}]}]}
`, bookinfo))
	s.judge(t, "balancing.subset", func(t *testing.T) (int, error) {
		all := askIn(t, bookinfo, "-brief", "-n", "20", url)
		for i, a := range all {
			if a.Status != 200 || a.Text != "v2" {
				return 0, fmt.Errorf("%+v", a)
			}
			if i > 0 && a.Server == all[i-1].Server {
				return 0, fmt.Errorf("%s answered twice, one after the other; want v2 to take turns", a.Server)
			}
		}
		return len(all), nil
	})
}
