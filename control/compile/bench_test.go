package compile

import (
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// BenchmarkOneNamespace compiles 5000 pods and 500 services that share one
// namespace: the case in which every pod has to be held against every service.
func BenchmarkOneNamespace(b *testing.B) {
	const pods, services = 5000, 500
	var in Inputs
	for i := range services {
		in.Services = append(in.Services, &corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: fmt.Sprint("svc", i)},
			Spec: corev1.ServiceSpec{
				Selector: map[string]string{"app": fmt.Sprint("app", i), "tier": "web"},
				Ports:    []corev1.ServicePort{{Name: "http", Port: 80}},
			},
		})
	}
	for i := range pods {
		in.Pods = append(in.Pods, &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: fmt.Sprint("pod", i), Labels: map[string]string{
				"app": fmt.Sprint("app", i%services), "tier": "web", "pod-template-hash": "abc", "version": "v1",
			}},
			Status: corev1.PodStatus{PodIP: fmt.Sprintf("10.0.%d.%d", i/250, i%250+1)},
		})
	}
	for b.Loop() {
		w := Compile(Settings{}, in)
		for _, p := range in.Pods {
			if wl, ok := w.Workload(p, nil); !ok || len(wl.Services) != 1 {
				b.Fatalf("%+v", wl)
			}
		}
	}
}
