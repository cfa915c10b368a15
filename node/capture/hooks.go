package capture

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/bpf"
	"github.com/weft-mesh/weft/internal/netns"
)

// A hook is a place where a program of the pod is attached.
type hook struct {
	pin     string
	program string          // in Pod.programs
	index   int             // interface; 0 for the hook of the namespace itself
	host    bool            // in the host's namespace
	kind    ebpf.AttachType // of an interface's hook
	late    bool            // put on a running pod when it is captured already, by fasten
}

// loopback is the index of lo in every namespace.
const loopback = 1

// hooks returns the hooks of a captured pod, in the order in which they are
// attached: what keeps most in comes first.
//
// guard_pod is late where each link takes a grace period of RCU. What it keeps
// in, guard_host keeps in too; what it does for itself is to hold packets back
// while the pod leaves, so detach makes sure of it.
func (p *Pod) hooks() []hook {
	return []hook{
		{pin: pinGuardHost, program: bpf.CaptureProgGuardHost, index: p.place.veth, host: true, kind: ebpf.AttachTCXIngress},
		{pin: pinInbound, program: bpf.CaptureProgInbound, index: p.place.eth0, kind: ebpf.AttachTCXIngress},
		{pin: pinGuardPod, program: bpf.CaptureProgGuardPod, index: p.place.eth0, kind: ebpf.AttachTCXEgress, late: p.c.features.Rung == RungTCX},
		{pin: pinGuardLo, program: bpf.CaptureProgGuardLo, index: loopback, kind: ebpf.AttachTCXEgress},
		p.outboundHook(p.c.features.SkLookup),
	}
}

// outboundHook is where the pod's own connections are given to the proxy.
func (p *Pod) outboundHook(lookup bool) hook {
	if lookup {
		return hook{pin: pinSkLookup, program: bpf.LookupProgMeshLookup}
	}
	return hook{pin: pinOutbound, program: bpf.CaptureProgOutbound, index: loopback, kind: ebpf.AttachTCXIngress}
}

func (p *Pod) hook(pin string) hook {
	for _, h := range append(p.hooks(), p.outboundHook(!p.c.features.SkLookup)) {
		if h.pin == pin {
			return h
		}
	}
	panic("capture: no hook " + pin)
}

// put makes prog the program of the hook, for good: by a link where the kernel
// has them, else by a filter. If there is one, its program is exchanged in one
// step, so that there is no moment without one.
func (p *Pod) put(h hook, prog *ebpf.Program) error {
	if h.index == 0 {
		return p.putLink(h, prog)
	}
	if p.c.features.Rung == RungTCX {
		if err := p.putLink(h, prog); err != nil {
			return err
		}
		return p.dropFilter(h)
	}
	if err := p.makeClsact(h); err != nil {
		return err
	}
	if err := p.putFilter(h, prog); err != nil {
		return err
	}
	return p.dropLink(h.pin)
}

// putSoon is put without the wait for a link, where a filter costs nobody a
// packet: where there is a qdisc for it already, or the pod is silent, so that
// one can be made.
func (p *Pod) putSoon(h hook, prog *ebpf.Program, silent bool) error {
	if h.index == 0 || p.c.features.Rung != RungTCX || p.c.noFilters {
		return p.put(h, prog)
	}
	l, err := p.pinned(h)
	if err != nil {
		return err
	}
	if l != nil {
		return p.put(h, prog)
	}
	if silent {
		if err := p.makeClsact(h); err != nil {
			return err
		}
	}
	err = p.putFilter(h, prog)
	if errors.Is(err, unix.EINVAL) { // no qdisc
		return p.put(h, prog)
	}
	return err
}

// on reports whether the hook's program is there, by a link or a filter.
func (p *Pod) on(h hook) (bool, error) {
	l, err := p.pinned(h)
	if err != nil || l != nil {
		return l != nil, err
	}
	if h.index == 0 {
		return false, nil
	}
	return p.filterHolds(h)
}

func (p *Pod) putLink(h hook, prog *ebpf.Program) error {
	path := filepath.Join(p.dir, h.pin)
	l, err := p.pinned(h)
	if err != nil {
		return err
	}
	if l != nil {
		if err := l.Update(prog); err != nil {
			return fmt.Errorf("exchange the program of %s: %w", h.pin, err)
		}
		return nil
	}
	if l, err = p.attach(h, prog); err != nil {
		return fmt.Errorf("attach %s: %w", h.pin, err)
	}
	if err := l.Pin(path); err != nil {
		l.Close()
		return fmt.Errorf("pin %s: %w", h.pin, err)
	}
	p.links[h.pin] = l
	return nil
}

// pinned returns the link that is pinned for the hook, nil if there is none.
// A pin that is left from another sandbox of the same pod is removed: its
// namespace or interface is gone.
func (p *Pod) pinned(h hook) (link.Link, error) {
	path := filepath.Join(p.dir, h.pin)
	l := p.links[h.pin]
	if l == nil {
		var err error
		l, err = link.LoadPinnedLink(path, nil)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		}
		if err != nil {
			return nil, fmt.Errorf("open pinned link %s: %w", h.pin, err)
		}
		p.links[h.pin] = l
	}
	holds, err := p.holds(h, l)
	if err != nil {
		return nil, fmt.Errorf("ask pinned link %s where it is: %w", h.pin, err)
	}
	if holds {
		return l, nil
	}
	return nil, p.dropLink(h.pin)
}

// holds reports whether l is attached where h is.
func (p *Pod) holds(h hook, l link.Link) (bool, error) {
	info, err := l.Info()
	if err != nil {
		return false, err
	}
	if h.index == 0 {
		ns := info.NetNs()
		if ns == nil {
			return false, nil
		}
		id, err := p.ns.ID()
		return uint64(ns.NetnsInode) == id.Ino, err
	}
	tcx := info.TCX()
	return tcx != nil && int(tcx.Ifindex) == h.index, nil
}

func (p *Pod) attach(h hook, prog *ebpf.Program) (link.Link, error) {
	if h.index == 0 {
		return link.AttachNetNs(p.ns.Fd(), prog)
	}
	ns := p.ns
	if h.host {
		ns = p.c.cfg.HostNS
	}
	return attachTCX(ns, h.index, prog, h.kind)
}

// attachTCX attaches before the programs of others, the CNI plug-in's for
// instance; what ours let pass, theirs see.
func attachTCX(ns *netns.NS, index int, prog *ebpf.Program, kind ebpf.AttachType) (l link.Link, err error) {
	err = ns.Do(func() error {
		l, err = link.AttachTCX(link.TCXOptions{Interface: index, Program: prog, Attach: kind, Anchor: link.Head()})
		return err
	})
	return l, err
}

// drop takes a hook's program off.
func (p *Pod) drop(pin string) error {
	if err := p.dropLink(pin); err != nil {
		return err
	}
	if h := p.hook(pin); h.index != 0 {
		return p.dropFilter(h)
	}
	return nil
}

// dropLink takes off what a link holds, by letting go of it.
func (p *Pod) dropLink(pin string) error {
	err := os.Remove(filepath.Join(p.dir, pin))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove pin %s: %w", pin, err)
	}
	if l := p.links[pin]; l != nil {
		delete(p.links, pin)
		return l.Close()
	}
	return nil
}

// markCaptured and unmarkCaptured make and remove the sign that the capture is
// complete.
func (p *Pod) markCaptured() error {
	err := os.Mkdir(filepath.Join(p.dir, pinCaptured), 0o700)
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("note that the pod is captured: %w", err)
	}
	return nil
}

func (p *Pod) unmarkCaptured() error {
	err := unix.Rmdir(filepath.Join(p.dir, pinCaptured))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("note that the pod is not captured: %w", err)
	}
	return nil
}

// captured reports whether an earlier Attach, perhaps of another agent, has
// run to its end and every program of it is still there. A late one may be
// missing: another Attach puts it on.
func (p *Pod) captured() (bool, error) {
	if e, err := p.entry(); err != nil || e.Mode != bpf.CaptureModeMODE_STRICT {
		return false, err
	}
	if _, err := os.Stat(filepath.Join(p.dir, pinCaptured)); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return false, nil
		}
		return false, fmt.Errorf("ask whether the pod is captured: %w", err)
	}
	for _, h := range p.hooks() {
		if h.late {
			continue
		}
		on, err := p.on(h)
		if err == nil && !on && h.pin == p.outboundHook(p.c.features.SkLookup).pin {
			on, err = p.on(p.outboundHook(!p.c.features.SkLookup)) // of another rung
		}
		if err != nil || !on {
			return false, err
		}
	}
	return true, nil
}
