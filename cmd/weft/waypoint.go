package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/yaml"
)

// The labels by which waypoints and what is behind them find each other.
const (
	useWaypoint          = "istio.io/use-waypoint"
	useWaypointNamespace = "istio.io/use-waypoint-namespace"
	waypointFor          = "istio.io/waypoint-for"
	dataplaneMode        = "istio.io/dataplane-mode"
)

// waypointClass is the GatewayClass of our waypoints; istioClass is honoured
// where nobody else does.
const (
	waypointClass = "weft-waypoint"
	istioClass    = "istio-waypoint"
)

func gateways() schema.GroupVersionResource {
	return schema.GroupVersionResource{Group: "gateway.networking.k8s.io", Version: "v1", Resource: "gateways"}
}

// A waypointSpec is what the flags say of one waypoint.
type waypointSpec struct {
	namespace string
	name      string
	traffic   string // service, workload or all; "" leaves the label out, which is service
}

func (s *waypointSpec) flags(c *cobra.Command) {
	c.Flags().StringVar(&s.name, "name", "waypoint", "name of the waypoint, which is that of its Gateway")
	c.Flags().StringVar(&s.traffic, "for", "", "what traffic goes through it: service, workload, all or none (default service)")
	_ = c.RegisterFlagCompletionFunc("for", cobra.FixedCompletions([]string{"service", "workload", "all", "none"}, cobra.ShellCompDirectiveNoFileComp))
}

func (s *waypointSpec) check() error {
	if !slices.Contains([]string{"", "service", "workload", "all", "none"}, s.traffic) {
		return fmt.Errorf("a waypoint for %q: want service, workload, all or none", s.traffic)
	}
	if s.name == "" {
		return errors.New("the waypoint's name is empty")
	}
	return nil
}

// gateway returns the object that asks for the waypoint.
func (s *waypointSpec) gateway() *unstructured.Unstructured {
	metadata := map[string]any{"name": s.name}
	if s.namespace != "" {
		metadata["namespace"] = s.namespace
	}
	if s.traffic != "" {
		metadata["labels"] = map[string]any{waypointFor: s.traffic}
	}
	return &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway", "metadata": metadata,
		"spec": map[string]any{
			"gatewayClassName": waypointClass,
			"listeners":        []any{map[string]any{"name": "mesh", "port": int64(15008), "protocol": "HBONE"}},
		},
	}}
}

func waypointCommand(to *target) *cobra.Command {
	c := &cobra.Command{
		Use:   "waypoint",
		Short: "Make, show and remove waypoints: layer 7 for a namespace",
		Long: `A waypoint is a proxy in front of the services of a namespace. It gives them
routing, resilience and telemetry of requests, from the Gateway API and from
Istio's objects. Connections to what is behind it never go around it.`,
		Example: `  weft waypoint apply -n shop --enroll-namespace --wait
  weft waypoint list -A`,
	}
	var namespace string
	c.PersistentFlags().StringVarP(&namespace, "namespace", "n", "", "namespace of the waypoint (default: that of the kubeconfig's context)")
	c.AddCommand(waypointApply(to, &namespace), waypointGenerate(&namespace), waypointStatus(to, &namespace), waypointList(to, &namespace), waypointDelete(to, &namespace))
	return c
}

// currentNamespace is namespace, or else the one of the kubeconfig's context.
func (t *target) currentNamespace(namespace string) string {
	if namespace != "" {
		return namespace
	}
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = t.kubeconfig
	ns, _, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{CurrentContext: t.context}).Namespace()
	if err != nil {
		return metav1.NamespaceDefault // connect says what is wrong
	}
	return ns
}

func waypointGenerate(namespace *string) *cobra.Command {
	var s waypointSpec
	c := &cobra.Command{
		Use:   "generate",
		Short: "Print the Gateway that asks for a waypoint, and do not ask the cluster",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := s.check(); err != nil {
				return err
			}
			s.namespace = *namespace
			b, err := yaml.Marshal(s.gateway().Object)
			if err != nil {
				return err
			}
			_, err = cmd.OutOrStdout().Write(b)
			return err
		},
	}
	s.flags(c)
	return c
}

func waypointApply(to *target, namespace *string) *cobra.Command {
	var s waypointSpec
	var enroll, overwrite, wait bool
	c := &cobra.Command{
		Use:   "apply",
		Short: "Make a waypoint, and with --enroll-namespace put the services of its namespace behind it",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := s.check(); err != nil {
				return err
			}
			s.namespace = to.currentNamespace(*namespace)
			k, err := to.connect(cmd.Context())
			if err != nil {
				return err
			}
			return k.applyWaypoint(cmd.Context(), cmd.OutOrStdout(), s, enroll, overwrite, wait)
		},
	}
	s.flags(c)
	c.Flags().BoolVar(&enroll, "enroll-namespace", false, "label the namespace, so that its services are behind the waypoint")
	c.Flags().BoolVar(&overwrite, "overwrite", false, "change a Gateway of that name that differs")
	c.Flags().BoolVar(&wait, "wait", false, "wait until the waypoint is ready")
	return c
}

// waypointPatience is the longest wait for a waypoint to become ready.
const waypointPatience = 90 * time.Second

func (k *kube) applyWaypoint(ctx context.Context, out io.Writer, s waypointSpec, enroll, overwrite, wait bool) error {
	ns, err := k.typed.CoreV1().Namespaces().Get(ctx, s.namespace, metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("read namespace %s: %w", s.namespace, err)
	}
	want := s.gateway()
	old, err := k.dynamic.Resource(gateways()).Namespace(s.namespace).Get(ctx, s.name, metav1.GetOptions{})
	switch {
	case meta.IsNoMatchError(err) || apierrors.IsNotFound(err) && strings.Contains(err.Error(), "could not find the requested resource"):
		return fmt.Errorf("the cluster does not know the Gateway API: install its definitions (weft install does, unless it is told not to), then run the command again: %w", err)
	case apierrors.IsNotFound(err):
	case err != nil:
		return fmt.Errorf("read Gateway %s/%s: %w", s.namespace, s.name, err)
	case !sameWaypoint(old, want) && !overwrite:
		return fmt.Errorf("there is a Gateway %s/%s that differs: change it with --overwrite, or choose another --name", s.namespace, s.name)
	}
	if err := k.apply(ctx, want); err != nil {
		return err
	}
	fmt.Fprintf(out, "waypoint %s/%s applied\n", s.namespace, s.name)
	if wait || enroll {
		// Behind a waypoint that is not ready connections are held: so the
		// namespace is enrolled afterwards.
		if err := await(ctx, out, waypointPatience, func(ctx context.Context) (bool, string, error) { return k.waypointReady(ctx, s) }); err != nil {
			return fmt.Errorf("wait for waypoint %s/%s: %w; see weft waypoint status -n %s", s.namespace, s.name, err, s.namespace)
		}
		fmt.Fprintf(out, "waypoint %s/%s is ready\n", s.namespace, s.name)
	}
	if !enroll {
		return nil
	}
	if err := k.labelNamespace(ctx, s.namespace, s.name); err != nil {
		return err
	}
	fmt.Fprintf(out, "namespace %s is behind waypoint %s\n", s.namespace, s.name)
	if ns.Labels[dataplaneMode] != "ambient" {
		fmt.Fprintf(out, "its own pods are not in the mesh yet: kubectl label namespace %s %s=ambient\n", s.namespace, dataplaneMode)
	}
	return nil
}

// sameWaypoint reports whether a Gateway is one that apply would make.
func sameWaypoint(old, want *unstructured.Unstructured) bool {
	class, _, _ := unstructured.NestedString(old.Object, "spec", "gatewayClassName")
	if class != waypointClass {
		return false
	}
	return old.GetLabels()[waypointFor] == want.GetLabels()[waypointFor]
}

// labelNamespace puts a namespace behind a waypoint of its own; "" takes it from
// any.
func (k *kube) labelNamespace(ctx context.Context, namespace, waypoint string) error {
	value := "null"
	if waypoint != "" {
		value = fmt.Sprintf("%q", waypoint)
	}
	patch := fmt.Sprintf(`{"metadata":{"labels":{%q:%s,%q:null}}}`, useWaypoint, value, useWaypointNamespace)
	_, err := k.typed.CoreV1().Namespaces().Patch(ctx, namespace, types.MergePatchType, []byte(patch), metav1.PatchOptions{FieldManager: "weft"})
	if err != nil {
		return fmt.Errorf("label namespace %s: %w", namespace, err)
	}
	return nil
}

// waypointReady reports whether a waypoint takes connections, and what it waits
// for if not.
func (k *kube) waypointReady(ctx context.Context, s waypointSpec) (bool, string, error) {
	g, err := k.dynamic.Resource(gateways()).Namespace(s.namespace).Get(ctx, s.name, metav1.GetOptions{})
	if err != nil {
		return false, "", err
	}
	w := readWaypoint(g)
	return w.Programmed, fmt.Sprintf("waiting for waypoint %s/%s: %s", s.namespace, s.name, w.why()), nil
}

func waypointDelete(to *target, namespace *string) *cobra.Command {
	var all, force bool
	c := &cobra.Command{
		Use:   "delete [NAME...]",
		Short: "Remove waypoints",
		Long: `Delete takes the namespace from behind the waypoint, if that is how it was
enrolled, and then removes the Gateway. Services that name the waypoint
themselves would be refused without it: they must be changed first.`,
		RunE: func(cmd *cobra.Command, names []string) error {
			if all == (len(names) > 0) {
				return errors.New("which waypoints? Name them, or give --all")
			}
			k, err := to.connect(cmd.Context())
			if err != nil {
				return err
			}
			ns := to.currentNamespace(*namespace)
			if all {
				ws, err := k.waypoints(cmd.Context(), ns)
				if err != nil {
					return err
				}
				for _, w := range ws {
					names = append(names, w.Name)
				}
			}
			for _, name := range names {
				if err := k.deleteWaypoint(cmd.Context(), cmd.OutOrStdout(), ns, name, force); err != nil {
					return err
				}
			}
			return nil
		},
	}
	c.Flags().BoolVar(&all, "all", false, "all waypoints of the namespace")
	c.Flags().BoolVar(&force, "force", false, "even if services or other namespaces still name it: their connections are refused then")
	return c
}

func (k *kube) deleteWaypoint(ctx context.Context, out io.Writer, namespace, name string, force bool) error {
	g, err := k.dynamic.Resource(gateways()).Namespace(namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("read waypoint %s/%s: %w", namespace, name, err)
	}
	if class, _, _ := unstructured.NestedString(g.Object, "spec", "gatewayClassName"); class != waypointClass && class != istioClass {
		return fmt.Errorf("gateway %s/%s is of class %q: it is no waypoint", namespace, name, class)
	}
	users, err := k.waypointUsers(ctx, namespace, name)
	if err != nil {
		return err
	}
	if len(users) > 0 && !force {
		return fmt.Errorf("waypoint %s/%s is still named by %s: without it their connections are refused. Remove their label %s first, or give --force", namespace, name, strings.Join(users, ", "), useWaypoint)
	}
	ns, err := k.typed.CoreV1().Namespaces().Get(ctx, namespace, metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("read namespace %s: %w", namespace, err)
	}
	if of := ns.Labels[useWaypointNamespace]; ns.Labels[useWaypoint] == name && (of == "" || of == namespace) {
		if err := k.labelNamespace(ctx, namespace, ""); err != nil {
			return err
		}
		fmt.Fprintf(out, "namespace %s is not behind waypoint %s any more\n", namespace, name)
	}
	if _, err := k.remove(ctx, g, metav1.DeletePropagationForeground); err != nil {
		return err
	}
	fmt.Fprintf(out, "waypoint %s/%s deleted\n", namespace, name)
	return nil
}

// waypointUsers returns the services, pods and other namespaces that name a
// waypoint.
func (k *kube) waypointUsers(ctx context.Context, namespace, name string) ([]string, error) {
	opts := metav1.ListOptions{LabelSelector: useWaypoint + "=" + name}
	var users []string
	names := func(user, in string, labels map[string]string) {
		if of := labels[useWaypointNamespace]; of == namespace || of == "" && in == namespace {
			users = append(users, user)
		}
	}
	services, err := k.typed.CoreV1().Services("").List(ctx, opts)
	if err != nil {
		return nil, fmt.Errorf("list the services behind waypoint %s: %w", name, err)
	}
	for _, s := range services.Items {
		names("Service "+s.Namespace+"/"+s.Name, s.Namespace, s.Labels)
	}
	pods, err := k.typed.CoreV1().Pods("").List(ctx, opts)
	if err != nil {
		return nil, fmt.Errorf("list the pods behind waypoint %s: %w", name, err)
	}
	for _, p := range pods.Items {
		names("Pod "+p.Namespace+"/"+p.Name, p.Namespace, p.Labels)
	}
	others, err := k.typed.CoreV1().Namespaces().List(ctx, opts)
	if err != nil {
		return nil, fmt.Errorf("list the namespaces behind waypoint %s: %w", name, err)
	}
	for _, o := range others.Items {
		if o.Name != namespace {
			names("Namespace "+o.Name, o.Name, o.Labels)
		}
	}
	return users, nil
}
