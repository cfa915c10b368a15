package node

import (
	"context"
	"maps"
	"slices"
	"time"
)

// mendCapture puts back, every half minute, what root in a pod has taken off
// its own capture. In between nothing leaves by that: the pod has cut itself off.
func (k *keeper) mendCapture(ctx context.Context) error {
	tick := time.NewTicker(mendInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			k.mendAll(ctx)
		}
	}
}

func (k *keeper) mendAll(ctx context.Context) {
	k.mu.Lock()
	uids := slices.Collect(maps.Keys(k.pods))
	k.mu.Unlock()
	for _, uid := range uids {
		done, err := k.turns.take(ctx, uid)
		if err != nil {
			return
		}
		if m := k.member(uid); m != nil {
			k.mendOne(m)
		}
		done()
	}
}

func (k *keeper) mendOne(m *member) {
	mended, err := m.captive.mend()
	name := m.pod.Namespace + "/" + m.pod.Name
	if len(mended) > 0 {
		k.log.Warn("a process in the pod has taken off parts of its capture, which was cut off by that; they are back", "pod", name, "parts", mended)
	}
	if err != nil {
		k.log.Error("parts of a pod's capture are missing and cannot be put back; what it sends past the proxy is dropped", "pod", name, "error", err)
	}
}
