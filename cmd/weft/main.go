// Weft installs the mesh in a cluster, removes it, and says how it is.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
)

// version is set when a release is built.
var version = "dev"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second ^C ends a command that does not listen to the first
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// run runs one command line and returns the exit code: 0 if all is well, 1 if
// the command failed or found something wrong.
func run(ctx context.Context, args []string, out, errOut io.Writer) int {
	root := command()
	root.SetArgs(args)
	root.SetOut(out)
	root.SetErr(errOut)
	if err := root.ExecuteContext(ctx); err != nil {
		fmt.Fprintln(errOut, "weft:", advise(err))
		return 1
	}
	return 0
}

// advise adds to an error what to do about it, where every command has the
// same advice.
func advise(err error) error {
	switch {
	case errors.Is(err, context.Canceled):
		return fmt.Errorf("interrupted: %w", err)
	case apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause):
		return fmt.Errorf("%w: wait until the namespace is gone (kubectl get namespaces), then run the command again", err)
	case apierrors.IsForbidden(err):
		return fmt.Errorf("%w: this needs the rights of a cluster admin; see who you are with kubectl auth whoami, and choose another --context", err)
	case apierrors.IsUnauthorized(err):
		return fmt.Errorf("%w: log in to the cluster again, or choose another --context", err)
	}
	return err
}

func command() *cobra.Command {
	root := &cobra.Command{
		Use:   "weft",
		Short: "An ambient service mesh: mutual TLS for labelled namespaces, without sidecars",
		Long: `Weft is an ambient service mesh for Kubernetes.

  weft install --image-registry registry.example.com/weft
  kubectl label namespace shop istio.io/dataplane-mode=ambient
  weft status`,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	var to target
	to.flags(root.PersistentFlags())
	root.AddCommand(installCommand(&to), uninstallCommand(&to), statusCommand(&to), waypointCommand(&to), releaseCommand(&to), checkCommand(), versionCommand(&to), hboneConformanceCommand())
	return root
}
