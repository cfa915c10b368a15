package node

import (
	"context"
	"errors"
	"sync"
	"time"

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
		}
		done()
	}
	if len(uids) > 0 {
		k.log.Info("took over the pods of the agent before", "pods", adopted, "gone", len(uids)-adopted)
	}
	return nil
}

// adoptOne takes over one pod. It reports false for one that is gone.
func (k *keeper) adoptOne(ctx context.Context, c capturer, uid string, held map[string]handoff.Entry) bool {
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
	if err != nil {
		// It stays as the programs in the kernel hold it.
		k.failed(ctx, pod, p, "adopt", err)
		k.queue.AddRateLimited(uid)
		return true
	}
	var files *handoff.Files
	if isHeld {
		files = &h.Files
	}
	captive, err := c.prepare(ctx, uid, s, files)
	if err != nil {
		// Its programs still hold it, so nothing leaks. The worker enrols it
		// again, which picks up what is there.
		s.close()
		k.failed(ctx, pod, p, "adopt", err)
		k.queue.AddRateLimited(uid)
		return true
	}
	m := &member{pod: p, since: time.Now(), captive: captive, sandbox: s}
	if err := captive.attach(ctx, capture.Mode{Existing: capture.Keep}); err != nil {
		m.unsound = true
		k.failed(ctx, pod, p, "adopt", err)
		k.queue.AddRateLimited(uid)
	}
	k.mu.Lock()
	k.pods[uid], k.snapshot[uid] = m, m
	k.mu.Unlock()
	k.queue.Add(uid)
	return true
}
