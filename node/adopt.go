package node

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/weft-mesh/weft/internal/handoff"
	"github.com/weft-mesh/weft/node/capture"
)

// holdWait is how long an agent that has started waits for a ztunnel to say
// what it serves. With no ztunnel alive there are no listeners to adopt.
const holdWait = 5 * time.Second

// holds gathers the pods that a ztunnel serves while the agent starts. The
// first ztunnel that connects ends the gathering: two that overlap in an
// update serve the same listeners.
type holds struct {
	mu     sync.Mutex
	closed bool
	pods   map[string]handoff.Entry
	first  chan struct{} // closed when a ztunnel has told all
	told   sync.Once
}

func newHolds() *holds {
	return &holds{pods: map[string]handoff.Entry{}, first: make(chan struct{})}
}

// add is handoff's OnHold: it owns the files.
func (h *holds) add(p handoff.Pod, f handoff.Files) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if _, have := h.pods[p.UID]; have || h.closed {
		f.Close()
		return
	}
	h.pods[p.UID] = handoff.Entry{Pod: p, Files: f}
}

// end is handoff's OnHoldEnd.
func (h *holds) end(string) { h.told.Do(func() { close(h.first) }) }

// wait returns what was gathered when a ztunnel has told all, or after a
// while, or when ctx ends. The files stay h's, until close.
func (h *holds) wait(ctx context.Context, d time.Duration) map[string]handoff.Entry {
	limit := time.NewTimer(d)
	defer limit.Stop()
	select {
	case <-h.first:
	case <-limit.C:
	case <-ctx.Done():
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
	return h.pods
}

// close closes the files that were gathered.
func (h *holds) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
	for _, e := range h.pods {
		e.Files.Close()
	}
	h.pods = nil
}

// adopt takes over the pods that an agent before has captured, without
// touching their traffic, and removes what is left of pods that are gone.
func (k *keeper) adopt(ctx context.Context, c capturer, held map[string]handoff.Entry) error {
	uids, err := c.pinned()
	if err != nil {
		return err
	}
	adopted := 0
	keep := make(map[string]bool, len(uids))
	for _, uid := range uids {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		done, err := k.turns.take(ctx, uid)
		if err != nil {
			return err
		}
		if k.adoptOne(ctx, c, uid, held) {
			adopted++
			keep[uid] = true
		}
		done()
	}
	if len(uids) > 0 {
		k.log.Info("took over the pods of the agent before", "pods", adopted, "gone", len(uids)-adopted)
	}
	k.mu.Lock()
	k.blinded = false
	for uid := range k.pods {
		keep[uid] = true // captured while this went on
	}
	k.mu.Unlock()
	if err := k.records.sweep(keep); err != nil {
		k.log.Warn("records of pods that are gone were not removed", "error", err)
	}
	return nil
}

// adoptOne takes over one pod. It reports false for one that is gone. The
// caller has the pod's turn.
func (k *keeper) adoptOne(ctx context.Context, c capturer, uid string, held map[string]handoff.Entry) bool {
	if k.member(uid) != nil {
		k.queue.Add(uid) // adopted from its record before; now its object is known
		return true
	}
	h, isHeld := held[uid]
	pod := k.kube.pod(uid)
	p := h.Pod // if its object is gone, ztunnel knows whose traffic it is
	if pod != nil {
		addrs := addresses(pod)
		if len(addrs) == 0 {
			addrs = p.Addresses // it started moments ago, its status does not say yet
		}
		p = handed(pod, k.kube.node, addrs)
	}
	s, err := (*sandbox)(nil), errNoSandbox
	if pod != nil || isHeld {
		s, err = k.sandboxes.find(kubeletUID(uid, pod), p.Addresses)
	}
	if errors.Is(err, errNoSandbox) {
		if err := c.forget(uid); err != nil {
			k.log.Error("what is left of a pod that is gone was not removed", "uid", uid, "error", err)
		}
		return false
	}
	k.excuse(uid) // its programs hold it, whatever becomes of this
	if err != nil {
		// It stays as the programs in the kernel hold it.
		k.failed(ctx, pod, p, "adopt", err)
		k.queue.AddRateLimited(uid)
		return true
	}
	m := &member{pod: p, sandbox: s, kubelet: kubeletUID(uid, pod), dns: k.dns && (pod == nil || wantsDNS(pod))}
	k.takeOver(ctx, c, pod, m, heldFiles(held, uid))
	return true
}

func heldFiles(held map[string]handoff.Entry, uid string) *handoff.Files {
	h, ok := held[uid]
	if !ok {
		return nil
	}
	return &h.Files
}

// takeOver makes a pod that is captured in the kernel a member, with the
// listeners that a ztunnel has held, if any. It reports whether it did; if
// not, the worker tries again. m's sandbox is the keeper's from then on. pod
// may be nil.
func (k *keeper) takeOver(ctx context.Context, c capturer, pod *corev1.Pod, m *member, files *handoff.Files) bool {
	uid := m.pod.UID
	captive, err := c.prepare(ctx, uid, m.sandbox, m.dns, files)
	if err != nil {
		// Its programs still hold it, so nothing leaks. The worker enrols it
		// again, which picks up what is there.
		m.sandbox.close()
		k.failed(ctx, pod, m.pod, "adopt", err)
		k.queue.AddRateLimited(uid)
		return false
	}
	m.since, m.captive = time.Now(), captive
	if err := errors.Join(captive.captureDNS(k.answersDNS()), captive.attach(ctx, capture.Mode{Existing: capture.Keep})); err != nil {
		m.unsound = true
		k.failed(ctx, pod, m.pod, "adopt", err)
		k.queue.AddRateLimited(uid)
	}
	k.mu.Lock()
	k.pods[uid], k.snapshot[uid] = m, m
	k.mu.Unlock()
	k.write(m)
	k.queue.Add(uid)
	return true
}

// adoptRecorded takes over the captured pods that can be known for sure
// without the API server: by the record of the agent before, and by what a
// ztunnel says that it serves. The others stay blocked, as the programs in
// the kernel hold them, and nothing is removed.
func (k *keeper) adoptRecorded(ctx context.Context, c capturer, held map[string]handoff.Entry) error {
	uids, err := c.pinned()
	if err != nil {
		return err
	}
	k.mu.Lock()
	k.blinded = true
	k.mu.Unlock()
	adopted := 0
	for _, uid := range uids {
		done, err := k.turns.take(ctx, uid)
		if err != nil {
			return err
		}
		if err := k.adoptFromRecord(ctx, c, uid, held); err == nil {
			adopted++
		} else {
			k.log.Warn("a captured pod stays blocked until the API server says who it is", "uid", uid, "error", err)
		}
		done()
	}
	k.log.Warn("the API server does not answer; captured pods are served by what was written down of them", "pods", adopted, "blocked", len(uids)-adopted)
	return nil
}

// adoptFromRecord takes over one pod without the API server. The caller has
// the pod's turn.
func (k *keeper) adoptFromRecord(ctx context.Context, c capturer, uid string, held map[string]handoff.Entry) error {
	if k.member(uid) != nil {
		return nil
	}
	rec, err := k.records.load(uid)
	if err != nil {
		return err
	}
	if h, ok := held[uid]; ok && (h.Pod.Namespace != rec.Pod.Namespace || h.Pod.ServiceAccount != rec.Pod.ServiceAccount) {
		return fmt.Errorf("ztunnel serves it as %s/%s and its record says %s/%s", h.Pod.Namespace, h.Pod.ServiceAccount, rec.Pod.Namespace, rec.Pod.ServiceAccount)
	}
	s, err := k.sandboxOf(rec)
	if err != nil {
		return err
	}
	k.excuse(uid)
	m := &member{pod: rec.Pod, sandbox: s, kubelet: rec.Kubelet, container: rec.Container, dns: rec.DNS}
	if !k.takeOver(ctx, c, nil, m, heldFiles(held, uid)) {
		return errors.New("it could not be taken over; see the line before")
	}
	return nil
}
