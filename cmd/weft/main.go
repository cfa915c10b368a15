// Weft installs the mesh in a cluster, removes it, and says how it is.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

// version is set when a release is built.
var version = "dev"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
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
		fmt.Fprintln(errOut, "weft:", err)
		return 1
	}
	return 0
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
	root.AddCommand(installCommand(&to), uninstallCommand(&to), statusCommand(&to), versionCommand(&to))
	return root
}
