package node

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/weft-mesh/weft/internal/netns"
)

// A sandbox is the network namespace of a pod, held open.
type sandbox struct {
	ns *netns.NS
	id netns.ID
	// path is where the namespace was found. A container runtime removes it
	// when it takes the sandbox down; a process's path ends with the process.
	path  string
	addrs []netip.Addr // the pod's own
}

func (s *sandbox) close() {
	if s != nil && s.ns != nil {
		s.ns.Close()
	}
}

// errNoSandbox means that a pod has no network namespace now: it does not run
// yet, or not any more.
var errNoSandbox = errors.New("no process and no network namespace of the pod was found on this node")

// sandboxes finds the network namespaces of pods.
type sandboxes interface {
	// find returns the sandbox of a pod that runs, or errNoSandbox. uid is the
	// one that the kubelet runs it under. Without an address it cannot be
	// found, which is another error: the pod may run.
	find(uid string, addrs []netip.Addr) (*sandbox, error)
	// open returns the sandbox at a path that a container runtime names,
	// which must have the addresses.
	open(path string, addrs []netip.Addr) (*sandbox, error)
	// alive reports whether anything but Weft still uses the sandbox.
	alive(s *sandbox) bool
}

// scanAge is how old a scan of the processes may be and still answer. Labelling
// a namespace asks for many pods at once.
const scanAge = time.Second

// hostSandboxes finds sandboxes by the processes and named namespaces of the
// host.
type hostSandboxes struct {
	proc  string   // the host's /proc
	named string   // the host's /run/netns, as it is seen from here
	host  netns.ID // the host's own namespace

	mu      sync.Mutex
	scanned time.Time
	pids    map[string][]int // processes by pod UID
}

// newHostSandboxes needs the host's /proc and named namespaces, which may be
// missing.
func newHostSandboxes(proc, named string) (*hostSandboxes, error) {
	ns, err := netns.Open(filepath.Join(proc, "1/ns/net"))
	if err != nil {
		return nil, fmt.Errorf("open the host's network namespace (is %s the host's /proc?): %w", proc, err)
	}
	defer ns.Close()
	id, err := ns.ID()
	if err != nil {
		return nil, fmt.Errorf("open the host's network namespace: %w", err)
	}
	return &hostSandboxes{proc: proc, named: named, host: id}, nil
}

// find looks for a process of the pod: its cgroup names the pod, which no
// process can forge. Its network namespace must be a pod's and have the pod's
// addresses: a pod can make namespaces of its own. Runtimes that keep no
// process in the pod's cgroup leave the named namespaces, by address alone.
func (h *hostSandboxes) find(uid string, addrs []netip.Addr) (*sandbox, error) {
	if len(addrs) == 0 {
		return nil, errors.New("the pod has no address yet")
	}
	pids, err := h.processes(uid)
	if err != nil {
		return nil, err
	}
	var foreign error
	for _, pid := range pids {
		s, err := h.ofProcess(pid, uid, addrs)
		if err == nil {
			return s, nil
		}
		if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, errNoSandbox) {
			foreign = err
		}
	}
	if foreign != nil {
		return nil, foreign
	}
	if len(pids) > 0 {
		return nil, errNoSandbox // they ended meanwhile
	}
	return h.byAddress(addrs)
}

// processes returns the processes of a pod, from a fresh scan unless the last
// one is recent and knows the pod.
func (h *hostSandboxes) processes(uid string) ([]int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if time.Since(h.scanned) < scanAge && len(h.pids[uid]) > 0 {
		return h.pids[uid], nil
	}
	pids := map[string][]int{}
	err := h.eachProcess(func(pid int) {
		if of, ok := h.podOf(pid); ok {
			pids[of] = append(pids[of], pid)
		}
	})
	if err != nil {
		return nil, err
	}
	h.pids, h.scanned = pids, time.Now()
	return pids[uid], nil
}

func (h *hostSandboxes) eachProcess(f func(pid int)) error {
	dir, err := os.Open(h.proc)
	if err != nil {
		return fmt.Errorf("list the processes of the node: %w", err)
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return fmt.Errorf("list the processes of the node: %w", err)
	}
	for _, name := range names {
		if pid, err := strconv.Atoi(name); err == nil {
			f(pid)
		}
	}
	return nil
}

// podOf returns the pod of a process, or that it has none or is gone.
func (h *hostSandboxes) podOf(pid int) (uid string, ok bool) {
	b, err := os.ReadFile(filepath.Join(h.proc, strconv.Itoa(pid), "cgroup"))
	if err != nil {
		return "", false
	}
	return podUID(string(b))
}

// ofProcess opens the network namespace of a process and makes sure that it
// still is the pod's process: its number may have been given to another since
// it was found.
func (h *hostSandboxes) ofProcess(pid int, uid string, addrs []netip.Addr) (*sandbox, error) {
	s, err := h.openChecked(filepath.Join(h.proc, strconv.Itoa(pid), "ns/net"), addrs)
	if err != nil {
		return nil, err
	}
	if of, ok := h.podOf(pid); !ok || of != uid {
		s.close()
		return nil, errNoSandbox
	}
	return s, nil
}

// byAddress looks for the one named namespace that has the addresses.
func (h *hostSandboxes) byAddress(addrs []netip.Addr) (*sandbox, error) {
	names, err := os.ReadDir(h.named)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errNoSandbox
	}
	if err != nil {
		return nil, fmt.Errorf("list the named network namespaces: %w", err)
	}
	var found *sandbox
	for _, n := range names {
		s, err := h.openChecked(filepath.Join(h.named, n.Name()), addrs)
		if err != nil {
			continue // another pod's, or on its way out
		}
		if found != nil && found.id != s.id {
			found.close()
			s.close()
			return nil, fmt.Errorf("two network namespaces have the addresses %v, %s and %s: one is left from a pod that is gone; it is not clear which is the pod's", addrs, found.path, s.path)
		}
		found.close()
		found = s
	}
	if found == nil {
		return nil, errNoSandbox
	}
	return found, nil
}

// open opens the namespace that a runtime names. The path is the host's, and
// read as such: through the mount namespace of the host's first process, unless
// it is one of the directories that are mounted here.
func (h *hostSandboxes) open(path string, addrs []netip.Addr) (*sandbox, error) {
	return h.openChecked(h.local(path), addrs)
}

// local returns where a path of the host is found from here.
func (h *hostSandboxes) local(path string) string {
	path = filepath.Clean(path)
	for _, dir := range []string{"/run/netns/", "/var/run/netns/"} {
		if rest, ok := strings.CutPrefix(path, dir); ok {
			return filepath.Join(h.named, rest)
		}
	}
	if rest, ok := strings.CutPrefix(path, "/proc/"); ok {
		return filepath.Join(h.proc, rest)
	}
	return filepath.Join(h.proc, "1/root", path)
}

// openChecked opens a namespace that must not be the host's and must have the
// addresses.
func (h *hostSandboxes) openChecked(path string, addrs []netip.Addr) (_ *sandbox, err error) {
	ns, err := netns.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			ns.Close()
		}
	}()
	id, err := ns.ID()
	if err != nil {
		return nil, err
	}
	if id == h.host {
		return nil, fmt.Errorf("the network namespace %s is the node's own", path)
	}
	have, err := ns.Addrs()
	if err != nil {
		return nil, err
	}
	for _, a := range addrs {
		if !slices.Contains(have, a) {
			return nil, fmt.Errorf("the network namespace %s has the addresses %v and not %v, so it is not the pod's", path, have, a)
		}
	}
	return &sandbox{ns: ns, id: id, path: path, addrs: addrs}, nil
}

// alive looks for the namespace where it was found, then among all processes
// and names: a pod whose first process ended can have others. When it cannot
// look, it says that the namespace is alive.
func (h *hostSandboxes) alive(s *sandbox) bool {
	if same(s.path, s.id) {
		return true
	}
	names, err := os.ReadDir(h.named)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return true
	}
	for _, n := range names {
		if same(filepath.Join(h.named, n.Name()), s.id) {
			return true
		}
	}
	found := false
	err = h.eachProcess(func(pid int) {
		found = found || same(filepath.Join(h.proc, strconv.Itoa(pid), "ns/net"), s.id)
	})
	return found || err != nil
}

// same reports whether the namespace at path is id. The caller holds a
// descriptor of id's, or the number could have been given to another.
func same(path string, id netns.ID) bool {
	ns, err := netns.Open(path)
	if err != nil {
		return false
	}
	defer ns.Close()
	got, err := ns.ID()
	return err == nil && got == id
}
