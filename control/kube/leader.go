package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
	"k8s.io/klog/v2"

	"github.com/weft-mesh/weft/internal/run"
)

// A LeaderConfig says who stands for election, and what the winner does.
type LeaderConfig struct {
	Client    kubernetes.Interface
	Namespace string // of the Lease weft-control
	Identity  string // of this process: unique, such as its pod's name
	// Tasks run while this process is the leader, and end when it no longer
	// is. One that returns an error gives the leadership up.
	Tasks      []run.Task
	Log        *slog.Logger
	Registerer prometheus.Registerer // nil is none
}

// LeaseName is the name of the Lease that the leader holds.
const LeaseName = "weft-control"

// A term is a time as leader: it ends with ctx, or earlier with resign.
type term struct {
	ctx    context.Context
	resign context.CancelFunc
}

// RunLeader stands for election until ctx ends, and runs the tasks whenever
// it wins. Serving proxies needs no leader; only writing does.
func RunLeader(ctx context.Context, cfg LeaderConfig) error {
	gauge := promauto.With(cfg.Registerer).NewGauge(prometheus.GaugeOpts{
		Name: "weft_control_leader", Help: "1 while this process is the one that writes to the Kubernetes API.",
	})
	terms := make(chan term)
	lock := &loggedLock{
		Interface: &resourcelock.LeaseLock{
			LeaseMeta:  metav1.ObjectMeta{Namespace: cfg.Namespace, Name: LeaseName},
			Client:     cfg.Client.CoordinationV1(),
			LockConfig: resourcelock.ResourceLockConfig{Identity: cfg.Identity},
		},
		outage: outage{log: cfg.Log, every: 30 * time.Second},
	}
	elect := func(ctx context.Context) error {
		for ctx.Err() == nil {
			// The elector has a line for every try; ours are in the lock.
			candidacy, resign := context.WithCancel(klog.NewContext(ctx, klog.Logger{}))
			elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
				Lock: lock, Name: LeaseName, ReleaseOnCancel: true,
				LeaseDuration: 15 * time.Second, RenewDeadline: 10 * time.Second, RetryPeriod: 2 * time.Second,
				Callbacks: leaderelection.LeaderCallbacks{
					OnStartedLeading: func(won context.Context) {
						select {
						case terms <- term{won, resign}:
						case <-won.Done():
						}
					},
					OnStoppedLeading: func() {},
				},
			})
			if err != nil {
				resign()
				return fmt.Errorf("stand for election: %w", err) // the config is wrong: nothing to wait for
			}
			elector.Run(candidacy)
			resign()
		}
		return nil
	}
	work := func(ctx context.Context) error {
		for {
			select {
			case <-ctx.Done():
				return nil
			case t := <-terms:
				cfg.Log.Info("this process is the leader now and writes statuses and trust bundles", "identity", cfg.Identity)
				gauge.Set(1)
				err := run.All(t.ctx, cfg.Tasks...)
				gauge.Set(0)
				if err != nil && !errors.Is(err, context.Canceled) {
					cfg.Log.Error("gives up the leadership, and stands for it again", "error", err)
				}
				t.resign()
				if ctx.Err() == nil {
					cfg.Log.Info("this process is no longer the leader", "identity", cfg.Identity)
				}
			}
		}
	}
	return run.All(ctx, elect, work)
}

// A loggedLock says why a Lease cannot be read or written, and what to do.
type loggedLock struct {
	resourcelock.Interface
	outage outage
}

// Get reads the Lease.
func (l *loggedLock) Get(ctx context.Context) (*resourcelock.LeaderElectionRecord, []byte, error) {
	record, raw, err := l.Interface.Get(ctx)
	return record, raw, l.report(err)
}

// Create makes the Lease.
func (l *loggedLock) Create(ctx context.Context, r resourcelock.LeaderElectionRecord) error {
	return l.report(l.Interface.Create(ctx, r))
}

// Update takes or renews the Lease.
func (l *loggedLock) Update(ctx context.Context, r resourcelock.LeaderElectionRecord) error {
	return l.report(l.Interface.Update(ctx, r))
}

// report passes err on. A Lease that is not there yet, or that somebody else
// was faster to take, is no failure.
func (l *loggedLock) report(err error) error {
	if !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) && !apierrors.IsAlreadyExists(err) {
		l.outage.report("standing for election", err)
	}
	return err
}
