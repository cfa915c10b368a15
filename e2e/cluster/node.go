package cluster

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	corev1 "k8s.io/api/core/v1"

	"github.com/weft-mesh/weft/e2e/cluster/internal/enter"
	"github.com/weft-mesh/weft/e2e/cluster/internal/nodespec"
)

func (c *Cluster) nodeDir(n int) string { return filepath.Join(c.State, NodeName(n)) }

// startNodes starts the nodes that do not run. A node that ran before comes
// back empty; what the API server still believes of it is taken away first.
func (c *Cluster) startNodes(ctx context.Context) error {
	for n := 1; n <= nodes; n++ {
		if c.process(NodeName(n)).Running() {
			continue
		}
		if err := c.removeNode(ctx, n); err != nil {
			return err
		}
		if err := c.startNode(ctx, n); err != nil {
			return fmt.Errorf("start %s: %w", NodeName(n), err)
		}
	}
	return nil
}

// crashedNodes reports whether a node has run and does not any more.
func (c *Cluster) crashedNodes() bool {
	for n := 1; n <= nodes; n++ {
		if _, err := os.Stat(c.nodeDir(n)); err == nil && !c.process(NodeName(n)).Running() {
			return true
		}
	}
	return false
}

// forgetNodes removes crashed nodes and their pods from the API server.
func (c *Cluster) forgetNodes(ctx context.Context) error {
	client, err := c.client()
	if err != nil {
		return err
	}
	for n := 1; n <= nodes; n++ {
		if c.process(NodeName(n)).Running() {
			continue
		}
		pods, err := client.CoreV1().Pods("").List(ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=" + NodeName(n)})
		if err != nil {
			return err
		}
		for _, p := range pods.Items {
			err := client.CoreV1().Pods(p.Namespace).Delete(ctx, p.Name, *metav1.NewDeleteOptions(0))
			if err != nil && !isNotFound(err) {
				return err
			}
		}
		err = client.CoreV1().Nodes().Delete(ctx, NodeName(n), metav1.DeleteOptions{})
		if err != nil && !isNotFound(err) {
			return err
		}
	}
	return nil
}

// startNode starts node n. Node 1 shows its pods the cgroup layout of the
// machine and uses nftables; node 2 shows version 2 only and uses iptables.
func (c *Cluster) startNode(ctx context.Context, n int) error {
	spec, err := c.describeNode(n)
	if err != nil {
		return err
	}
	file := filepath.Join(spec.Dir, "node.json")
	if err := spec.Write(file); err != nil {
		return err
	}
	return c.ensure(ctx, start{
		name: spec.Name, netns: c.netnsPath(spec.Name), cgroups: spec.Hierarchies, node: true,
		argv: []string{c.record.Programs.Node, "init", file},
	})
}

// describeNode decides what node n is to be, and makes its directories and
// cgroups.
func (c *Cluster) describeNode(n int) (nodespec.Node, error) {
	name := NodeName(n)
	pr := c.record.Programs
	spec := nodespec.Node{
		Name: name, StateDir: c.State, Dir: c.nodeDir(n), LogDir: c.LogDir(), ImageDir: c.imageDir(),
		ProgramDir: pr.dir(), Hyper: pr.Hyper, Self: pr.Node,
		Addresses: nodeAddresses(n), PodCIDRs: nodePodCIDRs(n),
		ClusterPod: []string{podCIDR4, podCIDR6}, ClusterDNS: []string{DNSAddress4},
		APIServer: fmt.Sprintf("%s:%d", controlIP4, apiPort),
		ClientCA:  c.pki("ca.crt"), ServingCert: c.pki(name + ".crt"), ServingKey: c.pki(name + ".key"),
		Kubeconfig: c.pki(name + ".kubeconfig"), ProxyConfig: c.pki("kube-proxy.kubeconfig"),
		ProxyMode: "nftables", CNI: "bridge",
	}
	var err error
	if spec.Runc, err = findProgram("runc"); err != nil {
		return spec, err
	}
	if spec.PluginDir, err = findPlugins(); err != nil {
		return spec, err
	}
	hs, err := hierarchies()
	if err != nil {
		return spec, err
	}
	if n == 2 {
		spec.UnifiedOnly, spec.ProxyMode, spec.CNI = true, "iptables", "ptp"
	}
	if _, err := os.Stat("/proc/sys/net/bridge"); err != nil {
		// Without br_netfilter a Service does not work between two pods on one
		// bridge, and loading it would change the machine's own bridges.
		spec.CNI = "ptp"
	}
	if len(hs) == 1 && hs[0].Options == "" {
		spec.UnifiedOnly = true
	}
	if err := os.MkdirAll(filepath.Join(spec.Dir, "root"), 0o755); err != nil {
		return spec, err
	}
	if spec.Hierarchies, err = c.makeCgroups(name, hs); err != nil {
		return spec, err
	}
	for _, h := range spec.Hierarchies {
		if h.Options == "" {
			spec.NoLimits = spec.UnifiedOnly && limitless(h.Dir)
		}
	}
	return spec, nil
}

// removeNode stops node n and removes everything of it but its network
// namespace.
func (c *Cluster) removeNode(ctx context.Context, n int) error {
	if err := c.haltNode(ctx, n); err != nil {
		return err
	}
	return os.RemoveAll(c.nodeDir(n))
}

// haltNode ends everything on node n; what it wrote to its disk stays.
func (c *Cluster) haltNode(ctx context.Context, n int) error {
	// Process 1 of a pid namespace takes all the others along, and they the
	// mounts.
	if err := c.stop(ctx, NodeName(n)); err != nil {
		return err
	}
	return c.removeCgroups(ctx, NodeName(n))
}

// Reboot switches a node ("node1") off and on again. Every process and pod ends
// at once, and what was in memory is gone: network namespaces, mounts, eBPF,
// /run, links, routes and rules. What was on disk is there again: containers
// and images, the kubelet's state, the network configuration with its plugins.
// Reboot returns when the node begins to start; its pods follow.
func (c *Cluster) Reboot(ctx context.Context, node string) error {
	for n := 1; n <= nodes; n++ {
		if NodeName(n) != node {
			continue
		}
		if err := c.haltNode(ctx, n); err != nil {
			return err
		}
		if err := enter.Net(c.netnsPath(node), clearNetwork); err != nil {
			return fmt.Errorf("clear the network of %s: %w", node, err)
		}
		return c.startNode(ctx, n)
	}
	return fmt.Errorf("reboot %s: there is no such node", node)
}

// clearNetwork removes what the programs of a node have made in its network
// namespace. The links to pods went with the pods.
func clearNetwork() error {
	for _, argv := range [][]string{{"ip", "link", "delete", "cni0"}, {"nft", "flush", "ruleset"}, {"conntrack", "-F"}} {
		path, err := findProgram(argv[0])
		if err != nil {
			return err
		}
		out, err := exec.Command(path, argv[1:]...).CombinedOutput()
		if err != nil && argv[0] == "nft" { // the others fail if there is nothing
			return fmt.Errorf("%v: %w: %s", argv, err, out)
		}
	}
	return nil
}

// NodeCommand returns a command that runs argv inside a node ("node1"), with the
// node's network, files and processes. If the node does not run, the command
// fails.
func (c *Cluster) NodeCommand(ctx context.Context, node string, argv ...string) *exec.Cmd {
	pid := strconv.Itoa(c.process(node).PID)
	args := append([]string{"--target", pid, "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--"}, argv...)
	return exec.CommandContext(ctx, "nsenter", args...)
}

// waitNodes waits until every node is ready.
func (c *Cluster) waitNodes(ctx context.Context) error {
	client, err := c.client()
	if err != nil {
		return err
	}
	for n := 1; n <= nodes; n++ {
		err := c.waitFor(ctx, func(ctx context.Context) error {
			if err := c.alive(NodeName(n)); err != nil {
				return stopWaiting(err)
			}
			node, err := client.CoreV1().Nodes().Get(ctx, NodeName(n), metav1.GetOptions{})
			if err != nil {
				return err
			}
			return nodeReady(node)
		})
		if err != nil {
			return fmt.Errorf("%s is not ready: %w; the end of its log:\n%s", NodeName(n), err, c.logTail(NodeName(n), 5))
		}
	}
	return nil
}

func nodeReady(n *corev1.Node) error {
	for _, cond := range n.Status.Conditions {
		if cond.Type == corev1.NodeReady {
			if cond.Status == corev1.ConditionTrue {
				return nil
			}
			return fmt.Errorf("%s: %s", cond.Reason, cond.Message)
		}
	}
	return fmt.Errorf("the kubelet has not said anything yet")
}
