package node

import (
	"cmp"
	"encoding/json"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/weft-mesh/weft/internal/obs"
	"github.com/weft-mesh/weft/node/cni"
)

// A Status is how the agent of one node stands, the JSON of /status. It is
// what weft status shows.
type Status struct {
	Node    string `json:"node"`
	Version string `json:"version"`
	Ready   bool   `json:"ready"`
	// Standby is set while another agent works on the node, in an update.
	Standby  bool     `json:"standby,omitempty"`
	Problems []string `json:"problems,omitempty"` // why it is not ready, and what to do

	Capture  CaptureStatus    `json:"capture"`
	CNI      cni.InstallState `json:"cni"`
	Ztunnels int              `json:"ztunnels"` // active ones that are connected
	Standbys int              `json:"standbys"` // connected ones that stand by
	Pods     []PodStatus      `json:"pods"`     // captured, by name
	Failures []PodFailure     `json:"failures,omitempty"`
	// Uncaptured are pods that were found running outside the mesh though they
	// belong to it, until they are gone.
	Uncaptured []PodUncaptured `json:"uncaptured,omitempty"`
	// Released is set when the agent was asked to let every pod of the node go,
	// and has.
	Released bool `json:"released,omitempty"`
}

// CaptureStatus says how pods are captured on the node, and why that way.
type CaptureStatus struct {
	Design   string          `json:"design"`             // "bpf", or "none" if pods cannot be captured
	Rung     string          `json:"rung,omitempty"`     // of the ladder of capture.Rung
	Why      string          `json:"why"`                // why there is no better one
	Features map[string]bool `json:"features,omitempty"` // what the kernel has
}

// A PodStatus is a captured pod.
type PodStatus struct {
	Namespace string    `json:"namespace"`
	Name      string    `json:"name"`
	UID       string    `json:"uid"`
	Since     time.Time `json:"since"`
}

// A PodFailure is a pod that is not where it belongs.
type PodFailure struct {
	Pod    string    `json:"pod"`
	Reason string    `json:"reason"`
	Error  string    `json:"error"`
	Since  time.Time `json:"since"`
	Times  int       `json:"times"`
}

// A PodUncaptured is a pod that ran outside the mesh though it belongs to it.
type PodUncaptured struct {
	Pod  string    `json:"pod"`
	Seen time.Time `json:"seen"`
	// Done is what has become of it: "captured" or "restarted"; "reported" if it
	// still runs outside, "found" if it could not be captured yet.
	Done string `json:"done"`
}

// Status returns how the agent stands now.
func (a *Agent) Status() Status {
	a.mu.Lock()
	s := Status{Node: a.cfg.Node, Version: a.cfg.Version, Standby: a.standby, Capture: a.capture}
	stage := a.stage
	s.Released = a.freed
	a.mu.Unlock()
	s.CNI = a.installer.State()
	s.Ztunnels, _ = a.handoff.Connected()
	s.Standbys = a.handoff.Standbys()
	s.Pods, s.Failures = a.keeper.status()
	s.Uncaptured = a.keeper.uncapturedPods()
	if stage != "" {
		s.Problems = append(s.Problems, stage)
	}
	if !a.kube.synced() {
		s.Problems = append(s.Problems, "the API server has not been read yet; is it reachable from this pod, and may service account ztunnel list pods, namespaces and its DaemonSet?")
	}
	if !s.Standby && !s.Released {
		if !s.CNI.Installed {
			s.Problems = append(s.Problems, cmp.Or(s.CNI.Message, "the CNI plugin is not installed yet"))
		}
		if s.Ztunnels == 0 {
			s.Problems = append(s.Problems, "ztunnel is not connected; see the log of container istio-proxy of this pod. Running pods wait, new pods of the mesh do not start")
		}
	}
	s.Ready = len(s.Problems) == 0
	return s
}

// status returns the captured pods by name, and the failures.
func (k *keeper) status() ([]PodStatus, []PodFailure) {
	k.mu.Lock()
	defer k.mu.Unlock()
	pods := []PodStatus{}
	for uid, m := range k.pods {
		pods = append(pods, PodStatus{Namespace: m.pod.Namespace, Name: m.pod.Name, UID: uid, Since: m.since})
	}
	slices.SortFunc(pods, func(a, b PodStatus) int {
		return cmp.Or(strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Name, b.Name), strings.Compare(a.UID, b.UID))
	})
	var failures []PodFailure
	for _, f := range k.failures {
		if f.err != nil {
			failures = append(failures, PodFailure{Pod: f.pod, Reason: f.reason, Error: f.err.Error(), Since: f.since, Times: f.times})
		}
	}
	slices.SortFunc(failures, func(a, b PodFailure) int { return strings.Compare(a.Pod, b.Pod) })
	return pods, failures
}

// uncapturedPods returns the pods that were found outside the mesh, by name.
func (k *keeper) uncapturedPods() []PodUncaptured {
	k.mu.Lock()
	defer k.mu.Unlock()
	var out []PodUncaptured
	for _, e := range k.escapes {
		out = append(out, PodUncaptured{Pod: e.pod, Seen: e.seen, Done: e.done})
	}
	slices.SortFunc(out, func(a, b PodUncaptured) int { return strings.Compare(a.Pod, b.Pod) })
	return out
}

// handler serves health, metrics and status.
func (a *Agent) handler(reg *prometheus.Registry) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", obs.MetricsHandler(reg))
	mux.HandleFunc("GET /healthz/live", func(w http.ResponseWriter, _ *http.Request) {})
	mux.HandleFunc("GET /healthz/ready", func(w http.ResponseWriter, _ *http.Request) {
		if s := a.Status(); !s.Ready {
			http.Error(w, strings.Join(s.Problems, "\n"), http.StatusServiceUnavailable)
		}
	})
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		_ = enc.Encode(a.Status()) // a reader that went away
	})
	return mux
}

// gauges registers what is read from the agent's state.
func (a *Agent) gauges(reg prometheus.Registerer) {
	gauge := func(name, help string, f func() float64) {
		reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, f))
	}
	yes := func(b bool) float64 {
		if b {
			return 1
		}
		return 0
	}
	gauge("weft_node_pods_captured", "Pods of this node that are in the mesh.", func() float64 { return float64(a.keeper.count()) })
	gauge("weft_node_pods_failing", "Pods of this node that are not where they belong.", func() float64 {
		_, failures := a.keeper.status()
		return float64(len(failures))
	})
	gauge("weft_node_pods_uncaptured", "Pods of this node that belong to the mesh and were found running outside it, and still do.", func() float64 {
		n := 0
		for _, e := range a.keeper.uncapturedPods() {
			if e.Done == "found" || e.Done == "reported" {
				n++
			}
		}
		return float64(n)
	})
	gauge("weft_node_cni_installed", "1 if the CNI plugin is in the node's chain.", func() float64 { return yes(a.installer.State().Installed) })
	gauge("weft_node_ztunnels_connected", "Connected ztunnels: 1, or 2 in an update.", func() float64 {
		n, _ := a.handoff.Connected()
		return float64(n)
	})
	gauge("weft_node_ztunnels_standing_by", "Connected ztunnels that take over when the active one is gone.", func() float64 { return float64(a.handoff.Standbys()) })
	gauge("weft_node_ready", "1 if the agent is ready.", func() float64 { return yes(a.Status().Ready) })
}
