package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/weft-mesh/weft/e2e/cluster/internal/nodespec"
)

// A cluster of its own: interrupted while it comes up, brought up twice at
// once, used, broken, mended, removed.
func TestCluster(t *testing.T) {
	if testing.Short() {
		t.Skip("makes a whole cluster: not with -short")
	}
	if os.Geteuid() != 0 {
		t.Skip("makes namespaces, mounts and cgroups: not root")
	}
	o, err := Options{ID: fmt.Sprintf("self-%d", os.Getpid()), Out: &testOutput{t: t}}.complete()
	if err != nil {
		t.Fatal(err)
	}
	sweep(t, o)
	t.Cleanup(func() {
		if c, err := Find(o); err == nil {
			if t.Failed() {
				var b bytes.Buffer
				c.Dump(context.Background(), &b)
				t.Log(b.String())
			}
			if err := c.Down(context.Background()); err != nil {
				t.Error(err)
			}
		}
	})
	interrupt(t, o)
	c := upTwice(t, o)
	applyApps(t, c)
	t.Run("pod to pod, ClusterIP and DNS, both families", func(t *testing.T) { checkPaths(t, c) })
	t.Run("exec, logs and port-forward's API", func(t *testing.T) { checkStreams(t, c) })
	t.Run("nodes differ", func(t *testing.T) { checkNodes(t, c) })
	t.Run("a client that dials inside", func(t *testing.T) { checkClient(t, c) })
	t.Run("containerd comes back", func(t *testing.T) { restartContainerd(t, c) })
	t.Run("up mends what has crashed", func(t *testing.T) { mend(t, o, c) })
	t.Run("the machine is untouched", func(t *testing.T) { checkMachineUntouched(t) })
	t.Run("down leaves nothing", func(t *testing.T) { removeAll(t, o, c) })
}

// sweep removes the clusters of test processes that were killed.
func sweep(t *testing.T, o Options) {
	states, err := filepath.Glob(filepath.Join(o.Repo, "out", "cluster", "self-*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range states {
		pid, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(s), "self-"))
		if err != nil {
			continue
		}
		if _, err := nodespec.Find(pid); err == nil {
			continue
		}
		if c, err := Find(Options{State: s}); err == nil {
			if err := c.Down(t.Context()); err != nil {
				t.Error(err)
			}
		}
	}
}

// testOutput logs progress, a line at a time.
type testOutput struct {
	t    *testing.T
	mu   sync.Mutex
	line []byte
}

func (o *testOutput) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.line = append(o.line, b...)
	for {
		line, rest, ok := bytes.Cut(o.line, []byte("\n"))
		if !ok {
			return len(b), nil
		}
		o.t.Logf("%s", line)
		o.line = rest
	}
}

// cancelAt ends a context when a step begins.
type cancelAt struct {
	io.Writer
	step   string
	cancel context.CancelFunc
}

func (c cancelAt) Write(b []byte) (int, error) {
	if bytes.Contains(b, []byte(c.step)) {
		c.cancel()
	}
	return c.Writer.Write(b)
}

// interrupt ends an Up in the middle, as ^C does.
func interrupt(t *testing.T, o Options) {
	ctx, cancel := context.WithCancel(t.Context())
	o.Out = cancelAt{o.Out, "start the API server", cancel}
	if _, err := Up(ctx, o); !errors.Is(err, context.Canceled) {
		t.Fatalf("interrupted Up: got error %v, want %v", err, context.Canceled)
	}
	if _, err := Find(o); err != nil {
		t.Fatalf("an interrupted Up must leave a cluster to find: %v", err)
	}
}

// upTwice calls Up twice at once: both must succeed, with one cluster.
func upTwice(t *testing.T, o Options) *Cluster {
	type result struct {
		c   *Cluster
		err error
	}
	results := make(chan result)
	for range 2 {
		go func() {
			c, err := Up(t.Context(), o)
			results <- result{c, err}
		}()
		o.Out = &testOutput{t: t} // lines of the two must not mix
	}
	a, b := <-results, <-results
	if err := errors.Join(a.err, b.err); err != nil {
		t.Fatal(err)
	}
	if a.c.record.Token != b.c.record.Token {
		t.Fatalf("two Ups made two clusters, %s and %s", a.c.record.name(), b.c.record.name())
	}
	return a.c
}

const appsYAML = `
apiVersion: v1
kind: Service
metadata: {name: echo}
spec:
  ipFamilyPolicy: RequireDualStack
  selector: {app: echo}
  ports: [{port: 80, targetPort: 8080}]
---
apiVersion: v1
kind: Pod
metadata: {name: %[1]s, labels: {app: %[2]s}}
spec:
  nodeName: %[3]s
  terminationGracePeriodSeconds: 1
  containers:
  - name: app
    image: weft.test/testapp:1
    imagePullPolicy: Never
    args: [server]
    resources: {limits: {memory: 64Mi, cpu: 200m}}
    readinessProbe: {httpGet: {port: 8080, path: /}, periodSeconds: 1}
`

// applyApps makes a caller and a server on each node; the Service has the
// servers behind it.
func applyApps(t *testing.T, c *Cluster) {
	t.Helper()
	var y strings.Builder
	for _, node := range []string{"node1", "node2"} {
		fmt.Fprintf(&y, appsYAML+"---", "echo-"+node, "echo", node)
		fmt.Fprintf(&y, appsYAML+"---", "caller-"+node, "caller", node)
	}
	if _, err := c.KubectlInput(t.Context(), y.String(), "apply", "-f", "-"); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Kubectl(t.Context(), "wait", "pod", "--all", "--for=condition=Ready", "--timeout=90s"); err != nil {
		t.Fatal(err)
	}
}

// words runs kubectl and returns the words it printed.
func words(t *testing.T, c *Cluster, args ...string) []string {
	t.Helper()
	out, err := c.Kubectl(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Fields(out)
}

// getFrom requests a URL from a pod and returns who answered and whom he saw.
func getFrom(ctx context.Context, c *Cluster, pod, url string) (server, remote string, err error) {
	out, err := c.Kubectl(ctx, "exec", pod, "--", "/bin/testapp", "get", url)
	if err != nil {
		return "", "", fmt.Errorf("%w\n%s", err, out)
	}
	var r struct{ Server, Remote string }
	err = json.Unmarshal([]byte(out), &r)
	return r.Server, r.Remote, err
}

func urlOf(ip, port string) string {
	if strings.Contains(ip, ":") {
		ip = "[" + ip + "]"
	}
	return "http://" + ip + ":" + port + "/"
}

func checkPaths(t *testing.T, c *Cluster) {
	services := words(t, c, "get", "service", "echo", "-o", "jsonpath={.spec.clusterIPs[*]}")
	if len(services) != 2 {
		t.Fatalf("service addresses: got %v, want one of each family", services)
	}
	for _, from := range []string{"caller-node1", "caller-node2"} {
		own := words(t, c, "get", "pod", from, "-o", "jsonpath={.status.podIPs[*].ip}")
		for _, to := range []string{"echo-node1", "echo-node2"} {
			for i, ip := range words(t, c, "get", "pod", to, "-o", "jsonpath={.status.podIPs[*].ip}") {
				server, remote, err := getFrom(t.Context(), c, from, urlOf(ip, "8080"))
				if err != nil {
					t.Error(err)
					continue
				}
				if server != to || !strings.Contains(remote, own[i]) {
					t.Errorf("%s to %s at %s: answered by %q to %q, want %s to see %s", from, to, ip, server, remote, to, own[i])
				}
			}
		}
		for _, url := range []string{urlOf(services[0], "80"), urlOf(services[1], "80"), "http://echo/", "http://echo.default.svc.cluster.local/"} {
			wantBothServers(t, c, from, url)
		}
	}
}

// wantBothServers requests a Service until each server has answered once.
func wantBothServers(t *testing.T, c *Cluster, from, url string) {
	t.Helper()
	seen := map[string]bool{}
	for range 40 {
		server, _, err := getFrom(t.Context(), c, from, url)
		if err != nil {
			t.Error(err)
			return
		}
		seen[server] = true
		if seen["echo-node1"] && seen["echo-node2"] {
			return
		}
	}
	t.Errorf("%s to %s: answered by %v only, want both servers", from, url, seen)
}

func checkStreams(t *testing.T, c *Cluster) {
	for _, node := range []string{"node1", "node2"} {
		out, err := c.Kubectl(t.Context(), "logs", "echo-"+node)
		if err != nil || !strings.Contains(out, "HTTP on") {
			t.Errorf("logs of echo-%s: got %q, %v; want a line \"HTTP on ...\"", node, out, err)
		}
	}
	out, err := c.Command(t.Context(), c.record.Programs.Hyper, "kubectl", "get", "nodes", "-o", "name").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "node/node2") {
		t.Errorf("kubectl in the control plane's network: got %q, %v", out, err)
	}
}

// checkNodes checks what makes the two nodes different, and that a container's
// limits take effect where they can.
func checkNodes(t *testing.T, c *Cluster) {
	for node, want := range map[string]string{"node1": "nftables", "node2": "iptables"} {
		out, err := c.NodeCommand(t.Context(), node, "cat", "/etc/kubernetes/kube-proxy.yaml").Output()
		if err != nil || !strings.Contains(string(out), "mode: "+want) {
			t.Errorf("%s: kube-proxy's configuration is %q, %v; want mode %s", node, out, err, want)
		}
	}
	if _, err := c.NodeCommand(t.Context(), "node2", "cat", "/sys/fs/cgroup/cgroup.controllers").Output(); err != nil {
		t.Errorf("node2 does not show cgroup version 2 on /sys/fs/cgroup: %v", err)
	}
	for _, node := range []string{"node1", "node2"} {
		out, err := c.NodeCommand(t.Context(), node, "sh", "-c", "touch /opt/cni/bin/x && rm /opt/cni/bin/x && touch /etc/cni/net.d/x && rm /etc/cni/net.d/x && stat -f -c %T /sys/fs/bpf && test -r /sys/kernel/btf/vmlinux").CombinedOutput()
		if err != nil || strings.TrimSpace(string(out)) != "bpf_fs" {
			t.Errorf("%s: CNI directories writable, bpffs and BTF: got %q, %v", node, out, err)
		}
	}
}

func checkClient(t *testing.T, c *Cluster) {
	client, err := kubernetes.NewForConfig(c.RESTConfig())
	if err != nil {
		t.Fatal(err)
	}
	list, err := client.CoreV1().Nodes().List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, n := range list.Items {
		got = append(got, n.Name)
	}
	if want := []string{"node1", "node2"}; !slices.Equal(got, want) {
		t.Errorf("nodes: got %v, want %v", got, want)
	}
}

// restartContainerd kills containerd on a node: its init starts it again, and
// pods that run go on running.
func restartContainerd(t *testing.T, c *Cluster) {
	if out, err := c.NodeCommand(t.Context(), "node1", "pkill", "-KILL", "-x", "containerd").CombinedOutput(); err != nil {
		t.Fatalf("kill containerd: %v %s", err, out)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	err := c.waitFor(ctx, func(ctx context.Context) error {
		_, _, err := getFrom(ctx, c, "caller-node1", "http://echo/")
		return err
	})
	if err != nil {
		t.Errorf("exec into a pod after containerd was killed: %v", err)
	}
}

// mend kills one of each: a process of the control plane, the forwarder, a
// whole node. Up must bring them back, and the node's pods must run again.
func mend(t *testing.T, o Options, c *Cluster) {
	for _, name := range []string{apiserverName, forwardName, "node2"} {
		p := c.process(name)
		if err := syscall.Kill(p.PID, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		for p.Running() {
			if err := pause(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
	if _, err := Up(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	applyApps(t, c) // the node's own pods are gone with it
	if _, _, err := getFrom(t.Context(), c, "caller-node2", "http://echo/"); err != nil {
		t.Error(err)
	}
}

// checkMachineUntouched compares what the kubelet would like to change.
func checkMachineUntouched(t *testing.T) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, "/kubelet") || strings.Contains(line, "/containerd") {
			t.Errorf("the machine sees a mount of a node: %s", line)
		}
	}
	links, err := os.ReadDir("/sys/class/net")
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		if strings.HasPrefix(l.Name(), "node") || l.Name() == "cni0" {
			t.Errorf("the machine has a network link of a cluster: %s", l.Name())
		}
	}
}

func removeAll(t *testing.T, o Options, c *Cluster) {
	if err := c.Down(t.Context()); err != nil {
		t.Fatal(err)
	}
	name := c.record.name()
	if _, err := os.Stat(o.State); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("state directory after Down: got %v, want none", err)
	}
	if left, _ := filepath.Glob(filepath.Join(netnsDir, "*"+c.record.Token+"*")); len(left) > 0 {
		t.Errorf("network namespaces after Down: %v", left)
	}
	if left := c.cgroupDirs(""); len(left) > 0 {
		t.Errorf("cgroups after Down: %v", left)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, o.State) || strings.Contains(line, name) {
			t.Errorf("mount after Down: %s", line)
		}
	}
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err == nil && (bytes.Contains(b, []byte(o.State)) || bytes.Contains(b, []byte(name))) {
			t.Errorf("process after Down: %s: %s", f, bytes.ReplaceAll(b, []byte{0}, []byte(" ")))
		}
	}
	if _, err := Find(o); !errors.Is(err, ErrNone) {
		t.Errorf("Find after Down: got %v, want %v", err, ErrNone)
	}
}
