package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// A waypointState is how one waypoint is, as its Gateway and its Deployment say.
type waypointState struct {
	Namespace  string             `json:"namespace"`
	Name       string             `json:"name"`
	Class      string             `json:"class"`
	For        string             `json:"for"`
	Programmed bool               `json:"programmed"`
	Addresses  []string           `json:"addresses,omitempty"`
	Ready      int32              `json:"ready"`  // replicas
	Wanted     int32              `json:"wanted"` // of them
	Conditions []gatewayCondition `json:"conditions,omitempty"`
}

type gatewayCondition struct {
	Type    string `json:"type"`
	Status  string `json:"status"`
	Reason  string `json:"reason,omitempty"`
	Message string `json:"message,omitempty"`
}

// readWaypoint reads a Gateway.
func readWaypoint(g *unstructured.Unstructured) waypointState {
	w := waypointState{Namespace: g.GetNamespace(), Name: g.GetName(), For: "service"}
	w.Class, _, _ = unstructured.NestedString(g.Object, "spec", "gatewayClassName")
	if l := g.GetLabels()[waypointFor]; l != "" {
		w.For = l
	}
	conditions, _, _ := unstructured.NestedSlice(g.Object, "status", "conditions")
	for _, item := range conditions {
		m, ok := item.(map[string]any)
		if !ok {
			continue
		}
		text := func(key string) string { s, _ := m[key].(string); return s }
		c := gatewayCondition{Type: text("type"), Status: text("status"), Reason: text("reason"), Message: text("message")}
		// A condition of what was asked for before says nothing of now.
		if seen, ok := m["observedGeneration"].(int64); ok && seen < g.GetGeneration() {
			c.Status = "Unknown"
		}
		w.Conditions = append(w.Conditions, c)
		if c.Type == "Programmed" {
			w.Programmed = c.Status == "True"
		}
	}
	addresses, _, _ := unstructured.NestedSlice(g.Object, "status", "addresses")
	for _, item := range addresses {
		if m, ok := item.(map[string]any); ok {
			if a, _ := m["value"].(string); a != "" {
				w.Addresses = append(w.Addresses, a)
			}
		}
	}
	return w
}

// why says what keeps a waypoint from being ready.
func (w waypointState) why() string {
	for _, kind := range []string{"Accepted", "Programmed"} {
		i := slices.IndexFunc(w.Conditions, func(c gatewayCondition) bool { return c.Type == kind })
		switch {
		case i < 0:
			return "nothing has taken it up yet: is weft-control running, and does it know GatewayClass " + w.Class + "?"
		case w.Conditions[i].Status != "True":
			c := w.Conditions[i]
			return strings.TrimRight(fmt.Sprintf("%s: %s", c.Reason, c.Message), ": ")
		}
	}
	return ""
}

// waypoints returns the waypoints of a namespace, or of all if it is empty.
func (k *kube) waypoints(ctx context.Context, namespace string) ([]waypointState, error) {
	list, err := k.dynamic.Resource(gateways()).Namespace(namespace).List(ctx, metav1.ListOptions{})
	if apierrors.IsNotFound(err) {
		return nil, fmt.Errorf("the cluster does not know the Gateway API, so it has no waypoints: %w", err)
	}
	if err != nil {
		return nil, fmt.Errorf("list the Gateways: %w", err)
	}
	ws := []waypointState{}
	for i := range list.Items {
		w := readWaypoint(&list.Items[i])
		if w.Class != waypointClass && w.Class != istioClass {
			continue
		}
		ds, err := k.typed.AppsV1().Deployments(w.Namespace).List(ctx, metav1.ListOptions{LabelSelector: "gateway.networking.k8s.io/gateway-name=" + w.Name})
		if err != nil {
			return nil, fmt.Errorf("list the Deployments of waypoint %s/%s: %w", w.Namespace, w.Name, err)
		}
		for _, d := range ds.Items {
			w.Ready += d.Status.ReadyReplicas
			if d.Spec.Replicas != nil {
				w.Wanted += *d.Spec.Replicas
			}
		}
		ws = append(ws, w)
	}
	slices.SortFunc(ws, func(a, b waypointState) int {
		return strings.Compare(a.Namespace+"/"+a.Name, b.Namespace+"/"+b.Name)
	})
	return ws, nil
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

// waypointTable writes waypoints for people.
func waypointTable(ws []waypointState) func(io.Writer) error {
	return func(w io.Writer) error {
		rows := [][]string{{"NAMESPACE", "NAME", "CLASS", "FOR", "READY", "REPLICAS", "ADDRESS"}}
		for _, s := range ws {
			rows = append(rows, []string{s.Namespace, s.Name, s.Class, s.For, yesNo(s.Programmed), fmt.Sprintf("%d/%d", s.Ready, s.Wanted), strings.Join(s.Addresses, ",")})
		}
		return table(w, rows)
	}
}

func waypointList(to *target, namespace *string) *cobra.Command {
	var out output
	var all bool
	c := &cobra.Command{
		Use:   "list",
		Short: "List the waypoints of a namespace, or with -A of all",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := out.check(); err != nil {
				return err
			}
			k, err := to.connect(cmd.Context())
			if err != nil {
				return err
			}
			ns := to.currentNamespace(*namespace)
			if all {
				ns = metav1.NamespaceAll
			}
			ws, err := k.waypoints(cmd.Context(), ns)
			if err != nil {
				return err
			}
			return out.print(cmd.OutOrStdout(), ws, waypointTable(ws))
		},
	}
	out.flag(c)
	c.Flags().BoolVarP(&all, "all-namespaces", "A", false, "of all namespaces")
	return c
}

// errWaypointUnwell makes the exit code 1 after a status that shows problems.
var errWaypointUnwell = errors.New("a waypoint is not ready; see above")

func waypointStatus(to *target, namespace *string) *cobra.Command {
	var out output
	c := &cobra.Command{
		Use:   "status [NAME...]",
		Short: "Say how the waypoints of a namespace are, and why one is not ready",
		Long:  "Status prints each waypoint with its conditions. The exit code is 1 if one is not ready.",
		RunE: func(cmd *cobra.Command, names []string) error {
			if err := out.check(); err != nil {
				return err
			}
			k, err := to.connect(cmd.Context())
			if err != nil {
				return err
			}
			ns := to.currentNamespace(*namespace)
			ws, err := k.waypoints(cmd.Context(), ns)
			if err != nil {
				return err
			}
			if ws, err = named(ws, ns, names); err != nil {
				return err
			}
			if err := out.print(cmd.OutOrStdout(), ws, waypointPeople(ws)); err != nil {
				return err
			}
			if slices.ContainsFunc(ws, func(w waypointState) bool { return !w.Programmed }) {
				return errWaypointUnwell
			}
			return nil
		},
	}
	out.flag(c)
	return c
}

// named returns those of ws that have the names; no names are all.
func named(ws []waypointState, namespace string, names []string) ([]waypointState, error) {
	if len(names) == 0 {
		return ws, nil
	}
	var some []waypointState
	for _, n := range names {
		i := slices.IndexFunc(ws, func(w waypointState) bool { return w.Name == n })
		if i < 0 {
			return nil, fmt.Errorf("namespace %s has no waypoint %s: weft waypoint list -A shows all", namespace, n)
		}
		some = append(some, ws[i])
	}
	return some, nil
}

// waypointPeople writes the table, and below it why some are not ready.
func waypointPeople(ws []waypointState) func(io.Writer) error {
	return func(w io.Writer) error {
		if err := waypointTable(ws)(w); err != nil {
			return err
		}
		for _, s := range ws {
			if !s.Programmed {
				fmt.Fprintf(w, "waypoint %s/%s is not ready: %s\n", s.Namespace, s.Name, s.why())
			}
		}
		return nil
	}
}
