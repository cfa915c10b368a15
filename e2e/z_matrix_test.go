package e2e

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/weft-mesh/weft/e2e/score"
	"github.com/weft-mesh/weft/e2e/wire"
)

// A moment is when a fault began: not before from, and at the latest at to.
type moment struct{ from, to time.Time }

// A process is one of Weft's programs on a node, by the name that ps shows: the
// ztunnel that stands by is called ztunnel-standby until it works.
type process struct{ node, name string }

// A cell of the fault matrix is one fault made to one component, while all
// loads run.
type cell struct {
	component, fault string
	// Make makes the fault, and mends it if it does not end by itself.
	make func(t *testing.T) moment
	// Dies lists the processes that are others afterwards.
	dies []process
	// Breaks are the loads whose connections may be cut, by design. Of the
	// requests only those that were under way when the fault was made.
	breaks []string
	// Refuses says that connections may be refused.
	refuses bool
	// Joins is how many pods are made meanwhile.
	joins int
}

// How long a component is paused or cut off.
const faultTime = 2500 * time.Millisecond

// matrix is every component with every fault.
func matrix(t *testing.T) []cell {
	established := []string{"idle", "bulk", "long", "requests"}
	one := []process{{"node1", "ztunnel"}}
	agent := []process{{"node1", "weft-node"}}
	both := append(slices.Clone(one), agent...)
	control := []process{{controlNode(t), "weft-control"}}
	all := slices.Clone(control)
	for _, node := range []string{"node1", "node2"} {
		all = append(all, process{node, "ztunnel"}, process{node, "ztunnel-standby"}, process{node, "weft-node"})
	}
	signal := func(sig string, ps []process) func(*testing.T) moment {
		return func(t *testing.T) moment { return signalAll(t, sig, ps) }
	}
	pause := func(ps []process) func(*testing.T) moment {
		return func(t *testing.T) moment {
			at := signalAll(t, "STOP", ps)
			timer := time.NewTimer(faultTime)
			<-timer.C
			signalAll(t, "CONT", ps)
			return at
		}
	}
	const daemonset, deployment = "daemonset/ztunnel", "deployment/weft-control"
	cells := []cell{
		{component: "ztunnel", fault: "kill", make: signal("KILL", one), dies: one, breaks: established},
		{component: "agent", fault: "kill", make: signal("KILL", agent), dies: agent, joins: 2},
		{component: "both", fault: "kill", make: signal("KILL", both), dies: both, breaks: established},
		{component: "control", fault: "kill", make: signal("KILL", control), dies: control},
		{component: "all", fault: "kill", make: func(t *testing.T) moment { return signalAll(t, gone, all) }, dies: all, breaks: established, refuses: true},

		{component: "ztunnel", fault: "pause", make: pause(one)},
		{component: "agent", fault: "pause", make: pause(agent)},
		{component: "both", fault: "pause", make: pause(both)},
		{component: "control", fault: "pause", make: pause(control)},
		{component: "all", fault: "pause", make: pause(all)},

		// Of one container alone: it ends in good order, and the kubelet
		// starts the next.
		{component: "ztunnel", fault: "restart", make: signal("TERM", one), dies: one},
		{component: "agent", fault: "restart", make: signal("TERM", agent), dies: agent},
		{component: "both", fault: "restart", make: rollout(daemonset), joins: 6},
		{component: "control", fault: "restart", make: rollout(deployment)},
		{component: "all", fault: "restart", make: rollout(daemonset, deployment)},
	}
	for _, component := range []string{"ztunnel", "agent", "both", "control", "all"} {
		cells = append(cells, cell{component: component, fault: "cut", make: func(t *testing.T) moment { return cut(t, component) }})
	}
	return cells
}

// gone is KILL for signalAll, with a moment that lasts until the kernel has taken
// down the last process. It is for when nobody is left who shares a listener:
// what comes until then stands in its queue, and is reset with it.
const gone = "KILL and wait"

// signalAll sends a signal to programs of the nodes.
func signalAll(t *testing.T, sig string, ps []process) moment {
	t.Helper()
	const script = `for d in /proc/[0-9]*; do
	read -r comm <"$d/comm" || continue
	for name; do [ "$comm" = "$name" ] && pids="$pids ${d#/proc/}"; done
done 2>/dev/null
date +%s%N
kill -${0%% *} $pids
[ "$0" = "${0% wait}" ] || for p in $pids; do while [ -d /proc/$p ]; do :; done; done
date +%s%N
echo $pids`
	byNode := map[string][]string{}
	for _, p := range ps {
		byNode[p.node] = append(byNode[p.node], p.name)
	}
	var mu sync.Mutex
	var m moment
	var each sync.WaitGroup
	for node, names := range byNode {
		each.Go(func() {
			out, err := world.c.NodeCommand(t.Context(), node, append([]string{"sh", "-c", script, sig}, names...)...).CombinedOutput()
			f := strings.Fields(string(out)) // two times and the processes
			if err != nil || len(f) < 2+len(names) {
				t.Errorf("send %s to %v on %s: %v: %q, want a process of each name", sig, names, node, err, out)
				return
			}
			from, err := strconv.ParseInt(f[0], 10, 64)
			to, err2 := strconv.ParseInt(f[1], 10, 64)
			if err := errors.Join(err, err2); err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			if at := time.Unix(0, from); m.from.IsZero() || at.Before(m.from) {
				m.from = at
			}
			if at := time.Unix(0, to); at.After(m.to) {
				m.to = at
			}
		})
	}
	each.Wait()
	if t.Failed() {
		t.FailNow()
	}
	return m
}

// rollout replaces every pod of workloads, as an update of Weft does.
func rollout(workloads ...string) func(t *testing.T) moment {
	return func(t *testing.T) moment {
		at := time.Now()
		kubectl(t, append([]string{"rollout", "restart", "-n", "weft-system"}, workloads...)...)
		for _, w := range workloads {
			kubectl(t, "rollout", "status", "-n", "weft-system", w, "--timeout=120s")
		}
		return moment{at, at}
	}
}

// cut drops what a component says to others, and hears of them, for a while:
// ztunnel the tunnels between the nodes, the agent the Kubernetes API, the
// control service everything, and all every packet between pods of two nodes.
func cut(t *testing.T, component string) moment {
	t.Helper()
	pods, err := world.kube.CoreV1().Pods("weft-system").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	const node = "node1"
	links := []string{"iifname eth0", "oifname eth0"}
	var tunnels, agent, control []string
	for _, l := range links {
		tunnels = append(tunnels, l+" tcp dport 15008", l+" tcp sport 15008")
	}
	for _, p := range pods.Items {
		for _, ip := range p.Status.PodIPs {
			family := "ip"
			if strings.Contains(ip.IP, ":") {
				family = "ip6"
			}
			switch {
			case p.Labels["app"] == "ztunnel" && p.Spec.NodeName == node:
				agent = append(agent, fmt.Sprintf("%s saddr %s tcp dport 6443", family, ip.IP), fmt.Sprintf("%s daddr %s tcp sport 6443", family, ip.IP))
			case p.Labels["app"] == "weft-control":
				control = append(control, fmt.Sprintf("%s saddr %s", family, ip.IP), fmt.Sprintf("%s daddr %s", family, ip.IP))
			}
		}
	}
	at := time.Now()
	switch component {
	case "ztunnel":
		dropFor(t, node, tunnels)
	case "agent":
		dropFor(t, node, agent)
	case "both":
		dropFor(t, node, slices.Concat(tunnels, agent))
	case "control":
		dropFor(t, controlNode(t), control)
	case "all":
		dropFor(t, node, links)
	}
	return moment{at, at}
}

// dropFor makes a node forward nothing that matches any of some rules for
// faultTime.
func dropFor(t *testing.T, node string, match []string) {
	t.Helper()
	rules := []string{"add table inet weft_fault", "add chain inet weft_fault cut { type filter hook forward priority -400; }"}
	for _, m := range match {
		rules = append(rules, "add rule inet weft_fault cut "+m+" drop")
	}
	nft(t, node, rules...)
	timer := time.NewTimer(faultTime)
	<-timer.C
	nft(t, node, "delete table inet weft_fault")
}

// nft changes the rules of a node.
func nft(t *testing.T, node string, rules ...string) {
	t.Helper()
	cmd := world.c.NodeCommand(context.WithoutCancel(t.Context()), node, "nft", "-f", "-")
	cmd.Stdin = strings.NewReader(strings.Join(rules, "\n") + "\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("nft on %s: %v: %s", node, err, out)
	}
}

func controlNode(t *testing.T) string {
	t.Helper()
	pods, err := world.kube.CoreV1().Pods("weft-system").List(t.Context(), metav1.ListOptions{LabelSelector: "app=weft-control"})
	if err != nil || len(pods.Items) != 1 {
		t.Fatalf("find weft-control: %v: %d pods", err, len(pods.Items))
	}
	return pods.Items[0].Spec.NodeName
}

// components returns the containers of Weft with how often each was restarted,
// once there is exactly one pod of ztunnel on each node and one of the control
// service, and all are ready.
func components(ctx context.Context) (map[string]int32, error) {
	pods, err := world.kube.CoreV1().Pods("weft-system").List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	if len(pods.Items) != 3 {
		return nil, fmt.Errorf("want three pods of Weft, have %d", len(pods.Items))
	}
	all := map[string]int32{}
	for _, p := range pods.Items {
		if p.DeletionTimestamp != nil || p.Status.Phase != corev1.PodRunning {
			return nil, fmt.Errorf("%s on %s is %s, deleted %v", p.Name, p.Spec.NodeName, p.Status.Phase, p.DeletionTimestamp)
		}
		for _, c := range p.Status.ContainerStatuses {
			name := p.Spec.NodeName + " " + c.Name
			if _, twice := all[name]; twice || !c.Ready {
				return nil, fmt.Errorf("%s is there more than once, or not ready", name)
			}
			all[name] = c.RestartCount
		}
	}
	return all, nil
}

// whole waits until every component works, and those that died are others.
func whole(t *testing.T, before map[string]int32, died []process) map[string]int32 {
	t.Helper()
	// Either ztunnel of a node may be the one that worked.
	sum := func(all map[string]int32, p process) (n int32) {
		for name, restarts := range all {
			proxy := strings.HasPrefix(name, p.node+" istio-proxy") && strings.HasPrefix(p.name, "ztunnel")
			if proxy || name == p.node+" "+p.name {
				n += restarts
			}
		}
		return n
	}
	var now map[string]int32
	poll(t, 2*time.Minute, func() (err error) {
		if now, err = components(t.Context()); err != nil {
			return err
		}
		for _, p := range died {
			if sum(now, p) <= sum(before, p) {
				return fmt.Errorf("%s of %s was not restarted yet", p.name, p.node)
			}
		}
		return nil
	})
	return now
}

// A lookout counts what pods of the mesh say on a node.
type lookout struct {
	tap *wire.Tap

	mu      sync.Mutex
	mesh    map[netip.Addr]bool
	outside map[netip.Addr]bool
	tunnel  int    // segments of tunnels
	clear   int    // and others
	example string // of the others
	control int    // segments in clear of pods outside the mesh
}

// allAddresses returns the addresses of some pods of a namespace.
func allAddresses(t *testing.T, ns string, pods ...string) []netip.Addr {
	t.Helper()
	var all []netip.Addr
	for _, pod := range pods {
		v4, v6 := addresses(t, ns, pod)
		all = append(all, v4, v6)
	}
	return all
}

// watchNode watches all interfaces of a node until the test ends.
func watchNode(t *testing.T, node string, mesh, outside []netip.Addr) *lookout {
	t.Helper()
	w := &lookout{mesh: map[netip.Addr]bool{}, outside: map[netip.Addr]bool{}}
	for _, a := range mesh {
		w.mesh[a] = true
	}
	for _, a := range outside {
		w.outside[a] = true
	}
	var err error
	if w.tap, err = wire.OpenFunc(world.c.NodeNetns(node), "", w.see); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.tap.Close(); err != nil {
			t.Errorf("the watch of %s ended early: %v", node, err)
		}
	})
	return w
}

func (w *lookout) see(s wire.Segment) {
	w.mu.Lock()
	defer w.mu.Unlock()
	src, dst := s.Src.Addr(), s.Dst.Addr()
	switch {
	case len(s.Payload) == 0 && !s.SYN:
	case w.outside[src] && w.outside[dst]:
		w.control++
	case !w.mesh[src] || !w.mesh[dst] && !w.outside[dst]:
	case s.Src.Port() == wire.HBONE || s.Dst.Port() == wire.HBONE:
		w.tunnel++
	default:
		w.clear++
		w.example = fmt.Sprintf("%v to %v, SYN %v: %.60q", s.Src, s.Dst, s.SYN, s.Payload)
	}
}

// take returns the counts since it was called last.
func (w *lookout) take() (tunnel, clear, control int, example string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	tunnel, clear, control, example = w.tunnel, w.clear, w.control, w.example
	w.tunnel, w.clear, w.control, w.example = 0, 0, 0, ""
	return tunnel, clear, control, example
}

// aliveYAML is pods on both nodes that are restarted when two of their liveness
// probes fail, one for each kind of probe over the network. A probe that was
// taken into the mesh fails at once, as nobody but the mesh is served; the time
// it has is for a machine that is busy with the fault.
func aliveYAML() string {
	y := ""
	probes := map[string]string{"http": "httpGet: {port: 8080, path: /}", "tcp": "tcpSocket: {port: 9000}", "grpc": "grpc: {port: 9090}"}
	for kind, p := range probes {
		for _, node := range []string{"node1", "node2"} {
			y += podYAML(meshed, "alive-"+kind+"-"+node, node, fmt.Sprintf(`args: [server]
    livenessProbe: {%s, periodSeconds: 1, failureThreshold: 2, timeoutSeconds: 5}`, p))
		}
	}
	return y
}

// Every component of Weft is killed, paused, restarted and cut off, while pods
// of the mesh hold idle connections, make new ones, move bulk and talk on
// long-lived ones: across the nodes in both directions, and on one node, over
// both IP families. Under STRICT somebody outside tries to get in all the time.
//
// In each cell no connection is refused while one process lives that holds the
// listeners; what a fault cannot touch by design does not break; nothing is
// seen in clear on the wire; nobody gets in; and no liveness probe fails.
func TestFaultMatrix(t *testing.T) {
	var y strings.Builder
	y.WriteString(podYAML(meshed, "load1", "node1", "args: [sleep]") + podYAML(meshed, "load2", "node2", "args: [sleep]"))
	y.WriteString(aliveYAML() + peerAuthentication("v1", "default", "STRICT"))
	apply(t, y.String())
	ready(t, meshed)
	wantServed(t, outside, "client", "near", false)

	address := map[string]netip.Addr{}
	for _, pod := range []string{"near", "far"} {
		address[pod+"4"], address[pod+"6"] = addresses(t, meshed, pod)
	}
	w := watchNode(t, "node1", allAddresses(t, meshed, "load1", "load2", "near", "far"), allAddresses(t, outside, "client", "far"))
	before := whole(t, nil, nil)
	alive := restarts(t)
	var rows []score.Row
	for _, c := range matrix(t) {
		t.Run(c.component+" "+c.fault, func(t *testing.T) {
			if !t.Run("loads", func(t *testing.T) {
				loads := []*load{
					startLoad(t, meshed, "load1", "-to", fmt.Sprintf("%v,%v", address["far4"], address["near6"])),
					startLoad(t, meshed, "load2", "-to", fmt.Sprint(address["near4"])),
				}
				intruder := startLoad(t, outside, "client", append(onlyRequests(), "-to", fmt.Sprint(address["near4"]))...)
				loads[0].waitReady(t)
				loads[1].waitReady(t)
				w.take()
				if got := try(t, outside, "client", "get", "http://far."+outside+"/"); !got.OK {
					t.Errorf("outside the mesh: got %+v, want an answer", got)
				}
				joined := c.join(t)
				at := c.make(t)
				loads[0].served(t, time.Now(), 2)
				loads[1].served(t, time.Now(), 1)
				before = whole(t, before, c.dies)
				loads[0].served(t, time.Now(), 2)
				loads[1].served(t, time.Now(), 1)
				joined()
				rows = append(rows, c.judge(t, at, slices.Concat(loads[0].end(t), loads[1].end(t)))...)
				rows = append(rows, blocked(t, fmt.Sprintf("fault.%s.%s.plaintext", c.component, c.fault), intruder.end(t)))
			}) {
				t.Logf("the state of the components: %v", before)
			}
			tunnel, clear, control, example := w.take()
			if clear > 0 || tunnel == 0 || control == 0 {
				t.Errorf("on the wire: %d segments of tunnels, %d of the mesh in clear (%s), %d of others in clear; want some, none and some", tunnel, clear, example, control)
			}
			if now := restarts(t); !maps.Equal(now, alive) {
				t.Errorf("restarts of the application's containers: %v, before %v", now, alive)
				alive = now
			}
		})
	}
	score.Record(t, rows...)
}

// join makes pods while the fault lasts. What it returns waits until they are
// in the mesh.
func (c cell) join(t *testing.T) (joined func()) {
	var y strings.Builder
	var names []string
	for i := range c.joins {
		names = append(names, fmt.Sprintf("made-during-%s-%s-%d", c.component, c.fault, i))
		y.WriteString(podYAML(meshed, names[i], fmt.Sprintf("node%d", i%2+1), "args: [sleep]"))
	}
	if len(names) == 0 {
		return func() {}
	}
	var made sync.WaitGroup
	made.Go(func() { // a kubectl takes longer than a signal
		if _, err := world.c.KubectlInput(t.Context(), y.String(), "apply", "-f", "-"); err != nil {
			t.Error(err)
		}
	})
	return func() {
		made.Wait()
		for _, name := range names {
			kubectl(t, "wait", "-n", meshed, "--for=condition=Ready", "pod/"+name, "--timeout=120s")
			wantCaptured(t, meshed, name, true)
		}
		if _, err := world.c.KubectlInput(t.Context(), y.String(), "delete", "--wait=false", "-f", "-"); err != nil {
			t.Error(err)
		}
	}
}

// restarts returns how often the containers of the applications were
// restarted, but for those of pods that are going.
func restarts(t *testing.T) map[string]int32 {
	t.Helper()
	pods, err := world.kube.CoreV1().Pods(meshed).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]int32{}
	for _, p := range pods.Items {
		for _, c := range p.Status.ContainerStatuses {
			if p.Status.Phase == corev1.PodRunning && p.DeletionTimestamp == nil && !strings.HasPrefix(p.Name, "made-") {
				all[p.Name] = c.RestartCount
			}
		}
	}
	return all
}

// judge makes the rows of a cell out of all events, and fails the test if one
// breaks its promise.
func (c cell) judge(t *testing.T, at moment, events []event) []score.Row {
	t.Helper()
	var rows []score.Row
	for _, name := range []string{"idle", "requests", "bulk", "long"} {
		attempted, refused, broken, late, examples, lateExamples := 0, 0, 0, 0, "", ""
		for _, e := range events {
			if e.Load != name {
				continue
			}
			attempted++
			switch {
			case e.Error == "":
				continue
			case e.Refused:
				refused++
			default:
				broken++
			}
			example := fmt.Sprintf("\n  from %v to %v after the fault: %s", time.Unix(0, e.Start).Sub(at.from).Round(time.Millisecond), time.Unix(0, e.End).Sub(at.from).Round(time.Millisecond), e.Error)
			if refused+broken <= 4 {
				examples += example
			}
			if !e.Refused && e.Start > at.to.UnixNano() {
				if late++; late <= 4 {
					lateExamples += example
				}
			}
		}
		row := score.Row{Name: fmt.Sprintf("fault.%s.%s.%s", c.component, c.fault, name), Attempted: score.N(attempted), Refused: score.N(refused), Broken: score.N(broken)}
		if name == "requests" {
			row.RecoveredMS = score.N(int(longestGap(at.from, events).Milliseconds()))
		}
		rows = append(rows, row)
		t.Logf("%s: %d attempted, %d refused, %d broken%s", name, attempted, refused, broken, examples)
		if refused > 0 && !c.refuses {
			t.Errorf("%s: %d were refused, want none", name, refused)
		}
		switch breaks := slices.Contains(c.breaks, name); {
		case broken > 0 && !breaks:
			t.Errorf("%s: %d of %d broke, want none", name, broken, attempted)
		case late > 0 && name == "requests":
			t.Errorf("%s: %d of %d broke that began after the fault, which was over after %v, want none%s", name, late, attempted, at.to.Sub(at.from), lateExamples)
		}
	}
	t.Logf("longest time without an answer: %v", longestGap(at.from, events).Round(time.Millisecond))
	return rows
}

// longestGap is the longest time after a moment that a client had no answer of
// a server.
func longestGap(at time.Time, events []event) time.Duration {
	answers := map[string][]int64{}
	for _, e := range events {
		if e.Load == "requests" && e.Error == "" && e.End > at.UnixNano() {
			answers[e.To] = append(answers[e.To], e.End)
		}
	}
	var longest int64
	for _, ends := range answers {
		slices.Sort(ends)
		from := at.UnixNano()
		for _, end := range ends {
			longest = max(longest, end-from)
			from = end
		}
	}
	return time.Duration(longest)
}

// onlyRequests are the flags for a load that nobody is to answer.
func onlyRequests() []string {
	return []string{"-timeout", "2s", "-rate", "10", "-idle", "0", "-long", "0", "-bytes", "0"}
}

// blocked makes the row of requests that nobody is to answer.
func blocked(t *testing.T, name string, events []event) score.Row {
	t.Helper()
	blocked := 0
	for _, e := range events {
		if e.Error != "" {
			blocked++
		}
	}
	if blocked < len(events) || len(events) == 0 {
		t.Errorf("%s: %d of %d requests were answered", name, len(events)-blocked, len(events))
	}
	return score.Row{Name: name, Attempted: score.N(len(events)), Blocked: score.N(blocked)}
}
