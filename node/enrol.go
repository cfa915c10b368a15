package node

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/weft-mesh/weft/internal/handoff"
	"github.com/weft-mesh/weft/node/capture"
)

// enrolRunning captures a pod whose processes run. The caller has its turn.
func (k *keeper) enrolRunning(ctx context.Context, pod *corev1.Pod) (again time.Duration, err error) {
	uid := string(pod.UID)
	p := handed(pod, k.kube.node, addresses(pod))
	began := time.Now()
	s, err := k.sandboxes.find(kubeletUID(uid, pod), p.Addresses)
	if errors.Is(err, errNoSandbox) && k.waitingFor(p) < sandboxPatience {
		k.metrics.waits.Inc()
		return 0, err // comes again, and is told only if it lasts
	}
	if err != nil {
		return 0, k.failed(ctx, pod, p, "sandbox", err)
	}
	escaped := k.escaped(pod)
	if escaped {
		k.foundEscaped(ctx, pod)
		if k.uncaptured == UncapturedReport {
			s.close()
			k.settle(uid, "reported")
			k.succeeded(uid) // no attempt failed: the status lists it among the escaped
			return 0, nil
		}
	}
	bound, cancel := context.WithTimeout(ctx, enrolTimeout)
	defer cancel()
	m := &member{pod: p, sandbox: s, kubelet: kubeletUID(uid, pod), dns: k.dns && wantsDNS(pod)}
	reason, err := k.hold(bound, m, capture.Mode{Existing: k.existingOf(pod)})
	if err != nil {
		alive := k.sandboxes.alive(s)
		s.close()
		if now := k.kube.pod(uid); now == nil || ended(now) || now.DeletionTimestamp != nil || !alive {
			k.log.Info("the pod ended while it was being brought into the mesh; nothing is left of it", "pod", p.Namespace+"/"+p.Name, "error", err)
			k.succeeded(uid)
			return 0, nil
		}
		return 0, k.failed(ctx, pod, p, reason, err)
	}
	k.metrics.enrolled(began, "running")
	if escaped {
		k.settle(uid, "captured")
	}
	k.log.Info("pod is in the mesh", "pod", p.Namespace+"/"+p.Name, "duration", time.Since(began))
	k.succeeded(uid)
	if err := k.kube.annotate(ctx, m.pod, true); err != nil {
		return 0, k.failed(ctx, pod, m.pod, "annotate", err)
	}
	return 0, nil
}

// existingOf returns what becomes of the connections of a running pod.
func (k *keeper) existingOf(pod *corev1.Pod) capture.Existing {
	var namespace map[string]string
	if ns := k.kube.namespace(pod.Namespace); ns != nil {
		namespace = ns.Annotations
	}
	what, bad := existing(pod.Annotations, namespace, k.existing)
	if bad != "" {
		k.log.Warn(meaninglessExisting(bad), "pod", pod.Namespace+"/"+pod.Name)
	}
	if what == ExistingReset || k.resetOnly {
		return capture.Reset
	}
	return capture.Keep
}

// hold captures the pod of m, which has no captive yet: the listeners first,
// then ztunnel serves them, then the traffic is turned to them. On failure
// nothing is left and the sandbox is still the caller's; reason is one word of
// why. The caller has the pod's turn.
func (k *keeper) hold(ctx context.Context, m *member, mode capture.Mode) (reason string, err error) {
	c, err := k.capturer()
	if err != nil {
		return "capture", err
	}
	k.endDrain(m.pod.UID)
	captive, err := c.prepare(ctx, m.pod.UID, m.sandbox, m.dns, nil)
	if err != nil {
		return "prepare", err
	}
	m.since, m.captive = time.Now(), captive
	defer func() {
		if err != nil {
			k.undo(context.WithoutCancel(ctx), c, m)
		}
	}()
	k.offer(m)
	files, err := captive.files()
	if err != nil {
		return "prepare", err
	}
	err = k.proxy.Add(ctx, m.pod, files)
	files.Close()
	if err != nil {
		return "ztunnel", err
	}
	if err := errors.Join(captive.captureDNS(k.answersDNS()), captive.attach(ctx, mode)); err != nil {
		return "attach", err
	}
	k.mu.Lock()
	k.pods[m.pod.UID] = m
	k.mu.Unlock()
	k.write(m)
	return "", nil
}

// undo removes what a failed hold has made.
func (k *keeper) undo(ctx context.Context, c capturer, m *member) {
	ctx, cancel := context.WithTimeout(ctx, leaveTimeout)
	defer cancel()
	k.withdraw(m)
	var errs []error
	if err := m.captive.detach(ctx); err != nil {
		errs = append(errs, err)
	}
	errs = append(errs, k.proxy.Del(ctx, m.pod.UID), m.captive.close(), c.forget(m.pod.UID))
	// A pod that died meanwhile makes some of these fail, and needs none.
	if err := errors.Join(errs...); err != nil {
		k.log.Debug("undoing a capture that failed met errors", "pod", m.pod.Namespace+"/"+m.pod.Name, "error", err)
	}
}

// leave takes a pod out of the mesh that goes on running. The caller has its
// turn.
func (k *keeper) leave(ctx context.Context, pod *corev1.Pod, m *member) error {
	ctx, cancel := context.WithTimeout(ctx, leaveTimeout)
	defer cancel()
	k.withdraw(m)
	if err := m.captive.detach(ctx); err != nil {
		if !k.sandboxes.alive(m.sandbox) {
			return k.release(ctx, m, "the pod ended while it was leaving the mesh")
		}
		k.offer(m)
		return k.failed(ctx, pod, m.pod, "detach", err)
	}
	k.drop(ctx, m)
	m.sandbox.close()
	k.mu.Lock()
	k.drains[m.pod.UID] = &drain{captive: m.captive, pause: drainMin}
	k.mu.Unlock()
	k.queue.AddAfter(m.pod.UID, drainMin)
	k.log.Info("pod has left the mesh", "pod", m.pod.Namespace+"/"+m.pod.Name)
	return nil
}

// release lets go of a pod whose sandbox is gone. The caller has its turn.
func (k *keeper) release(ctx context.Context, m *member, why string) error {
	c, err := k.capturer()
	if err != nil {
		return err
	}
	k.withdraw(m)
	// First: what it does in the background must not pin what is about to be
	// forgotten.
	if err := m.captive.close(); err != nil {
		k.log.Warn("closing the files of a pod failed", "pod", m.pod.Namespace+"/"+m.pod.Name, "error", err)
	}
	if err := c.forget(m.pod.UID); err != nil {
		return k.failed(ctx, nil, m.pod, "forget", err)
	}
	k.drop(ctx, m)
	m.sandbox.close()
	k.log.Info("let go of a pod", "pod", m.pod.Namespace+"/"+m.pod.Name, "why", why)
	return nil
}

// drop makes agent and ztunnel forget a pod that is not captured any more.
func (k *keeper) drop(ctx context.Context, m *member) {
	if err := k.proxy.Del(ctx, m.pod.UID); err != nil {
		// A ztunnel that did not hear of it is told by its next snapshot.
		k.log.Warn("ztunnel was not told that a pod is gone", "pod", m.pod.Namespace+"/"+m.pod.Name, "error", err)
	}
	if err := k.records.remove(m.pod.UID); err != nil {
		k.log.Warn("the record of a pod that is not captured any more was not removed", "pod", m.pod.Namespace+"/"+m.pod.Name, "error", err)
	}
	k.mu.Lock()
	delete(k.pods, m.pod.UID)
	k.mu.Unlock()
	k.excuse(m.pod.UID) // what comes next is not an escape
	k.succeeded(m.pod.UID)
}

// A drain is a pod that has left the mesh and may have connections that were
// captured. They live on; when the last has ended, the pod's routing is tidied.
type drain struct {
	captive captive
	pause   time.Duration // until the next look
}

// A look costs a load of programs, and connections can live for days.
const (
	drainMin = 5 * time.Second
	drainMax = 10 * time.Minute
)

// drain looks once whether a pod that has left has captured connections, and
// says when to look again. The caller has the pod's turn.
func (k *keeper) drain(pod *corev1.Pod, uid string) (again time.Duration, err error) {
	k.mu.Lock()
	d := k.drains[uid]
	k.mu.Unlock()
	if d == nil {
		return 0, nil
	}
	if pod != nil && !ended(pod) {
		once, cancel := context.WithCancel(context.Background())
		cancel()
		if err := d.captive.drained(once); errors.Is(err, context.Canceled) {
			d.pause = min(2*d.pause, drainMax)
			return d.pause, nil
		} else if err != nil {
			k.log.Warn("the routing of a pod that has left the mesh was not tidied; it does no harm", "pod", pod.Namespace+"/"+pod.Name, "error", err)
		}
	}
	k.endDrain(uid)
	return 0, nil
}

// endDrain lets go of a pod that has left.
func (k *keeper) endDrain(uid string) {
	k.mu.Lock()
	d := k.drains[uid]
	delete(k.drains, uid)
	k.mu.Unlock()
	if d == nil {
		return
	}
	if err := d.captive.close(); err != nil {
		k.log.Warn("closing the files of a pod failed", "uid", uid, "error", err)
	}
}

// offer puts a pod among those that a connecting ztunnel is given, withdraw
// takes it out.
func (k *keeper) offer(m *member) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.snapshot[m.pod.UID] = m
}

func (k *keeper) withdraw(m *member) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.snapshot[m.pod.UID] == m {
		delete(k.snapshot, m.pod.UID)
	}
}

// entries returns what a connecting ztunnel is given, in a steady order. The
// caller closes the files.
func (k *keeper) entries() []handoff.Entry {
	k.mu.Lock()
	members := slices.SortedFunc(maps.Values(k.snapshot), func(a, b *member) int { return strings.Compare(a.pod.UID, b.pod.UID) })
	k.mu.Unlock()
	var out []handoff.Entry
	for _, m := range members {
		files, err := m.captive.files()
		if err != nil {
			// It may have left in this very moment.
			k.log.Warn("a pod was not handed to the ztunnel that connects", "pod", m.pod.Namespace+"/"+m.pod.Name, "error", err)
			continue
		}
		out = append(out, handoff.Entry{Pod: m.pod, Files: files})
	}
	return out
}

// failed records, logs and counts that a pod is not as it should be, and
// returns err. Repetitions are logged once in a while; the pod gets an event
// the first time. pod may be nil.
func (k *keeper) failed(ctx context.Context, pod *corev1.Pod, p handoff.Pod, reason string, err error) error {
	if ctx.Err() != nil && errors.Is(err, context.Cause(ctx)) {
		return err // the agent stops
	}
	k.metrics.failures.WithLabelValues(reason).Inc()
	k.mu.Lock()
	f, again := k.failures[p.UID]
	if !again {
		f.since = time.Now()
	}
	news := f.err == nil || f.reason != reason
	f.pod, f.reason, f.err = p.Namespace+"/"+p.Name, reason, err
	if news {
		f.times = 0
	}
	f.times++
	k.failures[p.UID] = f
	k.mu.Unlock()
	if news || f.times%20 == 0 {
		k.log.Error("pod is not as it should be; it is tried again", "pod", f.pod, "reason", reason, "error", err, "times", f.times)
	}
	if news && pod != nil {
		if e := k.kube.warn(ctx, pod, "WeftEnrolFailed", fmt.Sprintf("the node agent of %s could not bring the pod where it belongs (%s): %v", k.kube.node, reason, err)); e != nil {
			k.log.Debug("the event was not written", "error", e)
		}
	}
	return err
}

// waitingFor returns how long a pod has been waited for, and begins to count.
func (k *keeper) waitingFor(p handoff.Pod) time.Duration {
	k.mu.Lock()
	defer k.mu.Unlock()
	f, ok := k.failures[p.UID]
	if !ok {
		f = failure{pod: p.Namespace + "/" + p.Name, reason: "starting", since: time.Now()}
		k.failures[p.UID] = f
	}
	return time.Since(f.since)
}

// succeeded forgets what went wrong with a pod.
func (k *keeper) succeeded(uid string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.failures, uid)
}
