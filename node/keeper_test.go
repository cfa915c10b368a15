package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
	"k8s.io/client-go/tools/cache"

	"github.com/weft-mesh/weft/internal/handoff"
	"github.com/weft-mesh/weft/internal/netns"
	"github.com/weft-mesh/weft/node/capture"
	"github.com/weft-mesh/weft/node/cni"
)

// A world is a keeper among fakes that keep a diary.
type world struct {
	t      *testing.T
	client *fake.Clientset
	keeper *keeper
	log    *bytes.Buffer

	mu        sync.Mutex
	diary     []string
	fail      map[string]error // by diary verb
	block     map[string]chan struct{}
	sandboxes map[string]uint64 // by pod UID: the inode of its namespace
	dead      map[uint64]bool
	pins      []string
	open      int                     // captives that were not closed
	held      map[string]int          // the same for each pod
	modes     map[string]capture.Mode // how pods were attached last, by UID
	dns       map[string]bool         // whether their DNS requests are captured
}

func newWorld(t *testing.T, objects ...runtime.Object) *world {
	w := &world{
		t: t, client: fake.NewClientset(objects...), log: &bytes.Buffer{},
		fail: map[string]error{}, block: map[string]chan struct{}{}, sandboxes: map[string]uint64{}, dead: map[uint64]bool{}, modes: map[string]capture.Mode{}, dns: map[string]bool{}, held: map[string]int{},
	}
	w.client.PrependReactor("patch", "pods", func(a clienttesting.Action) (bool, runtime.Object, error) {
		p := a.(clienttesting.PatchAction)
		verb := "annotate "
		if strings.Contains(string(p.GetPatch()), ":null") {
			verb = "retract "
		}
		return false, nil, w.note(verb + p.GetName())
	})
	log := slog.New(slog.NewTextHandler(&lockedWriter{w: w.log}, nil))
	k, err := newKube(w.client, "n1", "weft-system", "ztunnel", log)
	if err != nil {
		t.Fatal(err)
	}
	w.keeper = newKeeper(k, fakeProxy{w}, fakeSandboxes{w}, newMetrics(prometheus.NewRegistry()), log)
	w.keeper.excluded = []string{"weft-system", "kube-system"}
	w.keeper.leaveGrace = 20 * time.Millisecond
	return w
}

// start lets the keeper work until the test ends.
func (w *world) start() {
	w.t.Helper()
	w.work()
	w.follow()
}

// work starts the workers, which nothing wakes yet.
func (w *world) work() {
	w.t.Helper()
	ctx, cancel := context.WithCancel(w.t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { w.keeper.kube.run(ctx) })
	wg.Go(func() { w.keeper.run(ctx) })
	w.t.Cleanup(func() { cancel(); wg.Wait() })
	if !cache.WaitForCacheSync(ctx.Done(), w.keeper.kube.synced) {
		w.t.Fatal("the fake API server was not read")
	}
}

// follow lets objects that change wake the workers.
func (w *world) follow() {
	w.t.Helper()
	if err := w.keeper.follow(); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) enable() { w.keeper.enable(fakeCapturer{w}) }

// note writes the diary, waits if the verb is blocked, and fails if it shall.
func (w *world) note(entry string) error {
	verb, _, _ := strings.Cut(entry, " ")
	w.mu.Lock()
	w.diary = append(w.diary, entry)
	err, block := w.fail[verb], w.block[verb]
	w.mu.Unlock()
	if block != nil {
		<-block
	}
	return err
}

func (w *world) read() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.diary)
}

func (w *world) set(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f()
}

// wait waits until the diary is want, ignoring repeated annotations.
func (w *world) wait(want ...string) {
	w.t.Helper()
	w.until("the diary "+strings.Join(want, ", "), func() bool { return slices.Equal(slices.Compact(w.read()), want) }, func() {
		w.t.Error(cmp.Diff(want, w.read()))
	})
}

func (w *world) until(what string, ok func() bool, else_ ...func()) {
	w.t.Helper()
	end := time.Now().Add(30 * time.Second)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		if time.Now().After(end) {
			for _, f := range else_ {
				f()
			}
			w.t.Fatalf("waited in vain for %s; the log:\n%s", what, w.logged())
		}
		<-tick.C
	}
}

func (w *world) logged() string { logMu.Lock(); defer logMu.Unlock(); return w.log.String() }

// logMu guards the logs of all worlds: tests read them while others write.
var logMu sync.Mutex

type lockedWriter struct{ w io.Writer }

func (l *lockedWriter) Write(b []byte) (int, error) {
	logMu.Lock()
	defer logMu.Unlock()
	return l.w.Write(b)
}

type fakeProxy struct{ w *world }

func (p fakeProxy) Add(_ context.Context, pod handoff.Pod, f handoff.Files) error {
	if f.Netns == nil {
		return errors.New("no files")
	}
	return p.w.note("add " + pod.Name)
}
func (p fakeProxy) Del(_ context.Context, uid string) error { return p.w.note("del " + uid) }

type fakeSandboxes struct{ w *world }

func (s fakeSandboxes) get(uid, path string, addrs []netip.Addr) (*sandbox, error) {
	s.w.mu.Lock()
	defer s.w.mu.Unlock()
	ino, ok := s.w.sandboxes[uid]
	if !ok || s.w.dead[ino] {
		return nil, errNoSandbox
	}
	return &sandbox{id: netns.ID{Ino: ino}, path: path, addrs: addrs}, nil
}
func (s fakeSandboxes) find(uid string, addrs []netip.Addr) (*sandbox, error) {
	if len(addrs) == 0 {
		return nil, errors.New("no address")
	}
	return s.get(uid, "", addrs)
}
func (s fakeSandboxes) open(path string, addrs []netip.Addr) (*sandbox, error) {
	return s.get(path, path, addrs)
}
func (s fakeSandboxes) alive(b *sandbox) bool {
	s.w.mu.Lock()
	defer s.w.mu.Unlock()
	return !s.w.dead[b.id.Ino]
}

type fakeCapturer struct{ w *world }

func (c fakeCapturer) prepare(_ context.Context, uid string, s *sandbox, dns bool, held *handoff.Files) (captive, error) {
	entry := "prepare " + uid
	if held != nil {
		entry += " with held"
	}
	if err := c.w.note(entry); err != nil {
		return nil, err
	}
	c.w.set(func() { c.w.open++; c.w.held[uid]++ })
	return &fakeCaptive{c.w, uid}, nil
}
func (c fakeCapturer) pinned() ([]string, error) { return c.w.pins, nil }
func (c fakeCapturer) forget(uid string) error {
	c.w.set(func() {
		if c.w.held[uid] > 0 {
			c.w.t.Errorf("pod %s is forgotten while its capture may still be pinning", uid)
		}
	})
	return c.w.note("forget " + uid)
}

type fakeCaptive struct {
	w   *world
	uid string
}

func (p *fakeCaptive) files() (handoff.Files, error) {
	f, err := os.Open(os.DevNull)
	return handoff.Files{Netns: f}, err
}
func (p *fakeCaptive) attach(_ context.Context, m capture.Mode) error {
	p.w.set(func() { p.w.modes[p.uid] = m })
	if m.New {
		return p.w.note("attach " + p.uid + " new")
	}
	return p.w.note("attach " + p.uid)
}
func (p *fakeCaptive) captureDNS(on bool) error {
	p.w.set(func() { p.w.dns[p.uid] = on })
	return nil
}
func (p *fakeCaptive) detach(context.Context) error  { return p.w.note("detach " + p.uid) }
func (p *fakeCaptive) drained(context.Context) error { return nil }
func (p *fakeCaptive) mend() ([]string, error)       { return nil, p.w.note("mend " + p.uid) }
func (p *fakeCaptive) close() error {
	p.w.set(func() { p.w.open--; p.w.held[p.uid]-- })
	return nil
}

func namespace(name, mode string) *corev1.Namespace {
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}
	if mode != "" {
		ns.Labels = map[string]string{modeLabel: mode}
	}
	return ns
}

// runningPod is a pod of namespace shop whose UID is its name.
func runningPod(w *world, name string) *corev1.Pod {
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "shop", UID: types.UID(name)},
		Spec:       corev1.PodSpec{NodeName: "n1", ServiceAccountName: "sa"},
		Status:     corev1.PodStatus{Phase: corev1.PodRunning, PodIP: "10.0.0.1", PodIPs: []corev1.PodIP{{IP: "10.0.0.1"}, {IP: "fd00::1"}}},
	}
	if w != nil {
		w.set(func() { w.sandboxes[name] = uint64(100 + len(w.sandboxes)) })
	}
	return p
}

func (w *world) label(ns, mode string) {
	w.t.Helper()
	if _, err := w.client.CoreV1().Namespaces().Update(w.t.Context(), namespace(ns, mode), metav1.UpdateOptions{}); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) create(p *corev1.Pod) {
	w.t.Helper()
	if _, err := w.client.CoreV1().Pods(p.Namespace).Create(w.t.Context(), p, metav1.CreateOptions{}); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) events() []string {
	var out []string
	for _, a := range w.client.Actions() {
		if c, ok := a.(clienttesting.CreateAction); ok && a.GetResource().Resource == "events" {
			e := c.GetObject().(*corev1.Event)
			out = append(out, e.Reason+" "+e.InvolvedObject.Name)
		}
	}
	return out
}

func TestLabelOnAndOff(t *testing.T) {
	w := newWorld(t, namespace("shop", ""))
	w.create(runningPod(w, "a"))
	w.enable()
	w.start()
	w.label("shop", "ambient")
	w.wait("prepare a", "add a", "attach a", "annotate a")
	if e := w.keeper.entries(); len(e) != 1 || e[0].Pod.UID != "a" || e[0].Pod.ServiceAccount != "sa" || len(e[0].Pod.Addresses) != 2 {
		t.Errorf("a ztunnel that connects is given %+v", e)
	}
	w.until("the annotation to be seen", func() bool {
		return w.keeper.kube.pod("a").Annotations[capturedAnnotation] == capturedValue
	})
	done, err := w.keeper.turns.take(t.Context(), "a") // whoever has not seen it yet is through
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	w.set(func() { w.diary = nil })
	done()
	w.label("shop", "")
	w.wait("retract a", "detach a", "del a")
	if d := time.Since(began); d < w.keeper.leaveGrace {
		t.Errorf("left after %v, before others could hear of it", d)
	}
	if w.keeper.count() != 0 || len(w.keeper.entries()) != 0 {
		t.Error("the pod is still remembered as captured")
	}
}

func TestLabelBackWhileLeaving(t *testing.T) {
	w := newWorld(t, namespace("shop", "ambient"))
	w.create(runningPod(w, "a"))
	w.keeper.leaveGrace = time.Hour
	w.enable()
	w.start()
	w.wait("prepare a", "add a", "attach a", "annotate a")
	w.label("shop", "")
	w.wait("prepare a", "add a", "attach a", "annotate a", "retract a")
	w.label("shop", "ambient")
	w.wait("prepare a", "add a", "attach a", "annotate a", "retract a", "annotate a")
}

func TestEnrolWaitsForZtunnel(t *testing.T) {
	w := newWorld(t, namespace("shop", "ambient"))
	w.create(runningPod(w, "a"))
	w.fail["add"] = handoff.ErrNoProxy
	w.enable()
	w.start()
	w.until("a failure in the status", func() bool { _, f := w.keeper.status(); return len(f) == 1 && f[0].Reason == "ztunnel" })
	if pods, _ := w.keeper.status(); len(pods) != 0 {
		t.Errorf("captured without ztunnel: %v", pods)
	}
	w.until("several attempts", func() bool { _, f := w.keeper.status(); return len(f) == 1 && f[0].Times > 2 })
	w.set(func() {
		if w.open > 1 { // one may be in an attempt right now
			t.Errorf("%d captives left open", w.open)
		}
		for i, e := range w.diary {
			if strings.HasPrefix(e, "attach") {
				t.Errorf("traffic was turned before ztunnel had it: %v", w.diary[:i+1])
			}
		}
		delete(w.fail, "add")
	})
	w.keeper.wakeFailed()
	w.until("enrolment", func() bool { return w.keeper.count() == 1 })
	w.until("a clean status", func() bool { _, f := w.keeper.status(); return len(f) == 0 })
	if diff := cmp.Diff([]string{"WeftEnrolFailed a"}, w.events()); diff != "" {
		t.Error("one event for the whole time:", diff)
	}
}

func TestFailedAttachIsUndone(t *testing.T) {
	w := newWorld(t, namespace("shop", "ambient"))
	w.create(runningPod(w, "a"))
	w.fail["attach"] = errors.New("boom")
	w.enable()
	w.start()
	w.until("the first undo", func() bool { return slices.Contains(w.read(), "forget a") })
	if diff := cmp.Diff([]string{"prepare a", "add a", "attach a", "detach a", "del a", "forget a"}, w.read()[:6]); diff != "" {
		t.Error(diff)
	}
}

func TestPodDiesWhileBeingEnrolled(t *testing.T) {
	w := newWorld(t, namespace("shop", "ambient"))
	w.create(runningPod(w, "a"))
	w.fail["attach"] = errors.New("no such device")
	w.block["attach"] = make(chan struct{})
	w.enable()
	w.start()
	w.until("the attempt", func() bool { return slices.Contains(w.read(), "attach a") })
	w.set(func() { w.dead[w.sandboxes["a"]] = true })
	close(w.block["attach"])
	w.until("the undo", func() bool { return slices.Contains(w.read(), "forget a") })
	w.until("the log line", func() bool { return strings.Contains(w.logged(), "ended while it was being brought into the mesh") })
	if _, f := w.keeper.status(); len(f) != 0 {
		t.Errorf("a pod that is gone is a failure: %v", f)
	}
	if strings.Contains(w.logged(), "level=ERROR") || len(w.events()) != 0 {
		t.Errorf("more than one clear line: %s %v", w.logged(), w.events())
	}
	w.set(func() {
		if w.open != 0 {
			t.Errorf("%d captives left open", w.open)
		}
	})
}

func TestDeletedPodIsServedUntilItsSandboxIsGone(t *testing.T) {
	w := newWorld(t, namespace("shop", "ambient"))
	w.create(runningPod(w, "a"))
	w.enable()
	w.start()
	w.wait("prepare a", "add a", "attach a", "annotate a")
	if err := w.client.CoreV1().Pods("shop").Delete(t.Context(), "a", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	w.until("the deletion to be seen", func() bool { return w.keeper.kube.pod("a") == nil })
	if _, err := w.keeper.reconcile(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	w.wait("prepare a", "add a", "attach a", "annotate a")
	w.set(func() { w.dead[w.sandboxes["a"]] = true })
	w.wait("prepare a", "add a", "attach a", "annotate a", "forget a", "del a")
}

func TestUnknownLabelWarnsOnce(t *testing.T) {
	w := newWorld(t, namespace("shop", "Ambient"))
	p := runningPod(w, "a")
	p.Labels = map[string]string{modeLabel: "yes"}
	w.create(p)
	w.enable()
	w.start()
	w.until("the event", func() bool { return len(w.events()) == 1 })
	for range 3 {
		if _, err := w.keeper.reconcile(t.Context(), "a"); err != nil {
			t.Fatal(err)
		}
	}
	if e := w.events(); len(e) != 1 || e[0] != "WeftUnknownLabel a" {
		t.Errorf("events %v", e)
	}
	for _, value := range []string{`yes`, `Ambient`} {
		if n := strings.Count(w.logged(), value); n != 1 {
			t.Errorf("%d log lines about %q:\n%s", n, value, w.logged())
		}
	}
	if d := w.read(); len(d) != 0 {
		t.Errorf("something was done: %v", d)
	}
}

func TestClaimOfAPodThatIsNotCapturedIsTakenBack(t *testing.T) {
	w := newWorld(t, namespace("shop", ""))
	p := runningPod(w, "a")
	p.Annotations = map[string]string{capturedAnnotation: capturedValue}
	w.create(p)
	w.enable()
	w.start()
	w.wait("retract a")
}

func addRequest(name, container string) cni.Request {
	return cni.Request{Namespace: "shop", Pod: name, UID: name, ContainerID: container, Netns: name, Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1")}}
}

// startingPod has no address in its status yet.
func startingPod(w *world, name string) *corev1.Pod {
	p := runningPod(w, name)
	p.Status = corev1.PodStatus{Phase: corev1.PodPending}
	return p
}

func TestAddPod(t *testing.T) {
	w := newWorld(t, namespace("shop", "ambient"), namespace("plain", ""))
	w.create(startingPod(w, "a"))
	w.enable()
	w.start()
	res, err := w.keeper.AddPod(t.Context(), addRequest("a", "c1"))
	if err != nil || !res.Captured {
		t.Fatal(res, err)
	}
	w.wait("prepare a", "add a", "attach a new", "annotate a")

	if _, err := w.keeper.AddPod(t.Context(), addRequest("a", "c1")); err != nil {
		t.Error("a repeated call failed:", err)
	}
	w.wait("prepare a", "add a", "attach a new", "annotate a")

	w.set(func() { w.sandboxes["a"], w.diary = 777, nil })
	if _, err := w.keeper.AddPod(t.Context(), addRequest("a", "c2")); err != nil {
		t.Fatal(err)
	}
	w.wait("forget a", "del a", "prepare a", "add a", "attach a new") // its object says so already

	w.set(func() { w.diary = nil })
	if err := w.keeper.DelPod(t.Context(), addRequest("a", "c1")); err != nil {
		t.Fatal(err)
	}
	if w.keeper.count() != 1 {
		t.Fatal("the removal of the old sandbox let go of the new one")
	}
	if err := w.keeper.DelPod(t.Context(), addRequest("a", "c2")); err != nil {
		t.Fatal(err)
	}
	w.until("let go", func() bool { return w.keeper.count() == 0 })
	if err := w.keeper.DelPod(t.Context(), addRequest("a", "c2")); err != nil {
		t.Error("a repeated removal failed:", err)
	}
}

func TestAddPodOutsideTheMeshDependsOnNothing(t *testing.T) {
	w := newWorld(t, namespace("shop", ""))
	w.create(startingPod(w, "a"))
	w.fail["add"] = handoff.ErrNoProxy
	w.keeper.disable(errors.New("the kernel has no BTF"))
	w.start()
	res, err := w.keeper.AddPod(t.Context(), addRequest("a", "c1"))
	if err != nil || res.Captured || res.Reason == "" {
		t.Error(res, err)
	}
	if d := w.read(); len(d) != 0 {
		t.Errorf("something was done: %v", d)
	}
}

func TestAddPodRefuses(t *testing.T) {
	unreachable := func(w *world) {
		w.client.PrependReactor("get", "*", func(clienttesting.Action) (bool, runtime.Object, error) {
			return true, nil, errors.New("connection refused")
		})
	}
	tests := []struct {
		name  string
		setup func(w *world, r *cni.Request)
		want  string
	}{
		{"ztunnel is away", func(w *world, _ *cni.Request) { w.fail["add"] = handoff.ErrNoProxy }, "istio-proxy"},
		{"ztunnel refuses", func(w *world, _ *cni.Request) { w.fail["add"] = errors.New("no room") }, "no room"},
		{"the programs do not load", func(w *world, _ *cni.Request) { w.fail["prepare"] = errors.New("verifier") }, "verifier"},
		{"they do not attach", func(w *world, _ *cni.Request) { w.fail["attach"] = errors.New("no device") }, "no device"},
		{"the kernel is too old", func(w *world, _ *cni.Request) { w.keeper.disable(errors.New("the kernel has no BTF; do this")) }, "do this"},
		{"the API server has another pod of that name", func(_ *world, r *cni.Request) { r.UID = "other" }, "UID other"},
		{"the API server does not have the pod", func(_ *world, r *cni.Request) { r.Pod = "b" }, "does not have it"},
		{"the API server is away and the pod was never seen", func(w *world, r *cni.Request) { unreachable(w); r.Pod = "b" }, "needs the API server"},
		{"the sandbox is gone", func(w *world, _ *cni.Request) { w.dead[w.sandboxes["a"]] = true }, errNoSandbox.Error()},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, namespace("shop", "ambient"))
			w.create(startingPod(w, "a"))
			w.enable()
			w.start()
			r := addRequest("a", "c1")
			w.set(func() { tt.setup(w, &r) })
			res, err := w.keeper.AddPod(t.Context(), r)
			if err == nil || !strings.Contains(err.Error(), tt.want) || res.Captured {
				t.Errorf("%+v, %v: want an error with %q", res, err, tt.want)
			}
			if w.keeper.count() != 0 || len(w.keeper.entries()) != 0 {
				t.Error("the pod counts as captured")
			}
			w.set(func() {
				if w.open != 0 {
					t.Errorf("%d captives left open", w.open)
				}
				w.fail, w.dead = map[string]error{}, map[uint64]bool{}
			})
		})
	}
}

// A label that is younger than what the watch has seen counts.
func TestAddPodAsksTheAPIServerItself(t *testing.T) {
	w := newWorld(t, namespace("shop", ""))
	w.create(startingPod(w, "a"))
	w.enable()
	w.start()
	w.client.PrependReactor("get", "namespaces", func(clienttesting.Action) (bool, runtime.Object, error) {
		return true, namespace("shop", "ambient"), nil
	})
	if res, err := w.keeper.AddPod(t.Context(), addRequest("a", "c1")); err != nil || !res.Captured {
		t.Error(res, err)
	}
}

func TestAddPodWithoutAPIServerUsesWhatWasSeen(t *testing.T) {
	w := newWorld(t, namespace("shop", "ambient"))
	w.create(startingPod(w, "a"))
	w.enable()
	w.start()
	w.client.PrependReactor("get", "*", func(clienttesting.Action) (bool, runtime.Object, error) {
		return true, nil, errors.New("connection refused")
	})
	if res, err := w.keeper.AddPod(t.Context(), addRequest("a", "c1")); err != nil || !res.Captured {
		t.Error(res, err)
	}
}

func TestAddPodOfAStaticPod(t *testing.T) {
	w := newWorld(t, namespace("shop", "ambient"))
	p := startingPod(w, "a")
	p.Annotations = map[string]string{mirrorAnnotation: "hash"}
	w.create(p)
	w.enable()
	w.start()
	r := addRequest("a", "c1")
	r.UID = "hash"
	if res, err := w.keeper.AddPod(t.Context(), r); err != nil || !res.Captured {
		t.Fatal(res, err)
	}
	if err := w.keeper.DelPod(t.Context(), r); err != nil || w.keeper.count() != 0 {
		t.Error("its sandbox was not let go:", err)
	}
}

func TestAdopt(t *testing.T) {
	w := newWorld(t, namespace("shop", "ambient"), namespace("plain", ""))
	w.create(runningPod(w, "kept"))
	w.create(runningPod(w, "lost")) // ztunnel does not hold it
	left := runningPod(w, "left")   // its label went while there was no agent
	left.Labels = map[string]string{modeLabel: modeOff}
	w.create(left)
	w.set(func() { w.sandboxes["orphan"] = 500 }) // its object is gone, its processes run
	w.create(startingPod(w, "new"))               // it started moments ago, and its status has no address
	w.create(startingPod(w, "newlost"))
	w.pins = []string{"gone", "kept", "left", "lost", "new", "newlost", "orphan"}
	held := map[string]handoff.Entry{}
	for _, uid := range []string{"kept", "left", "new", "orphan"} {
		held[uid] = handoff.Entry{Pod: handoff.Pod{UID: uid, Name: uid, Namespace: "shop", ServiceAccount: "sa", Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1")}}}
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { w.keeper.kube.run(ctx) })
	t.Cleanup(func() { cancel(); wg.Wait() })
	cache.WaitForCacheSync(ctx.Done(), w.keeper.kube.synced)
	if err := w.keeper.adopt(ctx, fakeCapturer{w}, held); err != nil {
		t.Fatal(err)
	}
	want := []string{
		"forget gone",
		"prepare kept with held", "attach kept", "prepare left with held", "attach left",
		"prepare lost", "attach lost", "prepare new with held", "attach new", "prepare orphan with held", "attach orphan",
	}
	if diff := cmp.Diff(want, w.read()); diff != "" {
		t.Error(diff)
	}
	if n := len(w.keeper.entries()); n != 5 {
		t.Errorf("a ztunnel that connects is given %d pods, want 5", n)
	}
	w.enable()
	w.set(func() { w.diary = nil })
	wg.Go(func() { w.keeper.run(ctx) })
	w.until("the pod that left", func() bool { return slices.Contains(w.read(), "del left") })
	for _, e := range w.read() {
		if !strings.HasPrefix(e, "annotate") && !strings.HasSuffix(e, "left") {
			t.Errorf("the others were touched: %v", w.read())
		}
	}
}

func TestLeaveAll(t *testing.T) {
	w := newWorld(t, namespace("shop", "ambient"))
	for i := range 20 {
		w.create(runningPod(w, fmt.Sprint("p", i)))
	}
	w.enable()
	w.start()
	w.until("all of them", func() bool { return w.keeper.count() == 20 })
	if err := w.client.CoreV1().Pods("shop").Delete(t.Context(), "p7", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err) // its processes still run
	}
	w.until("the deletion to be seen", func() bool { return w.keeper.kube.pod("p7") == nil })
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := w.keeper.leaveAll(ctx); err != nil {
		t.Fatal(err)
	}
	if w.keeper.count() != 0 {
		t.Errorf("%d left", w.keeper.count())
	}
	w.create(startingPod(w, "new"))
	if res, err := w.keeper.AddPod(t.Context(), addRequest("new", "c")); err != nil || res.Captured {
		t.Error("a pod that starts meanwhile:", res, err)
	}
}

func TestLeaveAllSaysWhatIsStuck(t *testing.T) {
	w := newWorld(t, namespace("shop", "ambient"))
	w.create(runningPod(w, "a"))
	w.fail["detach"] = errors.New("stuck")
	w.enable()
	w.start()
	w.until("enrolment", func() bool { return w.keeper.count() == 1 })
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := w.keeper.leaveAll(ctx); err == nil || !strings.Contains(err.Error(), "1 are still captured") {
		t.Error(err)
	}
}

func TestPatchNamesThePod(t *testing.T) {
	w := newWorld(t, namespace("shop", "ambient"))
	w.create(runningPod(w, "a"))
	w.enable()
	w.start()
	w.wait("prepare a", "add a", "attach a", "annotate a")
	for _, a := range w.client.Actions() {
		if p, ok := a.(clienttesting.PatchAction); ok {
			if want := `{"metadata":{"annotations":{"ambient.istio.io/redirection":"enabled"},"uid":"a"}}`; string(p.GetPatch()) != want {
				t.Errorf("patch %s, want %s", p.GetPatch(), want)
			}
		}
	}
}

func TestTurns(t *testing.T) {
	var ts turns
	done, err := ts.take(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	other, err := ts.take(t.Context(), "b")
	if err != nil {
		t.Fatal(err)
	}
	other()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := ts.take(ctx, "a"); !errors.Is(err, context.Canceled) {
		t.Errorf("took a turn that another has: %v", err)
	}
	got := make(chan struct{})
	go func() {
		d, err := ts.take(t.Context(), "a")
		if err == nil {
			d()
		}
		close(got)
	}()
	done()
	<-got
	ts.mu.Lock()
	defer ts.mu.Unlock()
	if len(ts.keys) != 0 {
		t.Errorf("%d keys left", len(ts.keys))
	}
}
