package e2e

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

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
// thousands of connections of every kind, while new ones are made all the time
// and, in the second half, policies change. Each ztunnel asks for certificates
// of its own, so those change with every rollout.
func TestHandover(t *testing.T) {
	freshProxies(t)
	far, _ := addresses(t, meshed, "far")
	n := rollouts
	if s := os.Getenv("WEFT_ROLLOUTS"); s != "" {
		var err error
		if n, err = strconv.Atoi(s); err != nil {
			t.Fatalf("$WEFT_ROLLOUTS: %v", err)
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
	var windows [][2]time.Time
	var stood []time.Duration // longest pause of a tunnel, of each handover
	for i := range n {
		if i == n/2 {
			changePolicies(t)
		}
		from := time.Now()
		kubectl(t, "rollout", "restart", "-n", "weft-system", "daemonset/ztunnel")
		kubectl(t, "rollout", "status", "-n", "weft-system", "daemonset/ztunnel", "--timeout=120s")
		stood = append(stood, inherited(t)...)
		windows = append(windows, [2]time.Time{from, time.Now()})
		t.Logf("rollout %d took %v", i+1, time.Since(from).Round(100*time.Millisecond))
	}

	mixed := score.Row{Name: "handover.mixed", Attempted: score.N(heldConnections), Refused: score.N(0), Broken: score.N(0)}
	var slow []event
	ended := 0
	for _, e := range held.end(t) {
		switch {
		case e.Load == "slow":
			slow = append(slow, e)
			continue
		case e.Refused:
			*mixed.Refused++
		case e.Error != "":
			*mixed.Broken++
		}
		if ended++; e.Error != "" && *mixed.Broken+*mixed.Refused <= 10 {
			t.Logf("%s, %v after the first rollout: %s", e.Load, time.Unix(0, e.End).Sub(windows[0][0]).Round(time.Millisecond), e.Error)
		}
	}
	requests := score.Row{Name: "handover.requests", Attempted: score.N(0), Refused: score.N(0), Broken: score.N(0)}
	for _, e := range news.end(t) {
		*requests.Attempted++
		switch {
		case e.Refused:
			*requests.Refused++
		case e.Error != "":
			*requests.Broken++
		}
	}
	slices.Sort(stood)
	p50, p99, worst := pauses(slow, windows...)
	_, calm99, calmWorst := pauses(slow, calm)
	t.Logf("%d handovers in %d rollouts under %d connections: %d broken, %d refused; the tunnel that stood still the longest in each: %v", len(stood), n, ended, *mixed.Broken, *mixed.Refused, stood)
	t.Logf("longest exchange of each talking connection in each rollout: p50 %v, p99 %v, worst %v; in 10 s without one: p99 %v, worst %v", p50, p99, worst, calm99, calmWorst)
	pause := score.Row{Name: "handover.pause", Attempted: score.N(len(stood)), RecoveredMS: score.N(int(stood[len(stood)-1].Milliseconds()))}
	score.Record(t, mixed, requests, pause)
	switch {
	case ended != heldConnections:
		t.Errorf("%d connections told how they ended, want %d", ended, heldConnections)
	case len(stood) != 2*n:
		t.Errorf("%d ztunnels took connections over, want one on each node in each of %d rollouts", len(stood), n)
	}
	if *mixed.Broken+*mixed.Refused+*requests.Broken+*requests.Refused > 0 {
		t.Errorf("held %+v: %d broken, %d refused; new: %d broken, %d refused of %d", mixed.Name,
			*mixed.Broken, *mixed.Refused, *requests.Broken, *requests.Refused, *requests.Attempted)
	}
}

// inherited returns the longest pause that each ztunnel saw that has taken
// tunnels over. It waits for one on each node: the old one ends in its own time.
func inherited(t *testing.T) (stood []time.Duration) {
	t.Helper()
	poll(t, 30*time.Second, func() error {
		stood = nil
		pods := strings.Fields(kubectl(t, "get", "pods", "-n", "weft-system", "-l", "app=ztunnel", "--field-selector=status.phase=Running", "-o", "name"))
		for _, p := range pods {
			for line := range strings.Lines(kubectl(t, "logs", "-n", "weft-system", p, "-c", "istio-proxy")) {
				_, text, ok := strings.Cut(line, "longest_pause=")
				if !ok || strings.Contains(line, "tunnels=0") {
					continue
				}
				d, err := time.ParseDuration(strings.TrimSpace(text))
				if err != nil {
					t.Fatal(err)
				}
				stood = append(stood, d)
			}
		}
		if len(stood) < 2 {
			return fmt.Errorf("%d of %d ztunnels took connections over", len(stood), len(pods))
		}
		return nil
	})
	return stood
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
// held connections are among it.
func changePolicies(t *testing.T) {
	t.Helper()
	policy := func(i int) string {
		return fmt.Sprintf(`---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: handover, namespace: %[1]s}
spec:
  action: ALLOW
  rules:
  - from: [{source: {principals: ["cluster.local/ns/%[1]s/sa/client", "cluster.local/ns/%[1]s/sa/other-%[2]d"]}}]
  - to: [{operation: {ports: ["8080", "9090"]}}]
`, meshed, i)
	}
	apply(t, policy(0))
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
			if _, err := world.c.KubectlInput(t.Context(), policy(i), "apply", "-f", "-"); err != nil && t.Context().Err() == nil {
				t.Errorf("change a policy: %v", err)
				return
			}
		}
	}()
	t.Cleanup(func() { close(stop); <-done })
}
