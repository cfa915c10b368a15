package kube

import (
	"context"
	"time"

	"k8s.io/client-go/discovery"
)

const (
	pingEvery   = 5 * time.Second
	pingTimeout = 5 * time.Second
)

// ping asks the API server for its version now and again, until ctx ends. A
// watch that is cut is tried again in silence, so without this a long outage
// would have no line in the log.
func (w *Watcher) ping(ctx context.Context) error {
	server := discovery.ToServerVersionInterfaceWithContext(w.cfg.Client.Discovery())
	tick := time.NewTicker(pingEvery)
	defer tick.Stop()
	var down time.Time
	for {
		began := time.Now()
		asking, cancel := context.WithTimeout(ctx, pingTimeout)
		_, err := server.ServerVersionWithContext(asking)
		cancel()
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			w.reachable.Set(0)
			if down.IsZero() {
				down = began
			}
			w.outage.report("asking whether it is there", err)
		default:
			w.reachable.Set(1)
			if !down.IsZero() {
				w.cfg.Log.Info("the Kubernetes API is back", "after", time.Since(down).Round(time.Second).String())
				down = time.Time{}
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}
