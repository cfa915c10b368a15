package node

import "testing"

// TestCapturedPodsAreMended: each pod that is captured, and no other.
func TestCapturedPodsAreMended(t *testing.T) {
	w := newWorld(t, namespace("shop", "ambient"), namespace("plain", ""))
	w.create(runningPod(w, "a"))
	other := runningPod(w, "b")
	other.Namespace = "plain"
	w.create(other)
	w.enable()
	w.start()
	w.wait("prepare a", "add a", "attach a", "annotate a")
	w.set(func() { w.diary = nil })
	w.keeper.mendAll(t.Context())
	w.wait("mend a")
}
