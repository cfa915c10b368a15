package e2e

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// onNode runs a script as root on a node.
func onNode(t *testing.T, node, script string) string {
	t.Helper()
	out, err := world.c.NodeCommand(t.Context(), node, "sh", "-c", script).CombinedOutput()
	if err != nil {
		t.Fatalf("on %s: %v\n%s", node, err, out)
	}
	return strings.TrimSpace(string(out))
}

// signalAgent sends a signal to the agent of a node.
func signalAgent(t *testing.T, node, signal string) {
	t.Helper()
	onNode(t, node, `for d in /proc/[0-9]*; do
	read -r comm <"$d/comm" || continue
	[ "$comm" = weft-node ] && pid=${d#/proc/}
done 2>/dev/null
kill -`+signal+` "$pid"`)
}

// weftStatus returns what weft status says, which ends with an error if it
// shows problems.
func weftStatus(t *testing.T) string {
	t.Helper()
	out, err := world.a.Weft(t.Context(), world.c, "status")
	if err != nil {
		t.Logf("weft status: %v", err)
	}
	return out
}

// A pod of the mesh that starts while the CNI plugin was taken out by hand and
// the agent could not put it back is found, told of, and captured.
func TestUncapturedPodIsFound(t *testing.T) {
	const ns = "escapes"
	apply(t, namespaceYAML(ns, "ambient"))
	signalAgent(t, "node1", "STOP")
	stopped := true
	carryOn := func() {
		if stopped {
			stopped = false
			signalAgent(t, "node1", "CONT")
		}
	}
	defer carryOn()
	onNode(t, "node1", `cd /etc/cni/net.d && for f in *.conflist; do
	python3 - "$f" <<'END' || exit 1
import json, os, sys
c = json.load(open(sys.argv[1]))
c["plugins"] = [p for p in c["plugins"] if p["type"] != "weft-cni"]
json.dump(c, open(".new", "w"))
os.rename(".new", sys.argv[1])
END
done`)
	apply(t, podYAML(ns, "runaway", "node1", "args: [sleep]"))
	kubectl(t, "wait", "-n", ns, "--for=condition=Ready", "pod/runaway", "--timeout=120s")
	if got := kubectl(t, "get", "pod", "-n", ns, "runaway", "-o", redirection); got != "" {
		t.Fatalf("the pod did not escape: redirection %q", got)
	}
	carryOn()
	start := time.Now()
	wantCaptured(t, ns, "runaway", true)
	t.Logf("captured %v after the agent could work again", time.Since(start).Round(10*time.Millisecond))
	eventually(t, patience, func() error {
		if got := kubectl(t, "get", "events", "-n", ns, "-o", "jsonpath={range .items[*]}{.reason} {.message}{end}"); !strings.Contains(got, "WeftRanUncaptured") || !strings.Contains(got, "restart the pod") {
			return fmt.Errorf("events: %s", got)
		}
		return nil
	})
	if out := weftStatus(t); !strings.Contains(out, ns+"/runaway ran outside the mesh until it was found") {
		t.Errorf("weft status:\n%s", out)
	}
	eventually(t, patience, func() error {
		if got := onNode(t, "node1", "cat /etc/cni/net.d/*.conflist"); !strings.Contains(got, "weft-cni") {
			return fmt.Errorf("the plugin was not put back: %s", got)
		}
		return nil
	})
}

// A startup taint is taken off when the agent is ready, and only that one.
func TestStartupTaint(t *testing.T) {
	const other = "e2e.weft.dev/other"
	taints := func() string {
		return kubectl(t, "get", "node", "node2", "-o", "jsonpath={.spec.taints[*].key}")
	}
	kubectl(t, "taint", "node", "node2", "node.weft.dev/agent-not-ready=:NoSchedule", other+"=:PreferNoSchedule")
	defer func() {
		if _, err := world.c.Kubectl(t.Context(), "taint", "node", "node2", other+"-"); err != nil {
			t.Error(err)
		}
	}()
	if got := taints(); !strings.Contains(got, "agent-not-ready") {
		t.Errorf("taken off while nothing has started: taints %s", got)
	}
	kill(t, "node2", "weft-node")
	eventually(t, patience, func() error {
		if got := taints(); got != other {
			return fmt.Errorf("taints %q, want %s", got, other)
		}
		return nil
	})
	wantProxies(t, 1, "node2 weft-node")
}

// A node is let go on request: its pods run outside the mesh, new ones start,
// and when its pod of the DaemonSet is made anew, all of them are back.
func TestReleaseNode(t *testing.T) {
	const ns = "released"
	apply(t, namespaceYAML(ns, "ambient")+podYAML(ns, "stays", "node2", "args: [sleep]"))
	wantCaptured(t, ns, "stays", true)
	out, err := world.a.Weft(t.Context(), world.c, "release", "node2", "--yes")
	if err != nil {
		t.Fatal(err)
	}
	t.Log(out)
	wantCaptured(t, ns, "stays", false)
	apply(t, podYAML(ns, "starts", "node2", "args: [sleep]"))
	kubectl(t, "wait", "-n", ns, "--for=condition=Ready", "pod/starts", "--timeout=120s")
	if got := onNode(t, "node2", "ls /sys/fs/bpf/weft 2>/dev/null; cat /etc/cni/net.d/*.conflist"); strings.Contains(got, "weft-cni") || strings.Contains(got, "v1") {
		t.Errorf("left on the node: %s", got)
	}
	if out := weftStatus(t); !strings.Contains(out, "node2 was let go") {
		t.Errorf("weft status:\n%s", out)
	}
	var pods struct {
		Items []struct{ Metadata struct{ Name string } }
	}
	if err := json.Unmarshal([]byte(kubectl(t, "get", "pods", "-n", "weft-system", "-l", "app=ztunnel", "--field-selector", "spec.nodeName=node2", "-o", "json")), &pods); err != nil || len(pods.Items) != 1 {
		t.Fatalf("the pod of node2: %v, %v", pods, err)
	}
	kubectl(t, "delete", "pod", "-n", "weft-system", pods.Items[0].Metadata.Name)
	wantProxies(t, 0, "node2 weft-node")
	wantCaptured(t, ns, "stays", true)
	wantCaptured(t, ns, "starts", true)
}

// An agent can change the pods of its own node, and its node, but nothing of
// another: not even with a token that was taken from it.
func TestAgentChangesOnlyItsOwnNode(t *testing.T) {
	pod := strings.TrimSpace(kubectl(t, "get", "pod", "-n", "weft-system", "-l", "app=ztunnel", "--field-selector=spec.nodeName=node1,status.phase=Running", "-o", "jsonpath={.items[0].metadata.name}"))
	stolen := token(t, "-n", "weft-system", "ztunnel", "--bound-object-kind", "Pod", "--bound-object-name", pod)
	cfg := rest.AnonymousClientConfig(world.c.RESTConfig())
	cfg.BearerToken = stolen
	agent, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	patch := []byte(`{"metadata":{"annotations":{"weft.test/changed":"true"}}}`)
	for _, tt := range []struct {
		what  string
		allow bool
		do    func(metav1.PatchOptions) error
	}{
		{"a pod of its node", true, func(o metav1.PatchOptions) error {
			_, err := agent.CoreV1().Pods(meshed).Patch(t.Context(), "near", types.MergePatchType, patch, o)
			return err
		}},
		{"a pod of another node", false, func(o metav1.PatchOptions) error {
			_, err := agent.CoreV1().Pods(meshed).Patch(t.Context(), "far", types.MergePatchType, patch, o)
			return err
		}},
		{"its node", true, func(o metav1.PatchOptions) error {
			_, err := agent.CoreV1().Nodes().Patch(t.Context(), "node1", types.MergePatchType, patch, o)
			return err
		}},
		{"another node", false, func(o metav1.PatchOptions) error {
			_, err := agent.CoreV1().Nodes().Patch(t.Context(), "node2", types.MergePatchType, patch, o)
			return err
		}},
	} {
		err := tt.do(metav1.PatchOptions{DryRun: []string{metav1.DryRunAll}})
		if tt.allow && err != nil || !tt.allow && (err == nil || !strings.Contains(err.Error(), "may not change what belongs to")) {
			t.Errorf("%s: %v; want it allowed: %v", tt.what, err, tt.allow)
		}
	}
}
