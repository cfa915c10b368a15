package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes/fake"
)

func TestAdvise(t *testing.T) {
	crds := schema.GroupResource{Group: "apiextensions.k8s.io", Resource: "customresourcedefinitions"}
	dying := apierrors.NewForbidden(schema.GroupResource{Resource: "services"}, "x", nil)
	dying.ErrStatus.Details.Causes = []metav1.StatusCause{{Type: corev1.NamespaceTerminatingCause}}
	for _, tc := range []struct {
		name string
		err  error
		want string
	}{
		{"no rights", apierrors.NewForbidden(crds, "x", nil), "cluster admin"},
		{"a namespace that is being deleted", dying, "until the namespace is gone"},
		{"an expired login", apierrors.NewUnauthorized("no"), "log in"},
		{"^C", context.Canceled, "interrupted"},
		{"anything else", io.ErrUnexpectedEOF, "unexpected EOF"},
	} {
		if got := advise(fmt.Errorf("install: %w", tc.err)).Error(); !strings.Contains(got, tc.want) {
			t.Errorf("%s: %q lacks %q", tc.name, got, tc.want)
		}
	}
}

func TestConfirm(t *testing.T) {
	for answer, want := range map[string]bool{"yes\n": true, " yes \r\n": true, "y\n": false, "no\n": false, "": false} {
		if got := confirm(t.Context(), strings.NewReader(answer), io.Discard, "weft-system", false); got != want {
			t.Errorf("%q is taken for %v", answer, got)
		}
	}
	t.Run("^C at the question", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		in, silent := io.Pipe()
		defer silent.Close()
		var out bytes.Buffer
		if confirm(ctx, in, &out, "weft-system", true) {
			t.Error("taken for yes")
		}
		if !strings.Contains(out.String(), "every AuthorizationPolicy") {
			t.Errorf("the question %q does not say that policies go", out.String())
		}
	})
}

// Nodes that the DaemonSet is not meant for are not missing a pod.
func TestWantedOn(t *testing.T) {
	ds := &appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Namespace: "weft-system", Name: "ztunnel"}}
	ds.Spec.Template.Spec.NodeSelector = map[string]string{"kubernetes.io/os": "linux"}
	d := &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Namespace: "weft-system", Name: "weft-control"}, Status: appsv1.DeploymentStatus{AvailableReplicas: 1}}
	d.Spec.Replicas = new(int32)
	*d.Spec.Replicas = 1
	node := func(name, os string) *corev1.Node {
		return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"kubernetes.io/os": os}}}
	}
	k := &kube{typed: fake.NewClientset(ds, d, node("a", "linux"), node("b", "windows"))}
	s, err := k.status(t.Context(), "weft-system")
	if err != nil {
		t.Fatal(err)
	}
	if len(s.Nodes) != 1 || s.Nodes[0].Node != "a" || len(s.Problems) != 1 {
		t.Errorf("nodes %+v, problems %q, want node a and its problem", s.Nodes, s.Problems)
	}
}

func TestWaitingFor(t *testing.T) {
	var pods []corev1.Pod
	for i := range 7 {
		p := corev1.Pod{}
		p.Spec.NodeName = fmt.Sprint("n", i)
		pods = append(pods, p, p)
	}
	if got, want := waitingFor(pods), "waiting for nodes to let their pods go: n0, n1, n2, n3, n4, and 2 more"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}
