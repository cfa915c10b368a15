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

// partOf labels everything of the chart.
const partOf = "app.kubernetes.io/part-of"

func installCommand(to *target) *cobra.Command {
	var s settings
	var dryRun, gatewayAPI bool
	var kubeVersion string
	var wait time.Duration
	c := &cobra.Command{
		Use:   "install",
		Short: "Install Weft, or bring an installation to this version and these values",
		Long: `Install renders the Helm chart that is part of this binary and applies it.
It may be run again at any time: it changes what differs and keeps the rest,
including the certificate authority and every captured pod.

A cluster without the definitions of the Gateway API gets those of its standard
channel, which waypoints need. Where there are some, they stay as they are;
uninstall leaves them. They are not printed by --dry-run.`,
		Example: `  weft install --image-registry registry.example.com/weft --image-tag v0.1.0
  weft install --image-registry registry.example.com/weft --set ztunnel.sameNode=direct
  weft install --image-registry registry.example.com/weft --dry-run | kubectl apply -f -`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if dryRun {
				r, err := render(to.namespace, kubeVersion, s)
				if err != nil {
					return err
				}
				return printAll(cmd.OutOrStdout(), r.all(to.namespace))
			}
			return install(cmd.Context(), cmd.OutOrStdout(), to, s, gatewayAPI, wait)
		},
	}
	f := c.Flags()
	f.StringVar(&s.registry, "image-registry", "", "where the images are pulled from, for example registry.example.com/weft")
	f.StringVar(&s.tag, "image-tag", "", "tag of the images (default: the version of this command)")
	f.StringArrayVar(&s.sets, "set", nil, "set a value of the chart, key=value; may be repeated")
	f.StringArrayVarP(&s.files, "values", "f", nil, "file with values of the chart; may be repeated")
	f.BoolVar(&dryRun, "dry-run", false, "print what would be applied, and do not ask the cluster")
	f.BoolVar(&gatewayAPI, "gateway-api", true, "install the definitions of the Gateway API if the cluster has none")
	f.StringVar(&kubeVersion, "kube-version", "", "version of the cluster that --dry-run prints for (default "+newestKube+")")
	f.DurationVar(&wait, "wait", 5*time.Minute, "longest wait until Weft is ready")
	return c
}

// printAll writes objects as YAML documents.
func printAll(w io.Writer, list []*unstructured.Unstructured) error {
	for _, o := range list {
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

func install(ctx context.Context, out io.Writer, to *target, s settings, gatewayAPI bool, wait time.Duration) error {
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
	if err := k.onlyIn(ctx, to.namespace); err != nil {
		return err
	}
	fmt.Fprintf(out, "Installing Weft %s in namespace %s of %s (Kubernetes %s)\n", version, to.namespace, k.host, server.GitVersion)
	if err := k.installCRDs(ctx, out, r.crds); err != nil {
		return err
	}
	if gatewayAPI {
		if err := k.installGatewayAPI(ctx, out); err != nil {
			return err
		}
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

// onlyIn refuses a second Weft: two agents on a node would fight over its pods.
func (k *kube) onlyIn(ctx context.Context, namespace string) error {
	list, err := k.typed.AppsV1().DaemonSets("").List(ctx, metav1.ListOptions{LabelSelector: partOf + "=weft"})
	if err != nil {
		return fmt.Errorf("look for another Weft in the cluster: %w", err)
	}
	for _, d := range list.Items {
		if d.Namespace != namespace {
			return fmt.Errorf("namespace %s of this cluster has a Weft already: name it with -n %s, or uninstall it there first", d.Namespace, d.Namespace)
		}
	}
	return nil
}

func namespaceObject(name string) *unstructured.Unstructured {
	return &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "v1", "kind": "Namespace",
		"metadata": map[string]any{"name": name, "labels": map[string]any{
			managedBy: "weft",
			// The agent mounts directories of the node; clusters that refuse
			// that by default make an exception for labelled namespaces.
			"pod-security.kubernetes.io/enforce": "privileged",
		}},
	}}
}

// installCRDs makes the definitions that the cluster lacks, brings those of an
// older Weft to this version, and waits until they are served. One of somebody
// else, from Istio for example, is left as it is: it knows more fields than
// ours, not fewer. But it must serve the version that weft-control reads.
func (k *kube) installCRDs(ctx context.Context, out io.Writer, crds []*unstructured.Unstructured) error {
	for _, crd := range crds {
		made, err := k.create(ctx, crd)
		if err != nil {
			return err
		}
		if made {
			fmt.Fprintf(out, "Definition of %s created\n", crd.GetName())
		} else if err := k.updateOwn(ctx, crd); err != nil {
			return err
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
			if lacks := lacksVersion(got, crd); lacks != "" {
				return false, "", fmt.Errorf("%w: the cluster's definition %s, which is not Weft's, does not serve %s: update it", errFinal, crd.GetName(), lacks)
			}
			return established(got), "", nil
		})
		if err != nil {
			return fmt.Errorf("wait for the definition %s: %w", crd.GetName(), err)
		}
	}
	return nil
}

// updateOwn applies o if what is there is Weft's.
func (k *kube) updateOwn(ctx context.Context, o *unstructured.Unstructured) error {
	r, err := k.resource(o)
	if err != nil {
		return err
	}
	got, err := r.Get(ctx, o.GetName(), metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("read %s: %w", describe(o), err)
	}
	if got.GetLabels()[partOf] != "weft" {
		return nil
	}
	return k.apply(ctx, o)
}

// lacksVersion returns the storage version of want if got does not serve it.
func lacksVersion(got, want *unstructured.Unstructured) string {
	served := map[string]bool{}
	each := func(crd *unstructured.Unstructured, f func(name string, v map[string]any)) {
		versions, _, _ := unstructured.NestedSlice(crd.Object, "spec", "versions")
		for _, v := range versions {
			if m, ok := v.(map[string]any); ok {
				f(fmt.Sprint(m["name"]), m)
			}
		}
	}
	each(got, func(name string, v map[string]any) { served[name] = v["served"] == true })
	lacks := ""
	each(want, func(name string, v map[string]any) {
		if v["storage"] == true && !served[name] {
			lacks = name
		}
	})
	return lacks
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
