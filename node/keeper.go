package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"

	"github.com/weft-mesh/weft/internal/handoff"
	"github.com/weft-mesh/weft/node/capture"
)

// A proxy serves captured pods: ztunnel, behind *handoff.Server.
type proxy interface {
	Add(ctx context.Context, p handoff.Pod, f handoff.Files) error
	Del(ctx context.Context, uid string) error
}

// How workers pace themselves.
const (
	workers       = 8
	retryMin      = 100 * time.Millisecond
	retryMax      = 15 * time.Second
	enrolTimeout  = 20 * time.Second
	leaveTimeout  = 15 * time.Second
	watchInterval = 2 * time.Second // how often a sandbox whose pod is gone is looked for
	// sandboxPatience is how long a pod may have an address and no sandbox
	// before that is a failure: sandboxes are replaced in place, and objects
	// outlive them.
	sandboxPatience = 10 * time.Second
)

// A keeper brings the pods of the node to where they belong, in or out of the
// mesh, and remembers those that are in.
type keeper struct {
	kube       *kube
	proxy      proxy
	sandboxes  sandboxes
	records    *records // of captured pods; nil keeps none
	excluded   []string
	leaveGrace time.Duration
	existing   string // ExistingKeep or ExistingReset, where neither pod nor namespace says
	resetOnly  bool   // the kernel cannot keep connections
	dns        bool   // DNS requests are captured, unless a pod says otherwise
	uncaptured string // what to do about pods that run outside the mesh though they belong to it
	metrics    *metrics
	log        *slog.Logger

	queue workqueue.TypedRateLimitingInterface[string] // UIDs
	turns turns                                        // by UID: one at a time works on a pod

	decided    chan struct{} // closed when it is known whether anything can be captured
	decideOnce sync.Once

	mu       sync.Mutex
	capture  capturer           // nil while nothing can be captured
	blocked  error              // why not
	leaving  bool               // Weft is being uninstalled: every pod leaves
	blinded  bool               // pods were taken over by their records, and adopt has still to look
	noDNS    bool               // the ztunnel that serves new pods has no name server
	pods     map[string]*member // what is captured, by UID
	failures map[string]failure // what went wrong last, by UID, until it goes right
	snapshot map[string]*member // what a ztunnel that connects is given
	drains   map[string]*drain  // pods that left and have captured connections, by UID
	unknown  map[string]string  // label values that were warned of, by UID
	escapes  map[string]*escape // pods that were found outside the mesh, by UID
	excused  map[string]bool    // pods that may be found there, by UID
}

// A member is a captured pod. Whoever has the pod's turn may change it; who
// has not reads pod and since only.
type member struct {
	pod       handoff.Pod
	since     time.Time
	captive   captive
	sandbox   *sandbox
	kubelet   string    // the UID that the kubelet runs it under
	container string    // the runtime's name of the sandbox, if CNI told it
	dns       bool      // its DNS requests are captured
	unsound   bool      // attaching it failed after a restart, and is to be repeated
	retracted time.Time // when its annotation was taken away; zero unless it leaves
}

// A failure is why a pod is not as it should be.
type failure struct {
	pod    string // namespace/name
	reason string // one word, for metrics
	err    error
	since  time.Time
	times  int
}

// errBlocked is the zero keeper's answer: the agent has not started yet.
var errBlocked = errors.New("the node agent is starting")

func newKeeper(k *kube, p proxy, s sandboxes, m *metrics, log *slog.Logger) *keeper {
	return &keeper{
		kube: k, proxy: p, sandboxes: s, metrics: m, log: log,
		blocked: errBlocked,
		queue: workqueue.NewTypedRateLimitingQueue(
			workqueue.NewTypedItemExponentialFailureRateLimiter[string](retryMin, retryMax)),
		pods: map[string]*member{}, failures: map[string]failure{}, snapshot: map[string]*member{},
		drains: map[string]*drain{}, unknown: map[string]string{}, decided: make(chan struct{}),
		escapes: map[string]*escape{}, excused: map[string]bool{}, uncaptured: UncapturedCapture,
	}
}

// follow makes pods and namespaces that change wake their workers.
func (k *keeper) follow() error {
	_, err := k.kube.pods.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: k.podChanged,
		UpdateFunc: func(old, obj any) {
			k.podChanged(old) // of another UID, if the pod was replaced by one of its name
			k.podChanged(obj)
		},
		DeleteFunc: func(obj any) {
			if gone, ok := obj.(cache.DeletedFinalStateUnknown); ok {
				obj = gone.Obj
			}
			k.podChanged(obj)
		},
	})
	if err != nil {
		return fmt.Errorf("follow pods: %v", err)
	}
	_, err = k.kube.namespaces.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(obj any) { k.namespaceChanged(nil, obj) },
		UpdateFunc: k.namespaceChanged,
	})
	if err != nil {
		return fmt.Errorf("follow namespaces: %v", err)
	}
	return nil
}

func (k *keeper) podChanged(obj any) {
	if pod, ok := obj.(*corev1.Pod); ok {
		k.queue.Add(string(pod.UID)) // the queue holds each UID once
	}
}

func (k *keeper) namespaceChanged(old, obj any) {
	ns, ok := obj.(*corev1.Namespace)
	if !ok {
		return
	}
	var before map[string]string
	if o, ok := old.(*corev1.Namespace); ok {
		before = o.Labels
	}
	if old != nil && before[modeLabel] == ns.Labels[modeLabel] {
		return
	}
	if v, unknown := unknownMode(ns.Labels); unknown {
		k.log.Warn(meaningless(v), "namespace", ns.Name)
	}
	if _, bad := existing(ns.Annotations, nil, ""); bad != "" {
		k.log.Warn(meaninglessExisting(bad), "namespace", ns.Name)
	}
	for _, p := range k.kube.podsOf(ns.Name) {
		k.queue.Add(string(p.UID))
	}
}

// meaningless says what is wrong with a value of the label.
func meaningless(value string) string {
	return fmt.Sprintf("label %s=%q has no meaning and counts as not set: want %s or %s", modeLabel, value, modeOn, modeOff)
}

// meaninglessExisting says what is wrong with a value of the annotation.
func meaninglessExisting(value string) string {
	return fmt.Sprintf("annotation %s=%q has no meaning and counts as not set: want %s or %s", existingAnnotation, value, ExistingKeep, ExistingReset)
}

// warnUnknown tells once of a pod's label value that has no meaning.
func (k *keeper) warnUnknown(ctx context.Context, uid string, pod *corev1.Pod) {
	value, unknown := "", false
	if pod != nil {
		value, unknown = unknownMode(pod.Labels)
	}
	k.mu.Lock()
	told, was := k.unknown[uid]
	if unknown {
		k.unknown[uid] = value
	} else {
		delete(k.unknown, uid)
	}
	k.mu.Unlock()
	if !unknown || was && told == value {
		return
	}
	k.log.Warn(meaningless(value), "pod", pod.Namespace+"/"+pod.Name)
	if err := k.kube.warn(ctx, pod, "WeftUnknownLabel", meaningless(value)); err != nil {
		k.log.Debug("the event was not written", "error", err)
	}
}

// run works until ctx ends, and returns when every worker has.
func (k *keeper) run(ctx context.Context) error {
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for k.work(ctx) {
			}
		})
	}
	<-ctx.Done()
	k.queue.ShutDown()
	wg.Wait()
	return nil
}

// work serves one pod from the queue. It reports whether there is more to come.
func (k *keeper) work(ctx context.Context) bool {
	uid, stop := k.queue.Get()
	if stop {
		return false
	}
	defer k.queue.Done(uid)
	again, err := k.reconcile(ctx, uid)
	switch {
	case err != nil:
		k.queue.AddRateLimited(uid)
	case again > 0:
		k.queue.Forget(uid)
		k.queue.AddAfter(uid, again)
	default:
		k.queue.Forget(uid)
	}
	return true
}

// reconcile takes the next step for one pod, and says when to look again if
// nothing else happens.
func (k *keeper) reconcile(ctx context.Context, uid string) (again time.Duration, err error) {
	done, err := k.turns.take(ctx, uid)
	if err != nil {
		return 0, nil // the agent stops
	}
	defer done()
	pod, m := k.kube.pod(uid), k.member(uid)
	if k.isBlind() {
		return k.blind(ctx, m)
	}
	k.warnUnknown(ctx, uid, pod)
	again, err = k.step(ctx, uid, pod, m)
	if e := k.replaceEscaped(ctx, pod); err == nil {
		err = e
	}
	return again, err
}

// isBlind reports whether it is not known what the API server says, or was not
// until a moment ago: then adopt has still to take over the pods that no record
// told of, with the listeners that a ztunnel may hold of them.
func (k *keeper) isBlind() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.blinded || !k.kube.synced()
}

// blind looks after a captured pod while nothing else is known of it: it is
// served until its sandbox is gone.
func (k *keeper) blind(ctx context.Context, m *member) (again time.Duration, err error) {
	if m == nil {
		return 0, nil
	}
	if k.sandboxes.alive(m.sandbox) {
		return watchInterval, nil
	}
	return 0, k.release(ctx, m, "its sandbox is gone")
}

// step takes the next step for a pod. The caller has its turn.
func (k *keeper) step(ctx context.Context, uid string, pod *corev1.Pod, m *member) (again time.Duration, err error) {
	if m != nil && m.unsound {
		if err := m.captive.attach(ctx, capture.Mode{Existing: capture.Keep}); err != nil {
			return 0, k.failed(ctx, pod, m.pod, "attach", err)
		}
		m.unsound = false
		k.succeeded(uid)
	}
	switch step := next(k.situation(uid, pod, m)); step {
	case enrol:
		return k.enrolRunning(ctx, pod)
	case annotate:
		m.retracted = time.Time{}
		if err := k.kube.annotate(ctx, m.pod, true); err != nil {
			return 0, k.failed(ctx, pod, m.pod, "annotate", err)
		}
		k.succeeded(uid)
	case retract:
		if err := k.kube.annotate(ctx, m.pod, false); err != nil && !k.isLeaving() {
			return 0, k.failed(ctx, pod, m.pod, "annotate", err)
		}
		m.retracted = time.Now()
		return k.leaveGrace, nil
	case linger:
		return time.Until(m.retracted.Add(k.leaveGrace)), nil
	case leave:
		return 0, k.leave(ctx, pod, m)
	case watch:
		if k.sandboxes.alive(m.sandbox) {
			return watchInterval, nil
		}
		return 0, k.release(ctx, m, "its sandbox is gone")
	case disclaim:
		if err := k.kube.annotate(ctx, handed(pod, k.kube.node, nil), false); err != nil {
			return 0, k.failed(ctx, pod, handed(pod, k.kube.node, nil), "annotate", err)
		}
		k.succeeded(uid)
	default:
		k.succeeded(uid)
		return k.drain(pod, uid)
	}
	return 0, nil
}

// situation is what is known of a pod. Both pod and m may be nil.
func (k *keeper) situation(uid string, pod *corev1.Pod, m *member) situation {
	s := situation{captured: m != nil}
	if m != nil {
		s.retracted = !m.retracted.IsZero()
		s.lingered = s.retracted && time.Since(m.retracted) >= k.leaveGrace
	}
	if pod == nil || ended(pod) {
		if pod == nil {
			k.forgetGone(uid)
		}
		// With the agent goes who would watch its sandbox.
		s.there = s.captured && k.isLeaving()
		return s
	}
	labels, _ := k.kube.labels(pod.Namespace)
	s.there = true
	s.wanted = decide(pod, labels, k.excluded).enrol && !k.isLeaving()
	if !s.wanted {
		k.excuse(uid) // when it is wanted later, it joins as a running pod
	}
	// A pod that is being deleted is not brought in: its sandbox may be gone.
	s.running = len(addresses(pod)) > 0 && pod.DeletionTimestamp == nil
	s.annotated = pod.Annotations[capturedAnnotation] == capturedValue
	return s
}

// leaveAll takes every pod out of the mesh, and returns when that is done or
// ctx ends.
func (k *keeper) leaveAll(ctx context.Context) error {
	k.mu.Lock()
	k.leaving = true
	k.mu.Unlock()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	wake := func() int {
		k.mu.Lock()
		uids := slices.Collect(maps.Keys(k.pods))
		k.mu.Unlock()
		for _, uid := range uids {
			k.queue.Add(uid)
		}
		return len(uids)
	}
	wake()
	for {
		select {
		case <-ctx.Done():
			if n := wake(); n > 0 {
				return fmt.Errorf("take the pods of the node out of the mesh: %d are still captured; restart them to free them", n)
			}
			return nil
		case <-tick.C:
			if k.count() == 0 {
				return nil
			}
		}
	}
}

// wakeFailed wakes the workers of the pods that are not as they should be,
// after something they may have waited for has changed.
func (k *keeper) wakeFailed() {
	k.mu.Lock()
	defer k.mu.Unlock()
	for uid := range k.failures {
		k.queue.Forget(uid)
		k.queue.Add(uid)
	}
}

// serveDNS says whether the ztunnel that is connected answers DNS requests.
// While none is connected, it stays as it was: requests wait for one.
func (k *keeper) serveDNS(ctx context.Context, on bool) {
	k.mu.Lock()
	was := !k.noDNS
	k.noDNS = !on
	uids := slices.Collect(maps.Keys(k.pods))
	k.mu.Unlock()
	if !k.dns || was == on {
		return
	}
	k.log.Info("whether ztunnel answers the DNS requests of pods has changed", "answers", on)
	for _, uid := range uids {
		done, err := k.turns.take(ctx, uid)
		if err != nil {
			return
		}
		if m := k.member(uid); m != nil && m.dns {
			if err := m.captive.captureDNS(on); err != nil {
				k.log.Error("the DNS requests of a pod do not go where they should", "pod", m.pod.Namespace+"/"+m.pod.Name, "error", err)
			}
		}
		done()
	}
}

// answersDNS reports whether a pod that is captured now may have its DNS
// requests captured.
func (k *keeper) answersDNS() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return !k.noDNS
}

func (k *keeper) member(uid string) *member {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.pods[uid]
}

func (k *keeper) count() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.pods)
}

func (k *keeper) isLeaving() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.leaving
}

// enable lets pods be captured.
func (k *keeper) enable(c capturer) {
	k.mu.Lock()
	k.capture, k.blocked = c, nil
	k.mu.Unlock()
	k.decideOnce.Do(func() { close(k.decided) })
}

// disable says why no pod can be captured.
func (k *keeper) disable(why error) {
	k.mu.Lock()
	k.capture, k.blocked = nil, why
	k.mu.Unlock()
	k.decideOnce.Do(func() { close(k.decided) })
}

func (k *keeper) capturer() (capturer, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.capture, k.blocked
}
