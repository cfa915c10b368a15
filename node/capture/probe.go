package capture

import (
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/features"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/internal/netns"
)

// Features are what the kernel can do that not every supported kernel can.
type Features struct {
	// Rung is the way of capture that is used, the best that there is.
	Rung Rung
	// Why says in a sentence what keeps the node from a better one, and what
	// that means for its pods. It is empty on the best.
	Why string
	// Keep: connections of a running pod can be kept when it is captured, and
	// captured ones when it leaves.
	Keep bool
	// Reset: they can be reset.
	Reset bool
	// SkLookup: the pod's own connections are given to the proxy by the socket
	// lookup, else by a packet program on its lo.
	SkLookup bool

	destroys bool // the iterators can do that, else sock_diag
}

// A Rung is a way of capture.
type Rung string

// The rungs of the ladder, the best first.
const (
	// RungTCX attaches programs by links, which nothing in a pod can take off.
	RungTCX Rung = "tcx"
	// RungClsact attaches them as filters of the clsact qdisc. A process in a
	// pod with NET_ADMIN can take off those in the pod; the one at the host's
	// end of its wire keeps it in.
	RungClsact Rung = "clsact"
)

// What Config.Disable can name.
const (
	FeatureTCX      = "tcx"       // links for packet programs
	FeatureIterator = "iterator"  // socket iterators, with which connections are kept
	FeatureSkLookup = "sk_lookup" // socket lookup programs; a packet program on lo stands in for them
)

var errDisabled = errors.New("it is turned off by configuration")

func checkDisable(names []string) error {
	for _, n := range names {
		switch n {
		case FeatureTCX, FeatureIterator, FeatureSkLookup:
		default:
			return fmt.Errorf("there is no feature %q to turn off; there are %s, %s and %s", n, FeatureTCX, FeatureIterator, FeatureSkLookup)
		}
	}
	return nil
}

// rung decides which way is used. The funcs say why the kernel has not got
// what they ask for.
func rung(disable []string, tcx, lookup, iterator, destroy func() error) (Features, error) {
	ask := func(name string, have func() error) error {
		if slices.Contains(disable, name) {
			return errDisabled
		}
		return have()
	}
	f := Features{Rung: RungTCX, Keep: true, Reset: true, SkLookup: true, destroys: true}
	var why []string
	if err := ask(FeatureTCX, tcx); err != nil {
		if !errors.Is(err, errDisabled) && !errors.Is(err, ebpf.ErrNotSupported) {
			return Features{}, fmt.Errorf("find out whether the kernel has tcx links: %w", err)
		}
		f.Rung = RungClsact
		why = append(why, fmt.Sprintf("no tcx links (%v): a process with NET_ADMIN can take off the programs inside its pod, and only the guard at the host's end of its wire keeps it in", err))
	}
	if err := ask(FeatureSkLookup, lookup); err != nil {
		if !errors.Is(err, errDisabled) && !errors.Is(err, ebpf.ErrNotSupported) {
			return Features{}, fmt.Errorf("find out whether the kernel has sk_lookup programs: %w", err)
		}
		f.SkLookup = false
		why = append(why, fmt.Sprintf("no sk_lookup programs (%v): a packet program on each pod's lo stands in for them", err))
	}
	if err := ask(FeatureIterator, iterator); err != nil {
		f.Keep, f.destroys = false, false
		why = append(why, fmt.Sprintf("no socket iterators (%v): the connections of a pod are reset when it joins or leaves the mesh", err))
	}
	if destroy() != nil {
		f.destroys = false
	}
	f.Why = strings.Join(why, "; ")
	return f, nil
}

// A need is something that capture cannot do without.
type need struct {
	what string // as in "the kernel has no ..."
	do   string // what the operator can do
	have func() error
}

const newerKernel = "run a kernel of version 6.6 or later on this node"

func needs() []need {
	helper := func(t ebpf.ProgramType, f asm.BuiltinFunc) func() error {
		return func() error { return features.HaveProgramHelper(t, f) }
	}
	return []need{
		{"BTF type information (/sys/kernel/btf/vmlinux)", "run a kernel that is built with CONFIG_DEBUG_INFO_BTF", haveBTF},
		{"tc programs", "run a kernel that is built with CONFIG_NET_CLS_ACT", func() error { return features.HaveProgramType(ebpf.SchedCLS) }},
		{"socket maps", "run a kernel that is built with CONFIG_BPF_STREAM_PARSER or CONFIG_NET_SOCK_MSG", func() error { return features.HaveMapType(ebpf.SockMap) }},
		{"socket storage", newerKernel, func() error { return features.HaveMapType(ebpf.SkStorage) }},
		{"bpf_sk_assign for tc programs", newerKernel, helper(ebpf.SchedCLS, asm.FnSkAssign)},
		{"bpf_skc_lookup_tcp for tc programs", newerKernel, helper(ebpf.SchedCLS, asm.FnSkcLookupTcp)},
		{"socket storage for tc programs", newerKernel, helper(ebpf.SchedCLS, asm.FnSkStorageGet)},
		{"tcx links or cls_bpf filters", "run a kernel of version 6.6 or later, or one that is built with CONFIG_NET_CLS_BPF and CONFIG_NET_SCH_INGRESS", haveHooks},
	}
}

// Probe asks the kernel, by trying, whether pods can be captured on this node.
// It reads no version number: distributions move features between versions.
// The error names everything that is missing and what to do about it. disable
// is as in Config.
func Probe(disable ...string) (Features, error) {
	err := checkDisable(disable)
	if err == nil {
		err = probe(needs())
	}
	if err != nil {
		return Features{}, fmt.Errorf("pods cannot be captured on this node: %w", err)
	}
	return rung(disable, haveTCX, haveSkLookup,
		func() error { return haveType("bpf_iter__tcp") },
		func() error { return haveFunc("bpf_sock_destroy") })
}

func probe(list []need) error {
	var missing []error
	for _, n := range list {
		err := n.have()
		switch {
		case err == nil:
		case errors.Is(err, ebpf.ErrNotSupported):
			missing = append(missing, fmt.Errorf("the kernel has no %s; %s", n.what, n.do))
		case errors.Is(err, unix.EPERM):
			missing = append(missing, fmt.Errorf("not allowed to find out whether the kernel has %s; give the agent's container the capabilities SYS_ADMIN and NET_ADMIN, and see that seccomp and lockdown allow bpf(2): %w", n.what, err))
		default:
			missing = append(missing, fmt.Errorf("find out whether the kernel has %s: %w", n.what, err))
		}
	}
	return errors.Join(missing...)
}

func haveBTF() error {
	if _, err := btf.LoadKernelSpec(); err != nil {
		if errors.Is(err, unix.EPERM) {
			return err
		}
		return fmt.Errorf("%w: %v", ebpf.ErrNotSupported, err)
	}
	return nil
}

func haveType(name string) error {
	spec, err := btf.LoadKernelSpec()
	if err != nil {
		return err
	}
	_, err = spec.AnyTypeByName(name)
	return err
}

func haveFunc(name string) error {
	spec, err := btf.LoadKernelSpec()
	if err != nil {
		return err
	}
	var f *btf.Func
	return spec.TypeByName(name, &f)
}

func haveSkLookup() error { return features.HaveProgramType(ebpf.SkLookup) }

func haveHooks() error {
	if err := haveTCX(); err == nil || !errors.Is(err, ebpf.ErrNotSupported) {
		return err
	}
	return haveFilters()
}

// haveFilters makes a clsact qdisc and a filter on lo, in a namespace of its own.
func haveFilters() error {
	prog, err := passAll()
	if err != nil {
		return err
	}
	defer prog.Close()
	ns, err := newNamespace()
	if err != nil {
		return err
	}
	defer ns.Close()
	h := hook{pin: "probe", index: loopback, kind: ebpf.AttachTCXIngress}
	err = routed(ns, func(nl *netlink.Handle) error {
		if err := nl.QdiscAdd(h.clsact()); err != nil {
			return err
		}
		f := h.filter()
		f.Fd = prog.FD()
		return nl.FilterReplace(f)
	})
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("%w: %v", ebpf.ErrNotSupported, err)
	}
	return err
}

// haveTCX attaches a program to lo, in a namespace of its own.
func haveTCX() error {
	prog, err := passAll()
	if err != nil {
		return err
	}
	defer prog.Close()
	ns, err := newNamespace()
	if err != nil {
		return err
	}
	defer ns.Close()
	l, err := attachTCX(ns, 1, prog, ebpf.AttachTCXIngress)
	if err != nil {
		return err
	}
	return l.Close()
}

func passAll() (*ebpf.Program, error) {
	return ebpf.NewProgram(&ebpf.ProgramSpec{
		Type:         ebpf.SchedCLS,
		Instructions: asm.Instructions{asm.LoadImm(asm.R0, actUnspec, asm.DWord), asm.Return()},
		License:      "GPL",
	})
}

func newNamespace() (ns *netns.NS, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		if err = unix.Unshare(unix.CLONE_NEWNET); err == nil {
			ns, err = netns.Current()
		}
	}()
	<-done
	if err != nil {
		return nil, fmt.Errorf("make a network namespace: %w", err)
	}
	return ns, nil
}
