package cluster

import (
	"context"
	"fmt"
	"io"
	"time"
)

// Status writes what runs of the cluster, and what does not, for a person. The
// error says that something does not.
func (c *Cluster) Status(ctx context.Context, w io.Writer) error {
	fmt.Fprintf(w, "cluster %s, made %s ago, Kubernetes %s\n", c.ID, time.Since(c.record.Created).Round(time.Second), kubernetesVersion)
	fmt.Fprintf(w, "state      %s\nkubeconfig %s\n\n", c.State, c.Kubeconfig)
	var down []string
	names := controlProcesses()
	for n := 1; n <= nodes; n++ {
		names = append(names, NodeName(n))
	}
	for _, name := range names {
		state := "does not run"
		if p := c.process(name); p.Running() {
			state = fmt.Sprintf("runs, process %d", p.PID)
		} else {
			down = append(down, name)
		}
		fmt.Fprintf(w, "%-26s %s\n", name, state)
	}
	if len(down) > 0 {
		return fmt.Errorf("%v do not run: `weft-cluster up` mends that", down)
	}
	out, err := c.Kubectl(ctx, "get", "nodes,pods", "-A", "-o", "wide", "--request-timeout=10s")
	fmt.Fprintf(w, "\n%s", out)
	return err
}
