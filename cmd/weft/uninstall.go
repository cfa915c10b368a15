package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

func uninstallCommand(to *target) *cobra.Command {
	var yes, crds bool
	var wait time.Duration
	c := &cobra.Command{
		Use:   "uninstall",
		Short: "Take every pod out of the mesh and remove Weft",
		Long: `Uninstall deletes the DaemonSet first and waits: each node's agent lets its
pods go, so that their traffic is direct again, and restores the node's CNI
configuration. Then it removes the rest. Pods are not restarted. Policies and
their definitions stay unless --crds is given, those of the Gateway API always.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !yes && !confirm(cmd.Context(), cmd.InOrStdin(), cmd.OutOrStdout(), to.namespace, crds) {
				return errors.New("nothing was removed")
			}
			return uninstall(cmd.Context(), cmd.OutOrStdout(), to, crds, wait)
		},
	}
	f := c.Flags()
	f.BoolVarP(&yes, "yes", "y", false, "do not ask")
	f.BoolVar(&crds, "crds", false, "also delete the definitions of AuthorizationPolicy, PeerAuthentication, VirtualService, DestinationRule, ServiceEntry and WorkloadEntry, and with them every such object of the cluster")
	f.DurationVar(&wait, "wait", 2*time.Minute, "longest wait for the nodes to let their pods go")
	return c
}

// confirm asks whether to go on.
func confirm(ctx context.Context, in io.Reader, out io.Writer, namespace string, crds bool) bool {
	what := "Weft"
	if crds {
		what = "Weft, and every AuthorizationPolicy, PeerAuthentication, VirtualService, DestinationRule, ServiceEntry and WorkloadEntry of the cluster"
	}
	return ask(ctx, in, out, fmt.Sprintf("This removes %s from namespace %s. Traffic of meshed pods will be in clear. Type yes to go on: ", what, namespace))
}

// ask asks a question. Anything but "yes" is no, and so is the end of ctx; the
// reader of in is left behind then, because a read cannot be ended.
func ask(ctx context.Context, in io.Reader, out io.Writer, question string) bool {
	fmt.Fprint(out, question)
	answer := make(chan string, 1)
	go func() {
		line, _ := bufio.NewReader(in).ReadString('\n')
		answer <- strings.TrimSpace(line)
	}()
	select {
	case line := <-answer:
		return line == "yes"
	case <-ctx.Done():
		fmt.Fprintln(out)
		return false
	}
}

func uninstall(ctx context.Context, out io.Writer, to *target, crds bool, wait time.Duration) error {
	k, err := to.connect(ctx)
	if err != nil {
		return err
	}
	// Only names and kinds matter here, so any registry will do.
	r, err := render(to.namespace, "", settings{registry: "unused"})
	if err != nil {
		return err
	}
	there, err := k.traces(ctx, to.namespace, r)
	if err != nil {
		return err
	}
	if !there && !crds {
		return fmt.Errorf("there is no Weft in namespace %s, and nothing was removed: name another namespace with -n", to.namespace)
	}
	if err := k.releaseNodes(ctx, out, to.namespace, wait); err != nil {
		return err
	}
	doomed := slices.Clone(r.objects)
	slices.Reverse(doomed)
	if crds {
		doomed = append(doomed, r.crds...)
	}
	n := 0
	for _, o := range doomed {
		gone, err := k.remove(ctx, o, metav1.DeletePropagationForeground)
		if err != nil {
			return fmt.Errorf("%w: run uninstall again to go on from here", err)
		}
		if gone {
			n++
		}
	}
	fmt.Fprintf(out, "%d objects deleted\n", n)
	roots, err := k.removeRoots(ctx)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "Root certificate removed from %d namespaces\n", roots)
	return k.removeNamespace(ctx, out, to.namespace)
}

// traces reports whether anything of an installation is there, if only half of
// it: one of its objects, or the namespace that install has made.
func (k *kube) traces(ctx context.Context, namespace string, r rendering) (bool, error) {
	ns, err := k.typed.CoreV1().Namespaces().Get(ctx, namespace, metav1.GetOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return false, fmt.Errorf("read namespace %s: %w", namespace, err)
	}
	if err == nil && ns.Labels[managedBy] == "weft" {
		return true, nil
	}
	for _, o := range r.objects {
		res, err := k.resource(o)
		if err != nil {
			return false, err
		}
		_, err = res.Get(ctx, o.GetName(), metav1.GetOptions{})
		if err == nil {
			return true, nil
		}
		if !apierrors.IsNotFound(err) {
			return false, fmt.Errorf("look for %s: %w", describe(o), err)
		}
	}
	return false, nil
}

// releaseNodes deletes the DaemonSet and waits until its last pod is gone: by
// then each agent has let its pods go.
func (k *kube) releaseNodes(ctx context.Context, out io.Writer, namespace string, wait time.Duration) error {
	ds := &unstructured.Unstructured{Object: map[string]any{"apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": map[string]any{"name": "ztunnel", "namespace": namespace}}}
	if _, err := k.remove(ctx, ds, metav1.DeletePropagationForeground); err != nil {
		return err
	}
	err := await(ctx, out, wait, func(ctx context.Context) (bool, string, error) {
		pods, err := k.typed.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: "app=ztunnel"})
		if err != nil {
			return false, "", err
		}
		return len(pods.Items) == 0, waitingFor(pods.Items), nil
	})
	if err != nil {
		return fmt.Errorf("wait for the nodes: %w: look at the logs of the pods that remain (kubectl logs -n %s -l app=ztunnel -c weft-node); "+
			"if a node is down for good, delete it (kubectl delete node NAME); then run uninstall again", err, namespace)
	}
	fmt.Fprintln(out, "Every node has let its pods go; their traffic is direct")
	return nil
}

// waitingFor says which nodes still have a pod.
func waitingFor(pods []corev1.Pod) string {
	const most = 5
	nodes := map[string]bool{}
	for _, p := range pods {
		nodes[p.Spec.NodeName] = true
	}
	names := slices.Sorted(maps.Keys(nodes))
	if n := len(names) - most; n > 0 {
		names = append(names[:most], fmt.Sprintf("and %d more", n))
	}
	return "waiting for nodes to let their pods go: " + strings.Join(names, ", ")
}

// removeRoots deletes the root certificate's ConfigMap from every namespace, where
// Weft has made it.
func (k *kube) removeRoots(ctx context.Context) (int, error) {
	list, err := k.typed.CoreV1().ConfigMaps("").List(ctx, metav1.ListOptions{LabelSelector: managedBy + "=weft", FieldSelector: "metadata.name=istio-ca-root-cert"})
	if err != nil {
		return 0, fmt.Errorf("look for root certificates: %w", err)
	}
	for _, m := range list.Items {
		if err := k.typed.CoreV1().ConfigMaps(m.Namespace).Delete(ctx, m.Name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
			return 0, fmt.Errorf("delete the root certificate of namespace %s: %w", m.Namespace, err)
		}
	}
	return len(list.Items), nil
}

// removeNamespace deletes the namespace, with the certificate authority in
// it, if install has made it, and waits until it is gone.
func (k *kube) removeNamespace(ctx context.Context, out io.Writer, name string) error {
	ns, err := k.typed.CoreV1().Namespaces().Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		fmt.Fprintln(out, "Weft is removed")
		return nil
	}
	if err != nil {
		return fmt.Errorf("read namespace %s: %w", name, err)
	}
	if ns.Labels[managedBy] != "weft" {
		fmt.Fprintf(out, "Weft is removed; namespace %s was not made by weft and stays, and in it the Secret weft-ca-secret\n", name)
		return nil
	}
	if _, err := k.remove(ctx, namespaceObject(name), metav1.DeletePropagationBackground); err != nil {
		return err
	}
	err = await(ctx, out, time.Minute, func(ctx context.Context) (bool, string, error) {
		_, err := k.typed.CoreV1().Namespaces().Get(ctx, name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return true, "", nil
		}
		return false, "waiting for namespace " + name + " to be gone", err
	})
	if err != nil {
		return fmt.Errorf("wait for namespace %s: %w", name, err)
	}
	fmt.Fprintf(out, "Namespace %s deleted; Weft is removed\n", name)
	return nil
}
