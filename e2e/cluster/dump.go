package cluster

import (
	"context"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// Dump writes to w what helps to understand a failure: the objects and events
// of the cluster, each node's network, and the end of every log. It writes what
// it can get within a minute.
func (c *Cluster) Dump(ctx context.Context, w io.Writer) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	for _, args := range []string{
		"get nodes -o wide",
		"get all,endpointslices -A -o wide",
		"get events -A --sort-by=.lastTimestamp",
		"describe pods -A",
	} {
		section(w, "kubectl "+args, c.KubectlCommand(ctx, strings.Fields(args)...))
	}
	c.dumpPods(ctx, w)
	for n := 1; n <= nodes; n++ {
		for _, argv := range []string{
			"ip -br address", "ip route", "ip -6 route", "ip rule", "ip -6 rule", "ss -tanp", "nft list ruleset",
			"ls -l /etc/cni/net.d /opt/cni/bin", "ps ax",
		} {
			section(w, NodeName(n)+": "+argv, c.NodeCommand(ctx, NodeName(n), strings.Fields(argv)...))
		}
	}
	logs, _ := filepath.Glob(filepath.Join(c.LogDir(), "*.log"))
	for _, l := range logs {
		fmt.Fprintf(w, "\n==== end of %s\n%s\n", l, tail(l, 40))
	}
}

// dumpPods writes the end of the logs of every container.
func (c *Cluster) dumpPods(ctx context.Context, w io.Writer) {
	out, err := c.Kubectl(ctx, "get", "pods", "-A", "-o", `jsonpath={range .items[*]}{.metadata.namespace} {.metadata.name}{"\n"}{end}`)
	if err != nil {
		fmt.Fprintln(w, err)
		return
	}
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) == 2 {
			section(w, "logs of "+f[0]+"/"+f[1],
				c.KubectlCommand(ctx, "logs", "-n", f[0], f[1], "--all-containers", "--prefix", "--tail=60"))
		}
	}
}

// section writes a command's output under a title.
func section(w io.Writer, title string, cmd *exec.Cmd) {
	out, err := cmd.CombinedOutput()
	fmt.Fprintf(w, "\n==== %s\n%s", title, out)
	if err != nil {
		fmt.Fprintln(w, err)
	}
}
