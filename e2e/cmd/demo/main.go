// Demo shows Weft at work on a real Kubernetes: a namespace is labelled, and
// its live traffic turns from plain text into mutual TLS between identities.
//
// It makes everything it needs, and fails if one step does not hold. The
// cluster stays up afterwards.
package main

import (
	"context"
	_ "embed"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/weft-mesh/weft/e2e/cluster"
	"github.com/weft-mesh/weft/e2e/install"
)

//go:embed shop.yaml
var shopYAML string

//go:embed policy.yaml
var policyYAML string

func main() {
	id := flag.String("id", "demo", "name of the cluster")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	d := &demo{id: *id, start: time.Now(), out: os.Stdout}
	if err := d.run(ctx); err != nil {
		fmt.Fprintf(os.Stderr, "\ndemo: %v\n", err)
		if !errors.Is(err, context.Canceled) {
			fmt.Fprintln(os.Stderr, "The cluster is left as it is, so that you can look; `make demo-down` removes it.")
		}
		os.Exit(1)
	}
}

// run tells the whole story, step by step. Each step returns an error when what it
// says does not hold.
func (d *demo) run(ctx context.Context) error {
	steps := []struct {
		title string
		do    func(context.Context) error
	}{
		{"A real Kubernetes with two nodes, on this machine", d.cluster},
		{"Weft, built from this checkout and installed", d.weft},
		{"A shop: a catalog, a storefront that asks it, a visitor", d.shop},
		{"Before: anyone on the wire can read the orders", d.before},
		{"The label: two namespaces join the mesh, no pod restarts", d.label},
		{"Who talks to whom: ztunnel's access log", d.identities},
		{"A policy: the storefront may ask, the visitor may not", d.policy},
		{"The label comes off, and traffic is direct again", d.unlabel},
		{"The count", d.count},
	}
	for i, s := range steps {
		d.title(fmt.Sprintf("%d. %s", i+1, s.title))
		if err := s.do(ctx); err != nil {
			return fmt.Errorf("step %d (%s): %w", i+1, s.title, err)
		}
	}
	d.farewell()
	return nil
}

func (d *demo) cluster(ctx context.Context) (err error) {
	d.say("etcd, API server, controllers, scheduler, and two nodes with kubelet, containerd and kube-proxy.")
	d.say("Node 1 has hybrid cgroups and kube-proxy on nftables, node 2 cgroup v2 and iptables.")
	d.c, err = cluster.Up(ctx, cluster.Options{ID: d.id, Out: d.out})
	return err
}

func (d *demo) weft(ctx context.Context) error {
	d.say("Building the images and the weft command ...")
	a, err := install.Build(ctx, d.out)
	if err != nil {
		return err
	}
	d.say("weft install ...")
	out, err := a.Install(ctx, d.c)
	if err != nil {
		return err
	}
	d.quote(out)
	d.a = a
	out, err = a.Weft(ctx, d.c, "status")
	if err != nil {
		return err
	}
	d.quote(out)
	return nil
}

func (d *demo) farewell() {
	fmt.Fprintf(d.out, `
Done in %s. The cluster is still up, with Weft in it:

  cd e2e && go run ./cmd/weft-cluster --id %s kubectl get pods -A -o wide
  cd e2e && go run ./cmd/weft-cluster --id %s kubectl label ns shop istio.io/dataplane-mode=ambient
  make demo-down        removes all of it
`, time.Since(d.start).Round(time.Second), d.id, d.id)
}
