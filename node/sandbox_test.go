package node

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/weft-mesh/weft/internal/netns"
	"github.com/weft-mesh/weft/internal/testnet"
)

const (
	uidA = "aaaaaaaa-1d2e-4f3a-8b9c-0d1e2f3a4b5c"
	uidB = "bbbbbbbb-1d2e-4f3a-8b9c-0d1e2f3a4b5c"
)

// A fakeHost is a /proc and a directory of named namespaces made of files;
// the namespaces are real.
type fakeHost struct {
	t           *testing.T
	proc, named string
	*hostSandboxes
}

func newFakeHost(t *testing.T, host *netns.NS) *fakeHost {
	h := &fakeHost{t: t, proc: t.TempDir(), named: t.TempDir()}
	h.process(1, "0::/init.scope\n", host)
	s, err := newHostSandboxes(h.proc, h.named)
	if err != nil {
		t.Fatal(err)
	}
	h.hostSandboxes = s
	return h
}

func nsPath(ns *netns.NS) string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), ns.Fd()) }

func (h *fakeHost) process(pid int, cgroup string, ns *netns.NS) {
	h.t.Helper()
	dir := filepath.Join(h.proc, fmt.Sprint(pid))
	if err := errors.Join(os.MkdirAll(filepath.Join(dir, "ns"), 0o755),
		os.WriteFile(filepath.Join(dir, "cgroup"), []byte(cgroup), 0o644),
		os.Symlink(nsPath(ns), filepath.Join(dir, "ns/net"))); err != nil {
		h.t.Fatal(err)
	}
}

func (h *fakeHost) name(name string, ns *netns.NS) {
	h.t.Helper()
	if err := os.Symlink(nsPath(ns), filepath.Join(h.named, name)); err != nil {
		h.t.Fatal(err)
	}
}

func (h *fakeHost) remove(path string) {
	h.t.Helper()
	if err := os.RemoveAll(path); err != nil {
		h.t.Fatal(err)
	}
}

func ofPod(uid string) string { return "0::/kubepods/besteffort/pod" + uid + "/c\n" }

func TestFindSandbox(t *testing.T) {
	w := testnet.New(t)
	n := w.Node("n1")
	a, b := n.Pod("a", testnet.Bridged), n.Pod("b", testnet.Bridged)
	inner := w.Host("inner") // a namespace that pod a made for itself
	id := func(ns *netns.NS) netns.ID {
		id, err := ns.ID()
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	tests := []struct {
		name  string
		setup func(h *fakeHost)
		uid   string
		addrs []netip.Addr
		want  *netns.NS
		err   string // "" with want nil: errNoSandbox
	}{
		{"by a process of its cgroup", func(h *fakeHost) {
			h.process(10, ofPod(uidA), a.NS)
			h.process(11, ofPod(uidB), b.NS)
		}, uidA, []netip.Addr{a.V4, a.V6}, a.NS, ""},
		{"a namespace that the pod made itself is not it", func(h *fakeHost) {
			h.process(10, ofPod(uidA), inner.NS)
			h.process(11, ofPod(uidA), a.NS)
		}, uidA, []netip.Addr{a.V4}, a.NS, ""},
		{"a process of the pod in another pod's namespace is refused", func(h *fakeHost) {
			h.process(10, ofPod(uidA), b.NS)
		}, uidA, []netip.Addr{a.V4}, nil, "not the pod's"},
		{"a process of the pod in the node's namespace is refused", func(h *fakeHost) {
			h.process(10, ofPod(uidA), n.NS)
		}, uidA, []netip.Addr{n.V4}, nil, "the node's own"},
		{"without processes, by its addresses", func(h *fakeHost) {
			h.name("cni-1", b.NS)
			h.name("cni-2", a.NS)
		}, uidA, []netip.Addr{a.V4, a.V6}, a.NS, ""},
		{"one namespace under two names is one", func(h *fakeHost) {
			h.name("cni-1", a.NS)
			h.name("cni-2", a.NS)
		}, uidA, []netip.Addr{a.V4}, a.NS, ""},
		{"addresses that two namespaces have say nothing", func(h *fakeHost) {
			h.name("cni-1", a.NS)
			h.name("cni-2", b.NS)
		}, uidA, []netip.Addr{netip.MustParseAddr("fe80::77")}, nil, "two network namespaces"},
		{"nothing there", func(*fakeHost) {}, uidA, []netip.Addr{a.V4}, nil, ""},
		{"only another pod", func(h *fakeHost) { h.process(11, ofPod(uidB), b.NS) }, uidA, []netip.Addr{a.V4}, nil, ""},
		{"no address yet", func(h *fakeHost) { h.process(10, ofPod(uidA), a.NS) }, uidA, nil, nil, "no address"},
	}
	for _, p := range []*testnet.Pod{a, b} {
		p.Run("ip", "-6", "addr", "add", "fe80::77/64", "dev", "eth0", "nodad")
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			h := newFakeHost(t, n.NS)
			tt.setup(h)
			s, err := h.find(tt.uid, tt.addrs)
			if tt.want == nil {
				if tt.err == "" && !errors.Is(err, errNoSandbox) || tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
					t.Errorf("got %v, %v, want an error with %q", s, err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer s.close()
			if s.id != id(tt.want) {
				t.Errorf("found %s", s.path)
			}
		})
	}
}

// The number of a process that ended may be another's by the time its
// namespace is opened.
func TestProcessThatIsAnothersNowIsNotTaken(t *testing.T) {
	w := testnet.New(t)
	n := w.Node("n1")
	a := n.Pod("a", testnet.Routed)
	h := newFakeHost(t, n.NS)
	h.process(10, ofPod(uidB), a.NS)
	h.scanned, h.pids = time.Now(), map[string][]int{uidA: {10}} // as an old scan saw it
	if s, err := h.find(uidA, []netip.Addr{a.V4}); !errors.Is(err, errNoSandbox) {
		t.Errorf("got %v, %v", s, err)
	}
}

func TestOpenSandboxByPathOfTheHost(t *testing.T) {
	w := testnet.New(t)
	n := w.Node("n1")
	a := n.Pod("a", testnet.Routed)
	h := newFakeHost(t, n.NS)
	h.name("cni-1", a.NS)
	h.process(10, ofPod(uidA), a.NS)
	root := filepath.Join(h.proc, "1/root/run/other")
	if err := errors.Join(os.MkdirAll(root, 0o755), os.Symlink(nsPath(a.NS), filepath.Join(root, "x"))); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"/var/run/netns/cni-1", "/run/netns/cni-1", "/proc/10/ns/net", "/run/other/x"} {
		s, err := h.open(path, []netip.Addr{a.V4, a.V6})
		if err != nil {
			t.Errorf("%s: %v", path, err)
			continue
		}
		s.close()
	}
	bad := map[string]string{
		"/var/run/netns/none":                "no such file",
		"/proc/1/ns/net":                     "the node's own",
		"/var/run/netns/../../1/root/cgroup": "no such file",
		"":                                   "not a network namespace",
	}
	for path, want := range bad {
		if s, err := h.open(path, []netip.Addr{a.V4}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, %v: want an error with %q", path, s, err, want)
		}
	}
	if _, err := h.open("/var/run/netns/cni-1", []netip.Addr{n.V4}); err == nil || !strings.Contains(err.Error(), "not the pod's") {
		t.Errorf("took a namespace without the pod's address: %v", err)
	}
}

func TestSandboxAlive(t *testing.T) {
	w := testnet.New(t)
	n := w.Node("n1")
	a := n.Pod("a", testnet.Routed)
	h := newFakeHost(t, n.NS)
	h.name("cni-1", a.NS)
	h.process(10, ofPod(uidA), a.NS)
	h.process(11, ofPod(uidA), a.NS)
	s, err := h.find(uidA, []netip.Addr{a.V4})
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	for _, path := range []string{filepath.Join(h.proc, "10"), filepath.Join(h.named, "cni-1"), filepath.Join(h.proc, "11")} {
		if !h.alive(s) {
			t.Errorf("not alive with %s still there", path)
		}
		h.remove(path)
	}
	if h.alive(s) {
		t.Error("alive when only Weft holds it")
	}
	h.remove(h.proc)
	if !h.alive(s) {
		t.Error("not alive when nobody could look")
	}
}

func podAddrs(p *testnet.Pod) []netip.Addr { return []netip.Addr{p.V4, p.V6} }
