package node

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"github.com/weft-mesh/weft/internal/handoff"
	"github.com/weft-mesh/weft/internal/testnet"
	"github.com/weft-mesh/weft/node/cni"
)

const conflist = `{"cniVersion":"1.0.0","name":"net","plugins":[{"type":"bridge"}]}`

// A heldProxy is a ztunnel that serves nothing and holds everything.
type heldProxy struct {
	mu   sync.Mutex
	pods map[string]handoff.Entry
	dels []string
	kept map[string]bool
}

func (p *heldProxy) Add(_ context.Context, pod handoff.Pod, f handoff.Files) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.pods[pod.UID].Files.Close()
	p.pods[pod.UID] = handoff.Entry{Pod: pod, Files: f}
	return nil
}

func (p *heldProxy) Del(uid string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.dels = append(p.dels, uid)
	p.pods[uid].Files.Close()
	delete(p.pods, uid)
}

func (p *heldProxy) SnapshotEnd(kept map[string]bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.kept = kept
}

func (p *heldProxy) Held() []handoff.Entry {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []handoff.Entry
	for _, e := range p.pods {
		f := handoff.Files{Netns: dupFile(e.Files.Netns), Blessed: dupFile(e.Files.Blessed)}
		for i, l := range e.Files.Listeners {
			f.Listeners[i] = dupFile(l)
		}
		out = append(out, handoff.Entry{Pod: e.Pod, Files: f})
	}
	return out
}

func dupFile(f *os.File) *os.File {
	if f == nil {
		return nil
	}
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		panic(err)
	}
	return os.NewFile(uintptr(fd), f.Name())
}

// cookies tells sockets apart: a listener that was made anew has another.
func (p *heldProxy) cookies(t *testing.T) map[string][]uint64 {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	out := map[string][]uint64{}
	for uid, e := range p.pods {
		for _, l := range e.Files.Listeners {
			if l == nil {
				continue
			}
			c, err := unix.GetsockoptUint64(int(l.Fd()), unix.SOL_SOCKET, unix.SO_COOKIE)
			if err != nil {
				t.Fatal(err)
			}
			out[uid] = append(out[uid], c)
		}
	}
	return out
}

// A site is one node of the real kernel, with everything around the agent.
type site struct {
	t      *testing.T
	cfg    Config
	client *fake.Clientset
	host   *fakeHost
	proxy  *heldProxy
	node   *testnet.Node
}

func newSite(t *testing.T) *site {
	n := testnet.New(t).Node("n1")
	s := &site{t: t, node: n, host: newFakeHost(t, n.NS), proxy: &heldProxy{pods: map[string]handoff.Entry{}}}
	// Written from inside a pod's namespace, it is that pod's.
	if err := os.Symlink("/proc/sys", filepath.Join(s.host.proc, "sys")); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cfg := Defaults()
	cfg.Node, cfg.Address, cfg.LeaveGrace = "n1", "127.0.0.1:0", 10*time.Millisecond
	cfg.ProcRoot, cfg.NetnsDir, cfg.BPFRoot = s.host.proc, s.host.named, filepath.Join(testnet.BPFFS(t), "weft", "v1")
	cfg.HandoffSocket, cfg.CNISocket, cfg.LockFile = filepath.Join(dir, "h.sock"), filepath.Join(dir, "c.sock"), filepath.Join(dir, "lock")
	cfg.RecordsDir = filepath.Join(dir, "pods")
	cfg.CNIAgentSocket = cfg.CNISocket
	cfg.CNIConfDir, cfg.CNIBinDir, cfg.CNIPlugin = filepath.Join(dir, "net.d"), filepath.Join(dir, "bin"), filepath.Join(dir, "plugin")
	if err := errors.Join(os.Mkdir(cfg.CNIConfDir, 0o755), os.Mkdir(cfg.CNIBinDir, 0o755), os.Mkdir(filepath.Dir(cfg.BPFRoot), 0o755),
		os.WriteFile(cfg.CNIPlugin, []byte("plugin"), 0o755),
		os.WriteFile(filepath.Join(cfg.CNIConfDir, "10-net.conflist"), []byte(conflist), 0o600)); err != nil {
		t.Fatal(err)
	}
	s.cfg = cfg
	s.client = fake.NewClientset(namespace("shop", ""), &appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Namespace: "weft-system", Name: "ztunnel"}})
	t.Cleanup(func() {
		for _, e := range s.proxy.pods {
			e.Files.Close()
		}
	})
	return s
}

// pod adds a pod that runs on the node, in the kernel and in the API.
func (s *site) pod(name, uid string, pid int) (*testnet.Pod, *corev1.Pod) {
	p := s.node.Pod(name, testnet.Routed)
	s.host.process(pid, ofPod(uid), p.NS)
	obj := runningPod(nil, name)
	obj.UID = types.UID(uid)
	obj.Status.PodIP, obj.Status.PodIPs = p.V4.String(), []corev1.PodIP{{IP: p.V4.String()}, {IP: p.V6.String()}}
	return p, obj
}

func (s *site) create(p *corev1.Pod) {
	s.t.Helper()
	if _, err := s.client.CoreV1().Pods(p.Namespace).Create(s.t.Context(), p, metav1.CreateOptions{}); err != nil {
		s.t.Fatal(err)
	}
}

func (s *site) label(mode string) {
	s.t.Helper()
	if _, err := s.client.CoreV1().Namespaces().Update(s.t.Context(), namespace("shop", mode), metav1.UpdateOptions{}); err != nil {
		s.t.Fatal(err)
	}
}

// agent runs an agent until stop is called.
func (s *site) agent() (a *Agent, stop func()) {
	s.t.Helper()
	log := slog.New(slog.NewTextHandler(s.t.Output(), nil))
	a, err := New(s.cfg, s.client, prometheus.NewRegistry(), log)
	if err != nil {
		s.t.Fatal(err)
	}
	return a, s.run(a.Run)
}

func (s *site) ztunnel() (stop func()) {
	c := handoff.NewClient(handoff.ClientConfig{Path: s.cfg.HandoffSocket, Instance: "z", Handler: s.proxy,
		Log: slog.New(slog.DiscardHandler), Retry: 5 * time.Millisecond})
	return s.run(c.Run)
}

func (s *site) run(f func(context.Context) error) (stop func()) {
	ctx, cancel := context.WithCancel(s.t.Context())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			s.t.Error(err)
		}
	})
	s.t.Cleanup(stop)
	return stop
}

func (s *site) until(what string, ok func() bool) {
	s.t.Helper()
	end := time.Now().Add(30 * time.Second)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		if time.Now().After(end) {
			s.t.Fatalf("waited in vain for: %s", what)
		}
		<-tick.C
	}
}

func captured(p *testnet.Pod) bool {
	return strings.Contains(p.Run("ip", "rule"), "102:") && strings.Contains(p.Run("ip", "-6", "rule"), "102:")
}

func names(s Status) []string {
	var out []string
	for _, p := range s.Pods {
		out = append(out, p.Name)
	}
	return out
}

// The life of an agent on the real kernel: pods join running and starting, the
// agent is replaced, Weft is uninstalled.
func TestAgentLife(t *testing.T) {
	s := newSite(t)
	pa, a := s.pod("a", uidA, 10)
	pb, b := s.pod("b", uidB, 11)
	s.host.name("cni-b", pb.NS)
	b.Status = corev1.PodStatus{Phase: corev1.PodPending}
	s.create(a)
	s.ztunnel()
	first, stop := s.agent()
	s.until("readiness", func() bool { return first.Status().Ready })
	if captured(pa) {
		t.Fatal("captured without a label")
	}

	s.label("ambient")
	s.until("the running pod", func() bool { return slices.Equal(names(first.Status()), []string{"a"}) })
	if !captured(pa) {
		t.Error("status says that a is captured, the kernel does not")
	}
	s.create(b)
	req := cni.Request{Namespace: "shop", Pod: "b", UID: uidB, ContainerID: "c1", Netns: "/var/run/netns/cni-b", Interface: "eth0", Addresses: podAddrs(pb)}
	res, err := cni.NewClient(s.cfg.CNISocket).Add(t.Context(), req)
	if err != nil || !res.Captured || !captured(pb) {
		t.Fatalf("the starting pod: %+v, %v", res, err)
	}
	s.until("the annotation", func() bool {
		p, err := s.client.CoreV1().Pods("shop").Get(t.Context(), "b", metav1.GetOptions{})
		return err == nil && p.Annotations[capturedAnnotation] == capturedValue
	})
	before := s.proxy.cookies(t)
	stop()
	s.proxy.mu.Lock()
	s.proxy.kept = nil
	s.proxy.mu.Unlock()

	if !captured(pa) || !captured(pb) {
		t.Fatal("an agent that stops let go of its pods")
	}
	second, stop := s.agent()
	s.until("readiness after a restart", func() bool { return second.Status().Ready })
	if got := names(second.Status()); !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("the next agent has %v", got)
	}
	if diff := cmp.Diff(before, s.proxy.cookies(t)); diff != "" {
		t.Error("the listeners are not the same:", diff)
	}
	s.until("the snapshot with both", func() bool {
		s.proxy.mu.Lock()
		defer s.proxy.mu.Unlock()
		return s.proxy.kept[uidA] && s.proxy.kept[uidB]
	})
	s.proxy.mu.Lock()
	if len(s.proxy.dels) != 0 {
		t.Errorf("ztunnel was told to drop pods: %v", s.proxy.dels)
	}
	s.proxy.mu.Unlock()

	if err := s.client.AppsV1().DaemonSets("weft-system").Delete(t.Context(), "ztunnel", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	stop()
	if captured(pa) || captured(pb) {
		t.Error("pods are still captured after Weft is gone")
	}
	if b, err := os.ReadFile(filepath.Join(s.cfg.CNIConfDir, "10-net.conflist")); err != nil || string(b) != conflist {
		t.Errorf("the conflist was not given back: %s %v", b, err)
	}
	if _, err := os.Stat(s.cfg.BPFRoot); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("pins are left: %v", err)
	}
	for _, name := range []string{"a", "b"} {
		p, err := s.client.CoreV1().Pods("shop").Get(t.Context(), name, metav1.GetOptions{})
		if err != nil || p.Annotations[capturedAnnotation] != "" {
			t.Errorf("%s still says that it is captured: %v", name, err)
		}
	}
}

// A rolling update may start the new pod before it stops the old.
func TestAgentStandsBy(t *testing.T) {
	s := newSite(t)
	s.ztunnel()
	first, stop := s.agent()
	s.until("readiness", func() bool { return first.Status().Ready })
	second, _ := s.agent()
	s.until("a standby that is ready", func() bool { st := second.Status(); return st.Standby && st.Ready })
	if !first.Status().Ready {
		t.Error("the standby disturbed the one that works")
	}
	stop()
	s.until("the takeover", func() bool { st := second.Status(); return !st.Standby && st.Ready })
}

func TestAgentSaysWhatItWaitsFor(t *testing.T) {
	s := newSite(t)
	s.client.PrependReactor("list", "pods", func(clienttesting.Action) (bool, runtime.Object, error) {
		return true, nil, errors.New("connection refused")
	})
	if err := os.Remove(filepath.Join(s.cfg.CNIConfDir, "10-net.conflist")); err != nil {
		t.Fatal(err)
	}
	a, _ := s.agent()
	h := a.handler(a.registry)
	s.until("a status that names all three", func() bool {
		r := httptest.NewRecorder()
		h.ServeHTTP(r, httptest.NewRequest("GET", "/healthz/ready", nil))
		b := r.Body.String()
		return r.Code == http.StatusServiceUnavailable && strings.Contains(b, "API server") && strings.Contains(b, "CNI network plugin") && strings.Contains(b, "ztunnel")
	})
	_, err := cni.NewClient(s.cfg.CNISocket).Add(t.Context(), cni.Request{Namespace: "shop", Pod: "x", ContainerID: "c"})
	if err == nil {
		t.Error("a pod started that nobody could judge")
	}
	r := httptest.NewRecorder()
	h.ServeHTTP(r, httptest.NewRequest("GET", "/status", nil))
	var st Status
	if err := json.Unmarshal(r.Body.Bytes(), &st); err != nil || st.Ready || st.Node != "n1" {
		t.Errorf("%v: %s", err, r.Body)
	}
	r = httptest.NewRecorder()
	h.ServeHTTP(r, httptest.NewRequest("GET", "/metrics", nil))
	for _, m := range []string{"weft_node_pods_captured 0", "weft_node_ready 0", "weft_node_cni_installed 0"} {
		if !strings.Contains(r.Body.String(), m) {
			t.Errorf("metrics lack %q", m)
		}
	}
}

// Agent and ztunnel start anew while the API server is away: a captured pod is
// served by what was written down of it, with listeners of its own.
func TestAgentWithoutTheAPIServer(t *testing.T) {
	s := newSite(t)
	pa, a := s.pod("a", uidA, 10)
	s.create(a)
	stopZ := s.ztunnel()
	first, stop := s.agent()
	s.label("ambient")
	s.until("the running pod", func() bool { return slices.Equal(names(first.Status()), []string{"a"}) })
	stop()
	stopZ()
	s.proxy.Del(uidA)
	var away atomic.Bool
	away.Store(true)
	s.client.PrependReactor("list", "*", func(clienttesting.Action) (bool, runtime.Object, error) {
		return away.Load(), nil, errors.New("connection refused")
	})
	s.ztunnel()
	second, _ := s.agent()
	s.until("the pod to be handed to ztunnel", func() bool {
		s.proxy.mu.Lock()
		defer s.proxy.mu.Unlock()
		return s.proxy.pods[uidA].Files.Netns != nil && s.proxy.pods[uidA].Pod.ServiceAccount == "sa"
	})
	if st := second.Status(); st.Ready || !captured(pa) || !slices.Equal(names(st), []string{"a"}) {
		t.Errorf("with the API server away: %+v", st)
	}
	away.Store(false)
	s.until("readiness when it is back", func() bool { return second.Status().Ready })
	if !captured(pa) || !slices.Equal(names(second.Status()), []string{"a"}) {
		t.Errorf("when it is back: %+v", second.Status())
	}
}

// The agent lets a node's pods go when its pod is asked to, and not before.
func TestAgentIsAskedToRelease(t *testing.T) {
	s := newSite(t)
	s.cfg.Pod = "ztunnel-x"
	pa, a := s.pod("a", uidA, 10)
	s.create(a)
	own := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "weft-system", Name: "ztunnel-x", UID: "x", Annotations: map[string]string{releaseAnnotation: "no"}}, Spec: corev1.PodSpec{NodeName: "n1"}}
	foreign := own.DeepCopy()
	foreign.Namespace, foreign.UID, foreign.Annotations = "shop", "y", map[string]string{releaseAnnotation: "true"}
	s.create(own)
	s.create(foreign)
	s.ztunnel()
	agent, _ := s.agent()
	s.label("ambient")
	s.until("the running pod", func() bool { st := agent.Status(); return st.Ready && slices.Equal(names(st), []string{"a"}) })
	own.Annotations = map[string]string{releaseAnnotation: "true"}
	if _, err := s.client.CoreV1().Pods("weft-system").Update(t.Context(), own, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	s.until("the release", func() bool { st := agent.Status(); return st.Released && st.Ready && len(st.Pods) == 0 })
	if captured(pa) {
		t.Error("the kernel still captures the pod")
	}
	if b, err := os.ReadFile(filepath.Join(s.cfg.CNIConfDir, "10-net.conflist")); err != nil || string(b) != conflist {
		t.Errorf("the conflist was not given back: %s %v", b, err)
	}
}

// A namespace that is deleted takes the DaemonSet along, in any order.
func TestDeletedNamespaceIsAnUninstallation(t *testing.T) {
	s := newSite(t)
	a, err := New(s.cfg, s.client, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ns := namespace("weft-system", "")
	if _, err := s.client.CoreV1().Namespaces().Create(t.Context(), ns, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if a.uninstalled(t.Context()) {
		t.Error("nothing is deleted")
	}
	now := metav1.Now()
	ns.DeletionTimestamp, ns.Finalizers = &now, []string{"kubernetes"}
	if _, err := s.client.CoreV1().Namespaces().Update(t.Context(), ns, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	if !a.uninstalled(t.Context()) {
		t.Error("its namespace is being deleted")
	}
}

// In doubt the pods stay: the API server may be away, or refuse.
func TestUninstallIsNeverGuessed(t *testing.T) {
	s := newSite(t)
	a, err := New(s.cfg, s.client, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if a.uninstalled(t.Context()) {
		t.Error("the DaemonSet is there")
	}
	s.client.PrependReactor("get", "daemonsets", func(clienttesting.Action) (bool, runtime.Object, error) {
		return true, nil, errors.New("connection refused")
	})
	if a.uninstalled(t.Context()) {
		t.Error("an API server that is away is no uninstallation")
	}
	a.gone.Store(true)
	if !a.uninstalled(t.Context()) {
		t.Error("a DaemonSet that was seen to go is gone")
	}
}

func TestBadConfig(t *testing.T) {
	var c Config
	err := c.Validate()
	if err == nil || strings.Count(err.Error(), "\n") < 10 {
		t.Errorf("the zero config: %v", err)
	}
	c = Defaults()
	c.Node, c.LeaveGrace, c.Existing = "n", -time.Second, "x"
	if err := c.Validate(); err == nil || !strings.Contains(err.Error(), "-1s") || !strings.Contains(err.Error(), `"x"`) {
		t.Errorf("got %v", err)
	}
}

// A feature that is turned off shows in the status, with what it means.
func TestDisabledFeaturesAreTold(t *testing.T) {
	s := newSite(t)
	s.cfg.DisableFeatures = []string{"tcx"}
	a, _ := s.agent()
	s.until("the rung", func() bool { c := a.Status().Capture; return c.Rung == "clsact" && strings.Contains(c.Why, "tcx") })
}
