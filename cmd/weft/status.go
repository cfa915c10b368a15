package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
)

// A status is how Weft is in one cluster.
type status struct {
	Namespace string        `json:"namespace"`
	Control   controlStatus `json:"control"`
	Nodes     []nodeStatus  `json:"nodes"`
	Problems  []string      `json:"problems,omitempty"` // what is wrong, and what to do
}

type controlStatus struct {
	Installed bool   `json:"installed"`
	Ready     int32  `json:"ready"`
	Wanted    int32  `json:"wanted"`
	Version   string `json:"version,omitempty"`
}

// A nodeStatus is how one node is. Agent is as the node's agent says itself.
type nodeStatus struct {
	Node    string      `json:"node"`
	Pod     string      `json:"pod,omitempty"`
	Ztunnel bool        `json:"ztunnelReady"`
	Agent   agentStatus `json:"agent"`
	// Captured counts the node's pods that are in the mesh.
	Captured int `json:"captured"`
}

// An agentStatus is what /status of weft-node says.
type agentStatus struct {
	Version  string   `json:"version,omitempty"`
	Ready    bool     `json:"ready"`
	Standby  bool     `json:"standby,omitempty"`
	Problems []string `json:"problems,omitempty"`
	Capture  struct {
		Design string `json:"design,omitempty"`
		Why    string `json:"why,omitempty"`
	} `json:"capture"`
	CNI struct {
		Installed bool   `json:"installed"`
		Conflist  string `json:"conflist,omitempty"`
	} `json:"cni"`
	Pods     []agentPod     `json:"pods"`
	Failures []agentFailure `json:"failures,omitempty"`
}

type agentPod struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
}

type agentFailure struct {
	Pod   string `json:"pod"`
	Error string `json:"error"`
}

// errUnwell makes the exit code 1 after a status that shows problems.
var errUnwell = errors.New("something is wrong; see above")

func statusCommand(to *target) *cobra.Command {
	var out output
	c := &cobra.Command{
		Use:   "status",
		Short: "Say how Weft is: the control service, and each node",
		Long:  "Status asks the cluster and each node's agent. The exit code is 1 if something is wrong.",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := out.check(); err != nil {
				return err
			}
			k, err := to.connect(cmd.Context())
			if err != nil {
				return err
			}
			s, err := k.status(cmd.Context(), to.namespace)
			if err != nil {
				return err
			}
			if err := out.print(cmd.OutOrStdout(), s, s.people); err != nil {
				return err
			}
			if len(s.Problems) > 0 {
				return errUnwell
			}
			return nil
		},
	}
	out.flag(c)
	return c
}

// status asks everyone, and then says what is wrong.
func (k *kube) status(ctx context.Context, namespace string) (status, error) {
	s := status{Namespace: namespace, Nodes: []nodeStatus{}}
	d, err := k.typed.AppsV1().Deployments(namespace).Get(ctx, "weft-control", metav1.GetOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return s, fmt.Errorf("read the Deployment weft-control: %w", err)
	}
	if err == nil {
		s.Control = controlStatus{Installed: true, Ready: d.Status.AvailableReplicas, Wanted: *d.Spec.Replicas, Version: imageTag(d.Spec.Template.Spec.Containers, "weft-control")}
	}
	nodes, err := k.typed.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return s, fmt.Errorf("list the nodes: %w", err)
	}
	pods, err := k.typed.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: "app=ztunnel"})
	if err != nil {
		return s, fmt.Errorf("list the pods of ztunnel: %w", err)
	}
	wanted, err := k.wantedOn(ctx, namespace)
	if err != nil {
		return s, err
	}
	for _, n := range nodes.Items {
		if !wanted.Matches(labels.Set(n.Labels)) {
			continue // Windows, say, or excluded by the user
		}
		s.Nodes = append(s.Nodes, k.node(ctx, n.Name, pods.Items))
	}
	slices.SortFunc(s.Nodes, func(a, b nodeStatus) int { return strings.Compare(a.Node, b.Node) })
	s.Problems = s.problems()
	return s, nil
}

// wantedOn selects the nodes that the DaemonSet is meant for. Without one it
// selects all: each lacks a pod then.
func (k *kube) wantedOn(ctx context.Context, namespace string) (labels.Selector, error) {
	ds, err := k.typed.AppsV1().DaemonSets(namespace).Get(ctx, "ztunnel", metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return labels.Everything(), nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the DaemonSet ztunnel: %w", err)
	}
	return labels.SelectorFromSet(ds.Spec.Template.Spec.NodeSelector), nil
}

// node asks the agent of one node. During an update a node has two pods; the
// newest that works counts.
func (k *kube) node(ctx context.Context, name string, pods []corev1.Pod) nodeStatus {
	n := nodeStatus{Node: name}
	mine := slices.DeleteFunc(slices.Clone(pods), func(p corev1.Pod) bool { return p.Spec.NodeName != name })
	slices.SortFunc(mine, func(a, b corev1.Pod) int {
		return cmp.Or(b.CreationTimestamp.Compare(a.CreationTimestamp.Time), strings.Compare(a.Name, b.Name))
	})
	for _, p := range mine {
		a, err := k.agent(ctx, p)
		if err != nil {
			a.Problems = append(a.Problems, err.Error())
		}
		n = nodeStatus{Node: name, Pod: p.Name, Ztunnel: containerReady(p, "istio-proxy"), Agent: a, Captured: len(a.Pods)}
		if err == nil && !a.Standby {
			break
		}
	}
	return n
}

// agent reads /status of a node's agent through the API server.
func (k *kube) agent(ctx context.Context, p corev1.Pod) (agentStatus, error) {
	var a agentStatus
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	b, err := k.typed.CoreV1().Pods(p.Namespace).ProxyGet("http", p.Name, "15022", "status", nil).DoRaw(ctx)
	if err != nil {
		return a, fmt.Errorf("the agent does not answer: %w: see kubectl logs -n %s %s -c weft-node", err, p.Namespace, p.Name)
	}
	if err := json.Unmarshal(b, &a); err != nil {
		return a, fmt.Errorf("the agent's answer is not understood: %w: are the command and the agent of one version?", err)
	}
	return a, nil
}

func containerReady(p corev1.Pod, name string) bool {
	for _, c := range p.Status.ContainerStatuses {
		if c.Name == name {
			return c.Ready
		}
	}
	return false
}

// problems says what is wrong, with what to do. It is pure.
func (s status) problems() []string {
	var ps []string
	say := func(format string, args ...any) { ps = append(ps, fmt.Sprintf(format, args...)) }
	switch {
	case !s.Control.Installed:
		say("Weft is not installed in namespace %s: run weft install, or name another namespace with -n", s.Namespace)
		return ps
	case s.Control.Wanted == 0:
		say("weft-control is scaled to 0: new pods get no certificates, and changes do not reach the proxies; kubectl scale deployment -n %s weft-control --replicas=1", s.Namespace)
	case s.Control.Ready < s.Control.Wanted:
		say("weft-control: %d of %d ready: see kubectl describe pods -n %s -l app=weft-control", s.Control.Ready, s.Control.Wanted, s.Namespace)
	}
	for _, n := range s.Nodes {
		if n.Pod == "" {
			say("node %s: no ztunnel pod: its pods are not captured; see kubectl describe daemonset -n %s ztunnel", n.Node, s.Namespace)
			continue
		}
		for _, p := range n.Agent.Problems {
			say("node %s: %s", n.Node, p)
		}
		if !n.Agent.Ready && len(n.Agent.Problems) == 0 {
			say("node %s: the agent is not ready: see kubectl logs -n %s %s -c weft-node", n.Node, s.Namespace, n.Pod)
		}
		if !n.Ztunnel {
			say("node %s: ztunnel is not ready: see kubectl logs -n %s %s -c istio-proxy", n.Node, s.Namespace, n.Pod)
		}
		for _, f := range n.Agent.Failures {
			say("node %s: pod %s: %s", n.Node, f.Pod, f.Error)
		}
	}
	return ps
}

// people writes the status as tables.
func (s status) people(w io.Writer) error {
	control := "not installed"
	if s.Control.Installed {
		control = fmt.Sprintf("%d of %d ready, version %s", s.Control.Ready, s.Control.Wanted, s.Control.Version)
	}
	fmt.Fprintf(w, "weft-control  %s\n\n", control)
	rows := [][]string{{"NODE", "AGENT", "ZTUNNEL", "CNI PLUGIN", "CAPTURED PODS", "CAPTURE"}}
	for _, n := range s.Nodes {
		if n.Pod == "" {
			rows = append(rows, []string{n.Node, "missing", "", "", "", ""})
			continue
		}
		design := n.Agent.Capture.Design
		if n.Agent.Capture.Why != "" {
			design += ": " + n.Agent.Capture.Why
		}
		rows = append(rows, []string{n.Node, word(n.Agent.Ready, "ready", "not ready"), word(n.Ztunnel, "ready", "not ready"),
			word(n.Agent.CNI.Installed, "installed", "not installed"), fmt.Sprint(n.Captured), design})
	}
	if err := table(w, rows); err != nil {
		return err
	}
	if len(s.Problems) > 0 {
		fmt.Fprintln(w, "\nProblems:")
		for _, p := range s.Problems {
			fmt.Fprintln(w, "-", p)
		}
	}
	return nil
}

func word(b bool, yes, no string) string {
	if b {
		return yes
	}
	return no
}
