package e2e

import (
	"context"
	"fmt"
	"maps"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/weft-mesh/weft/e2e/score"
)

// Agent and ztunnel are away for more than a minute, on both nodes. Nobody gets
// in or out in clear; liveness probes go on; a pod of the mesh is not started
// uncaptured: its creation fails with an event that says why. Once both are
// back all is well by itself.
func TestAgentAndZtunnelAway(t *testing.T) {
	apply(t, aliveYAML()+peerAuthentication("v1", "default", "STRICT"))
	ready(t, meshed)
	wantServed(t, outside, "client", "near", false)
	alive := restarts(t)
	patch := func(value string) {
		kubectl(t, "patch", "daemonset", "-n", "weft-system", "ztunnel", "--type=merge", "-p",
			fmt.Sprintf(`{"spec":{"template":{"spec":{"nodeSelector":%s}}}}`, value))
	}
	patch(`{"weft.test/nowhere":"true"}`)
	t.Cleanup(func() { // for the tests after this one, should it fail half way
		if _, err := world.c.Kubectl(context.Background(), "patch", "daemonset", "-n", "weft-system", "ztunnel", "--type=merge", "-p",
			`{"spec":{"template":{"spec":{"nodeSelector":null}}}}`); err != nil {
			t.Error(err)
		}
	})
	eventually(t, patience, func() error {
		if got := kubectl(t, "get", "pods", "-n", "weft-system", "-l", "app=ztunnel", "-o", "name"); got != "" {
			return fmt.Errorf("still there: %s", got)
		}
		return nil
	})
	start := time.Now()
	w := watchNode(t, "node1", allAddresses(t, meshed, "client", "near", "far"), allAddresses(t, outside, "client", "far"))
	near, _ := addresses(t, meshed, "near")
	far, _ := addresses(t, outside, "far")
	in := startLoad(t, outside, "client", append(onlyRequests(), "-to", near.String())...)
	out := startLoad(t, meshed, "client", append(onlyRequests(), "-to", far.String())...)
	apply(t, podYAML(meshed, "waits", "node1", "args: [sleep]"))
	eventually(t, patience, func() error {
		events := kubectl(t, "get", "events", "-n", meshed, "--field-selector", "involvedObject.name=waits", "-o", "jsonpath={range .items[*]}{.message}{\"\\n\"}{end}")
		if !strings.Contains(events, "weft") {
			return fmt.Errorf("no event that names weft: %q", events)
		}
		t.Log(firstLine(events, "weft"))
		return nil
	})
	minute := time.NewTimer(time.Until(start.Add(65 * time.Second)))
	<-minute.C
	if got := kubectl(t, "get", "pod", "-n", meshed, "waits", "-o", "jsonpath={.status.phase}"); got != "Pending" {
		t.Errorf("the pod is %s while the agent is away, want Pending", got)
	}
	rows := []score.Row{blocked(t, "fault.both.away.inbound", in.end(t)), blocked(t, "fault.both.away.outbound", out.end(t))}
	if _, clear, _, example := w.take(); clear > 0 {
		t.Errorf("%d segments of the mesh in clear, for example %s", clear, example)
	}
	failed := 0
	if now := restarts(t); !maps.Equal(now, alive) {
		t.Errorf("restarts of the application's containers: %v, before %v", now, alive)
		failed++
	}
	rows = append(rows, score.Row{Name: "fault.both.away.probes", Attempted: score.N(len(alive)), Broken: score.N(failed)})
	patch(`null`)
	kubectl(t, "rollout", "status", "-n", "weft-system", "daemonset/ztunnel", "--timeout=120s")
	kubectl(t, "wait", "-n", meshed, "--for=condition=Ready", "pod/waits", "--timeout=120s")
	wantCaptured(t, meshed, "waits", true)
	wantServed(t, meshed, "waits", "far", true)
	wantServed(t, meshed, "client", "far", true)
	score.Record(t, rows...)
}

// firstLine returns the first line of text that holds what.
func firstLine(text, what string) string {
	for line := range strings.Lines(text) {
		if strings.Contains(line, what) {
			return strings.TrimSpace(line)
		}
	}
	return ""
}

// The control service goes away: what is captured goes on, old connections and
// new ones.
func TestControlAway(t *testing.T) {
	kubectl(t, "scale", "deployment", "-n", "weft-system", "weft-control", "--replicas=0")
	kubectl(t, "wait", "-n", "weft-system", "--for=delete", "pod", "-l", "app=weft-control", "--timeout=120s")
	for _, server := range []string{"near", "far"} {
		if got := try(t, meshed, "client", "get", "-n", "20", "http://"+server+"/"); !got.OK {
			t.Errorf("got %+v, want an answer of %s while control is away", got, server)
		}
	}
	kubectl(t, "scale", "deployment", "-n", "weft-system", "weft-control", "--replicas=1")
	kubectl(t, "rollout", "status", "-n", "weft-system", "deployment/weft-control", "--timeout=120s")
	apply(t, authorizationPolicy("v1", "after", `{action: DENY, rules: [{}]}`))
	wantServed(t, meshed, "client", "far", false)
}

// Status says that all is well; version names both sides; uninstall leaves
// running pods with direct traffic and the nodes as they were; and Weft can be
// installed again.
func TestUninstallAndInstallAgain(t *testing.T) {
	status, err := world.a.Weft(t.Context(), world.c, "status")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"node1", "node2"} {
		if !strings.Contains(status, want) {
			t.Errorf("weft status does not name %s:\n%s", want, status)
		}
	}
	if out, err := world.a.Weft(t.Context(), world.c, "version"); err != nil || !strings.Contains(out, "dev") {
		t.Errorf("weft version: %v\n%s", err, out)
	}
	if _, err := world.a.Weft(t.Context(), world.c, "uninstall", "--yes"); err != nil {
		t.Fatal(err)
	}
	wantCaptured(t, meshed, "client", false)
	for _, server := range []string{"near", "far"} {
		if got := try(t, meshed, "client", "get", "http://"+server+"/"); !got.OK {
			t.Errorf("after uninstall: got %+v, want an answer of %s", got, server)
		}
	}
	// The plugin's binary stays, for runtimes that remember a pod's chain.
	for _, node := range []string{"node1", "node2"} {
		for _, c := range [][]string{
			{"grep", "-rl", "weft", "/etc/cni/net.d"},
			{"find", "/sys/fs/bpf/weft", "-mindepth", "3"},
		} {
			if out, _ := world.c.NodeCommand(t.Context(), node, c...).Output(); len(out) > 0 {
				t.Errorf("uninstall left behind on %s, by %v:\n%s", node, c, out)
			}
		}
	}
	kubectl(t, "run", "-n", meshed, "fresh", "--image=weft.test/testapp:1", "--image-pull-policy=Never", "--restart=Never", "--", "sleep")
	kubectl(t, "wait", "-n", meshed, "--for=condition=Ready", "pod/fresh", "--timeout=120s")
	kubectl(t, "delete", "pod", "-n", meshed, "fresh", "--wait=false")
	if out, err := world.a.Install(t.Context(), world.c); err != nil {
		world.c.Dump(t.Context(), os.Stderr)
		t.Fatalf("install again: %v\n%s", err, out)
	}
	wantCaptured(t, meshed, "client", true)
	wantServed(t, meshed, "client", "far", true)
}
