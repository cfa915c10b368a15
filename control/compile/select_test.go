package compile

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
)

// TestSelected compares the index of services with asking every one.
func TestSelected(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	some := func(most int) map[string]string {
		out := map[string]string{}
		for range r.IntN(most + 1) {
			out[fmt.Sprint("k", r.IntN(4))] = fmt.Sprint("v", r.IntN(3))
		}
		return out
	}
	var services []*corev1.Service
	for i := range 200 {
		services = append(services, &corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Namespace: fmt.Sprint("ns", i%2), Name: fmt.Sprint("s", i)},
			Spec:       corev1.ServiceSpec{Selector: some(3)},
		})
	}
	w := Compile(Settings{}, Inputs{Services: services})
	matched := 0
	for range 200 {
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: fmt.Sprint("ns", r.IntN(2)), Labels: some(4)}}
		var got, want []string
		for _, s := range w.selected(pod) {
			got = append(got, s.name.String())
		}
		for _, s := range services {
			if s.Namespace == pod.Namespace && len(s.Spec.Selector) > 0 && labels.SelectorFromSet(s.Spec.Selector).Matches(labels.Set(pod.Labels)) {
				want = append(want, w.settings.serviceName(s.Namespace, s.Name).String())
			}
		}
		slices.Sort(got)
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Fatalf("pod with %v is selected by %v, want %v", pod.Labels, got, want)
		}
		matched += len(got)
	}
	if matched == 0 {
		t.Error("nothing was ever selected")
	}
}
