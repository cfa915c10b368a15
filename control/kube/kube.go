// Package kube is the control service's side of the Kubernetes API: it watches
// the objects that the mesh is compiled from, keeps stripped copies of them,
// hands what comes out of compile to a Sink, and writes back statuses and the
// trust bundle.
//
// An API server that cannot be reached stops nothing: what was read last stays
// in force, and the log says what to do.
package kube

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"

	"github.com/weft-mesh/weft/api/feed"
	"github.com/weft-mesh/weft/control/compile"
	"github.com/weft-mesh/weft/control/provision"
	"github.com/weft-mesh/weft/internal/run"
	"github.com/weft-mesh/weft/mesh"
)

// A Sink takes what the cluster compiles to. Its methods are called by one
// goroutine, and own their arguments.
type Sink interface {
	// UpdateWorld replaces everything but workloads; of those it replaces
	// r.Workloads and removes del. since is when the first of the changes was
	// noticed.
	UpdateWorld(r feed.Resources, del []mesh.UID, since time.Time)
	// UpdateWorkloads replaces the workloads in set and removes those in del.
	// since is when the first of their changes was noticed.
	UpdateWorkloads(set []mesh.Workload, del []mesh.UID, since time.Time)
	// SetPolicies replaces all policies.
	SetPolicies([]mesh.Policy)
	// SetSynced says, once, that all there was at the start has been handed
	// over.
	SetSynced()
}

// A WatcherConfig says what a Watcher reads and to whom it tells it.
type WatcherConfig struct {
	Client   kubernetes.Interface
	Dynamic  dynamic.Interface // for kinds of custom resources, which are read strictly
	Settings compile.Settings
	// Provision says what runs waypoints.
	Provision provision.Settings
	Sink      Sink
	Log       *slog.Logger
	// Registerer takes the metrics; nil is none.
	Registerer prometheus.Registerer
	// Quiet is how long services, slices and policies must have been quiet
	// before they are compiled anew, and Patience how long at most a change
	// waits for that. Zero is 20 ms and 100 ms. Pods never wait.
	Quiet, Patience time.Duration
}

// A Watcher keeps a Sink up to date with the cluster.
type Watcher struct {
	cfg WatcherConfig

	pods, nodes, services, slices, namespaces cache.SharedIndexInformer
	optional                                  []*optionalInformer

	queue     queue
	statuses  board
	waypoints atomic.Pointer[map[mesh.Name]bool] // their service accounts
	synced    chan struct{}
	outage    outage
	faults    faults // of running waypoints

	events    *prometheus.CounterVec
	compile   prometheus.Histogram
	reachable prometheus.Gauge
}

// NewWatcher returns a Watcher; Run starts it.
func NewWatcher(cfg WatcherConfig) *Watcher {
	if cfg.Quiet <= 0 {
		cfg.Quiet = 20 * time.Millisecond
	}
	if cfg.Patience <= 0 {
		cfg.Patience = 100 * time.Millisecond
	}
	factory := promauto.With(cfg.Registerer)
	w := &Watcher{
		cfg:    cfg,
		queue:  newQueue(),
		synced: make(chan struct{}),
		outage: outage{log: cfg.Log, every: 30 * time.Second},
		events: factory.NewCounterVec(prometheus.CounterOpts{
			Name: "pilot_k8s_cfg_events",
			Help: "Events from the Kubernetes API that changed something, by kind and event.",
		}, []string{"type", "event"}),
		compile: factory.NewHistogram(prometheus.HistogramOpts{
			Name:    "weft_control_compile_seconds",
			Help:    "Time to compile all services, endpoints and policies, and every pod, anew.",
			Buckets: prometheus.ExponentialBuckets(0.001, 2, 14),
		}),
	}
	w.reachable = factory.NewGauge(prometheus.GaugeOpts{
		Name: "weft_control_api_server_reachable",
		Help: "1 while the Kubernetes API server answers.",
	})
	w.statuses.changed = make(chan struct{})
	w.makeInformers()
	return w
}

// Synced is closed when the Sink has been handed all that was there at the
// start.
func (w *Watcher) Synced() <-chan struct{} { return w.synced }

// Run watches the cluster until ctx ends. It returns only then.
func (w *Watcher) Run(ctx context.Context) error {
	tasks := []run.Task{w.loop, w.ping}
	for _, inf := range []cache.SharedIndexInformer{w.pods, w.nodes, w.services, w.slices, w.namespaces} {
		tasks = append(tasks, runInformer(inf))
	}
	for _, o := range w.optional {
		tasks = append(tasks, o.run)
	}
	return run.All(ctx, tasks...)
}

func runInformer(inf cache.SharedIndexInformer) run.Task {
	return func(ctx context.Context) error {
		inf.RunWithContext(ctx)
		return nil
	}
}

// A board holds the latest statuses, and the objects that run the proxies of
// Gateways, for whoever writes them.
type board struct {
	mu       sync.Mutex
	statuses []compile.Status
	objects  []*unstructured.Unstructured
	changed  chan struct{} // closed at the next set
}

func (b *board) set(statuses []compile.Status, objects []*unstructured.Unstructured) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.statuses, b.objects = statuses, objects
	close(b.changed)
	b.changed = make(chan struct{})
}

// latest returns what is on the board, and a channel that is closed when there
// is something newer.
func (b *board) latest() ([]compile.Status, []*unstructured.Unstructured, <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.statuses, b.objects, b.changed
}
