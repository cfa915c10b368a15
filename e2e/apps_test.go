package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// The applications that most tests use: two namespaces in the mesh, one
// outside of it. "client" runs on node1; a server runs on each node.
const (
	meshed  = "meshed"
	outside = "outside"
)

// patience is how long a test waits for what takes seconds: a machine may be
// slow, or have other things to do. What has to be quick is measured.
const patience = 90 * time.Second

// makeApps makes both namespaces and waits until their pods are ready and the
// meshed ones captured.
func makeApps(ctx context.Context) error {
	var y strings.Builder
	y.WriteString(namespaceYAML(meshed, "ambient") + namespaceYAML(outside, ""))
	for _, ns := range []string{meshed, outside} {
		y.WriteString(podYAML(ns, "client", "node1", "args: [sleep]"))
		y.WriteString(podYAML(ns, "near", "node1", "args: [server]"))
		y.WriteString(podYAML(ns, "far", "node2", "args: [server]"))
		for _, name := range []string{"near", "far"} {
			y.WriteString(serviceYAML(ns, name, name, ""))
			y.WriteString(serviceYAML(ns, name+"-headless", name, "clusterIP: None"))
		}
	}
	if _, err := world.c.KubectlInput(ctx, y.String(), "apply", "-f", "-"); err != nil {
		return err
	}
	for _, ns := range []string{meshed, outside} {
		if _, err := world.c.Kubectl(ctx, "wait", "-n", ns, "--for=condition=Ready", "pod", "--all", "--timeout=90s"); err != nil {
			return err
		}
	}
	for _, p := range []string{"client", "near", "far"} {
		if _, err := world.c.Kubectl(ctx, "wait", "-n", meshed, "pod/"+p, "--timeout=60s",
			`--for=jsonpath={.metadata.annotations.ambient\.istio\.io/redirection}=enabled`); err != nil {
			return fmt.Errorf("pod %s is not captured: %w", p, err)
		}
	}
	return nil
}

func namespaceYAML(name, mode string) string {
	labels := ""
	if mode != "" {
		labels = ", labels: {istio.io/dataplane-mode: " + mode + "}"
	}
	return fmt.Sprintf("---\napiVersion: v1\nkind: Namespace\nmetadata: {name: %s%s}\n", name, labels)
}

// podYAML is a pod with a service account of its own name. Spec is the rest of
// its container, in flow or block style at the right depth.
func podYAML(ns, name, node, container string, more ...string) string {
	meta := ""
	for _, m := range more {
		meta += "\n  " + m
	}
	return fmt.Sprintf(`---
apiVersion: v1
kind: ServiceAccount
metadata: {name: %[2]s, namespace: %[1]s}
---
apiVersion: v1
kind: Pod
metadata:
  name: %[2]s
  namespace: %[1]s
  labels: {app: %[2]s}%[5]s
spec:
  nodeName: %[3]s
  serviceAccountName: %[2]s
  terminationGracePeriodSeconds: 1
  containers:
  - name: app
    image: weft.test/testapp:1
    imagePullPolicy: Never
    %[4]s
`, ns, name, node, container, meta)
}

func serviceYAML(ns, name, app, spec string) string {
	return fmt.Sprintf(`---
apiVersion: v1
kind: Service
metadata: {name: %s, namespace: %s}
spec:
  %s
  ipFamilyPolicy: RequireDualStack
  selector: {app: %s}
  ports:
  - {name: http, port: 80, targetPort: 8080}
  - {name: tcp-echo, port: 9000}
  - {name: tcp-banner, port: 9001}
`, name, ns, spec, app)
}

// kubectl runs kubectl and fails the test when it does.
func kubectl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := world.c.Kubectl(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// apply applies YAML and deletes it again when the test ends.
func apply(t *testing.T, yaml string) {
	t.Helper()
	if _, err := world.c.KubectlInput(t.Context(), yaml, "apply", "-f", "-"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := world.c.KubectlInput(context.Background(), yaml, "delete", "--ignore-not-found", "--wait=false", "-f", "-"); err != nil {
			t.Error(err)
		}
	})
}

// ready waits until all pods of a namespace are ready. Those that a test before
// has deleted may still be going.
func ready(t *testing.T, ns string) {
	t.Helper()
	poll(t, 2*time.Minute, func() error {
		pods, err := world.kube.CoreV1().Pods(ns).List(t.Context(), metav1.ListOptions{})
		if err != nil {
			return err
		}
		waits := []string{}
		for _, p := range pods.Items {
			is := slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
				return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
			})
			if !is && p.DeletionTimestamp == nil {
				waits = append(waits, fmt.Sprintf("%s (%s)", p.Name, p.Status.Phase))
			}
		}
		if len(waits) > 0 {
			return fmt.Errorf("not ready in %s: %s", ns, strings.Join(waits, ", "))
		}
		return nil
	})
}

// addresses returns a pod's addresses, IPv4 first.
func addresses(t *testing.T, ns, pod string) (v4, v6 netip.Addr) {
	t.Helper()
	for f := range strings.FieldsSeq(kubectl(t, "get", "pod", "-n", ns, pod, "-o", "jsonpath={.status.podIPs[*].ip}")) {
		a := netip.MustParseAddr(f)
		if a.Is4() {
			v4 = a
		} else {
			v6 = a
		}
	}
	if !v4.IsValid() || !v6.IsValid() {
		t.Fatalf("pod %s/%s has addresses %v and %v, want one of each family", ns, pod, v4, v6)
	}
	return v4, v6
}

// clusterIPs returns a service's addresses, IPv4 first.
func clusterIPs(t *testing.T, ns, service string) (v4, v6 netip.Addr) {
	t.Helper()
	for f := range strings.FieldsSeq(kubectl(t, "get", "service", "-n", ns, service, "-o", "jsonpath={.spec.clusterIPs[*]}")) {
		a := netip.MustParseAddr(f)
		if a.Is4() {
			v4 = a
		} else {
			v6 = a
		}
	}
	return v4, v6
}

// A reply is what the test program says of one try.
type reply struct {
	OK     bool
	Status int
	Server string // the server's pod
	Remote string // the client as the server saw it
	Bytes  int
	Echoes int
	Banner string
	Error  string
	End    int64 // when it was over, in nanoseconds since 1970
}

// try runs a verb of the test program in a pod. It fails the test only when
// the verb could not be run at all.
func try(t *testing.T, ns, pod string, args ...string) reply {
	t.Helper()
	r, err := tryQuietly(t.Context(), ns, pod, args...)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// tryQuietly is try for who looks at the error himself. Where the verb said
// nothing it did not run: the container runtime fails now and then when a
// machine is busy, and is asked again.
func tryQuietly(ctx context.Context, ns, pod string, args ...string) (r reply, err error) {
	for range 3 {
		var out string
		out, err = world.c.Kubectl(ctx, append([]string{"exec", "-n", ns, pod, "--", "/bin/testapp"}, args...)...)
		for line := range strings.Lines(out) {
			if json.Unmarshal([]byte(line), &r) == nil {
				return r, nil
			}
		}
		err = fmt.Errorf("testapp %s in %s/%s said nothing: %w\n%s", strings.Join(args, " "), ns, pod, err, out)
		if ctx.Err() != nil {
			break
		}
	}
	return reply{}, err
}

// eventually asks until hold says nil, or the limit is over; then the test
// fails with what it said last.
func eventually(t *testing.T, limit time.Duration, hold func() error) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for {
		err := hold()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %v", limit, err)
		}
	}
}
