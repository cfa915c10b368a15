package handoff

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

var testPod = Pod{
	UID: "6b0f7c1e-1", Name: "cart-1", Namespace: "shop", ServiceAccount: "cart",
	Addresses: []netip.Addr{netip.MustParseAddr("10.244.0.7"), netip.MustParseAddr("fd00::7")}, Node: "n1",
}

func pod(uid string) Pod {
	p := testPod
	p.UID = uid
	return p
}

// testFiles returns files of a pod with a real listener in role Out4. They are
// closed with the test.
func testFiles(t *testing.T) (Files, net.Addr) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var f Files
	if f.Listeners[Out4], err = l.(*net.TCPListener).File(); err != nil {
		t.Fatal(err)
	}
	if f.Netns, err = os.Open("/proc/self/ns/net"); err != nil {
		t.Fatal(err)
	}
	if f.Blessed, err = os.Open(os.DevNull); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f, l.Addr()
}

// dup copies files as the owner of an Entry does.
func dup(t *testing.T, f Files) Files {
	t.Helper()
	var out Files
	copyOne := func(to **os.File, from *os.File) {
		if from == nil {
			return
		}
		l, err := os.Open("/proc/self/fd/" + itoa(t, from))
		if err != nil { // a socket cannot be opened by path
			c, cerr := net.FileListener(from)
			if cerr != nil {
				t.Fatal(err, cerr)
			}
			defer c.Close()
			if l, err = c.(*net.TCPListener).File(); err != nil {
				t.Fatal(err)
			}
		}
		*to = l
	}
	copyOne(&out.Netns, f.Netns)
	copyOne(&out.Blessed, f.Blessed)
	for i := range f.Listeners {
		copyOne(&out.Listeners[i], f.Listeners[i])
	}
	return out
}

// fakeProxy is a Handler that keeps what it is given.
type fakeProxy struct {
	mu    sync.Mutex
	pods  map[string]Entry
	order []string
	fail  map[string]error
	kept  map[string]bool
	held  func() []Entry
	block chan struct{} // when set, Add waits for it
}

func newFakeProxy(t *testing.T) *fakeProxy {
	p := &fakeProxy{pods: map[string]Entry{}, fail: map[string]error{}}
	t.Cleanup(func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		for _, e := range p.pods {
			e.Files.Close()
		}
	})
	return p
}

func (p *fakeProxy) Add(_ context.Context, pod Pod, f Files) error {
	if p.block != nil {
		<-p.block
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.order = append(p.order, "add "+pod.UID)
	if err := p.fail[pod.UID]; err != nil {
		f.Close()
		return err
	}
	p.pods[pod.UID].Files.Close()
	p.pods[pod.UID] = Entry{pod, f}
	return nil
}

func (p *fakeProxy) Del(uid string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.order = append(p.order, "del "+uid)
	p.pods[uid].Files.Close()
	delete(p.pods, uid)
}

func (p *fakeProxy) SnapshotEnd(kept map[string]bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.order = append(p.order, "end")
	p.kept = kept
}

func (p *fakeProxy) Held() []Entry {
	if p.held == nil {
		return nil
	}
	return p.held()
}

func (p *fakeProxy) did() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.order)
}

func (p *fakeProxy) entry(uid string) (Entry, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	e, ok := p.pods[uid]
	return e, ok
}

// startServer runs a server until the test ends.
func startServer(t *testing.T, cfg ServerConfig) *Server {
	t.Helper()
	cfg.Log = slog.New(slog.NewTextHandler(t.Output(), nil))
	s := NewServer(cfg)
	run(t, s.Run)
	eventually(t, "the socket", func() bool { _, err := os.Stat(cfg.Path); return err == nil })
	return s
}

// startClient runs a client until the test or the returned func ends it.
func startClient(t *testing.T, path, instance string, h Handler) (*Client, func()) {
	t.Helper()
	c := NewClient(ClientConfig{Path: path, Instance: instance, Handler: h,
		Log: slog.New(slog.NewTextHandler(t.Output(), nil)), Retry: 5 * time.Millisecond})
	return c, run(t, c.Run)
}

func run(t *testing.T, f func(context.Context) error) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(stop)
	return stop
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	for !ok() {
		select {
		case <-deadline:
			t.Fatalf("%s: it did not come within 10 s", what)
		case <-time.After(time.Millisecond):
		}
	}
}

func synced(t *testing.T, c *Client) {
	t.Helper()
	select {
	case <-c.Synced():
	case <-time.After(10 * time.Second):
		t.Fatal("the client got no snapshot within 10 s")
	}
}

func sockPath(t *testing.T) string { return filepath.Join(t.TempDir(), "run", "handoff.sock") }

func TestAddCarriesAListenerThatAccepts(t *testing.T) {
	path := sockPath(t)
	s := startServer(t, ServerConfig{Path: path})
	h := newFakeProxy(t)
	c, _ := startClient(t, path, "z1", h)
	synced(t, c)

	f, addr := testFiles(t)
	if err := s.Add(t.Context(), testPod, f); err != nil {
		t.Fatal(err)
	}
	e, ok := h.entry(testPod.UID)
	if !ok {
		t.Fatal("Add returned before ztunnel had the pod")
	}
	if diff := cmp.Diff(testPod, e.Pod, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
		t.Error(diff)
	}
	l, err := net.FileListener(e.Files.Listeners[Out4])
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dialed, err := net.Dial("tcp", addr.String())
	if err != nil {
		t.Fatal(err)
	}
	defer dialed.Close()
	got, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer got.Close()
	if got.RemoteAddr().String() != dialed.LocalAddr().String() {
		t.Errorf("the listener accepted %v, want %v", got.RemoteAddr(), dialed.LocalAddr())
	}
	var same bool
	a, aerr := e.Files.Netns.Stat()
	b, berr := f.Netns.Stat()
	same = aerr == nil && berr == nil && os.SameFile(a, b)
	if !same {
		t.Error("the network namespace is another one than was sent")
	}
	if e.Files.Listeners[Out6] != nil || e.Files.Listeners[HB4] != nil {
		t.Error("a listener that was not sent is there")
	}
}

func TestAddReturnsTheProxysError(t *testing.T) {
	path := sockPath(t)
	s := startServer(t, ServerConfig{Path: path})
	h := newFakeProxy(t)
	h.fail["bad"] = errors.New("no room")
	c, _ := startClient(t, path, "z1", h)
	synced(t, c)
	f, _ := testFiles(t)
	err := s.Add(t.Context(), pod("bad"), f)
	if err == nil || !strings.Contains(err.Error(), "no room") {
		t.Errorf("Add: %v, want the proxy's reason", err)
	}
	if err := s.Add(t.Context(), pod("good"), f); err != nil {
		t.Errorf("Add after a failed one: %v", err)
	}
}

func TestAddWithoutProxy(t *testing.T) {
	s := startServer(t, ServerConfig{Path: sockPath(t)})
	f, _ := testFiles(t)
	if err := s.Add(t.Context(), testPod, f); !errors.Is(err, ErrNoProxy) {
		t.Errorf("Add: %v, want ErrNoProxy", err)
	}
	if err := s.Del(t.Context(), testPod.UID); err != nil {
		t.Errorf("Del: %v, want nil: nobody serves the pod", err)
	}
	if err := s.Add(t.Context(), Pod{}, f); err == nil || errors.Is(err, ErrNoProxy) {
		t.Errorf("Add of the zero Pod: %v, want that it is invalid", err)
	}
}

func TestSnapshotThenIncrements(t *testing.T) {
	path := sockPath(t)
	f, _ := testFiles(t)
	s := startServer(t, ServerConfig{Path: path, Snapshot: func() []Entry {
		return []Entry{{pod("a"), dup(t, f)}, {pod("b"), dup(t, f)}, {pod("c"), dup(t, f)}}
	}})
	h := newFakeProxy(t)
	h.fail["b"] = errors.New("broken pod") // must not keep c from being served
	c, _ := startClient(t, path, "z1", h)
	synced(t, c)
	if err := s.Add(t.Context(), pod("d"), f); err != nil {
		t.Fatal(err)
	}
	if err := s.Del(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	want := []string{"add a", "add b", "add c", "end", "add d", "del a"}
	if diff := cmp.Diff(want, h.did()); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(map[string]bool{"a": true, "b": true, "c": true}, h.kept); diff != "" {
		t.Error(diff)
	}
}

func TestDelWaitsForTheSnapshot(t *testing.T) {
	path := sockPath(t)
	f, _ := testFiles(t)
	inSnapshot := make(chan struct{})
	s := startServer(t, ServerConfig{Path: path, Snapshot: func() []Entry {
		e := []Entry{{pod("a"), dup(t, f)}}
		close(inSnapshot)
		return e
	}})
	h := newFakeProxy(t)
	h.block = make(chan struct{})
	c, _ := startClient(t, path, "z1", h)
	<-inSnapshot // pod a leaves after the snapshot was taken, before it is through
	done := make(chan error, 1)
	go func() { done <- s.Del(t.Context(), "a") }()
	close(h.block)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	synced(t, c)
	if _, ok := h.entry("a"); ok {
		t.Errorf("pod a is served after its Del: %v", h.did())
	}
}

func TestNewestGetsAddsAllGetDels(t *testing.T) {
	path := sockPath(t)
	s := startServer(t, ServerConfig{Path: path})
	old, young := newFakeProxy(t), newFakeProxy(t)
	c1, _ := startClient(t, path, "old", old)
	synced(t, c1)
	c2, stop2 := startClient(t, path, "young", young)
	synced(t, c2)
	f, _ := testFiles(t)
	if err := s.Add(t.Context(), pod("a"), f); err != nil {
		t.Fatal(err)
	}
	if err := s.Del(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"end", "del a"}, old.did()); diff != "" {
		t.Errorf("old: %s", diff)
	}
	if diff := cmp.Diff([]string{"end", "add a", "del a"}, young.did()); diff != "" {
		t.Errorf("young: %s", diff)
	}

	// With the newest gone, the one before is asked.
	stop2()
	if err := s.Add(t.Context(), pod("b"), f); err != nil {
		t.Fatal(err)
	}
	if _, ok := old.entry("b"); !ok {
		t.Error("the older ztunnel did not get the pod")
	}
}

func TestHoldsAreAdoptedByARestartedAgent(t *testing.T) {
	path := sockPath(t)
	f, addr := testFiles(t)
	h := newFakeProxy(t)
	h.held = func() []Entry { return []Entry{{testPod, dup(t, f)}} }

	ctx, kill := context.WithCancel(t.Context())
	first := NewServer(ServerConfig{Path: path, Log: slog.New(slog.DiscardHandler)})
	done := make(chan error, 1)
	go func() { done <- first.Run(ctx) }()
	eventually(t, "the socket", func() bool { _, err := os.Stat(path); return err == nil })
	c, _ := startClient(t, path, "z1", h)
	synced(t, c)
	kill()
	if err := <-done; err != nil {
		t.Fatal(err)
	}

	events := make(chan string, 10)
	held := make(chan Files, 1)
	ended := make(chan struct{})
	startServer(t, ServerConfig{Path: path,
		OnHold: func(p Pod, f Files) {
			events <- "hold " + p.UID
			held <- f
		},
		OnHoldEnd: func(instance string) {
			events <- "holdEnd " + instance
			close(ended)
		},
		Snapshot: func() []Entry {
			events <- "snapshot"
			return nil
		},
	})
	<-ended
	got := <-held
	defer got.Close()
	l, err := net.FileListener(got.Listeners[Out4])
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if l.Addr().String() != addr.String() {
		t.Errorf("held listener at %v, want %v", l.Addr(), addr)
	}
	eventually(t, "the snapshot", func() bool { return len(h.did()) >= 2 })
	want := []string{"hold " + testPod.UID, "holdEnd z1", "snapshot"}
	for _, w := range want {
		if got := <-events; got != w {
			t.Errorf("event %q, want %q", got, w)
		}
	}
}

func TestSlowProxyIsDisconnected(t *testing.T) {
	path := sockPath(t)
	s := startServer(t, ServerConfig{Path: path, AckTimeout: 50 * time.Millisecond})
	h := newFakeProxy(t)
	h.block = make(chan struct{})
	c, stop := startClient(t, path, "z1", h)
	synced(t, c)
	f, _ := testFiles(t)
	unblocked := make(chan struct{})
	go func() { // it is asked again when it has reconnected, so let it go at last
		defer close(unblocked)
		for n, changed := s.Connected(); n > 0; n, changed = s.Connected() {
			<-changed
		}
		close(h.block)
	}()
	if err := s.Add(t.Context(), pod("a"), f); !errors.Is(err, ErrNoProxy) && err != nil {
		t.Errorf("Add: %v, want ErrNoProxy, or success after it reconnected", err)
	}
	<-unblocked
	stop()
}
