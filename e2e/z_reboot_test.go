package e2e

import (
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/weft-mesh/weft/e2e/score"
	"github.com/weft-mesh/weft/e2e/wire"
)

// How often each of the two nodes is rebooted.
const (
	wholeReboots = 2
	quickReboots = 48
	slowBoot     = 20 * time.Second // is worth a line in the log
)

// syns counts who asks for connections. What an application asks for, of a
// Service, is seen on the wire only if it was not captured; ztunnel sends into
// tunnels. Of those every segment counts: one that asks for a tunnel comes once,
// and a watch of a busy machine may lose it.
type syns struct {
	service map[netip.Addr]bool

	mu      sync.Mutex
	tunnels map[netip.Addr]time.Time // when a pod sent into a tunnel last
	clear   int
	example string
}

func (s *syns) see(g wire.Segment) {
	if !g.SYN && g.Dst.Port() != wire.HBONE {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if g.Dst.Port() == wire.HBONE {
		s.tunnels[g.Src.Addr()] = g.When
	}
	if g.SYN && s.service[g.Dst.Addr()] {
		s.clear++
		s.example = fmt.Sprintf("%v to %v at %v", g.Src, g.Dst, g.When)
	}
}

// uncaptured returns how many asked for a connection in clear since it was
// called last.
func (s *syns) uncaptured() (int, string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, example := s.clear, s.example
	s.clear, s.example = 0, ""
	return n, example
}

func (s *syns) lastTunnel(client netip.Addr) time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.tunnels[client]
}

// After each of a hundred reboots a labelled pod asks for a connection as soon
// as it runs, and never does so outside the mesh.
//
// Four are whole ones: all of a node's processes, namespaces, mounts, rules and
// eBPF end at once, and the node starts again from its disk. For the others the
// kubelet, the container runtime, the sandbox of Weft's own pod and the pod that
// is asked go on; what decides who is first is as after a boot: the agent, every
// ztunnel, and the labelled pod with its sandbox are killed at once, all that
// Weft has pinned and all of its files below /run are gone, and the kubelet
// starts everything again at the same time, in an order of its own. The nodes do
// that side by side.
func TestNodeReboots(t *testing.T) {
	const ns = "boots"
	servers := map[string]string{"node1": "far", "node2": "near"} // of the other node
	y := namespaceYAML(ns, "ambient")
	watches := map[string]*syns{}
	for _, node := range []string{"node1", "node2"} {
		v4, v6 := clusterIPs(t, meshed, servers[node])
		s := &syns{service: map[netip.Addr]bool{v4: true, v6: true}, tunnels: map[netip.Addr]time.Time{}}
		tap, err := wire.OpenFunc(world.c.NodeNetns(node), "", s.see)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := tap.Close(); err != nil {
				t.Errorf("the watch of %s ended early: %v", node, err)
			}
		})
		watches[node] = s
		y += podYAML(ns, "early-"+node, node,
			fmt.Sprintf(`args: [client, -listen, "", -quiet, -rate, "20", -timeout, 2s, -url, "http://%v/"]`, netip.AddrPortFrom(v4, 80)))
	}
	// The watch sees what it is there to see.
	for node, pod := range map[string]string{"node1": "client", "node2": "far"} {
		if got := try(t, outside, pod, "get", "http://"+servers[node]+"."+meshed+"/"); !got.OK {
			t.Fatalf("outside the mesh: got %+v, want an answer", got)
		}
		poll(t, patience, func() error { // the watch is read beside
			if n, _ := watches[node].uncaptured(); n == 0 {
				return fmt.Errorf("nothing was seen of a pod of %s outside the mesh", node)
			}
			return nil
		})
	}
	apply(t, y)
	ready(t, ns)
	var mu sync.Mutex
	boots, good, slowest := 0, 0, time.Duration(0)
	boot := func(t *testing.T, node string, do func()) {
		start := time.Now()
		before := sandboxes(t, ns, node)
		do()
		earlyAgain(t, ns, node, before, watches[node], start)
		took := time.Since(start)
		n, example := watches[node].uncaptured()
		if n > 0 {
			t.Errorf("reboot %d of %s: %d connections outside the mesh, for example from %s", boots, node, n, example)
		}
		mu.Lock()
		defer mu.Unlock()
		boots++
		if took > slowBoot {
			t.Logf("reboot %d, of %s, took %v", boots, node, took.Round(time.Millisecond))
		}
		slowest = max(slowest, took)
		if n == 0 {
			good++
		}
	}
	start := time.Now()
	for range wholeReboots {
		for _, node := range []string{"node1", "node2"} {
			boot(t, node, func() {
				if err := world.c.Reboot(t.Context(), node); err != nil {
					t.Fatal(err)
				}
			})
			whole(t, nil, nil)
		}
	}
	t.Logf("%d whole reboots took %v", boots, time.Since(start).Round(time.Second))
	slowest = 0 // what a machine takes to start is not ours
	start = time.Now()
	t.Run("quick", func(t *testing.T) {
		for _, node := range []string{"node1", "node2"} {
			t.Run(node, func(t *testing.T) {
				t.Parallel()
				for range quickReboots {
					boot(t, node, func() { crash(t, ns, node) })
				}
			})
		}
	})
	t.Logf("%d quick ones took %v, the slowest %v", 2*quickReboots, time.Since(start).Round(time.Second), slowest.Round(time.Millisecond))
	whole(t, nil, nil)
	score.Record(t, score.Row{Name: "reboot.uncaptured_syn", Attempted: score.N(boots), Blocked: score.N(good), RecoveredMS: score.N(int(slowest.Milliseconds()))})
}

// crash kills the agent, every ztunnel, and the pods of a namespace on a node
// with their sandboxes, and removes all that Weft keeps in memory there. They
// are stopped first: once they are dead the kubelet starts others, and what
// those have made must not be removed, or nobody could ever reach them.
func crash(t *testing.T, ns, node string) {
	t.Helper()
	var uids []string
	for _, p := range podsOn(t, ns, node) {
		uids = append(uids, "pod"+string(p.UID))
	}
	const script = `pids=$(grep -lE "$0" /proc/[0-9]*/cgroup 2>/dev/null | cut -d/ -f3)
for d in /proc/[0-9]*; do
	read -r comm <"$d/comm" && case "$comm" in weft-node|ztunnel|ztunnel-standby) pids="$pids ${d#/proc/}";; esac
done 2>/dev/null
kill -STOP $pids 2>/dev/null
find /sys/fs/bpf/weft -depth -mindepth 1 -delete
rm -rf /run/weft/*
kill -KILL $pids 2>/dev/null
echo $pids`
	out, err := world.c.NodeCommand(t.Context(), node, "sh", "-c", script, strings.Join(uids, "|")).CombinedOutput()
	if err != nil || len(strings.Fields(string(out))) < len(uids)+2 {
		t.Fatalf("crash %s: %v: killed %s", node, err, out)
	}
}

// sandboxes returns the containers of the pods of a namespace on a node.
func sandboxes(t *testing.T, ns, node string) map[string]bool {
	t.Helper()
	ids := map[string]bool{}
	for _, p := range podsOn(t, ns, node) {
		for _, c := range p.Status.ContainerStatuses {
			ids[c.ContainerID] = true
		}
	}
	return ids
}

func podsOn(t *testing.T, ns, node string) []corev1.Pod {
	t.Helper()
	var list *corev1.PodList
	poll(t, patience, func() (err error) {
		list, err = world.kube.CoreV1().Pods(ns).List(t.Context(), metav1.ListOptions{FieldSelector: "spec.nodeName=" + node})
		return err
	})
	return list.Items
}

// earlyAgain waits until every early pod of a node runs in another container
// than before, and has sent into a tunnel. The kubelet gives a sandbox two
// minutes, and tries again only then.
func earlyAgain(t *testing.T, ns, node string, before map[string]bool, s *syns, since time.Time) {
	t.Helper()
	poll(t, 4*time.Minute, func() error {
		for _, p := range podsOn(t, ns, node) {
			if len(p.Status.ContainerStatuses) != 1 || before[p.Status.ContainerStatuses[0].ContainerID] || p.Status.ContainerStatuses[0].State.Running == nil {
				return fmt.Errorf("%s does not run again: %+v", p.Name, p.Status.ContainerStatuses)
			}
			ip, err := netip.ParseAddr(p.Status.PodIP)
			if err != nil || s.lastTunnel(ip).Before(since) {
				return fmt.Errorf("%s has sent nothing into a tunnel from %s yet", p.Name, p.Status.PodIP)
			}
		}
		return nil
	})
}
