package node

import (
	"errors"
	"io"
	"log/slog"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
)

func taints(t *testing.T, c *fake.Clientset) []string {
	t.Helper()
	n, err := c.CoreV1().Nodes().Get(t.Context(), "n1", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, taint := range n.Spec.Taints {
		out = append(out, taint.Key)
	}
	return out
}

func tainted(keys ...string) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1", ResourceVersion: "7"}}
	for _, k := range keys {
		n.Spec.Taints = append(n.Spec.Taints, corev1.Taint{Key: k, Effect: corev1.TaintEffectNoSchedule})
	}
	return n
}

func TestUntaint(t *testing.T) {
	c := fake.NewClientset(tainted("other", StartupTaint, IstioStartupTaint, "another"))
	k, err := newKube(c, "n1", "weft-system", "ztunnel", slog.New(slog.NewTextHandler(io.Discard, nil)))
	if err != nil {
		t.Fatal(err)
	}
	both := []string{StartupTaint, IstioStartupTaint}
	if n, err := k.untaint(t.Context(), both); err != nil || n != 2 {
		t.Fatal(n, err)
	}
	if got := taints(t, c); !slices.Equal(got, []string{"other", "another"}) {
		t.Errorf("left %v", got)
	}
	patches := 0
	for _, a := range c.Actions() {
		if p, ok := a.(clienttesting.PatchAction); ok {
			patches++
			want := `{"metadata":{"resourceVersion":"7"},"spec":{"taints":[{"key":"other","effect":"NoSchedule"},{"key":"another","effect":"NoSchedule"}]}}`
			if string(p.GetPatch()) != want {
				t.Errorf("patch %s, want %s", p.GetPatch(), want)
			}
		}
	}
	if n, err := k.untaint(t.Context(), both); err != nil || n != 0 || patches != 1 {
		t.Errorf("%d removed from a node that has none, %v, %d patches before", n, err, patches)
	}
	c.PrependReactor("get", "nodes", func(clienttesting.Action) (bool, runtime.Object, error) {
		return true, nil, errors.New("connection refused")
	})
	if _, err := k.untaint(t.Context(), both); err == nil {
		t.Error("no error without the API server")
	}
}

// The taint stays until ztunnel is there: before that no pod of the mesh could
// start.
func TestAgentTakesTheTaintOffWhenReady(t *testing.T) {
	s := newSite(t)
	s.cfg.StartupTaints = []string{StartupTaint}
	if _, err := s.client.CoreV1().Nodes().Create(t.Context(), tainted(StartupTaint, "other"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	a, _ := s.agent()
	s.until("the agent to wait for nothing but ztunnel", func() bool { st := a.Status(); return len(st.Problems) == 1 && st.CNI.Installed })
	if got := taints(t, s.client); len(got) != 2 {
		t.Errorf("taken off too early: %v", got)
	}
	s.ztunnel()
	s.until("the taint to go", func() bool { return slices.Equal(taints(t, s.client), []string{"other"}) })
}
