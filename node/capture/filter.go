package capture

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/internal/netns"
)

// Filters are how programs are attached where the kernel has no tcx links, and
// for the first moments where it has: cls_bpf filters of a clsact qdisc
// (tc-bpf(8)) hold at once, a link only after a grace period of RCU. A program
// in the pod with NET_ADMIN can take off those in the pod.

// filterHandle tells our filter from others of the same priority. Cilium and
// Calico have theirs at priority 1 too; the newest of them comes first.
const (
	filterHandle   = 0x539
	filterPriority = 1
)

func (h hook) parent() uint32 {
	if h.kind == ebpf.AttachTCXIngress {
		return netlink.HANDLE_MIN_INGRESS
	}
	return netlink.HANDLE_MIN_EGRESS
}

func (h hook) filter() *netlink.BpfFilter {
	return &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: h.index, Parent: h.parent(), Handle: filterHandle,
			Priority: filterPriority, Protocol: unix.ETH_P_ALL,
		},
		Fd: -1, Name: "weft_" + h.pin, DirectAction: true,
	}
}

func (h hook) clsact() *netlink.Clsact {
	return &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: h.index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
	}}
}

// filterPin is where the program of the filter is pinned: its ID is what tells
// our filter from one that somebody has put in its place.
func (p *Pod) filterPin(h hook) string { return filepath.Join(p.dir, h.pin+"_filter") }

// clsactPin is a directory that says that the qdisc was made here.
func (p *Pod) clsactPin(h hook) string {
	side := "pod"
	if h.host {
		side = "host"
	}
	return filepath.Join(p.dir, fmt.Sprintf("clsact_%s_%d", side, h.index))
}

func (p *Pod) sideOf(h hook) *netns.NS {
	if h.host {
		return p.c.cfg.HostNS
	}
	return p.ns
}

// putFilter makes prog the program of the hook's filter, in one step if there
// is one.
func (p *Pod) putFilter(h hook, prog *ebpf.Program) error {
	err := routed(p.sideOf(h), func(nl *netlink.Handle) error {
		err := nl.QdiscAdd(h.clsact())
		if err == nil {
			err = os.Mkdir(p.clsactPin(h), 0o700)
		}
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("make qdisc clsact: %w", err)
		}
		f := h.filter()
		f.Fd = prog.FD()
		return nl.FilterReplace(f)
	})
	if err != nil {
		return fmt.Errorf("attach %s as a filter: %w", h.pin, err)
	}
	if err := os.Remove(p.filterPin(h)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove pin of the filter %s: %w", h.pin, err)
	}
	pinned, err := prog.Clone() // a program object has one pin
	if err != nil {
		return fmt.Errorf("pin the filter %s: %w", h.pin, err)
	}
	defer pinned.Close()
	if err := pinned.Pin(p.filterPin(h)); err != nil {
		return fmt.Errorf("pin the filter %s: %w", h.pin, err)
	}
	return nil
}

// filterHolds reports whether the hook's filter is there and is ours.
func (p *Pod) filterHolds(h hook) (bool, error) {
	prog, err := ebpf.LoadPinnedProgram(p.filterPin(h), nil)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("open the pinned filter %s: %w", h.pin, err)
	}
	defer prog.Close()
	info, err := prog.Info()
	if err != nil {
		return false, fmt.Errorf("ask the pinned filter %s for its ID: %w", h.pin, err)
	}
	id, _ := info.ID()
	holds := false
	err = routed(p.sideOf(h), func(nl *netlink.Handle) error {
		list, err := listFilters(nl, h)
		for _, f := range list {
			b, ok := f.(*netlink.BpfFilter)
			holds = holds || ok && b.Handle == filterHandle && b.DirectAction && b.Id == int(id)
		}
		return err
	})
	if err != nil {
		return false, fmt.Errorf("list the filters of %s: %w", h.pin, err)
	}
	return holds, nil
}

// listFilters returns the hook's filters, ours and those of others. Without a
// qdisc, or without the interface, there are none.
func listFilters(nl *netlink.Handle, h hook) ([]netlink.Filter, error) {
	at := &netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: h.index}}
	list, err := nl.FilterList(at, h.parent())
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	return list, err
}

// dropFilter takes the hook's filter off, and the qdisc if it was made here and
// nobody else uses it.
func (p *Pod) dropFilter(h hook) error {
	if !exists(p.filterPin(h)) && !exists(p.clsactPin(h)) {
		return nil
	}
	err := routed(p.sideOf(h), func(nl *netlink.Handle) error {
		if err := nl.FilterDel(h.filter()); err != nil && !gone(err) && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENODEV) {
			return err
		}
		return p.dropClsact(nl, h)
	})
	if err != nil {
		return fmt.Errorf("take off the filter %s: %w", h.pin, err)
	}
	if err := os.Remove(p.filterPin(h)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove pin of the filter %s: %w", h.pin, err)
	}
	return nil
}

func (p *Pod) dropClsact(nl *netlink.Handle, h hook) error {
	if !exists(p.clsactPin(h)) {
		return nil
	}
	for _, kind := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
		list, err := listFilters(nl, hook{index: h.index, kind: kind})
		if err != nil || len(list) > 0 {
			return err
		}
	}
	if err := nl.QdiscDel(h.clsact()); err != nil && !gone(err) && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENODEV) {
		return err
	}
	return os.Remove(p.clsactPin(h))
}
