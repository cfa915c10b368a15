package node

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	clienttesting "k8s.io/client-go/testing"

	"github.com/weft-mesh/weft/node/capture"
)

var longAgo = metav1.NewTime(time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC))

// newEscapeWorld has a Weft that was installed long ago, and notes evictions.
func newEscapeWorld(t *testing.T, mode string) *world {
	w := newWorld(t, namespace("shop", "ambient"), namespace("plain", ""),
		&appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Namespace: "weft-system", Name: "ztunnel", CreationTimestamp: longAgo}})
	w.keeper.uncaptured = mode
	w.client.PrependReactor("create", "pods", func(a clienttesting.Action) (bool, runtime.Object, error) {
		if a.GetSubresource() != "eviction" {
			return false, nil, nil
		}
		return true, nil, w.note("evict")
	})
	return w
}

// escapee is a pod that nobody stopped from starting outside the mesh.
func escapee(w *world, name string) *corev1.Pod {
	p := runningPod(w, name)
	p.CreationTimestamp = metav1.NewTime(longAgo.Add(time.Hour))
	yes := true
	p.OwnerReferences = []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: "r", UID: "r", Controller: &yes}}
	return p
}

func TestEscapedPods(t *testing.T) {
	captured := []string{"prepare a", "add a", "attach a", "annotate a"}
	tests := []struct {
		name   string
		mode   string
		change func(w *world, p *corev1.Pod)
		diary  []string
		done   string // empty: it is no escape
	}{
		{"capture it and say so", UncapturedCapture, nil, captured, "captured"},
		{"report it and leave it", UncapturedReport, nil, nil, "reported"},
		{"capture it and have it replaced", UncapturedRestart, nil, append(slices.Clone(captured), "evict"), "restarted"},
		{"one without a controller is not taken away", UncapturedRestart, func(_ *world, p *corev1.Pod) { p.OwnerReferences = nil }, captured, "captured"},
		{"a static pod neither", UncapturedRestart, func(w *world, p *corev1.Pod) {
			p.Annotations = map[string]string{mirrorAnnotation: "hash"}
			w.set(func() { w.sandboxes["hash"] = 400 })
		}, captured, "captured"},
		{"a pod older than Weft joins like any", UncapturedReport, func(_ *world, p *corev1.Pod) {
			p.CreationTimestamp = metav1.NewTime(longAgo.Add(-time.Hour))
		}, captured, ""},
		{"unless it was captured before, as after a reboot", UncapturedReport, func(_ *world, p *corev1.Pod) {
			p.CreationTimestamp = metav1.NewTime(longAgo.Add(-time.Hour))
			p.Annotations = map[string]string{capturedAnnotation: capturedValue}
		}, nil, "reported"},
		{"one that does not belong is nothing to tell of", UncapturedReport, func(_ *world, p *corev1.Pod) {
			p.Labels = map[string]string{modeLabel: modeOff}
		}, nil, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			w := newEscapeWorld(t, tt.mode)
			p := escapee(w, "a")
			if tt.change != nil {
				tt.change(w, p)
			}
			w.create(p)
			w.enable()
			w.start()
			if tt.diary != nil {
				w.until("the diary", func() bool {
					d := w.read()
					slices.Sort(d) // the annotation may come before or after the eviction, and twice
					d = slices.Compact(d)
					want := slices.Sorted(slices.Values(tt.diary))
					return slices.Equal(d, want)
				}, func() { t.Errorf("%q, want %q", w.read(), tt.diary) })
			}
			w.until("what became of it", func() bool {
				u := w.keeper.uncapturedPods()
				if tt.done == "" {
					return len(u) == 0
				}
				return len(u) == 1 && u[0].Pod == "shop/a" && u[0].Done == tt.done
			}, func() { t.Errorf("%+v", w.keeper.uncapturedPods()) })
			for range 3 { // nothing is said or done twice
				if _, err := w.keeper.reconcile(t.Context(), "a"); err != nil {
					t.Fatal(err)
				}
			}
			if got, want := strings.Count(strings.Join(w.events(), "\n"), "WeftRanUncaptured a"), min(1, len(tt.done)); got != want {
				t.Errorf("%d events, want %d", got, want)
			}
			if tt.diary == nil && len(w.read()) > 0 {
				t.Errorf("something was done: %v", w.read())
			}
		})
	}
}

// A label that comes while the pod runs is no escape, and neither is a pod
// that started when its namespace had none.
func TestJoiningIsNoEscape(t *testing.T) {
	w := newEscapeWorld(t, UncapturedReport)
	w.label("shop", "")
	w.create(escapee(w, "a"))
	w.enable()
	w.start()
	w.until("the pod to be seen", func() bool {
		w.keeper.mu.Lock()
		defer w.keeper.mu.Unlock()
		return w.keeper.excused["a"]
	})
	w.create(startingPod(w, "b"))
	if res, err := w.keeper.AddPod(t.Context(), addRequest("b", "c")); err != nil || res.Captured {
		t.Fatal(res, err)
	}
	w.label("shop", "ambient")
	b := escapee(w, "b")
	if _, err := w.client.CoreV1().Pods("shop").Update(t.Context(), b, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	w.until("both", func() bool { return w.keeper.count() == 2 })
	if u := w.keeper.uncapturedPods(); len(u) != 0 {
		t.Errorf("called escapes: %+v", u)
	}
}

func TestEvictionIsTriedAgain(t *testing.T) {
	w := newEscapeWorld(t, UncapturedRestart)
	w.fail["evict"] = errors.New("the disruption budget says no")
	w.create(escapee(w, "a"))
	w.enable()
	w.start()
	w.until("a failure in the status", func() bool {
		_, f := w.keeper.status()
		return len(f) == 1 && f[0].Reason == "restart" && strings.Contains(f[0].Error, "budget")
	})
	if w.keeper.count() != 1 {
		t.Error("it runs in clear while it waits")
	}
	w.set(func() { delete(w.fail, "evict") })
	w.keeper.wakeFailed()
	w.until("the eviction", func() bool { u := w.keeper.uncapturedPods(); return len(u) == 1 && u[0].Done == "restarted" })
	if err := w.client.CoreV1().Pods("shop").Delete(t.Context(), "a", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	w.set(func() { w.dead[w.sandboxes["a"]] = true })
	w.until("it is forgotten", func() bool { return len(w.keeper.uncapturedPods()) == 0 })
}

func TestExisting(t *testing.T) {
	on := func(v string) map[string]string { return map[string]string{existingAnnotation: v} }
	tests := []struct {
		name      string
		pod, ns   map[string]string
		def, want string
		bad       string
	}{
		{"the default", nil, nil, ExistingKeep, ExistingKeep, ""},
		{"the other default", nil, nil, ExistingReset, ExistingReset, ""},
		{"the namespace says", nil, on("reset"), ExistingKeep, ExistingReset, ""},
		{"the pod says more", on("keep"), on("reset"), ExistingReset, ExistingKeep, ""},
		{"nonsense on the pod counts as not set", on("drop"), on("reset"), ExistingKeep, ExistingReset, "drop"},
		{"nonsense on both", on("drop"), on("x"), ExistingKeep, ExistingKeep, "drop"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got, bad := existing(tt.pod, tt.ns, tt.def); got != tt.want || bad != tt.bad {
				t.Errorf("got %q %q, want %q %q", got, bad, tt.want, tt.bad)
			}
		})
	}
}

// What pod and namespace say is what the kernel is told.
func TestExistingReachesTheKernel(t *testing.T) {
	w := newWorld(t, namespace("shop", "ambient"))
	p := runningPod(w, "a")
	p.Annotations = map[string]string{existingAnnotation: "reset"}
	w.create(p)
	w.create(runningPod(w, "b"))
	w.enable()
	w.start()
	w.until("both", func() bool { return w.keeper.count() == 2 })
	if got := w.keeper.existingOf(w.keeper.kube.pod("a")); got != capture.Reset {
		t.Errorf("the pod that says reset: %v", got)
	}
	w.set(func() {
		if w.modes["a"].Existing != capture.Reset || w.modes["b"].Existing != capture.Keep {
			t.Errorf("captured with %+v", w.modes)
		}
	})
	w.keeper.resetOnly = true
	if got := w.keeper.existingOf(w.keeper.kube.pod("b")); got != capture.Reset {
		t.Errorf("a kernel that cannot keep: %v", got)
	}
}

func TestWantsDNS(t *testing.T) {
	for name, tt := range map[string]struct {
		labels, annotations map[string]string
		want                bool
	}{
		"nothing said":        {nil, nil, true},
		"the label says no":   {map[string]string{dnsSetting: "false"}, nil, false},
		"the annotation does": {nil, map[string]string{dnsSetting: "false"}, false},
		"true is not false":   {map[string]string{dnsSetting: "true"}, nil, true},
	} {
		if got := wantsDNS(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Labels: tt.labels, Annotations: tt.annotations}}); got != tt.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// The DNS requests of pods are captured only while ztunnel answers them.
func TestDNSFollowsZtunnel(t *testing.T) {
	w := newWorld(t, namespace("shop", "ambient"))
	w.keeper.dns = true
	w.keeper.serveDNS(t.Context(), false) // of a release without a name server
	w.create(runningPod(w, "a"))
	w.enable()
	w.start()
	w.until("enrolment", func() bool { return w.keeper.count() == 1 })
	is := func(want bool) {
		t.Helper()
		w.set(func() {
			if got := w.dns["a"]; got != want {
				t.Errorf("captured: %v, want %v", got, want)
			}
		})
	}
	is(false)
	w.keeper.serveDNS(t.Context(), true)
	is(true)
	w.keeper.serveDNS(t.Context(), false)
	is(false)
}
