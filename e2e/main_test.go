// Package e2e tests Weft on a real two-node Kubernetes, as its users meet it:
// through kubectl, the weft command, and the wire.
package e2e

import (
	"context"
	"flag"
	"fmt"
	"os"
	"testing"
	"time"

	"k8s.io/client-go/kubernetes"

	"github.com/weft-mesh/weft/e2e/cluster"
	"github.com/weft-mesh/weft/e2e/failed"
	"github.com/weft-mesh/weft/e2e/install"
)

var (
	keep = flag.Bool("keep", false, "leave the cluster up after the tests, and use one that is up")
	id   = flag.String("id", "test", "name of the cluster")
)

// world is what the tests run in; TestMain makes it.
var world struct {
	c    *cluster.Cluster
	kube *kubernetes.Clientset // with every right
	a    install.Artifacts
}

func TestMain(m *testing.M) {
	flag.Parse()
	if testing.Short() {
		fmt.Println("e2e: nothing runs with -short")
		os.Exit(0)
	}
	os.Exit(run(m))
}

func run(m *testing.M) (code int) {
	ctx, cancel := context.WithTimeout(context.Background(), 80*time.Minute)
	defer cancel()
	var err error
	world.c, err = cluster.Up(ctx, cluster.Options{ID: *id, Out: os.Stdout})
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	if !*keep {
		defer func() {
			if err := world.c.Down(context.Background()); err != nil {
				fmt.Fprintln(os.Stderr, "e2e: remove the cluster:", err)
				code = 1
			}
		}()
	}
	if world.kube, err = kubernetes.NewForConfig(world.c.RESTConfig()); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	start := time.Now()
	if world.a, err = install.Build(ctx, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	fmt.Printf("e2e: built Weft in %v\n", time.Since(start).Round(time.Second))
	start = time.Now()
	if out, err := world.a.Install(ctx, world.c, "--set", "node.startupTaint.enabled=true"); err != nil {
		fmt.Fprintf(os.Stderr, "e2e: %v\n%s", err, out)
		world.c.Dump(ctx, os.Stderr)
		return 1
	}
	fmt.Printf("e2e: installed Weft in %v\n", time.Since(start).Round(time.Second))
	if err := makeApps(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "e2e: make the applications:", err)
		world.c.Dump(ctx, os.Stderr)
		return 1
	}
	code, said, err := failed.Watch(m.Run)
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e: the output of the tests:", err)
		code = 1
	}
	if code != 0 {
		world.c.Dump(ctx, os.Stderr)
		// Nobody finds them above the dump.
		said.Report(os.Stdout, "e2e: what failed")
	}
	return code
}
