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
	"sync"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

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
	// Disable turns features of the kernel off, as if it had not got them: see
	// FeatureTCX and the others.
	Disable []string
	// Log gets what is worth knowing and is no error; nil discards it.
	Log *slog.Logger
}

// A Capture puts pods into the mesh. Its methods are safe for concurrent use.
type Capture struct {
	cfg    Config
	log    *slog.Logger
	hostID netns.ID
	// features are what the kernel has and Config allows; noFilters says that
	// it has no cls_bpf.
	features  Features
	noFilters bool
	lookup    *ebpf.CollectionSpec // read-only; copied for each pod
	maps      map[string]*ebpf.Map // by name in the programs
	// enrolling is read-locked while a pod joins or leaves. Links are attached
	// between: the kernel's lock of the network's configuration (rtnl) is held
	// for a grace period by each, and a pod that joins needs it a dozen times.
	enrolling sync.RWMutex
	// closed is guarded by enrolling; background is what goes on for any pod.
	closed     bool
	background sync.WaitGroup
	// walkers are the socket iterators. They are nil where the kernel cannot
	// load them, or Config forbids it, and noWalkers is why.
	walkers   *ebpf.Collection
	noWalkers error
}

// New reads the programs and opens what the pods share. It captures nothing.
func New(cfg Config) (*Capture, error) {
	c := &Capture{cfg: cfg, log: cfg.Log, maps: map[string]*ebpf.Map{}}
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
	if err := checkDisable(c.cfg.Disable); err != nil {
		return err
	}
	if c.hostID, err = c.cfg.HostNS.ID(); err != nil {
		return fmt.Errorf("host namespace: %w", err)
	}
	for _, dir := range []string{c.podsDir(), c.mapsDir()} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("make the directory of pins (is %s in a bpf file system that is mounted writable?): %w", c.cfg.BPFRoot, err)
		}
	}
	if err := c.loadPrograms(); err != nil {
		return err
	}
	if c.lookup, err = bpf.LoadLookup(); err != nil {
		return fmt.Errorf("read programs: %w", err)
	}
	c.pruneMaps(c.lookup, lookupMaps()...)
	if err := c.loadWalkers(); err != nil {
		return err
	}
	return c.choose()
}

// choose finds out how programs are attached and what becomes of connections.
func (c *Capture) choose() (err error) {
	c.noFilters = haveFilters() != nil
	c.features, err = rung(c.cfg.Disable, haveTCX, haveSkLookup, func() error { return c.noWalkers }, func() error { return haveFunc("bpf_sock_destroy") })
	return err
}

// Features returns what the kernel has and the configuration allows.
func (c *Capture) Features() Features { return c.features }

// loadPrograms opens the maps, loads the packet programs, and makes them those
// of all pods, also of pods that an agent before has captured.
func (c *Capture) loadPrograms() error {
	spec, err := bpf.LoadCapture()
	if err != nil {
		return fmt.Errorf("read programs: %w", err)
	}
	for name, m := range spec.Maps {
		if internal(name) {
			continue
		}
		if c.maps[name], err = loadOrCreate(filepath.Join(c.mapsDir(), name), m); err != nil {
			delete(c.maps, name)
			return err
		}
	}
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: c.maps})
	if err != nil {
		return fmt.Errorf("load programs into the kernel: %w", err)
	}
	defer coll.Close()
	for name, slot := range slots() {
		if err := c.maps[bpf.CaptureMapPrograms].Put(uint32(slot), coll.Programs[name]); err != nil {
			return fmt.Errorf("make %s the program of all pods: %w", name, err)
		}
	}
	return nil
}

// internal: is it a map of the compiler's, not one of ours?
func internal(name string) bool { return strings.HasPrefix(name, ".") }

// pruneMaps takes all maps out of spec but those with the given names, of which
// it then has ours. The header declares all maps to all objects.
func (c *Capture) pruneMaps(spec *ebpf.CollectionSpec, names ...string) {
	for name := range spec.Maps {
		if !internal(name) && !slices.Contains(names, name) {
			delete(spec.Maps, name)
		}
	}
}

// with returns options with which a collection uses our maps of these names.
func (c *Capture) with(names ...string) ebpf.CollectionOptions {
	have := map[string]*ebpf.Map{}
	for _, name := range names {
		have[name] = c.maps[name]
	}
	return ebpf.CollectionOptions{MapReplacements: have}
}

// loadWalkers loads the socket iterators. Pods are captured without them too.
func (c *Capture) loadWalkers() error {
	if slices.Contains(c.cfg.Disable, FeatureIterator) {
		c.noWalkers = errDisabled
		return nil
	}
	spec, err := bpf.LoadSockets()
	if err != nil {
		return fmt.Errorf("read programs: %w", err)
	}
	c.pruneMaps(spec, bpf.SocketsMapKept)
	c.walkers, c.noWalkers = ebpf.NewCollectionWithOptions(spec, c.with(bpf.SocketsMapKept))
	return nil
}

// Close ends what goes on in the background, also for pods that nobody has
// closed, and closes descriptors. Pods stay captured; none can be captured any
// more.
func (c *Capture) Close() error {
	c.enrolling.Lock()
	c.closed = true
	c.enrolling.Unlock()
	c.background.Wait()
	var errs []error
	for name, m := range c.maps {
		errs = append(errs, m.Close())
		delete(c.maps, name)
	}
	if c.walkers != nil {
		c.walkers.Close()
		c.walkers = nil
	}
	return errors.Join(errs...)
}

func (c *Capture) podsDir() string { return filepath.Join(c.cfg.BPFRoot, "pods") }
func (c *Capture) mapsDir() string { return filepath.Join(c.cfg.BPFRoot, "maps") }

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
	if err := c.forgetSandboxes(filepath.Join(c.podsDir(), uid), ""); err != nil {
		return fmt.Errorf("forget pod %s: %w", uid, err)
	}
	return nil
}

// forgetSandboxes removes a pod's directory of pins and its entries in maps,
// unless they belong to the sandbox that is to stay.
func (c *Capture) forgetSandboxes(dir, stay string) error {
	list, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("list pins: %w", err)
	}
	var ids []uint32
	for _, e := range list {
		if id, ok := sandboxID(e.Name()); ok && e.Name() != stay {
			ids = append(ids, id)
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove pins: %w", err)
	}
	for _, id := range ids {
		if err := c.removeEntries(id); err != nil {
			return err
		}
	}
	return nil
}

// removeEntries removes a pod from the maps. Nothing of it may be attached.
func (c *Capture) removeEntries(id uint32) error {
	if used, err := c.usedByAnother(id); used || err != nil {
		return err
	}
	errs := []error{c.maps[bpf.CaptureMapPods].Delete(id), c.maps[bpf.CaptureMapStats].Delete(id)}
	for r := range bpf.CaptureRoleROLE_SLOTS {
		errs = append(errs, c.maps[bpf.CaptureMapListeners].Delete(bpf.CaptureListener{Pod: id, Role: r}))
	}
	for _, err := range errs {
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("remove the pod from the maps: %w", err)
		}
	}
	return nil
}

// usedByAnother reports whether a pod that is pinned has this number: kernels
// without namespace cookies give a number again when its namespace has ended.
func (c *Capture) usedByAnother(id uint32) (bool, error) {
	found, err := filepath.Glob(filepath.Join(c.podsDir(), "*", fmt.Sprintf("netns_*_%d", id)))
	return len(found) > 0, err
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
