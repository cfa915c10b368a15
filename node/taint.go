package node

import (
	"context"
	"strings"
	"time"
)

// StartupTaint is the taint that keeps pods off a node until Weft's agent is
// ready there. IstioStartupTaint is the one that node pools made for Istio
// have already.
const (
	StartupTaint      = "node.weft.dev/agent-not-ready"
	IstioStartupTaint = "cni.istio.io/not-ready"
)

// How often the agent looks whether it has become ready, and, when it is,
// whether its node has the taint (again).
const (
	readyInterval = 200 * time.Millisecond
	taintInterval = 5 * time.Minute
)

// untaint takes the startup taints off the node as soon as the agent is ready,
// and each time that it becomes ready again, until ctx ends.
func (a *Agent) untaint(ctx context.Context) error {
	if len(a.cfg.StartupTaints) == 0 {
		<-ctx.Done()
		return nil
	}
	var looked time.Time
	was, told := false, ""
	tick := time.NewTicker(readyInterval)
	defer tick.Stop()
	for {
		ready := a.Status().Ready
		if ready && (!was || time.Since(looked) >= taintInterval) {
			n, err := a.kube.untaint(ctx, a.cfg.StartupTaints)
			switch {
			case ctx.Err() != nil:
				return nil
			case err == nil:
				if n > 0 {
					a.log.Info("took the startup taint off the node: its pods may start", "taints", strings.Join(a.cfg.StartupTaints, ","))
				}
				looked, was, told = time.Now(), true, ""
			case err.Error() != told:
				told = err.Error()
				a.log.Error("the startup taint cannot be taken off the node, so no pod is scheduled to it; it is tried again", "error", err)
			}
		}
		if !ready {
			was = false
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}
