package capture

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/bpf"
	"github.com/weft-mesh/weft/internal/netns"
)

// A Pod is a pod that is captured, or about to be. Its methods are safe for
// concurrent use. Whoever got it from Prepare must Close it, which does not
// end the capture.
type Pod struct {
	c     *Capture
	uid   string
	dir   string
	place place
	roles []role

	mu        sync.Mutex
	noDNS     bool // CaptureDNS has turned it off
	ns        *netns.NS
	maps      map[string]*ebpf.Map // by name in the programs; the pod's own
	programs  map[string]*ebpf.Program
	listeners Listeners
	links     map[string]link.Link // by pin name; open so that Info can be asked
}

// Names of pins. The links are those of a captured pod; captured is a
// directory that exists when all of them hold and the rules do.
const (
	pinSkLookup  = "sk_lookup"
	pinInbound   = "inbound"
	pinGuardPod  = "guard_pod"
	pinGuardHost = "guard_host"
	pinHostProbe = "host_probe"
	pinCaptured  = "captured"
)

// podMaps are the maps that each pod has its own of, and their pins' names.
func podMaps() []string {
	return []string{bpf.CaptureMapListeners, bpf.CaptureMapBlessed, bpf.CaptureMapStats}
}

// Prepare readies a pod for capture: it loads the programs into the kernel,
// pins the maps, and makes the proxy's listeners in the pod's namespace, or
// takes those that a proxy has kept if held is not nil. It changes nothing for
// the pod's traffic. If the pod is captured already, it stays so, and Prepare
// picks it up; Attach then brings it to this version of the programs.
//
// The proxy should serve the listeners before Attach.
func (c *Capture) Prepare(ctx context.Context, t Target, held *Listeners) (*Pod, error) {
	if err := checkUID(t.UID); err != nil {
		return nil, fmt.Errorf("prepare capture: %w", err)
	}
	p := &Pod{c: c, uid: t.UID, dir: filepath.Join(c.podsDir(), t.UID), maps: map[string]*ebpf.Map{}, links: map[string]link.Link{}}
	if err := p.prepare(ctx, t, held); err != nil {
		p.Close()
		return nil, fmt.Errorf("prepare capture of pod %s: %w", t.UID, err)
	}
	return p, nil
}

func (p *Pod) prepare(ctx context.Context, t Target, held *Listeners) (err error) {
	if err := ctx.Err(); err != nil {
		return err
	}
	if p.place, err = p.c.survey(t); err != nil {
		return err
	}
	p.roles = p.place.roles()
	f, err := t.Netns.Dup()
	if err != nil {
		return err
	}
	if p.ns, err = dupNS(f); err != nil {
		return err
	}
	fresh, err := p.openMaps()
	defer func() {
		if err != nil && fresh {
			os.RemoveAll(p.dir) // nothing was attached: leave no trace
		}
	}()
	if err != nil {
		return err
	}
	if p.programs, err = p.load(p.c.spec); err != nil {
		return err
	}
	if held != nil {
		p.listeners, err = adopt(p.ns, p.roles, *held)
	} else {
		p.listeners, err = listen(p.ns, p.roles)
	}
	if err != nil {
		return err
	}
	return enlist(p.roles, p.listeners, p.maps[bpf.CaptureMapListeners], p.maps[bpf.CaptureMapBlessed])
}

func dupNS(f *os.File) (*netns.NS, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	f.Close()
	if err != nil {
		return nil, os.NewSyscallError("fcntl", err)
	}
	return netns.FromFD(fd)
}

// openMaps opens the pod's pinned maps and makes those that are missing. fresh
// says that nothing was pinned for this sandbox of the pod.
//
// A pod whose sandbox is made anew keeps its UID and gets another namespace.
// What was pinned for the old one is removed: an interface's index alone would
// not tell the two apart.
func (p *Pod) openMaps() (fresh bool, err error) {
	cookie, err := netnsCookie(p.ns)
	if err != nil {
		return false, err
	}
	sandbox := filepath.Join(p.dir, fmt.Sprintf("netns_%d", cookie))
	if !exists(sandbox) {
		fresh = true
		if err := os.RemoveAll(p.dir); err != nil {
			return false, fmt.Errorf("remove the pins of an earlier sandbox: %w", err)
		}
		if err := os.MkdirAll(sandbox, 0o700); err != nil {
			return false, fmt.Errorf("make the directory of pins: %w", err)
		}
	}
	for _, name := range podMaps() {
		m, err := loadOrCreate(filepath.Join(p.dir, name), p.c.spec.Maps[name])
		if err != nil {
			return fresh, err
		}
		p.maps[name] = m
	}
	return fresh, nil
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// load puts the programs of spec into the kernel, with the pod's maps and
// constants.
func (p *Pod) load(spec *ebpf.CollectionSpec) (map[string]*ebpf.Program, error) {
	coll, err := p.collection(spec)
	if err != nil {
		return nil, err
	}
	defer coll.Close()
	programs := coll.Programs
	coll.Programs = nil // so that Close leaves them
	return programs, nil
}

func (p *Pod) collection(spec *ebpf.CollectionSpec) (*ebpf.Collection, error) {
	spec = spec.Copy()
	if err := p.place.constants(spec); err != nil {
		return nil, err
	}
	have := maps.Clone(p.c.shared)
	maps.Copy(have, p.maps)
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: have})
	if err != nil {
		return nil, fmt.Errorf("load programs into the kernel: %w", err)
	}
	return coll, nil
}

// Close closes descriptors. A captured pod stays captured; one that is not
// loses its listeners unless a proxy has them.
func (p *Pod) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.close()
}

func (p *Pod) close() error {
	errs := []error{p.listeners.Close()}
	for name, l := range p.links {
		errs = append(errs, l.Close())
		delete(p.links, name)
	}
	for name, m := range p.maps {
		errs = append(errs, m.Close())
		delete(p.maps, name)
	}
	closePrograms(p.programs)
	if p.ns != nil {
		errs = append(errs, p.ns.Close())
		p.ns = nil
	}
	return errors.Join(errs...)
}

func closePrograms(programs map[string]*ebpf.Program) {
	for name, prog := range programs {
		prog.Close()
		delete(programs, name)
	}
}

// Files are what the proxy needs to serve a pod. They are duplicates that the
// caller closes.
type Files struct {
	Netns     *os.File
	Blessed   *os.File // the map; a socket is blessed by writing 1 (u32) under its descriptor
	Listeners Listeners
}

// Close closes all of them.
func (f *Files) Close() error {
	errs := []error{f.Listeners.Close()}
	for _, file := range []*os.File{f.Netns, f.Blessed} {
		if file != nil {
			errs = append(errs, file.Close())
		}
	}
	return errors.Join(errs...)
}

// Files returns what the proxy needs to serve the pod.
func (p *Pod) Files() (Files, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var f Files
	err := func() (err error) {
		if p.ns == nil {
			return errClosed
		}
		if f.Netns, err = p.ns.Dup(); err != nil {
			return err
		}
		fd, err := unix.FcntlInt(uintptr(p.maps[bpf.CaptureMapBlessed].FD()), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return os.NewSyscallError("fcntl", err)
		}
		f.Blessed = os.NewFile(uintptr(fd), "blessed")
		f.Listeners, err = p.listeners.dup()
		return err
	}()
	if err != nil {
		f.Close()
		return Files{}, fmt.Errorf("hand out descriptors of pod %s: %w", p.uid, err)
	}
	return f, nil
}

// UID returns the pod's UID.
func (p *Pod) UID() string { return p.uid }

var errClosed = errors.New("the pod is closed")

// Stats returns the pod's counters by name.
func (p *Pod) Stats() (map[string]uint64, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ns == nil {
		return nil, errClosed
	}
	out := map[string]uint64{}
	for _, c := range bpf.Counters() {
		var perCPU []uint64
		if err := p.maps[bpf.CaptureMapStats].Lookup(uint32(c), &perCPU); err != nil {
			return nil, fmt.Errorf("read counter %v of pod %s: %w", c, p.uid, err)
		}
		var sum uint64
		for _, n := range perCPU {
			sum += n
		}
		out[c.String()] = sum
	}
	return out, nil
}
