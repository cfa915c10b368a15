package kube

import (
	"bytes"
	"errors"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/rogpeppe/go-internal/txtar"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
	"sigs.k8s.io/yaml"

	"github.com/weft-mesh/weft/control/compile"
	"github.com/weft-mesh/weft/mesh"
)

// TestWatcher follows a cluster from its first listing through changes of
// each kind.
func TestWatcher(t *testing.T) {
	service := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "cart", Namespace: "shop"},
		Spec:       corev1.ServiceSpec{ClusterIPs: []string{"10.96.0.1"}, Selector: map[string]string{"app": "cart"}, Ports: []corev1.ServicePort{{Port: 80}}},
	}
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node-1", Labels: map[string]string{"topology.kubernetes.io/zone": "z1"}}}
	client := fake.NewClientset(aPod("shop", "cart", "10.244.0.1", map[string]string{"app": "cart"}), service, node)
	dyn := dynamicClient()
	s := newSink()
	w := NewWatcher(WatcherConfig{Client: client, Dynamic: dyn, Sink: s, Log: quiet(), Quiet: 5 * time.Millisecond})
	start(t, w.Run)
	<-w.Synced()

	if got, want := s.since(0), []string{"services", "policies ", "workloads +cart", "synced"}; !slices.Equal(got, want) {
		t.Fatalf("told %q at the start, want %q", got, want)
	}
	cart := s.workloads["Kubernetes//Pod/shop/cart"]
	if cart.Locality.Zone != "z1" || len(cart.Services) != 1 || cart.Transport != mesh.PlainTCP {
		t.Fatalf("cart is %+v, want zone z1, one service, plain", cart)
	}

	t.Run("a captured pod is told", func(t *testing.T) {
		pod := aPod("shop", "cart", "10.244.0.1", map[string]string{"app": "cart"})
		pod.Annotations = map[string]string{"ambient.istio.io/redirection": "enabled"}
		pod.ResourceVersion = "2"
		if _, err := client.CoreV1().Pods("shop").Update(t.Context(), pod, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		s.wait(t, "hbone", func(s *sink) bool { return s.workloads["Kubernetes//Pod/shop/cart"].Transport == mesh.HBONE })
	})
	t.Run("a namespace lets its pods stay on a node", func(t *testing.T) {
		ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", Labels: map[string]string{"ambient.weft.dev/same-node": "direct"}}}
		if _, err := client.CoreV1().Namespaces().Create(t.Context(), ns, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		s.wait(t, "direct", func(s *sink) bool { return s.workloads["Kubernetes//Pod/shop/cart"].Direct })
		ns = ns.DeepCopy()
		ns.Labels, ns.ResourceVersion = nil, "2"
		if _, err := client.CoreV1().Namespaces().Update(t.Context(), ns, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		s.wait(t, "not direct any more", func(s *sink) bool { return !s.workloads["Kubernetes//Pod/shop/cart"].Direct })
	})
	t.Run("a load balancer gives a service an address", func(t *testing.T) {
		balanced := service.DeepCopy()
		balanced.Spec.Type, balanced.ResourceVersion = corev1.ServiceTypeLoadBalancer, "2"
		for _, ips := range [][]corev1.LoadBalancerIngress{{{IP: "198.51.100.1"}}, nil} {
			balanced = balanced.DeepCopy()
			balanced.Status.LoadBalancer.Ingress = ips
			balanced.ResourceVersion += "0"
			if _, err := client.CoreV1().Services("shop").Update(t.Context(), balanced, metav1.UpdateOptions{}); err != nil {
				t.Fatal(err)
			}
			s.wait(t, "its address", func(s *sink) bool { return len(s.services) == 1 && len(s.services[0].ExternalAddresses) == len(ips) })
		}
	})
	t.Run("a policy arrives before the pods that list it", func(t *testing.T) {
		n := len(s.since(0))
		p := policy(t, "AuthorizationPolicy", "shop", "only", "{selector: {matchLabels: {app: cart}}}")
		if _, err := dyn.Resource(authorizationPolicies).Namespace("shop").Create(t.Context(), p, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		s.wait(t, "listed", func(s *sink) bool { return len(s.workloads["Kubernetes//Pod/shop/cart"].Policies) == 1 })
		if got, want := s.since(n), []string{"services", "policies only", "workloads +cart"}; !slices.Equal(got, want) {
			t.Errorf("told %q, want %q", got, want)
		}
	})
	t.Run("a policy goes after the pods that listed it", func(t *testing.T) {
		n := len(s.since(0))
		if err := dyn.Resource(authorizationPolicies).Namespace("shop").Delete(t.Context(), "only", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		s.wait(t, "gone", func(s *sink) bool { return len(s.policies) == 1 })
		if got, want := s.since(n), []string{"services", "policies only", "workloads +cart", "policies "}; !slices.Equal(got, want) {
			t.Errorf("told %q, want %q", got, want)
		}
	})
	t.Run("a deleted pod goes", func(t *testing.T) {
		if err := client.CoreV1().Pods("shop").Delete(t.Context(), "cart", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		s.wait(t, "gone", func(s *sink) bool { return len(s.workloads) == 0 })
	})
}

// TestPodsDoNotWait proves that a pod's change passes while the rest of the
// cluster never comes to rest.
func TestPodsDoNotWait(t *testing.T) {
	client := fake.NewClientset()
	s := newSink()
	w := NewWatcher(WatcherConfig{Client: client, Dynamic: dynamicClient(), Sink: s, Log: quiet(), Quiet: time.Hour, Patience: time.Hour})
	start(t, w.Run)
	<-w.Synced()
	if _, err := client.CoreV1().Services("shop").Create(t.Context(), &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "x", Namespace: "shop"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := client.CoreV1().Pods("shop").Create(t.Context(), aPod("shop", "cart", "10.244.0.1", nil), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	s.wait(t, "the pod", func(s *sink) bool { return len(s.workloads) == 1 })
	if len(s.services) != 0 {
		t.Error("the service did not wait for quiet")
	}
}

// TestKindNotInstalled proves that a missing kind holds up nothing, that it is
// picked up once it is there, and that a kind that may not be read does hold
// everything up.
func TestKindNotInstalled(t *testing.T) {
	deny := func(dyn interface {
		PrependReactor(verb, resource string, f clienttesting.ReactionFunc)
	}, err func() error) {
		dyn.PrependReactor("list", "authorizationpolicies", func(clienttesting.Action) (bool, runtime.Object, error) {
			e := err()
			return e != nil, nil, e
		})
	}
	t.Run("missing, then installed", func(t *testing.T) {
		dyn := dynamicClient(policy(t, "AuthorizationPolicy", "shop", "p", "{}"))
		installed := make(chan struct{})
		deny(dyn, func() error {
			select {
			case <-installed:
				return nil
			default:
				return apierrors.NewNotFound(authorizationPolicies.GroupResource(), "")
			}
		})
		var log logBook
		s := newSink()
		w := NewWatcher(WatcherConfig{Client: fake.NewClientset(), Dynamic: dyn, Sink: s, Log: log.logger()})
		start(t, w.Run)
		<-w.Synced()
		if log.count("not installed") != 1 {
			t.Error("no log line says that the kind is missing")
		}
		close(installed)
		s.wait(t, "the policy", func(s *sink) bool { return len(s.policies) == 2 })
	})
	t.Run("an older version alone", func(t *testing.T) {
		dyn := dynamicClient()
		asked := make(chan struct{}, 100)
		dyn.PrependReactor("list", "authorizationpolicies", func(a clienttesting.Action) (bool, runtime.Object, error) {
			if a.GetResource().Version != "v1" {
				asked <- struct{}{}
				return false, nil, nil
			}
			return true, nil, apierrors.NewNotFound(authorizationPolicies.GroupResource(), "")
		})
		var log logBook
		w := NewWatcher(WatcherConfig{Client: fake.NewClientset(), Dynamic: dyn, Sink: newSink(), Log: log.logger()})
		start(t, w.Run)
		<-asked
		eventually(t, "all other kinds are read", func() bool { return slices.Equal(w.missing(), []string{"authorizationpolicies"}) })
		<-asked // a whole retry later
		select {
		case <-w.Synced():
			t.Error("synced as if there were no policies")
		default:
		}
		eventually(t, "a log line says what to do", func() bool { return log.count("custom resource definition") == 1 })
	})
	t.Run("forbidden", func(t *testing.T) {
		dyn := dynamicClient()
		asked := make(chan struct{}, 100)
		deny(dyn, func() error {
			asked <- struct{}{}
			return apierrors.NewForbidden(authorizationPolicies.GroupResource(), "", errors.New("no rule"))
		})
		var log logBook
		w := NewWatcher(WatcherConfig{Client: fake.NewClientset(), Dynamic: dyn, Sink: newSink(), Log: log.logger()})
		start(t, w.Run)
		<-asked
		eventually(t, "all other kinds are read", func() bool { return slices.Equal(w.missing(), []string{"authorizationpolicies"}) })
		<-asked // a whole retry later
		select {
		case <-w.Synced():
			t.Error("synced without knowing the policies")
		default:
		}
		eventually(t, "a log line says what to do", func() bool { return log.count("ClusterRole") == 1 })
	})
}

// TestPodIdentity proves who may ask for which identity.
func TestPodIdentity(t *testing.T) {
	gone := aPod("shop", "done", "10.244.0.2", nil)
	gone.Status.Phase = corev1.PodSucceeded
	going := aPod("shop", "going", "10.244.0.3", nil)
	going.DeletionTimestamp = &metav1.Time{Time: time.Unix(1, 0)}
	unbound := aPod("shop", "unbound", "", nil)
	unbound.Spec.NodeName = ""
	noAccount := aPod("shop", "plain", "10.244.0.4", nil)
	noAccount.Spec.ServiceAccountName = ""
	w := NewWatcher(WatcherConfig{Client: fake.NewClientset(aPod("shop", "cart", "10.244.0.1", nil), gone, going, unbound, noAccount),
		Dynamic: dynamicClient(), Sink: newSink(), Log: quiet()})
	start(t, w.Run)
	<-w.Synced()
	for _, tc := range []struct {
		name, pod, uid string
		ok             bool
	}{
		{"a live pod", "cart", "uid-1", true},
		{"another pod of the same name", "cart", "uid-2", false},
		{"no UID", "cart", "", false},
		{"a terminating pod is still there", "going", "uid-1", true},
		{"a pod that has ended", "done", "uid-1", false},
		{"a pod without a node", "unbound", "uid-1", false},
		{"no such pod", "nobody", "uid-1", false},
	} {
		if node, ok := w.NodeOf(mesh.Name{Namespace: "shop", Name: tc.pod}, tc.uid); ok != tc.ok || ok != (node == "node-1") {
			t.Errorf("%s: NodeOf = %q, %v, want %v", tc.name, node, ok, tc.ok)
		}
	}
	for _, tc := range []struct {
		name, node, ns, sa string
		want               bool
	}{
		{"a pod with the account runs there", "node-1", "shop", "cart", true},
		{"a terminating one too", "node-1", "shop", "going", true},
		{"the default account", "node-1", "shop", "default", true},
		{"on another node", "node-2", "shop", "cart", false},
		{"in another namespace", "node-1", "other", "cart", false},
		{"only ended pods", "node-1", "shop", "done", false},
		{"only unbound pods", "", "shop", "unbound", false},
		{"parts that would join to another key", "node-1/shop", "", "cart", false},
	} {
		if got := w.RunsOn(tc.node, mesh.Identity{TrustDomain: "any", Namespace: tc.ns, ServiceAccount: tc.sa}); got != tc.want {
			t.Errorf("%s: RunsOn = %v, want %v", tc.name, got, tc.want)
		}
	}
}

// TestStripKeepsWhatCompileReads compiles the pods and services of every story
// of compile, whole and stripped.
func TestStripKeepsWhatCompileReads(t *testing.T) {
	files, _ := filepath.Glob("../compile/testdata/*.txtar")
	if len(files) == 0 {
		t.Fatal("no stories")
	}
	seen := 0
	for _, path := range files {
		story, err := txtar.ParseFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var whole, stripped compile.Inputs
		for doc := range bytes.SplitSeq(story.Files[0].Data, []byte("\n---\n")) {
			add(t, doc, &whole, &stripped)
		}
		a, b := compile.Compile(compile.Settings{}, whole), compile.Compile(compile.Settings{}, stripped)
		if diff := cmp.Diff(a.Services, b.Services, addresses); diff != "" {
			t.Errorf("%s: services differ (-whole +stripped):\n%s", path, diff)
		}
		for i := range whole.Pods {
			x, okx := a.Workload(whole.Pods[i], nil)
			y, oky := b.Workload(stripped.Pods[i], nil)
			if diff := cmp.Diff(x, y, addresses); okx != oky || diff != "" {
				t.Errorf("%s: workloads differ (-whole +stripped):\n%s", path, diff)
			}
			seen++
		}
	}
	if seen < 10 {
		t.Errorf("compared %d pods only", seen)
	}
}

// addresses compares the address types by ==.
var addresses = cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})

func add(t *testing.T, doc []byte, whole, stripped *compile.Inputs) {
	t.Helper()
	switch {
	case strings.Contains(string(doc), "kind: Pod\n"):
		o := parse[corev1.Pod](t, doc)
		whole.Pods = append(whole.Pods, o)
		stripped.Pods = append(stripped.Pods, stripTwice(t, o).(*corev1.Pod))
	case strings.Contains(string(doc), "kind: Service\n"):
		o := parse[corev1.Service](t, doc)
		whole.Services = append(whole.Services, o)
		stripped.Services = append(stripped.Services, stripTwice(t, o).(*corev1.Service))
	}
}

func parse[T any](t *testing.T, doc []byte) *T {
	t.Helper()
	v := new(T)
	if err := yaml.Unmarshal(doc, v); err != nil {
		t.Fatal(err)
	}
	return v
}

// stripTwice also proves that stripping what is stripped changes nothing.
func stripTwice(t *testing.T, o any) any {
	t.Helper()
	once, err := strip(o)
	if err != nil {
		t.Fatal(err)
	}
	twice, err := strip(once)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(once, twice); diff != "" {
		t.Fatalf("stripped twice is not stripped once:\n%s", diff)
	}
	return twice
}

// TestQueueWaitsForQuiet proves when the world is compiled.
func TestQueueWaitsForQuiet(t *testing.T) {
	now := time.Unix(1000, 0)
	q := newQueue()
	q.clock = func() time.Time { return now }
	take := func() (bool, time.Duration) {
		now, since, wait := q.takeWorld(50*time.Millisecond, 200*time.Millisecond)
		if now == since.IsZero() {
			t.Errorf("taken %v, of changes since %v", now, since)
		}
		return now, wait
	}
	if got, wait := take(); got || wait != 0 {
		t.Fatalf("nothing changed: %v, %v", got, wait)
	}
	q.addWorld()
	if got, wait := take(); got || wait != 50*time.Millisecond {
		t.Fatalf("just changed: %v, %v, want a wait of 50ms", got, wait)
	}
	for range 5 { // never quiet
		now = now.Add(40 * time.Millisecond)
		q.addWorld()
	}
	if got, _ := take(); !got {
		t.Fatal("patience has ended after 200ms, but the world was not taken")
	}
	q.addWorld()
	now = now.Add(50 * time.Millisecond)
	if got, _ := take(); !got {
		t.Fatal("quiet for 50ms, but the world was not taken")
	}
	if got, wait := take(); got || wait != 0 {
		t.Fatal("the world was taken twice")
	}
}

// TestOutage proves that a long outage has its line, that it is not repeated
// with every try, and that its end is told.
func TestOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := fake.NewClientset()
		var down atomic.Bool
		client.PrependReactor("get", "version", func(clienttesting.Action) (bool, runtime.Object, error) {
			if down.Load() {
				return true, nil, errors.New("connection refused")
			}
			return false, nil, nil
		})
		var log logBook
		w := NewWatcher(WatcherConfig{Client: client, Dynamic: dynamicClient(), Sink: newSink(), Log: log.logger()})
		start(t, w.ping)
		time.Sleep(time.Minute)
		if log.count("Kubernetes API") != 0 {
			t.Error("an API server that answers is complained about")
		}
		down.Store(true)
		time.Sleep(2 * time.Minute)
		if n := log.count("check that the API server is up"); n < 2 || n > 5 {
			t.Errorf("%d lines in 2 minutes of outage, want about one every 30 s", n)
		}
		down.Store(false)
		time.Sleep(10 * time.Second)
		if log.count("is back") != 1 {
			t.Error("no line says that the API server is back")
		}
	})
}
