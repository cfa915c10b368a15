package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// pinned returns the UIDs of the pods that a node's kernel holds captured.
func pinned(t *testing.T, node string) []string {
	t.Helper()
	out, err := world.c.NodeCommand(t.Context(), node, "find", "/sys/fs/bpf/weft/v1/pods", "-mindepth", "1", "-maxdepth", "1", "-printf", "%f\n").Output()
	if err != nil {
		t.Fatalf("list the pins of %s: %v", node, err)
	}
	return slices.Sorted(slices.Values(strings.Fields(string(out))))
}

// captured returns the UIDs of the living pods that say they are captured, and
// what weft status counts, by node. It is an error if weft status complains, as
// it does while a ztunnel is started again, for example.
func captured(t *testing.T) (uids map[string][]string, counted map[string]int, err error) {
	t.Helper()
	var list struct {
		Items []struct {
			Metadata struct {
				UID         string
				Annotations map[string]string
			}
			Spec struct{ NodeName string }
		}
	}
	if err := json.Unmarshal([]byte(kubectl(t, "get", "pods", "-A", "-o", "json")), &list); err != nil {
		t.Fatal(err)
	}
	uids, counted = map[string][]string{"node1": nil, "node2": nil}, map[string]int{}
	for _, p := range list.Items {
		if p.Metadata.Annotations["ambient.istio.io/redirection"] == "enabled" {
			uids[p.Spec.NodeName] = append(uids[p.Spec.NodeName], p.Metadata.UID)
		}
	}
	out, err := world.a.Weft(t.Context(), world.c, "status", "-o", "json")
	if err != nil {
		return nil, nil, err
	}
	var status struct {
		Nodes []struct {
			Node  string
			Agent struct{ Pods []struct{ Name string } }
		}
	}
	if err := json.Unmarshal([]byte(out), &status); err != nil {
		t.Fatalf("weft status: %v\n%s", err, out)
	}
	for _, n := range status.Nodes {
		counted[n.Node] = len(n.Agent.Pods)
	}
	return uids, counted, nil
}

// wantNoLeaks waits until kernel, agent and Kubernetes agree on which pods are
// captured.
func wantNoLeaks(t *testing.T) {
	t.Helper()
	eventually(t, patience, func() error {
		uids, counted, err := captured(t)
		if err != nil {
			return err
		}
		for node, living := range uids {
			slices.Sort(living)
			if got := pinned(t, node); !slices.Equal(got, living) {
				return fmt.Errorf("%s has pins of %v, the captured pods are %v", node, got, living)
			}
			if counted[node] != len(living) {
				return fmt.Errorf("weft status counts %d captured pods on %s, there are %d", counted[node], node, len(living))
			}
		}
		return nil
	})
}

// agentErrors returns the errors that the agents have logged since a moment.
func agentErrors(t *testing.T, since time.Time) []string {
	t.Helper()
	var errs []string
	log := kubectl(t, "logs", "-n", "weft-system", "-l", "app=ztunnel", "-c", "weft-node", "--tail=-1", "--since-time="+since.UTC().Format(time.RFC3339Nano))
	for line := range strings.Lines(log) {
		if strings.Contains(line, "\terror\t") || strings.Contains(line, "panic") {
			errs = append(errs, line)
		}
	}
	return errs
}

// Pods are deleted while they are being brought in: nothing is left of them,
// and nobody complains.
func TestPodsDeletedWhileTheyAreEnrolled(t *testing.T) {
	const ns, rounds, pods = "fleeting", 3, 4
	restarts := whole(t, nil, nil)
	apply(t, namespaceYAML(ns, ""))
	start := time.Now()
	for round := range rounds {
		kubectl(t, "label", "namespace", ns, "--overwrite", "istio.io/dataplane-mode=none")
		var y strings.Builder
		for i := range pods {
			y.WriteString(podYAML(ns, fmt.Sprintf("pod-%d-%d", round, i), fmt.Sprintf("node%d", i%2+1), "args: [sleep]"))
		}
		if _, err := world.c.KubectlInput(t.Context(), y.String(), "apply", "-f", "-"); err != nil {
			t.Fatal(err)
		}
		ready(t, ns)
		// At once: the kubectl that comes second is a few tens of milliseconds
		// behind, or ahead.
		var both sync.WaitGroup
		remove := []string{"delete", "pod", "-n", ns, "--all", "--timeout=120s"}
		if round == 1 { // the object is gone before the sandbox is
			remove = append(remove, "--force")
		}
		for _, args := range [][]string{remove, {"label", "namespace", ns, "--overwrite", "istio.io/dataplane-mode=ambient"}} {
			both.Go(func() {
				if _, err := world.c.Kubectl(t.Context(), args...); err != nil {
					t.Error(err)
				}
			})
		}
		both.Wait()
	}
	wantNoLeaks(t)
	log := kubectl(t, "logs", "-n", "weft-system", "-l", "app=ztunnel", "-c", "weft-node", "--tail=-1", "--since-time="+start.UTC().Format(time.RFC3339Nano))
	t.Logf("%d pods were deleted while their namespace joined; %d of the agents' lines are about them", rounds*pods, strings.Count(log, ns))
	if errs := agentErrors(t, start); len(errs) > 0 {
		t.Errorf("the agents complain:\n%s", strings.Join(errs, ""))
	}
	if now := whole(t, nil, nil); !maps.Equal(now, restarts) {
		t.Errorf("restarts of the containers of Weft: %v, before %v", now, restarts)
	}
}

// The agent is killed while it brings running pods in: the next one finishes
// the work, and can undo it.
func TestAgentKilledWhilePodsJoin(t *testing.T) {
	const ns, pods = "joining", 6
	freshProxies(t)
	y := namespaceYAML(ns, "")
	for i := range pods {
		y += podYAML(ns, fmt.Sprintf("pod-%d", i), "node1", "args: [sleep]")
	}
	apply(t, y)
	ready(t, ns)
	before := len(pinned(t, "node1"))
	kubectl(t, "label", "namespace", ns, "istio.io/dataplane-mode=ambient")
	kill(t, "node1", "weft-node")
	start := time.Now()
	t.Logf("of %d pods the kernel holds %d when the agent is killed", pods, len(pinned(t, "node1"))-before)
	for i := range pods {
		wantCaptured(t, ns, fmt.Sprintf("pod-%d", i), true)
	}
	t.Logf("all are captured after %v", time.Since(start).Round(time.Millisecond))
	wantProxies(t, 1, "node1 weft-node")
	wantNoLeaks(t)
	kubectl(t, "label", "namespace", ns, "istio.io/dataplane-mode-")
	for i := range pods {
		wantCaptured(t, ns, fmt.Sprintf("pod-%d", i), false)
	}
	wantNoLeaks(t)
}

// Somebody rewrites a node's network configuration without Weft in it, or
// removes the plugin: both are put back.
func TestCNIConfigurationIsRepaired(t *testing.T) {
	const conf, plugin = "/etc/cni/net.d/10-pods.conflist", "/opt/cni/bin/weft-cni"
	run := func(node string, in []byte, argv ...string) []byte {
		cmd := world.c.NodeCommand(t.Context(), node, argv...)
		cmd.Stdin = bytes.NewReader(in)
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("%v on %s: %v", argv, node, err)
		}
		return out
	}
	for _, node := range []string{"node1", "node2"} {
		t.Run(node, func(t *testing.T) {
			before := run(node, nil, "cat", conf)
			var list map[string]any
			if err := json.Unmarshal(before, &list); err != nil {
				t.Fatal(err)
			}
			plugins := list["plugins"].([]any)
			foreign := slices.DeleteFunc(slices.Clone(plugins), func(p any) bool { return p.(map[string]any)["type"] == "weft-cni" })
			if len(foreign) != len(plugins)-1 {
				t.Fatalf("want weft-cni once in %s", before)
			}
			list["plugins"] = foreign
			without, err := json.Marshal(list)
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range []struct{ name, script string }{
				{"rewritten in place", "cat >" + conf},
				{"replaced by another file", "cat >" + conf + ".new && mv " + conf + ".new " + conf},
				{"plugin removed", "rm " + plugin},
			} {
				start := time.Now()
				run(node, without, "sh", "-c", r.script)
				eventually(t, patience, func() error {
					out, err := world.c.NodeCommand(t.Context(), node, "sh", "-c", "grep -c weft-cni "+conf+" && test -x "+plugin).CombinedOutput()
					if err != nil {
						return fmt.Errorf("%s: %v: %s", r.name, err, out)
					}
					return nil
				})
				t.Logf("%s: repaired within %v", r.name, time.Since(start).Round(time.Millisecond))
			}
		})
	}
	apply(t, podYAML(meshed, "after-repair", "node1", "args: [sleep]"))
	kubectl(t, "wait", "-n", meshed, "--for=condition=Ready", "pod/after-repair", "--timeout=120s")
	wantCaptured(t, meshed, "after-repair", true)
}
