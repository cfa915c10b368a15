package e2e

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
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
	eventually(t, patience, func() error {
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
