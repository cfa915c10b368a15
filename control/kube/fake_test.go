package kube

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"sigs.k8s.io/yaml"

	"github.com/weft-mesh/weft/api/feed"
	"github.com/weft-mesh/weft/control/provision"
	"github.com/weft-mesh/weft/internal/run"
	"github.com/weft-mesh/weft/mesh"
)

// A sink remembers what it was told, and in which order.
type sink struct {
	mu        sync.Mutex
	ops       []string
	workloads map[mesh.UID]mesh.Workload
	services  []mesh.Service
	policies  []mesh.Policy
	world     feed.Resources // as last told
	synced    bool
	changed   chan struct{}
}

func newSink() *sink {
	return &sink{workloads: map[mesh.UID]mesh.Workload{}, changed: make(chan struct{})}
}

// note does and remembers one operation. s.mu is held until all that belongs
// together is done: a test that waits for a part of it may then ask for the rest.
func (s *sink) note(op string, f func()) {
	f()
	s.ops = append(s.ops, op)
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *sink) UpdateWorkloads(set []mesh.Workload, del []mesh.UID, _ time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.updateWorkloads(set, del)
}

func (s *sink) updateWorkloads(set []mesh.Workload, del []mesh.UID) {
	var names []string
	for _, w := range set {
		names = append(names, "+"+w.Name.Name)
	}
	for _, u := range del {
		names = append(names, "-"+string(u[strings.LastIndexByte(string(u), '/')+1:]))
	}
	s.note("workloads "+strings.Join(names, " "), func() {
		for _, w := range set {
			s.workloads[w.UID] = w
		}
		for _, u := range del {
			delete(s.workloads, u)
		}
	})
}

func (s *sink) UpdateWorld(r feed.Resources, del []mesh.UID, _ time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.note("services", func() { s.services, s.world = r.Services, r })
	s.setPolicies(r.Policies)
	if len(r.Workloads)+len(del) > 0 {
		s.updateWorkloads(r.Workloads, del)
	}
}

func (s *sink) SetPolicies(ps []mesh.Policy) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.setPolicies(ps)
}

func (s *sink) setPolicies(ps []mesh.Policy) {
	var names []string
	for _, p := range ps {
		if p.Name.Name != "istio_converted_static_strict" {
			names = append(names, p.Name.Name)
		}
	}
	s.note("policies "+strings.Join(names, " "), func() { s.policies = ps })
}

func (s *sink) SetSynced() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.note("synced", func() { s.synced = true })
}

// wait waits until f holds.
func (s *sink) wait(t *testing.T, what string, f func(*sink) bool) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	for {
		s.mu.Lock()
		ok, changed := f(s), s.changed
		ops := slices.Clone(s.ops)
		s.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-changed:
		case <-deadline:
			t.Fatalf("%s: never happened; the sink was told %q", what, ops)
		}
	}
}

// since returns what the sink was told after the first n operations.
func (s *sink) since(n int) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.ops[n:])
}

// eventually polls the fake API server until f holds.
func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(10 * time.Second)
	for !f() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("%s: never happened", what)
		}
	}
}

// start runs the task until the test ends.
func start(t *testing.T, task run.Task) {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- task(t.Context()) }()
	t.Cleanup(func() { // t.Context has ended by now
		if err := <-done; err != nil {
			t.Errorf("task: %v", err)
		}
	})
}

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

// A logBook is a logger's output that a test can read.
type logBook struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBook) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBook) count(s string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.b.String(), s)
}

func (l *logBook) logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }

var authorizationPolicies = resource("AuthorizationPolicy")

// resource returns the resource of a kind, in its best version.
func resource(name string) schema.GroupVersionResource {
	ks := kinds()
	k := ks[slices.IndexFunc(ks, func(k kind) bool { return k.name == name })]
	return k.in(k.versions[0])
}

// dynamicClient returns a fake that serves all kinds.
func dynamicClient(objects ...runtime.Object) *dynamicfake.FakeDynamicClient {
	lists := map[schema.GroupVersionResource]string{
		authorizationPolicies.GroupResource().WithVersion(olderVersion): "AuthorizationPolicyList",
	}
	for _, gvr := range provision.Kinds() {
		lists[gvr] = strings.TrimSuffix(gvr.Resource, "s") + "List"
	}
	for _, k := range kinds() {
		for _, v := range k.versions {
			lists[k.in(v)] = k.name + "List"
		}
	}
	return dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), lists, objects...)
}

func policy(t *testing.T, kind, ns, name, spec string) *unstructured.Unstructured {
	t.Helper()
	b, err := yaml.YAMLToJSON(fmt.Appendf(nil, "apiVersion: security.istio.io/v1\nkind: %s\nmetadata: {name: %s, namespace: %s, generation: 1}\nspec: %s", kind, name, ns, spec))
	if err != nil {
		t.Fatal(err)
	}
	u := &unstructured.Unstructured{}
	if err := u.UnmarshalJSON(b); err != nil {
		t.Fatal(err)
	}
	return u
}

func aPod(ns, name, ip string, labels map[string]string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: ns, UID: "uid-1", Labels: labels, ResourceVersion: "1"},
		Spec:       corev1.PodSpec{NodeName: "node-1", ServiceAccountName: name},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIPs: []corev1.PodIP{{IP: ip}},
			Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}},
	}
}

func aNamespace(name string) *corev1.Namespace {
	return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}
}
