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
// for the first moments of a new pod where it has: cls_bpf filters of a clsact
// qdisc (tc-bpf(8)) hold at once, a link only after a grace period of RCU. A
// program in the pod with NET_ADMIN can take off those in the pod.
//
// To add a qdisc, or to take it off, the kernel stops the interface and drops
// what is sent until it is done (qdisc_graft and dev_deactivate in net/sched). A
// name query that is lost then costs the application five seconds. So a qdisc
// is made before anybody sends, or where there is no other way, and is never
// taken off: it ends with the pod. Filters come and go without a loss.

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

func (p *Pod) sideOf(h hook) *netns.NS {
	if h.host {
		return p.c.cfg.HostNS
	}
	return p.ns
}

// makeClsact makes the qdisc for the hook's filter, if there is none.
func (p *Pod) makeClsact(h hook) error {
	err := routed(p.sideOf(h), func(nl *netlink.Handle) error { return nl.QdiscAdd(h.clsact()) })
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("make qdisc clsact for %s: %w", h.pin, err)
	}
	return nil
}

// putFilter makes prog the program of the hook's filter, in one step if there
// is one. Without a qdisc the error is EINVAL.
func (p *Pod) putFilter(h hook, prog *ebpf.Program) error {
	err := routed(p.sideOf(h), func(nl *netlink.Handle) error {
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

// dropFilter takes the hook's filter off.
func (p *Pod) dropFilter(h hook) error {
	if !exists(p.filterPin(h)) {
		return nil
	}
	err := routed(p.sideOf(h), func(nl *netlink.Handle) error {
		err := nl.FilterDel(h.filter())
		if gone(err) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENODEV) {
			return nil
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("take off the filter %s: %w", h.pin, err)
	}
	if err := os.Remove(p.filterPin(h)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove pin of the filter %s: %w", h.pin, err)
	}
	return nil
}
