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
	Notes     []string      `json:"notes,omitempty"`    // what is worth knowing and no fault now
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
	// StandsBy reports whether a ztunnel is there that takes over from the
	// active one, Meant whether there should be.
	StandsBy bool `json:"standsBy"`
	Meant    bool `json:"standbyMeant,omitempty"`
	// Dropped is set on a node that the DaemonSet is not meant for (any more)
	// and that has captured pods: Stranded.
	Dropped bool `json:"dropped,omitempty"`
	// Stranded are pods that say that they are captured on a node without a
	// ztunnel pod: their traffic is blocked.
	Stranded []string `json:"stranded,omitempty"`
}

// An agentStatus is what /status of weft-node says.
type agentStatus struct {
	Version  string   `json:"version,omitempty"`
	Ready    bool     `json:"ready"`
	Standby  bool     `json:"standby,omitempty"`
	Released bool     `json:"released,omitempty"`
	Standbys int      `json:"standbys,omitempty"`
	Problems []string `json:"problems,omitempty"`
	Capture  struct {
		Design string `json:"design,omitempty"`
		Rung   string `json:"rung,omitempty"`
		Why    string `json:"why,omitempty"`
	} `json:"capture"`
	CNI struct {
		Installed bool   `json:"installed"`
		Conflist  string `json:"conflist,omitempty"`
	} `json:"cni"`
	Pods     []agentPod     `json:"pods"`
	Failures []agentFailure `json:"failures,omitempty"`

	Uncaptured []agentUncaptured `json:"uncaptured,omitempty"`
}

type agentPod struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
}

type agentFailure struct {
	Pod   string `json:"pod"`
	Error string `json:"error"`
}

// An agentUncaptured is a pod that ran outside the mesh though it belongs to it.
type agentUncaptured struct {
	Pod  string `json:"pod"`
	Done string `json:"done"`
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
	for _, item := range nodes.Items {
		n := k.node(ctx, item.Name, pods.Items)
		n.Dropped = !wanted.Matches(labels.Set(item.Labels)) && n.Pod == ""
		if n.Pod == "" {
			if n.Stranded, err = k.stranded(ctx, item.Name); err != nil {
				return s, err
			}
		}
		if n.Dropped && len(n.Stranded) == 0 {
			continue // Windows, say, or excluded by the user
		}
		s.Nodes = append(s.Nodes, n)
	}
	slices.SortFunc(s.Nodes, func(a, b nodeStatus) int { return strings.Compare(a.Node, b.Node) })
	s.Problems, s.Notes = s.problems(), s.notes()
	return s, nil
}

// stranded returns the pods of a node that say that they are captured.
func (k *kube) stranded(ctx context.Context, node string) ([]string, error) {
	list, err := k.typed.CoreV1().Pods("").List(ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=" + node})
	if err != nil {
		return nil, fmt.Errorf("list the pods of node %s: %w", node, err)
	}
	var out []string
	for _, p := range list.Items {
		if p.Annotations["ambient.istio.io/redirection"] == "enabled" && p.Status.Phase == corev1.PodRunning {
			out = append(out, p.Namespace+"/"+p.Name)
		}
	}
	slices.Sort(out)
	return out, nil
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
		n = nodeStatus{Node: name, Pod: p.Name, Ztunnel: containerReady(p, "istio-proxy"), Agent: a, Captured: len(a.Pods),
			StandsBy: a.Standbys > 0, Meant: hasContainer(p, "istio-proxy-standby")}
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

func hasContainer(p corev1.Pod, name string) bool {
	return slices.ContainsFunc(p.Spec.Containers, func(c corev1.Container) bool { return c.Name == name })
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
		if n.Dropped {
			say("node %s: Weft is not meant to run there and left %d captured pods behind, whose traffic is blocked (%s), and no new pod can start: "+
				"label the node so that DaemonSet ztunnel runs there again, let the node go with weft release %s, and only then take the label away",
				n.Node, len(n.Stranded), some(n.Stranded), n.Node)
			continue
		}
		if n.Pod == "" {
			say("node %s: no ztunnel pod: pods that join are not captured, and new ones do not start; see kubectl describe daemonset -n %s ztunnel", n.Node, s.Namespace)
			if len(n.Stranded) > 0 {
				say("node %s: the traffic of %d captured pods is blocked until there is a ztunnel pod: %s", n.Node, len(n.Stranded), some(n.Stranded))
			}
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
		if n.Ztunnel && n.Agent.Ready && n.Meant && !n.StandsBy && !n.Agent.Released && !n.Agent.Standby {
			say("node %s: no ztunnel stands by, so that connections wait for the kubelet when the active one dies: see kubectl logs -n %s %s -c istio-proxy-standby, and -c istio-proxy", n.Node, s.Namespace, n.Pod)
		}
		for _, u := range n.Agent.Uncaptured {
			switch u.Done {
			case "reported", "found":
				say("node %s: pod %s belongs to the mesh and runs outside it, its traffic is in clear: restart it", n.Node, u.Pod)
			}
		}
		for _, f := range n.Agent.Failures {
			say("node %s: pod %s: %s", n.Node, f.Pod, f.Error)
		}
	}
	return ps
}

// notes says what is no fault now and worth knowing. It is pure.
func (s status) notes() []string {
	var ns []string
	for _, n := range s.Nodes {
		if n.Agent.Released {
			ns = append(ns, fmt.Sprintf("node %s was let go: no pod of it is in the mesh until its ztunnel pod is deleted or the node leaves the DaemonSet", n.Node))
		}
		for _, u := range n.Agent.Uncaptured {
			switch u.Done {
			case "captured":
				ns = append(ns, fmt.Sprintf("node %s: pod %s ran outside the mesh until it was found and captured: connections from before may be in clear, restart it to be sure that none is", n.Node, u.Pod))
			case "restarted":
				ns = append(ns, fmt.Sprintf("node %s: pod %s ran outside the mesh and is being replaced", n.Node, u.Pod))
			}
		}
	}
	return ns
}

// some names the first few of a list.
func some(list []string) string {
	const most = 5
	if n := len(list) - most; n > 0 {
		return strings.Join(list[:most], ", ") + fmt.Sprintf(" and %d more", n)
	}
	return strings.Join(list, ", ")
}

// people writes the status as tables.
func (s status) people(w io.Writer) error {
	control := "not installed"
	if s.Control.Installed {
		control = fmt.Sprintf("%d of %d ready, version %s", s.Control.Ready, s.Control.Wanted, s.Control.Version)
	}
	fmt.Fprintf(w, "weft-control  %s\n\n", control)
	rows := [][]string{{"NODE", "AGENT", "ZTUNNEL", "STANDBY", "CNI PLUGIN", "CAPTURED PODS", "CAPTURE"}}
	for _, n := range s.Nodes {
		if n.Pod == "" {
			rows = append(rows, []string{n.Node, "missing", "", "", "", "", ""})
			continue
		}
		design := cmp.Or(n.Agent.Capture.Rung, n.Agent.Capture.Design)
		if n.Agent.Capture.Why != "" {
			design += ": " + n.Agent.Capture.Why
		}
		rows = append(rows, []string{n.Node, agentWord(n.Agent), word(n.Ztunnel, "ready", "not ready"), word(n.StandsBy, "ready", word(n.Meant, "missing", "none")),
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
	if len(s.Notes) > 0 {
		fmt.Fprintln(w, "\nNotes:")
		for _, n := range s.Notes {
			fmt.Fprintln(w, "-", n)
		}
	}
	return nil
}

func agentWord(a agentStatus) string {
	if a.Released {
		return "released"
	}
	return word(a.Ready, "ready", "not ready")
}

func word(b bool, yes, no string) string {
	if b {
		return yes
	}
	return no
}
