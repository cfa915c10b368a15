package e2e

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/weft-mesh/weft/e2e/wire"
)

// kill ends processes of a node at once, by name, with SIGKILL.
func kill(t *testing.T, node string, names ...string) {
	t.Helper()
	const script = `for d in /proc/[0-9]*; do
	read -r comm <"$d/comm" || continue
	for name; do [ "$comm" = "$name" ] && pids="$pids ${d#/proc/}"; done
done 2>/dev/null
echo $pids
kill -9 $pids`
	out, err := world.c.NodeCommand(t.Context(), node, append([]string{"sh", "-c", script, "kill"}, names...)...).CombinedOutput()
	if err != nil || len(strings.Fields(string(out))) != len(names) {
		t.Fatalf("kill %v on %s: %v: killed %q, want one process of each name", names, node, err, out)
	}
}

// A container of the DaemonSet, as Kubernetes sees it.
type container struct {
	Name         string
	Ready        bool
	RestartCount int
}

// proxies returns the containers of the DaemonSet, by node and name. It
// reports false while a node has not exactly one pod.
func proxies(t *testing.T) (map[string]container, bool) {
	t.Helper()
	var list struct {
		Items []struct {
			Spec   struct{ NodeName string }
			Status struct{ ContainerStatuses []container }
		}
	}
	if err := json.Unmarshal([]byte(kubectl(t, "get", "pods", "-n", "weft-system", "-l", "app=ztunnel", "-o", "json")), &list); err != nil {
		t.Fatal(err)
	}
	all := map[string]container{}
	for _, p := range list.Items {
		for _, c := range p.Status.ContainerStatuses {
			all[p.Spec.NodeName+" "+c.Name] = c
		}
	}
	return all, len(list.Items) == 2 && len(all) == 6
}

// freshProxies makes every container of the DaemonSet one that was not
// restarted yet: the kubelet lets the others wait before it starts them again.
func freshProxies(t *testing.T) {
	t.Helper()
	all, one := proxies(t)
	fresh := one
	for _, c := range all {
		fresh = fresh && c.Ready && c.RestartCount == 0
	}
	if !fresh {
		kubectl(t, "rollout", "restart", "-n", "weft-system", "daemonset/ztunnel")
		kubectl(t, "rollout", "status", "-n", "weft-system", "daemonset/ztunnel", "--timeout=120s")
	}
	wantProxies(t, 0)
}

// wantProxies waits until every container of the DaemonSet is ready, and the
// named ones, such as "node1 istio-proxy", were restarted so often.
func wantProxies(t *testing.T, restarts int, names ...string) {
	t.Helper()
	eventually(t, 60*time.Second, func() error {
		all, one := proxies(t)
		if !one {
			return fmt.Errorf("not one pod on each node: %v", all)
		}
		for name, c := range all {
			if !c.Ready {
				return fmt.Errorf("%s is not ready", name)
			}
		}
		for _, name := range names {
			if all[name].RestartCount != restarts {
				return fmt.Errorf("%s was restarted %d times, want %d", name, all[name].RestartCount, restarts)
			}
		}
		return nil
	})
}

// ztunnel is killed on the clients' node, and then on that of a server: the
// node agent holds the listeners, so that no connection is refused, and what
// is asked meanwhile is answered when ztunnel is back.
func TestZtunnelKilled(t *testing.T) {
	freshProxies(t)
	s := startSteady(t, "asks-killed-ztunnel", true)
	for _, node := range []string{"node1", "node2"} {
		t.Run(node, func(t *testing.T) {
			kill(t, node, "ztunnel")
			wantProxies(t, 1, node+" istio-proxy")
			s.served(t, 20)
			o := s.outcome(t, "ztunnel killed on "+node)
			if o.Refused > 0 || o.Worst > 1 {
				t.Errorf("got %+v, want none refused and at most the one request of each client that was under way", o)
			}
			if o.Broken > 2 {
				t.Errorf("got %+v, want each long connection broken once at most", o)
			}
			if o.Gap > 10*time.Second {
				t.Errorf("the clients waited for %v", o.Gap)
			}
		})
	}
}

// The node agent is killed: no request fails, captured pods stay captured and
// guarded, and a pod that is made while it is away starts in the mesh.
func TestAgentKilled(t *testing.T) {
	freshProxies(t)
	apply(t, peerAuthentication("v1", "default", "STRICT"))
	wantServed(t, outside, "client", "near", false)
	s := startSteady(t, "asks-killed-agent", true)
	kill(t, "node1", "weft-node")
	killed := time.Now()
	apply(t, podYAML(meshed, "newcomer", "node1", "args: [server]"))
	if got := try(t, outside, "client", "get", "-timeout", "1s", "http://near."+meshed+"/"); got.OK {
		t.Errorf("in clear, under STRICT, with the agent away: got %+v, want no answer", got)
	}
	if got := kubectl(t, "get", "pod", "-n", meshed, "near", "-o", redirection); got != "enabled" {
		t.Errorf("pod near has redirection %q with the agent away, want enabled", got)
	}
	kubectl(t, "wait", "-n", meshed, "--for=condition=Ready", "pod/newcomer", "--timeout=60s")
	t.Logf("a pod made with the agent away was ready after %v", time.Since(killed).Round(time.Millisecond))
	wantCaptured(t, meshed, "newcomer", true)
	wantProxies(t, 1, "node1 weft-node")
	v4, _ := addresses(t, meshed, "newcomer")
	url := "http://" + netip.AddrPortFrom(v4, 8080).String() + "/"
	if got := try(t, meshed, "client", "get", url); !got.OK {
		t.Errorf("the new pod, through the mesh: got %+v, want an answer", got)
	}
	if got := try(t, outside, "client", "get", "-timeout", "1s", url); got.OK {
		t.Errorf("the new pod, in clear under STRICT: got %+v, want no answer", got)
	}
	if got := try(t, outside, "client", "get", "-timeout", "1s", "http://near."+meshed+"/"); got.OK {
		t.Errorf("in clear, under STRICT, with the agent back: got %+v, want no answer", got)
	}
	if o := s.outcome(t, "weft-node killed on node1"); o.Failed+o.Broken > 0 {
		t.Errorf("got %+v, want nothing failed", o)
	}
}

// A rolling update replaces agent and ztunnel on both nodes: no request on a
// new connection fails, and pods that are made meanwhile start in the mesh.
func TestRollingRestart(t *testing.T) {
	s := startSteady(t, "asks-rolling-restart", false)
	start := time.Now()
	kubectl(t, "rollout", "restart", "-n", "weft-system", "daemonset/ztunnel")
	var y string
	for i := range 6 {
		y += podYAML(meshed, fmt.Sprintf("made-meanwhile-%d", i), fmt.Sprintf("node%d", i%2+1), "args: [sleep]")
	}
	apply(t, y)
	kubectl(t, "rollout", "status", "-n", "weft-system", "daemonset/ztunnel", "--timeout=120s")
	wantProxies(t, 0)
	t.Logf("the rollout took %v", time.Since(start).Round(100*time.Millisecond))
	for i := range 6 {
		pod := fmt.Sprintf("made-meanwhile-%d", i)
		kubectl(t, "wait", "-n", meshed, "--for=condition=Ready", "pod/"+pod, "--timeout=60s")
		wantCaptured(t, meshed, pod, true)
	}
	s.served(t, 20)
	if o := s.outcome(t, "rolling restart"); o.Failed > 0 {
		t.Errorf("got %+v, want nothing failed", o)
	}
}

// Agent and ztunnel of a node are killed at once: nothing passes in clear
// meanwhile, in either direction, and the clients are served again.
func TestAgentAndZtunnelKilled(t *testing.T) {
	freshProxies(t)
	apply(t, peerAuthentication("v1", "default", "STRICT"))
	wantServed(t, outside, "client", "near", false)
	s := startSteady(t, "asks-killed-both", false)
	var addrs []netip.Addr
	for _, p := range []string{"client", "near", "far", s.pod} {
		v4, v6 := addresses(t, meshed, p)
		addrs = append(addrs, v4, v6)
	}
	v4, v6 := clusterIPs(t, meshed, "far")
	addrs = append(addrs, v4, v6)
	tap, err := wire.Open(world.c.NodeNetns("node1"), "eth0")
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	s.served(t, 5) // so that the watch has something to see
	kill(t, "node1", "ztunnel", "weft-node")
	if got := try(t, outside, "client", "get", "-timeout", "1s", "http://near."+meshed+"/"); got.OK {
		t.Errorf("in clear, under STRICT, with both away: got %+v, want no answer", got)
	}
	wantProxies(t, 1, "node1 istio-proxy", "node1 weft-node")
	s.served(t, 20)
	if err := tap.Close(); err != nil {
		t.Fatal(err)
	}
	seen, err := tap.Between(addrs, []byte(marked), start)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("on the wire: %d segments of the tunnel, %d others", seen.Tunnel, seen.Other)
	if seen.Tunnel == 0 || seen.Other > 0 || seen.Marked > 0 {
		t.Errorf("on the wire: %+v, want nothing but the tunnel", seen)
	}
	if o := s.outcome(t, "ztunnel and weft-node killed on node1"); o.Gap > 15*time.Second {
		t.Errorf("the clients waited for %v", o.Gap)
	}
	wantServed(t, outside, "client", "near", false)
}
