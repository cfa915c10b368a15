package e2e

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/weft-mesh/weft/e2e/score"
)

// How much TestHandover does: connections that are held, and rollouts under
// them, each of which replaces the ztunnel of both nodes. $WEFT_ROLLOUTS asks
// for more of them.
const (
	heldConnections = 2000
	rollouts        = 10
)

// TestHandover replaces both ztunnels, by rollouts of the DaemonSet, under
// thousands of connections of every kind, while new ones are made all the time.
// Those that move bytes in bulk take a megabit a second each: the nodes share
// the processors with all that they run. Half of them have a peer that sends
// without an end, so megabytes wait in ztunnel for each.
// In the second half policies change too, once a second, and so do
// certificates: each ztunnel asks for its own. What that half shows has rows of
// its own.
func TestHandover(t *testing.T) {
	freshProxies(t)
	far, _ := addresses(t, meshed, "far")
	n := rollouts
	if s := os.Getenv("WEFT_ROLLOUTS"); s != "" {
		var err error
		if n, err = strconv.Atoi(s); err != nil || n < 2 {
			t.Fatalf("$WEFT_ROLLOUTS: %q is not a number from 2 on", s)
		}
	}
	held := startVerb(t, meshed, "client", "mixed", "-to", far.String(), "-n", fmt.Sprint(heldConnections))
	news := startLoad(t, meshed, "client", "-to", far.String(), "-idle", "0", "-long", "0", "-bytes", "0")
	poll(t, 120*time.Second, func() error {
		held.mu.Lock()
		defer held.mu.Unlock()
		if !held.ready {
			return fmt.Errorf("%d connections are not open yet; of those that were %d have ended", heldConnections, len(held.events))
		}
		return nil
	})
	news.waitReady(t)

	// What an exchange takes at the most while nothing is replaced: this machine
	// may be busy.
	calm := [2]time.Time{time.Now()}
	timer := time.NewTimer(10 * time.Second)
	<-timer.C
	calm[1] = time.Now()
	halves := []*half{{name: "handover", rollouts: n - n/2}, {name: "handover.changing", rollouts: n / 2}}
	for i, h := range halves {
		if h.from = time.Now(); i == 1 {
			changePolicies(t)
		}
		for range h.rollouts {
			from := time.Now()
			kubectl(t, "rollout", "restart", "-n", "weft-system", "daemonset/ztunnel")
			kubectl(t, "rollout", "status", "-n", "weft-system", "daemonset/ztunnel", "--timeout=120s")
			h.takeovers = append(h.takeovers, inherited(t)...)
			h.windows = append(h.windows, [2]time.Time{from, time.Now()})
			t.Logf("%s: a rollout took %v", h.name, time.Since(from).Round(100*time.Millisecond))
		}
	}

	slow, ended := between(t, halves, held.end(t), news.end(t))
	var rows []score.Row
	for _, h := range halves {
		rows = append(rows, h.judge(t, slow)...)
	}
	_, calm99, calmWorst := pauses(slow, calm)
	t.Logf("longest exchange of each talking connection in 10 s without a rollout: p99 %v, worst %v", calm99, calmWorst)
	score.Record(t, rows...)
	if ended != heldConnections {
		t.Errorf("%d connections told how they ended, want %d", ended, heldConnections)
	}
}

// A half is some rollouts of TestHandover, and what they did.
type half struct {
	name     string // of its rows
	from     time.Time
	rollouts int

	windows         [][2]time.Time
	takeovers       []takeover
	mixed, requests struct{ attempted, refused, broken int }
}

// between gives each half what ended, or began, in its time: the connections
// that were held are attempted in each half that they began. It returns the
// slow exchanges, and how many connections ended in all.
func between(t *testing.T, halves []*half, held, news []event) (slow []event, ended int) {
	t.Helper()
	of := func(at int64) *half {
		if at >= halves[1].from.UnixNano() {
			return halves[1]
		}
		return halves[0]
	}
	told := 0
	for _, e := range held {
		if e.Load == "slow" {
			slow = append(slow, e)
			continue
		}
		ended++
		h := of(e.End)
		halves[0].mixed.attempted++
		if h == halves[1] {
			h.mixed.attempted++
		}
		switch {
		case e.Refused:
			h.mixed.refused++
		case e.Error != "":
			h.mixed.broken++
		}
		if e.Error != "" {
			if told++; told <= 10 {
				t.Logf("%s, %v after the first rollout: %s", e.Load, time.Unix(0, e.End).Sub(halves[0].from).Round(time.Millisecond), e.Error)
			}
		}
	}
	for _, e := range news {
		h := of(e.Start)
		h.requests.attempted++
		switch {
		case e.Refused:
			h.requests.refused++
		case e.Error != "":
			h.requests.broken++
		}
	}
	return slow, ended
}

// judge makes the rows of a half, and fails the test if it breaks a promise.
func (h *half) judge(t *testing.T, slow []event) []score.Row {
	t.Helper()
	tunnels, conns, p99, worst := stood(h.takeovers)
	t.Logf("%s: %d handovers of %d tunnels with %d connections; a connection stood still: p99 %v, worst %v", h.name, len(h.takeovers), tunnels, conns, p99, worst)
	p50, talk99, talkWorst := pauses(slow, h.windows...)
	t.Logf("%s: longest exchange of each talking connection in each rollout: p50 %v, p99 %v, worst %v", h.name, p50, talk99, talkWorst)
	rows := []score.Row{{Name: h.name + ".pause", Attempted: score.N(conns), RecoveredMS: score.N(int(p99.Milliseconds()))}}
	for name, c := range map[string]struct{ attempted, refused, broken int }{".mixed": h.mixed, ".requests": h.requests} {
		rows = append(rows, score.Row{Name: h.name + name, Attempted: score.N(c.attempted), Refused: score.N(c.refused), Broken: score.N(c.broken)})
		if c.broken+c.refused > 0 || c.attempted == 0 {
			t.Errorf("%s%s: of %d %d broke and %d were refused", h.name, name, c.attempted, c.broken, c.refused)
		}
	}
	if len(h.takeovers) != 2*h.rollouts {
		t.Errorf("%s: %d ztunnels took connections over, want one on each node in each of %d rollouts", h.name, len(h.takeovers), h.rollouts)
	}
	return rows
}

// A takeover is the tunnels that one ztunnel took over from another.
type takeover []pausedTunnel

// A pausedTunnel is one of them.
type pausedTunnel struct {
	conns int
	stood time.Duration // how long nobody carried its bytes
}

// stood sums up how long connections stood still.
func stood(takeovers []takeover) (tunnels, conns int, p99, worst time.Duration) {
	all := slices.Concat(takeovers...)
	for _, one := range all {
		conns += one.conns
		worst = max(worst, one.stood)
	}
	slices.SortFunc(all, func(a, b pausedTunnel) int { return cmp.Compare(a.stood, b.stood) })
	below := 0
	for _, one := range all {
		if below += one.conns; below*100 >= conns*99 {
			return len(all), conns, one.stood, worst
		}
	}
	return len(all), conns, worst, worst
}

// inherited returns what each ztunnel has taken over that runs now. It waits for
// one on each node: the old one ends in its own time.
func inherited(t *testing.T) (all []takeover) {
	t.Helper()
	poll(t, 30*time.Second, func() error {
		all = nil
		pods := strings.Fields(kubectl(t, "get", "pods", "-n", "weft-system", "-l", "app=ztunnel", "--field-selector=status.phase=Running", "-o", "name"))
		for _, p := range pods {
			for line := range strings.Lines(kubectl(t, "logs", "-n", "weft-system", p, "-c", "istio-proxy")) {
				if !strings.Contains(line, "took over") || strings.Contains(line, "tunnels=0") {
					continue
				}
				one, err := parseTakeover(line)
				if err != nil {
					t.Fatal(err)
				}
				all = append(all, one)
			}
		}
		if len(all) < 2 {
			return fmt.Errorf("%d of %d ztunnels took connections over", len(all), len(pods))
		}
		return nil
	})
	return all
}

// parseTakeover reads the line of a log that says, for each tunnel, how many
// connections stood still and how long: pauses=2@1.5ms,3@2ms.
func parseTakeover(line string) (one takeover, err error) {
	for f := range strings.FieldsSeq(line) {
		text, ok := strings.CutPrefix(f, "pauses=")
		if !ok {
			continue
		}
		for p := range strings.SplitSeq(strings.Trim(text, `"`), ",") {
			conns, stood, _ := strings.Cut(p, "@")
			n, err := strconv.Atoi(conns)
			d, err2 := time.ParseDuration(stood)
			if err := errors.Join(err, err2); err != nil {
				return nil, fmt.Errorf("the log of ztunnel: %w in %s", err, line)
			}
			one = append(one, pausedTunnel{n, d})
		}
		return one, nil
	}
	return nil, fmt.Errorf("ztunnel does not say how long connections stood still: %s", line)
}

// pauses returns what the longest exchanges were that talking connections had
// in each rollout. One that is not told was shorter than what is told.
func pauses(slow []event, windows ...[2]time.Time) (p50, p99, worst time.Duration) {
	var ds []time.Duration
	for _, w := range windows {
		longest := map[string]time.Duration{}
		for _, e := range slow {
			if e.End >= w[0].UnixNano() && e.Start <= w[1].UnixNano() {
				longest[e.To] = max(longest[e.To], time.Duration(e.End-e.Start))
			}
		}
		for i := range heldConnections {
			if i%5 == 2 && i%4 != 1 { // those that talk
				ds = append(ds, longest[strconv.Itoa(i)])
			}
		}
	}
	slices.Sort(ds)
	return ds[len(ds)/2], ds[len(ds)*99/100], ds[len(ds)-1]
}

// changePolicies changes what is allowed all the time until the test ends. The
// held connections are among it. It asks the API server itself: a kubectl every
// second takes as much of the processors as everything that is tested.
func changePolicies(t *testing.T) {
	t.Helper()
	rules := func(i int) string {
		return fmt.Sprintf(`[{"from": [{"source": {"principals": ["cluster.local/ns/%[1]s/sa/client", "cluster.local/ns/%[1]s/sa/other-%[2]d"]}}]},
			{"to": [{"operation": {"ports": ["8080", "9090"]}}]}]`, meshed, i)
	}
	apply(t, fmt.Sprintf(`{"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
		"metadata": {"name": "handover", "namespace": %q}, "spec": {"action": "ALLOW", "rules": %s}}`, meshed, rules(0)))
	path := fmt.Sprintf("/apis/security.istio.io/v1/namespaces/%s/authorizationpolicies/handover", meshed)
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for i := 1; ; i++ {
			select {
			case <-stop:
				return
			case <-tick.C:
			}
			patch := fmt.Sprintf(`{"spec": {"rules": %s}}`, rules(i))
			_, err := world.kube.CoreV1().RESTClient().Patch(types.MergePatchType).AbsPath(path).Body([]byte(patch)).DoRaw(t.Context())
			if err != nil && t.Context().Err() == nil {
				t.Errorf("change a policy: %v", err)
				return
			}
		}
	}()
	t.Cleanup(func() { close(stop); <-done })
}
