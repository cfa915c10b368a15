package cluster

import (
	"context"
	_ "embed"
	"fmt"
	"os/exec"
	"strings"
	"time"
)

//go:embed coredns.yaml
var corednsManifest string

// startDNS installs CoreDNS and waits until it is ready.
func (c *Cluster) startDNS(ctx context.Context) error {
	if _, err := c.KubectlInput(ctx, corednsManifest, "apply", "-f", "-"); err != nil {
		return err
	}
	_, err := c.Kubectl(ctx, "rollout", "status", "-n", "kube-system", "deployment/coredns", "--timeout=120s")
	return err
}

// checkServices waits until, on every node, the API server answers at its
// Service's address and the cluster's DNS at both of its own: kube-proxy needs
// a moment after the pods are ready.
func (c *Cluster) checkServices(ctx context.Context) error {
	const name = "kubernetes.default.svc.cluster.local"
	app := c.record.Programs.TestApp
	for n := 1; n <= nodes; n++ {
		for _, argv := range [][]string{
			{app, "get", "-insecure", "https://" + apiServiceIP + "/readyz"},
			{app, "lookup", "-server", DNSAddress4, name},
			{app, "lookup", "-server", DNSAddress6, name},
		} {
			err := c.waitFor(ctx, func(ctx context.Context) error {
				ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
				defer cancel()
				return quietly(c.NodeCommand(ctx, NodeName(n), argv...))
			})
			if err != nil {
				return fmt.Errorf("on %s: %s: %w", NodeName(n), strings.Join(argv[1:], " "), err)
			}
		}
	}
	return nil
}

// quietly runs a command; the error holds what it wrote.
func quietly(cmd *exec.Cmd) error {
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: %s", err, strings.TrimSpace(string(out)))
	}
	return nil
}
