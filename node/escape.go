package node

import (
	"context"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// What to do about a pod that runs outside the mesh though it belongs to it:
// it started while nothing held it back, such as an agent or a CNI plugin that
// was taken out by hand.
const (
	UncapturedCapture = "capture" // capture it as it runs, and say so
	UncapturedReport  = "report"  // leave it as it is, and say so
	UncapturedRestart = "restart" // capture it, and have it replaced by its controller
)

// An escape is a pod that was found to run outside the mesh though it belongs
// to it. It is remembered until the pod is gone.
type escape struct {
	pod     string // namespace/name
	seen    time.Time
	restart bool // it is still to be replaced
	done    string
}

// excuse remembers that a pod may be uncaptured for a good reason: it was not
// wanted in the mesh when it was seen, or was captured and let go. When it is
// enrolled later it joins as any running pod does.
func (k *keeper) excuse(uid string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.excused[uid] = true
}

// escaped reports whether a pod that belongs to the mesh, runs and is not
// captured has run outside it all the time: its object says that it was
// captured, or it is younger than Weft and was never seen outside the mesh.
func (k *keeper) escaped(pod *corev1.Pod) bool {
	uid := string(pod.UID)
	k.mu.Lock()
	known, excused := k.escapes[uid] != nil, k.excused[uid]
	k.mu.Unlock()
	if known || excused {
		return known
	}
	installed := k.kube.installed()
	young := !installed.IsZero() && pod.CreationTimestamp.After(installed)
	return young || pod.Annotations[capturedAnnotation] == capturedValue
}

// foundEscaped tells, once for each pod, that it ran outside the mesh, and
// remembers what is done about it.
func (k *keeper) foundEscaped(ctx context.Context, pod *corev1.Pod) {
	uid := string(pod.UID)
	k.mu.Lock()
	e := k.escapes[uid]
	if e == nil {
		k.escapes[uid] = &escape{pod: pod.Namespace + "/" + pod.Name, seen: time.Now(), restart: k.uncaptured == UncapturedRestart, done: "found"}
	}
	k.mu.Unlock()
	if e != nil {
		return
	}
	k.metrics.escapes.WithLabelValues(k.uncaptured).Inc()
	done := map[string]string{
		UncapturedCapture: "it is captured now; connections from before stay outside the mesh until they end, restart the pod to be sure that none does",
		UncapturedReport:  "it stays outside, as node.uncaptured=report says: restart the pod",
		UncapturedRestart: "it is captured now and replaced by its controller; a pod without a controller is to be restarted by hand",
	}[k.uncaptured]
	message := fmt.Sprintf("the pod belongs to the mesh and was found running outside it on node %s, so its traffic was in clear: it started while the CNI plugin of Weft was not in place; %s", k.kube.node, done)
	k.log.Warn(message, "pod", pod.Namespace+"/"+pod.Name)
	if err := k.kube.warn(ctx, pod, "WeftRanUncaptured", message); err != nil {
		k.log.Debug("the event was not written", "error", err)
	}
}

// settle notes what has become of an escaped pod.
func (k *keeper) settle(uid, done string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if e := k.escapes[uid]; e != nil {
		e.done = done
	}
}

// replaceEscaped has a pod replaced that has escaped, if that is what shall
// become of them. The caller has the pod's turn.
func (k *keeper) replaceEscaped(ctx context.Context, pod *corev1.Pod) error {
	if pod == nil {
		return nil
	}
	uid := string(pod.UID)
	k.mu.Lock()
	e := k.escapes[uid]
	due := e != nil && e.restart && !k.leaving
	k.mu.Unlock()
	if !due {
		return nil
	}
	evicted, err := k.kube.evict(ctx, pod)
	if err != nil {
		return k.failed(ctx, pod, handed(pod, k.kube.node, nil), "restart", fmt.Errorf("it ran outside the mesh and could not be restarted yet: %w", err))
	}
	k.mu.Lock()
	e.restart = false
	k.mu.Unlock()
	if evicted {
		k.settle(uid, "restarted")
		k.log.Info("a pod that ran outside the mesh was evicted", "pod", e.pod)
	} else {
		k.log.Warn("a pod that ran outside the mesh has no controller and was not restarted: restart it by hand", "pod", e.pod)
	}
	return nil
}

// forgetGone forgets what is remembered of a pod whose object is gone.
func (k *keeper) forgetGone(uid string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.escapes, uid)
	delete(k.excused, uid)
}
