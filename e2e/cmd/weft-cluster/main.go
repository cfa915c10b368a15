// Weft-cluster runs a real two-node Kubernetes on this machine, for Weft's
// demo, its tests, and for trying things out.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/weft-mesh/weft/e2e/cluster"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := root().ExecuteContext(ctx)
	stop()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		os.Exit(max(1, exit.ExitCode()))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "weft-cluster:", err)
		os.Exit(1)
	}
}

func root() *cobra.Command {
	o := cluster.Options{Out: os.Stdout}
	cmd := &cobra.Command{
		Use:   "weft-cluster",
		Short: "a real two-node Kubernetes on this machine",
		Long: `weft-cluster runs a real two-node Kubernetes on this machine, for Weft's demo,
its tests, and for trying things out. It needs root, and Go to build Kubernetes
from source the first time, which takes about ten minutes. It leaves the
machine's network, cgroups and settings as they are.`,
		SilenceUsage:  true,
		SilenceErrors: true,
		// Flags before the verb are ours, also where those after it are not.
		TraverseChildren: true,
	}
	cmd.PersistentFlags().StringVar(&o.ID, "id", cluster.DefaultID, "name of the cluster; several can run at once")
	cmd.PersistentFlags().StringVar(&o.State, "state", "", "directory that holds all of the cluster (default out/cluster/ID)")
	cmd.PersistentFlags().StringVar(&o.Repo, "repo", "", "checkout of Weft to build from (default the one around the current directory)")
	cmd.AddCommand(up(&o), down(&o), status(&o), kubectl(&o), loadImage(&o), kubeconfig(&o), execNode(&o), logs(&o), dump(&o))
	return cmd
}

func up(o *cluster.Options) *cobra.Command {
	return &cobra.Command{
		Use: "up", Args: cobra.NoArgs,
		Short: "start the cluster, or what does not run of it",
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := cluster.Up(cmd.Context(), *o)
			if err != nil {
				return err
			}
			fmt.Printf("\ncluster %s is up; for example:\n  export KUBECONFIG=%s\n  cd e2e && go run ./cmd/weft-cluster --id %s kubectl get pods -A -o wide\n", c.ID, c.Kubeconfig, c.ID)
			return nil
		},
	}
}

func down(o *cluster.Options) *cobra.Command {
	return &cobra.Command{
		Use: "down", Args: cobra.NoArgs,
		Short: "remove the cluster with everything in it",
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := cluster.Find(*o)
			if errors.Is(err, cluster.ErrNone) {
				fmt.Println(err)
				return nil
			}
			if err != nil {
				return err
			}
			if err := c.Down(cmd.Context()); err != nil {
				return err
			}
			fmt.Printf("cluster %s is removed\n", c.ID)
			return nil
		},
	}
}

func status(o *cluster.Options) *cobra.Command {
	return &cobra.Command{
		Use: "status", Args: cobra.NoArgs,
		Short: "tell what runs",
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := cluster.Find(*o)
			if err != nil {
				return err
			}
			return c.Status(cmd.Context(), os.Stdout)
		},
	}
}

func kubectl(o *cluster.Options) *cobra.Command {
	return &cobra.Command{
		Use: "kubectl ARG...", DisableFlagParsing: true,
		Short: "run kubectl, of the cluster's own version, on the cluster",
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := cluster.Find(*o)
			if err != nil {
				return err
			}
			return become(c.KubectlCommand(cmd.Context(), args...))
		},
	}
}

func loadImage(o *cluster.Options) *cobra.Command {
	return &cobra.Command{
		Use: "load-image FILE...", Args: cobra.MinimumNArgs(1),
		Short: "import image archives into every node",
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := cluster.Find(*o)
			if err != nil {
				return err
			}
			return c.LoadImage(cmd.Context(), args...)
		},
	}
}

func kubeconfig(o *cluster.Options) *cobra.Command {
	return &cobra.Command{
		Use: "kubeconfig", Args: cobra.NoArgs,
		Short: "print the path of a kubeconfig that works from this machine",
		Long: `kubeconfig prints the path of an administrator's kubeconfig. The API server is
forwarded to a port of 127.0.0.1, so any client on this machine can use it:
  KUBECONFIG=$(weft-cluster kubeconfig) helm list -A`,
		RunE: func(*cobra.Command, []string) error {
			c, err := cluster.Find(*o)
			if err != nil {
				return err
			}
			fmt.Println(c.Kubeconfig)
			return nil
		},
	}
}

func execNode(o *cluster.Options) *cobra.Command {
	cmd := &cobra.Command{
		Use: "exec-node NODE -- COMMAND ARG...", Args: cobra.MinimumNArgs(1),
		Short: "run a command inside a node (1 or node1); a shell if none is given",
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := cluster.Find(*o)
			if err != nil {
				return err
			}
			node, argv := args[0], args[1:]
			if len(node) == 1 {
				node = "node" + node
			}
			if len(argv) > 0 && argv[0] == "--" {
				argv = argv[1:]
			}
			if len(argv) == 0 {
				argv = []string{"bash"}
			}
			return become(c.NodeCommand(cmd.Context(), node, argv...))
		},
	}
	cmd.Flags().SetInterspersed(false) // flags after NODE are the command's
	return cmd
}

func logs(o *cluster.Options) *cobra.Command {
	return &cobra.Command{
		Use: "logs [NAME]", Args: cobra.MaximumNArgs(1),
		Short: "print the log of a process of the cluster; without a name, list them",
		RunE: func(_ *cobra.Command, args []string) error {
			c, err := cluster.Find(*o)
			if err != nil {
				return err
			}
			if len(args) == 1 {
				b, err := os.ReadFile(filepath.Join(c.LogDir(), args[0]+".log"))
				if err != nil {
					return fmt.Errorf("%w (weft-cluster logs lists them)", err)
				}
				_, err = os.Stdout.Write(b)
				return err
			}
			files, err := filepath.Glob(filepath.Join(c.LogDir(), "*.log"))
			for _, f := range files {
				fmt.Println(f)
			}
			return err
		},
	}
}

func dump(o *cluster.Options) *cobra.Command {
	return &cobra.Command{
		Use: "dump", Args: cobra.NoArgs,
		Short: "print all that may explain a failure",
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := cluster.Find(*o)
			if err != nil {
				return err
			}
			c.Dump(cmd.Context(), os.Stdout)
			return nil
		},
	}
}

// become replaces this program by a command, so that terminals and signals
// work as if it had been called itself.
func become(cmd *exec.Cmd) error {
	if cmd.Err != nil {
		return cmd.Err
	}
	if cmd.Env == nil {
		cmd.Env = os.Environ()
	}
	return fmt.Errorf("run %s: %w", cmd.Path, syscall.Exec(cmd.Path, cmd.Args, cmd.Env))
}
