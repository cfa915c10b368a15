package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"
)

const redirection = `jsonpath={.metadata.annotations.ambient\.istio\.io/redirection}`

// wantCaptured waits until a pod says that it is captured, or that it is not.
func wantCaptured(t *testing.T, ns, pod string, want bool) {
	t.Helper()
	eventually(t, 20*time.Second, func() error {
		if got := kubectl(t, "get", "pod", "-n", ns, pod, "-o", redirection); (got == "enabled") != want {
			return fmt.Errorf("pod %s/%s has redirection %q, want captured=%v", ns, pod, got, want)
		}
		return nil
	})
}

// wantMeshed checks that requests pass, through the mesh or in clear: under
// STRICT a server in the mesh tells the two apart.
func wantMeshed(t *testing.T, ns, client string, want bool) {
	t.Helper()
	eventually(t, 15*time.Second, func() error {
		for _, server := range []string{"near", "far"} {
			got := try(t, ns, client, "get", "http://"+server+"."+meshed+"/")
			if got.OK != want {
				return fmt.Errorf("%s/%s to %s under STRICT: got %+v, want served=%v", ns, client, server, got, want)
			}
		}
		return nil
	})
}

// The label on a namespace takes its running pods into the mesh and out of it
// again; open connections survive both.
func TestLabelOnAndOff(t *testing.T) {
	const ns = "joins"
	apply(t, namespaceYAML(ns, "")+podYAML(ns, "client", "node1", "args: [sleep]")+podYAML(ns, "server", "node2", "args: [server]")+serviceYAML(ns, "server", "server", ""))
	kubectl(t, "wait", "-n", ns, "--for=condition=Ready", "pod", "--all", "--timeout=60s")
	apply(t, peerAuthentication("v1", "default", "STRICT"))
	wantMeshed(t, ns, "client", false)

	v4, _ := addresses(t, ns, "server")
	held := make(chan reply, 1)
	go func() {
		r, err := tryQuietly(context.Background(), ns, "client", "hold", "-addr", v4.String()+":9000", "-for", "30s")
		if err != nil {
			r.Error = err.Error()
		}
		held <- r
	}()
	eventually(t, 15*time.Second, func() error {
		table := kubectl(t, "exec", "-n", ns, "server", "--", "/bin/testapp", "cat", "/proc/net/tcp", "/proc/net/tcp6")
		if countEstablished(table, ":2328") == 0 {
			return fmt.Errorf("the connection that is to be held is not open yet")
		}
		return nil
	})

	kubectl(t, "label", "namespace", ns, "istio.io/dataplane-mode=ambient")
	wantCaptured(t, ns, "client", true)
	wantCaptured(t, ns, "server", true)
	wantMeshed(t, ns, "client", true)
	kubectl(t, "label", "namespace", ns, "istio.io/dataplane-mode-")
	wantCaptured(t, ns, "client", false)
	wantMeshed(t, ns, "client", false)
	if got := try(t, ns, "client", "get", "http://server/"); !got.OK {
		t.Errorf("after leaving the mesh: got %+v, want an answer", got)
	}
	if r := <-held; !r.OK {
		t.Errorf("a connection that was open before the label: got %+v, want it to survive", r)
	}
}

// A pod's own label wins over its namespace's; hostNetwork pods and unknown
// values are left alone; a pod made in a labelled namespace is captured from
// its first packet.
func TestWhoIsCaptured(t *testing.T) {
	const in, out = "labelled", "unlabelled"
	y := namespaceYAML(in, "ambient") + namespaceYAML(out, "") + namespaceYAML("misspelt", "ambiant")
	for _, ns := range []string{in, out, "misspelt"} {
		y += podYAML(ns, "plain", "node1", "args: [sleep]")
	}
	y += strings.ReplaceAll(podYAML(in, "none", "node1", "args: [sleep]"), "labels: {app: none}", "labels: {app: none, istio.io/dataplane-mode: none}")
	y += strings.ReplaceAll(podYAML(out, "ambient", "node2", "args: [sleep]"), "labels: {app: ambient}", "labels: {app: ambient, istio.io/dataplane-mode: ambient}")
	y += strings.ReplaceAll(podYAML(in, "host", "node2", "args: [sleep]"), "nodeName: node2", "nodeName: node2\n  hostNetwork: true")
	apply(t, y)
	apply(t, peerAuthentication("v1", "default", "STRICT"))
	for _, r := range []struct {
		ns, pod string
		want    bool
	}{
		{in, "plain", true}, {in, "none", false}, {in, "host", false},
		{out, "plain", false}, {out, "ambient", true}, {"misspelt", "plain", false},
	} {
		t.Run(r.ns+"/"+r.pod, func(t *testing.T) {
			kubectl(t, "wait", "-n", r.ns, "--for=condition=Ready", "pod/"+r.pod, "--timeout=60s")
			wantCaptured(t, r.ns, r.pod, r.want)
			wantMeshed(t, r.ns, r.pod, r.want)
		})
	}
	t.Run("the log names the unknown value", func(t *testing.T) {
		eventually(t, 10*time.Second, func() error {
			if log := kubectl(t, "logs", "-n", "weft-system", "-l", "app=ztunnel", "-c", "weft-node", "--tail=1000"); !strings.Contains(log, "ambiant") {
				return fmt.Errorf("no line about the label value %q", "ambiant")
			}
			return nil
		})
	})
}

// Probes of every kind pass under STRICT: the pod becomes ready and is not
// restarted.
func TestProbesUnderStrict(t *testing.T) {
	apply(t, peerAuthentication("v1", "default", "STRICT"))
	probes := map[string]string{
		"http": "httpGet: {port: 8080, path: /}",
		"tcp":  "tcpSocket: {port: 9000}",
		"grpc": "grpc: {port: 9090}",
		"exec": "exec: {command: [/bin/testapp, exec-probe]}",
	}
	var y string
	for kind, p := range probes {
		for _, node := range []string{"node1", "node2"} {
			y += podYAML(meshed, "probe-"+kind+"-"+node, node, fmt.Sprintf(`args: [server]
    readinessProbe: {%[1]s, periodSeconds: 1, failureThreshold: 1}
    livenessProbe: {%[1]s, periodSeconds: 1, failureThreshold: 2}`, p))
		}
	}
	apply(t, y)
	for kind := range probes {
		for _, node := range []string{"node1", "node2"} {
			t.Run(kind+" on "+node, func(t *testing.T) {
				pod := "probe-" + kind + "-" + node
				kubectl(t, "wait", "-n", meshed, "--for=condition=Ready", "pod/"+pod, "--timeout=60s")
				wantCaptured(t, meshed, pod, true)
				ready := kubectl(t, "get", "pod", "-n", meshed, pod, "-o", `jsonpath={.status.conditions[?(@.type=="Ready")].lastTransitionTime}`)
				since, err := time.Parse(time.RFC3339, strings.TrimSpace(ready))
				if err != nil {
					t.Fatal(err)
				}
				// Several liveness probes must have passed since it was ready.
				eventually(t, 20*time.Second, func() error {
					got := kubectl(t, "get", "pod", "-n", meshed, pod, "-o", `jsonpath={.status.containerStatuses[0].restartCount} {.status.containerStatuses[0].ready}`)
					if got != "0 true" {
						t.Fatalf("restarts and readiness are %q, want 0 true", got)
					}
					if age := time.Since(since); age < 6*time.Second {
						return fmt.Errorf("ready for %v only", age)
					}
					return nil
				})
			})
		}
	}
}
