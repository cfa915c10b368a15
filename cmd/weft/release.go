package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// releaseAnnotation on a pod of ztunnel asks the agent in it to let every pod
// of its node go.
const releaseAnnotation = "node.weft.dev/release"

func releaseCommand(to *target) *cobra.Command {
	var yes bool
	var wait time.Duration
	c := &cobra.Command{
		Use:   "release NODE",
		Short: "Take every pod of one node out of the mesh, before the node is taken out of Weft",
		Long: `Release lets every pod of a node go, as uninstall does for all nodes: their
traffic is direct and in clear, and the node's CNI configuration is restored.
Do this before you take the node out of DaemonSet ztunnel (its node selector,
or the node's labels): a captured pod stays captured when its agent goes, and
without a ztunnel its traffic is blocked.

Labelled pods that come to the node later run outside the mesh. To take the
node back, delete its pod of DaemonSet ztunnel.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if !yes && !ask(cmd.Context(), cmd.InOrStdin(), cmd.OutOrStdout(), fmt.Sprintf("Traffic of meshed pods on node %s will be in clear. Type yes to go on: ", args[0])) {
				return errors.New("nothing was done")
			}
			k, err := to.connect(cmd.Context())
			if err != nil {
				return err
			}
			return k.release(cmd.Context(), cmd.OutOrStdout(), to.namespace, args[0], wait)
		},
	}
	c.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	c.Flags().DurationVar(&wait, "wait", time.Minute, "longest wait for the node to let its pods go")
	return c
}

// release asks the agents of a node to let its pods go, and waits until the
// one that works has.
func (k *kube) release(ctx context.Context, out io.Writer, namespace, node string, wait time.Duration) error {
	if _, err := k.typed.CoreV1().Nodes().Get(ctx, node, metav1.GetOptions{}); err != nil {
		return fmt.Errorf("look up node %s: %w", node, err)
	}
	mine, err := k.proxiesOn(ctx, namespace, node)
	if err != nil {
		return err
	}
	if len(mine) == 0 {
		return fmt.Errorf("node %s has no pod of DaemonSet ztunnel, so nobody can let its pods go: label the node so that the DaemonSet runs there, and run this again; or restart the captured pods on other nodes (kubectl drain)", node)
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": map[string]string{releaseAnnotation: "true"}}})
	if err != nil {
		return err
	}
	for _, p := range mine {
		_, err := k.typed.CoreV1().Pods(namespace).Patch(ctx, p.Name, types.MergePatchType, patch, metav1.PatchOptions{})
		if err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("ask the agent of node %s: %w", node, err)
		}
	}
	err = await(ctx, out, wait, func(ctx context.Context) (bool, string, error) {
		for _, p := range mine {
			a, err := k.agent(ctx, p)
			switch {
			case err != nil:
				return false, "", err
			case a.Released:
				return true, "", nil
			case !a.Standby:
				return false, fmt.Sprintf("waiting for %d pods to be let go", len(a.Pods)), nil
			}
		}
		return false, "waiting for the agent", nil
	})
	if err != nil {
		return fmt.Errorf("release node %s: %w: see kubectl logs -n %s %s -c weft-node", node, err, namespace, mine[0].Name)
	}
	fmt.Fprintf(out, "Node %s has let its pods go; their traffic is direct. Take the node out of the DaemonSet now, or delete pod %s to take the node back\n", node, mine[0].Name)
	return nil
}

// proxiesOn returns the pods of DaemonSet ztunnel on a node.
func (k *kube) proxiesOn(ctx context.Context, namespace, node string) ([]corev1.Pod, error) {
	list, err := k.typed.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: "app=ztunnel"})
	if err != nil {
		return nil, fmt.Errorf("list the pods of ztunnel: %w", err)
	}
	return slices.DeleteFunc(list.Items, func(p corev1.Pod) bool { return p.Spec.NodeName != node }), nil
}
