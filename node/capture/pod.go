package capture

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

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

	id uint32 // in the maps

	background sync.WaitGroup // fasten
	closing    atomic.Bool

	mu        sync.Mutex
	noDNS     bool // CaptureDNS has turned it off
	ns        *netns.NS
	programs  map[string]*ebpf.Program // by name, or the name of what they are a gate to
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
	pinGuardLo   = "guard_lo"
	pinOutbound  = "outbound" // where there is no sk_lookup
	pinCaptured  = "captured"
)

// Prepare readies a pod for capture: it tells the programs about the pod and
// makes the proxy's listeners in the pod's namespace, or takes those that a
// proxy has kept if held is not nil. It changes nothing for
// the pod's traffic. If the pod is captured already, it stays so, and Prepare
// picks it up; Attach then brings it to this version of the programs.
//
// The proxy should serve the listeners before Attach.
func (c *Capture) Prepare(ctx context.Context, t Target, held *Listeners) (*Pod, error) {
	if err := checkUID(t.UID); err != nil {
		return nil, fmt.Errorf("prepare capture: %w", err)
	}
	c.enrolling.RLock()
	defer c.enrolling.RUnlock()
	p := &Pod{c: c, uid: t.UID, dir: filepath.Join(c.podsDir(), t.UID), programs: map[string]*ebpf.Program{}, links: map[string]link.Link{}}
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
	fresh, err := p.claim()
	defer func() {
		if err != nil && fresh {
			p.c.forgetSandboxes(p.dir, "") // nothing was attached: leave no trace
		}
	}()
	if err != nil {
		return err
	}
	if err = p.load(); err != nil {
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
	return enlist(p.id, p.roles, p.listeners, p.c.maps[bpf.CaptureMapListeners], p.c.maps[bpf.CaptureMapBlessed])
}

func dupNS(f *os.File) (*netns.NS, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	f.Close()
	if err != nil {
		return nil, os.NewSyscallError("fcntl", err)
	}
	return netns.FromFD(fd)
}

// claim makes the pod's directory of pins and its entries in the maps. fresh
// says that nothing was pinned for this sandbox of the pod.
//
// A pod whose sandbox is made anew keeps its UID and gets another namespace.
// What was pinned for the old one is removed: an interface's index alone would
// not tell the two apart.
func (p *Pod) claim() (fresh bool, err error) {
	cookie, err := netnsCookie(p.ns)
	if err != nil {
		return false, err
	}
	id, err := p.ns.ID()
	if err != nil {
		return false, err
	}
	if p.id = uint32(cookie); p.id == 0 {
		p.id = uint32(id.Ino)
	}
	name := sandboxName(cookie, p.id)
	if fresh = !exists(filepath.Join(p.dir, name)); fresh {
		if err := p.c.forgetSandboxes(p.dir, name); err != nil {
			return false, fmt.Errorf("an earlier sandbox: %w", err)
		}
		if err := os.MkdirAll(filepath.Join(p.dir, name), 0o700); err != nil {
			return false, fmt.Errorf("make the directory of pins: %w", err)
		}
	}
	return fresh, p.enter(fresh)
}

// enter writes the pod into the maps. If it is there it keeps its mode.
func (p *Pod) enter(fresh bool) error {
	entry, err := p.place.entry()
	if err != nil {
		return err
	}
	entry.Mode = bpf.CaptureModeMODE_IDLE
	if have, err := p.entry(); err == nil && !fresh {
		entry.Mode = have.Mode
	}
	if err := p.c.maps[bpf.CaptureMapPods].Put(p.id, entry); err != nil {
		return fmt.Errorf("enter the pod into the map of pods: %w", err)
	}
	err = p.c.maps[bpf.CaptureMapStats].Update(p.id, bpf.CaptureCounters{}, ebpf.UpdateNoExist)
	if err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
		return fmt.Errorf("make the pod's counters: %w", err)
	}
	return nil
}

func (p *Pod) entry() (e bpf.CapturePod, err error) {
	if err := p.c.maps[bpf.CaptureMapPods].Lookup(p.id, &e); err != nil {
		return e, fmt.Errorf("find the pod in the map of pods: %w", err)
	}
	return e, nil
}

// setMode changes at once what all programs do for the pod.
func (p *Pod) setMode(m bpf.CaptureMode) error {
	e, err := p.entry()
	if err != nil {
		return err
	}
	e.Mode = m
	if err := p.c.maps[bpf.CaptureMapPods].Put(p.id, e); err != nil {
		return fmt.Errorf("change the pod's mode: %w", err)
	}
	return nil
}

func sandboxName(cookie uint64, id uint32) string { return fmt.Sprintf("netns_%d_%d", cookie, id) }

// sandboxID returns the number of the pod whose directory of pins has an entry
// with this name.
func sandboxID(name string) (id uint32, ok bool) {
	var cookie uint64
	n, err := fmt.Sscanf(name, "netns_%d_%d", &cookie, &id)
	return id, n == 2 && err == nil
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// Close closes descriptors. A captured pod stays captured; one that is not
// loses its listeners unless a proxy has them.
func (p *Pod) Close() error {
	p.closing.Store(true)
	p.background.Wait()
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
		fd, err := unix.FcntlInt(uintptr(p.c.maps[bpf.CaptureMapBlessed].FD()), unix.F_DUPFD_CLOEXEC, 0)
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

var errClosed = errors.New("the pod, or all of the capture, is closed")

// Stats returns the pod's counters by name.
func (p *Pod) Stats() (map[string]uint64, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ns == nil {
		return nil, errClosed
	}
	var n bpf.CaptureCounters
	if err := p.c.maps[bpf.CaptureMapStats].Lookup(p.id, &n); err != nil {
		return nil, fmt.Errorf("read the counters of pod %s: %w", p.uid, err)
	}
	out := map[string]uint64{}
	for _, c := range bpf.Counters() {
		out[c.String()] = n.N[c]
	}
	return out, nil
}
