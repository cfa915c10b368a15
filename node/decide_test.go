package node

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestDecide(t *testing.T) {
	label := func(v string) map[string]string { return map[string]string{modeLabel: v} }
	tests := []struct {
		name        string
		namespace   string
		pod, ns     map[string]string
		hostNetwork bool
		phase       corev1.PodPhase
		want        bool
	}{
		{name: "no label, no mesh"},
		{name: "the namespace's label enrols", ns: label("ambient"), want: true},
		{name: "the pod's label enrols", pod: label("ambient"), want: true},
		{name: "none on the pod wins over the namespace", pod: label("none"), ns: label("ambient")},
		{name: "ambient on the pod wins over none on the namespace", pod: label("ambient"), ns: label("none"), want: true},
		{name: "unknown value on the pod counts as not set", pod: label("sidecar"), ns: label("ambient"), want: true},
		{name: "unknown value on the pod enrols nothing", pod: label("Ambient")},
		{name: "unknown value on the namespace enrols nothing", ns: label("ambient ")},
		{name: "empty value is not ambient", pod: label(""), ns: label("")},
		{name: "host network is left alone", pod: label("ambient"), hostNetwork: true},
		{name: "the mesh's own namespace is left alone", namespace: "weft-system", pod: label("ambient"), ns: label("ambient")},
		{name: "kube-system is left alone", namespace: "kube-system", ns: label("ambient")},
		{name: "a pod that succeeded is over", ns: label("ambient"), phase: corev1.PodSucceeded},
		{name: "a pod that failed is over", ns: label("ambient"), phase: corev1.PodFailed},
		{name: "a pending pod belongs before it runs", ns: label("ambient"), phase: corev1.PodPending, want: true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if tt.namespace == "" {
				tt.namespace = "shop"
			}
			pod := &corev1.Pod{
				ObjectMeta: metav1.ObjectMeta{Namespace: tt.namespace, Labels: tt.pod},
				Spec:       corev1.PodSpec{HostNetwork: tt.hostNetwork},
				Status:     corev1.PodStatus{Phase: tt.phase},
			}
			got := decide(pod, tt.ns, []string{"weft-system", "kube-system"})
			if got.enrol != tt.want || got.reason == "" {
				t.Errorf("got %+v, want %v with a reason", got, tt.want)
			}
		})
	}
}

func TestUnknownMode(t *testing.T) {
	for v, want := range map[string]bool{"ambient": false, "none": false, "": true, "Ambient": true, "sidecar": true} {
		if _, got := unknownMode(map[string]string{modeLabel: v}); got != want {
			t.Errorf("%q: unknown is %v, want %v", v, got, want)
		}
	}
	if _, got := unknownMode(nil); got {
		t.Error("no label is called unknown")
	}
}

func TestNext(t *testing.T) {
	tests := []struct {
		name string
		in   situation
		want step
	}{
		{"nothing known, nothing done", situation{}, stay},
		{"a running pod that belongs is captured", situation{there: true, wanted: true, running: true}, enrol},
		{"whatever its object says already", situation{there: true, wanted: true, running: true, annotated: true}, enrol},
		{"one without a sandbox waits for CNI", situation{there: true, wanted: true}, stay},
		{"a captured pod says so", situation{there: true, wanted: true, running: true, captured: true}, annotate},
		{"captured and said", situation{there: true, wanted: true, running: true, captured: true, annotated: true}, stay},
		{"leaving begins with the annotation", situation{there: true, running: true, captured: true, annotated: true}, retract},
		{"then others hear of it", situation{there: true, running: true, captured: true, retracted: true}, linger},
		{"then it leaves", situation{there: true, running: true, captured: true, retracted: true, lingered: true}, leave},
		{"label back while lingering: it stays", situation{there: true, wanted: true, running: true, captured: true, retracted: true, lingered: true}, annotate},
		{"a deleted pod is served until its sandbox goes", situation{captured: true}, watch},
		{"a deleted pod that was leaving as well", situation{captured: true, retracted: true, lingered: true}, watch},
		{"a pod that claims to be captured and is not", situation{there: true, running: true, annotated: true}, disclaim},
		{"a pod that is gone claims nothing", situation{annotated: true}, stay},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := next(tt.in); got != tt.want {
				t.Errorf("got %d, want %d", got, tt.want)
			}
		})
	}
}
