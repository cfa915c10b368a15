package node

import (
	"context"
	"fmt"
	"time"

	"github.com/weft-mesh/weft/node/capture"
	"github.com/weft-mesh/weft/node/cni"
)

// startPatience is how long a pod waits for an agent that starts.
const startPatience = 10 * time.Second

// AddPod captures a pod that a container runtime is about to start, if it
// belongs to the mesh. None of its processes runs until AddPod returns.
func (k *keeper) AddPod(ctx context.Context, r cni.Request) (cni.Response, error) {
	if k.isLeaving() {
		return cni.Response{Reason: "Weft is being uninstalled"}, nil
	}
	began := time.Now()
	pod, labels, err := k.kube.starting(ctx, r.Namespace, r.Pod, r.UID)
	if err != nil {
		k.metrics.failures.WithLabelValues("lookup").Inc()
		return cni.Response{}, err
	}
	d := decide(pod, labels, k.excluded)
	if !d.enrol {
		k.excuse(string(pod.UID)) // it starts outside the mesh rightly
		return cni.Response{Reason: d.reason}, nil
	}
	select {
	case <-k.decided: // at the latest then it is known whether it can be captured
	case <-ctx.Done():
	case <-time.After(startPatience):
	}
	done, err := k.turns.take(ctx, string(pod.UID))
	if err != nil {
		return cni.Response{}, fmt.Errorf("wait for the pod's turn: %w", err)
	}
	defer done()
	if m := k.member(string(pod.UID)); m != nil {
		if m.container == r.ContainerID {
			return cni.Response{Captured: true, Reason: d.reason}, nil
		}
		if err := k.release(ctx, m, "its sandbox is replaced by another"); err != nil {
			return cni.Response{}, err
		}
	}
	p := handed(pod, k.kube.node, r.Addresses)
	s, err := k.sandboxes.open(r.Netns, r.Addresses)
	if err != nil {
		k.metrics.failures.WithLabelValues("sandbox").Inc()
		return cni.Response{}, err
	}
	m := &member{pod: p, sandbox: s, kubelet: kubeletUID(p.UID, pod), container: r.ContainerID, dns: k.dns && wantsDNS(pod)}
	if reason, err := k.hold(ctx, m, capture.Mode{New: true}); err != nil {
		s.close()
		k.metrics.failures.WithLabelValues(reason).Inc()
		k.log.Error("a pod of the mesh does not start; the kubelet tries again", "pod", p.Namespace+"/"+p.Name, "reason", reason, "error", err)
		return cni.Response{}, err
	}
	k.metrics.enrolled(began, "cni")
	k.log.Info("pod starts in the mesh", "pod", p.Namespace+"/"+p.Name, "duration", time.Since(began))
	k.succeeded(p.UID)
	k.queue.Add(p.UID) // to annotate it
	return cni.Response{Captured: true, Reason: d.reason}, nil
}

// CheckPod fails if the pod belongs to the mesh and is not in it.
func (k *keeper) CheckPod(ctx context.Context, r cni.Request) error {
	pod, labels, err := k.kube.starting(ctx, r.Namespace, r.Pod, r.UID)
	if err != nil {
		return err
	}
	d := decide(pod, labels, k.excluded)
	if d.enrol && !k.isLeaving() && k.member(string(pod.UID)) == nil {
		return fmt.Errorf("pod %s/%s belongs to the mesh (%s) and is not captured", r.Namespace, r.Pod, d.reason)
	}
	return nil
}

// DelPod lets go of a sandbox that the runtime takes down. A runtime may take
// down an old sandbox of a pod after it has made a new one, and may repeat
// itself, so only the very sandbox counts.
func (k *keeper) DelPod(ctx context.Context, r cni.Request) error {
	uid := k.uidOf(r)
	if uid == "" {
		return nil
	}
	done, err := k.turns.take(ctx, uid)
	if err != nil {
		return err
	}
	defer done()
	m := k.member(uid)
	switch {
	case m == nil:
		return nil
	case m.container == r.ContainerID, m.container == "" && k.isSandbox(m, r.Netns):
		return k.release(ctx, m, "the runtime takes its sandbox down")
	}
	k.queue.Add(uid) // see whether it is still there
	return nil
}

// uidOf finds the captured pod that a request is about.
func (k *keeper) uidOf(r cni.Request) string {
	k.mu.Lock()
	defer k.mu.Unlock()
	if _, ok := k.pods[r.UID]; ok {
		return r.UID
	}
	byName := ""
	for uid, m := range k.pods {
		if m.container == r.ContainerID {
			return uid
		}
		if m.pod.Namespace == r.Namespace && m.pod.Name == r.Pod {
			byName = uid // perhaps: the caller looks at the sandbox
		}
	}
	return byName
}

// isSandbox reports whether the namespace at a path of the host is m's.
func (k *keeper) isSandbox(m *member, path string) bool {
	if path == "" {
		return false
	}
	s, err := k.sandboxes.open(path, nil)
	if err != nil {
		return false
	}
	defer s.close()
	return s.id == m.sandbox.id
}

// Compile-time: the agent answers the plugin.
var _ cni.Handler = (*keeper)(nil)
