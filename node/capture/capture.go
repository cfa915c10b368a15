// Package capture holds pods in the mesh: it loads the programs of package bpf
// for a pod, pins them, attaches them, keeps the routing rules that go with
// them, and takes all of it off again.
//
// A captured pod stays captured when the agent dies, is replaced or forgets:
// links and maps are pinned in the bpf file system, rules belong to the pod's
// namespace. The listeners of the proxy inside the pod are made here, so that
// they outlive a proxy.
package capture

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"

	"github.com/weft-mesh/weft/bpf"
	"github.com/weft-mesh/weft/internal/netns"
)

// Config says where things are. All fields but Log are required.
type Config struct {
	// BPFRoot is a directory in a bpf file system that outlives the agent,
	// for example /sys/fs/bpf/weft/v1. It is made if it is missing.
	BPFRoot string
	// ProcRoot is a writable proc file system, for example /host/proc: a
	// container's own /proc/sys is read-only.
	ProcRoot string
	// HostNS is the namespace in which the host's ends of the pods' veths
	// are. The caller closes it, after Close.
	HostNS *netns.NS
	// Log gets what is worth knowing and is no error; nil discards it.
	Log *slog.Logger
}

// A Capture puts pods into the mesh. Its methods are safe for concurrent use.
type Capture struct {
	cfg    Config
	log    *slog.Logger
	hostID netns.ID
	spec   *ebpf.CollectionSpec // read-only; copied for each pod
	enrol  *ebpf.CollectionSpec // the same, for the short programs of a running pod
	shared map[string]*ebpf.Map // by name in the programs; what all pods share
	// walkers are the socket iterators. They are nil where the kernel cannot
	// load them, and noWalkers is why.
	walkers   *ebpf.Collection
	noWalkers error
}

// New reads the programs and opens what the pods share. It captures nothing.
func New(cfg Config) (*Capture, error) {
	c := &Capture{cfg: cfg, log: cfg.Log, shared: map[string]*ebpf.Map{}}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	if err := c.start(); err != nil {
		c.Close()
		return nil, fmt.Errorf("start capture: %w", err)
	}
	return c, nil
}

func (c *Capture) start() (err error) {
	if c.cfg.BPFRoot == "" || c.cfg.ProcRoot == "" || c.cfg.HostNS == nil {
		return errors.New("BPFRoot, ProcRoot and HostNS must be set")
	}
	if c.hostID, err = c.cfg.HostNS.ID(); err != nil {
		return fmt.Errorf("host namespace: %w", err)
	}
	if c.spec, err = bpf.LoadCapture(); err != nil {
		return fmt.Errorf("read programs: %w", err)
	}
	if c.enrol, err = bpf.LoadEnrol(); err != nil {
		return fmt.Errorf("read programs: %w", err)
	}
	if err := os.MkdirAll(c.podsDir(), 0o700); err != nil {
		return fmt.Errorf("make the directory of pins (is %s in a bpf file system that is mounted writable?): %w", c.cfg.BPFRoot, err)
	}
	for _, name := range []string{bpf.CaptureMapKept, bpf.CaptureMapProbes} {
		m, err := loadOrCreate(filepath.Join(c.cfg.BPFRoot, name), c.spec.Maps[name])
		if err != nil {
			return err
		}
		c.shared[name] = m
	}
	return c.loadWalkers()
}

// loadWalkers loads the socket iterators. New pods are captured without them,
// so that a kernel cannot load them is an error only for pods that run.
func (c *Capture) loadWalkers() error {
	spec, err := bpf.LoadSockets()
	if err != nil {
		return fmt.Errorf("read programs: %w", err)
	}
	for name := range spec.Maps {
		// The header declares all maps; the iterators use one, and constants.
		if name != bpf.SocketsMapKept && !strings.HasPrefix(name, ".") {
			delete(spec.Maps, name)
		}
	}
	kept := map[string]*ebpf.Map{bpf.SocketsMapKept: c.shared[bpf.CaptureMapKept]}
	c.walkers, c.noWalkers = ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: kept})
	return nil
}

// Close closes descriptors. Pods stay captured.
func (c *Capture) Close() error {
	var errs []error
	for name, m := range c.shared {
		errs = append(errs, m.Close())
		delete(c.shared, name)
	}
	if c.walkers != nil {
		c.walkers.Close()
		c.walkers = nil
	}
	return errors.Join(errs...)
}

func (c *Capture) podsDir() string { return filepath.Join(c.cfg.BPFRoot, "pods") }

// Pinned returns the UIDs of the pods that have pins, captured or begun, in
// order. After a restart of the agent, those that still run are to be given to
// Prepare and Attach, and the others to Forget.
func (c *Capture) Pinned() ([]string, error) {
	list, err := os.ReadDir(c.podsDir())
	if err != nil {
		return nil, fmt.Errorf("list captured pods: %w", err)
	}
	var uids []string
	for _, e := range list {
		uids = append(uids, e.Name())
	}
	slices.Sort(uids)
	return uids, nil
}

// Forget removes what is pinned for a pod that is gone. If the pod is not
// gone, its rules stay, so its connections get nowhere: nothing leaks. To
// forget what is not pinned is no error.
func (c *Capture) Forget(uid string) error {
	if err := checkUID(uid); err != nil {
		return fmt.Errorf("forget pod: %w", err)
	}
	if err := os.RemoveAll(filepath.Join(c.podsDir(), uid)); err != nil {
		return fmt.Errorf("forget pod %s: remove pins: %w", uid, err)
	}
	return nil
}

// checkUID refuses what is no file name of the bpf file system, which reserves
// dots.
func checkUID(uid string) error {
	if uid == "" || len(uid) > 128 || strings.ContainsAny(uid, "/.\x00") {
		return fmt.Errorf("%q is not a pod UID", uid)
	}
	return nil
}

// loadOrCreate opens the map pinned at path, or makes and pins it.
func loadOrCreate(path string, spec *ebpf.MapSpec) (*ebpf.Map, error) {
	for {
		m, err := ebpf.LoadPinnedMap(path, nil)
		if err == nil {
			if err := spec.Compatible(m); err != nil {
				m.Close()
				return nil, fmt.Errorf("map %s was pinned by an incompatible version, remove it or restart the pod: %w", path, err)
			}
			return m, nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("open pinned map %s: %w", path, err)
		}
		m, err = ebpf.NewMap(spec)
		if err != nil {
			return nil, fmt.Errorf("make map %s: %w", spec.Name, err)
		}
		if err = m.Pin(path); err == nil {
			return m, nil
		}
		m.Close()
		if !errors.Is(err, fs.ErrExist) { // else another agent was faster
			return nil, fmt.Errorf("pin map %s: %w", path, err)
		}
	}
}
