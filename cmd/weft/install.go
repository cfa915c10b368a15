package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// managedBy marks the namespace that install has made, so that uninstall
// deletes no other.
const managedBy = "app.kubernetes.io/managed-by"

func installCommand(to *target) *cobra.Command {
	var s settings
	var dryRun bool
	var wait time.Duration
	c := &cobra.Command{
		Use:   "install",
		Short: "Install Weft, or bring an installation to this version and these values",
		Long: `Install renders the Helm chart that is part of this binary and applies it.
It may be run again at any time: it changes what differs and keeps the rest,
including the certificate authority and every captured pod.`,
		Example: `  weft install --image-registry registry.example.com/weft --image-tag v0.1.0
  weft install --image-registry registry.example.com/weft --set ztunnel.sameNode=direct
  weft install --image-registry registry.example.com/weft --dry-run > weft.yaml`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if dryRun {
				r, err := render(to.namespace, "", s)
				if err != nil {
					return err
				}
				return r.print(cmd.OutOrStdout())
			}
			return install(cmd.Context(), cmd.OutOrStdout(), to, s, wait)
		},
	}
	f := c.Flags()
	f.StringVar(&s.registry, "image-registry", "", "where the images are pulled from, for example registry.example.com/weft")
	f.StringVar(&s.tag, "image-tag", "", "tag of the images (default: the version of this command)")
	f.StringArrayVar(&s.sets, "set", nil, "set a value of the chart, key=value; may be repeated")
	f.StringArrayVarP(&s.files, "values", "f", nil, "file with values of the chart; may be repeated")
	f.BoolVar(&dryRun, "dry-run", false, "print what would be applied, and do not ask the cluster")
	f.DurationVar(&wait, "wait", 5*time.Minute, "longest wait until Weft is ready")
	return c
}

// print writes all objects as YAML documents, definitions first.
func (r rendering) print(w io.Writer) error {
	for _, o := range append(r.crds, r.objects...) {
		b, err := yaml.Marshal(o.Object)
		if err != nil {
			return err
		}
		if _, err := fmt.Fprintf(w, "---\n%s", b); err != nil {
			return err
		}
	}
	return nil
}

func install(ctx context.Context, out io.Writer, to *target, s settings, wait time.Duration) error {
	k, err := to.connect(ctx)
	if err != nil {
		return err
	}
	server, err := k.typed.Discovery().ServerVersion()
	if err != nil {
		return fmt.Errorf("ask the API server for its version: %w", err)
	}
	r, err := render(to.namespace, server.GitVersion, s)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "Installing Weft %s in namespace %s of %s (Kubernetes %s)\n", version, to.namespace, k.host, server.GitVersion)
	if err := k.installCRDs(ctx, out, r.crds); err != nil {
		return err
	}
	made, err := k.create(ctx, namespaceObject(to.namespace))
	if err != nil {
		return err
	}
	if made {
		fmt.Fprintf(out, "Namespace %s created\n", to.namespace)
	}
	for _, o := range r.objects {
		if err := k.apply(ctx, o); err != nil {
			return fmt.Errorf("%w: nothing is lost; mend it and run install again", err)
		}
	}
	fmt.Fprintf(out, "%d objects applied\n", len(r.objects))
	if err := k.awaitReady(ctx, out, to.namespace, wait); err != nil {
		return fmt.Errorf("wait for Weft to be ready: %w: see `weft status -n %s` and `kubectl get events -n %s`; running install again goes on from here", err, to.namespace, to.namespace)
	}
	fmt.Fprint(out, "Weft is ready. Next:\n  kubectl label namespace NAME istio.io/dataplane-mode=ambient\n")
	return nil
}

func namespaceObject(name string) *unstructured.Unstructured {
	return &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "v1", "kind": "Namespace",
		"metadata": map[string]any{"name": name, "labels": map[string]any{managedBy: "weft"}},
	}}
}

// installCRDs makes the definitions that the cluster lacks, and waits until
// they are served. One that is there already, from Istio for example, is left
// as it is: it knows more fields than ours, not fewer.
func (k *kube) installCRDs(ctx context.Context, out io.Writer, crds []*unstructured.Unstructured) error {
	for _, crd := range crds {
		made, err := k.create(ctx, crd)
		if err != nil {
			return err
		}
		if made {
			fmt.Fprintf(out, "Definition of %s created\n", crd.GetName())
		}
		err = await(ctx, out, time.Minute, func(ctx context.Context) (bool, string, error) {
			r, err := k.resource(crd)
			if err != nil {
				return false, "", err
			}
			got, err := r.Get(ctx, crd.GetName(), metav1.GetOptions{})
			if err != nil {
				return false, "", err
			}
			return established(got), "", nil
		})
		if err != nil {
			return fmt.Errorf("wait for the definition %s: %w", crd.GetName(), err)
		}
	}
	return nil
}

func established(crd *unstructured.Unstructured) bool {
	conditions, _, _ := unstructured.NestedSlice(crd.Object, "status", "conditions")
	for _, c := range conditions {
		m, ok := c.(map[string]any)
		if ok && m["type"] == "Established" && m["status"] == "True" {
			return true
		}
	}
	return false
}

// awaitReady waits until the control service and every node's pod run what was
// applied, saying how far it is.
func (k *kube) awaitReady(ctx context.Context, out io.Writer, namespace string, limit time.Duration) error {
	start := time.Now()
	err := await(ctx, out, limit, func(ctx context.Context) (bool, string, error) {
		d, err := k.typed.AppsV1().Deployments(namespace).Get(ctx, "weft-control", metav1.GetOptions{})
		if err != nil {
			return false, "", err
		}
		want := *d.Spec.Replicas
		ok := d.Status.ObservedGeneration >= d.Generation && d.Status.UpdatedReplicas == want && d.Status.AvailableReplicas == want && d.Status.Replicas == want
		return ok, fmt.Sprintf("weft-control: %d of %d ready", min(d.Status.AvailableReplicas, d.Status.UpdatedReplicas), want), nil
	})
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "  weft-control is ready\n")
	err = await(ctx, out, limit-time.Since(start), func(ctx context.Context) (bool, string, error) {
		d, err := k.typed.AppsV1().DaemonSets(namespace).Get(ctx, "ztunnel", metav1.GetOptions{})
		if err != nil {
			return false, "", err
		}
		st := d.Status
		ok := st.ObservedGeneration >= d.Generation && st.UpdatedNumberScheduled == st.DesiredNumberScheduled && st.NumberReady == st.DesiredNumberScheduled
		return ok, fmt.Sprintf("ztunnel: %d of %d nodes ready", min(st.NumberReady, st.UpdatedNumberScheduled), st.DesiredNumberScheduled), nil
	})
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "  ztunnel is ready on every node\n")
	return nil
}
