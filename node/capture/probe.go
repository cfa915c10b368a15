package capture

import (
	"errors"
	"fmt"
	"runtime"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/features"
	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/internal/netns"
)

// Features are what the kernel can do that not every supported kernel can.
type Features struct {
	// Keep: connections of a running pod can be kept when it is captured.
	Keep bool
	// Reset: they can be reset. Without it they are cut off, and the app
	// notices when they time out.
	Reset bool
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
		{"sk_lookup programs", newerKernel, func() error { return features.HaveProgramType(ebpf.SkLookup) }},
		{"tc programs", "run a kernel that is built with CONFIG_NET_CLS_ACT", func() error { return features.HaveProgramType(ebpf.SchedCLS) }},
		{"socket maps", "run a kernel that is built with CONFIG_BPF_STREAM_PARSER or CONFIG_NET_SOCK_MSG", func() error { return features.HaveMapType(ebpf.SockMap) }},
		{"socket storage", newerKernel, func() error { return features.HaveMapType(ebpf.SkStorage) }},
		{"bpf_sk_assign for tc programs", newerKernel, helper(ebpf.SchedCLS, asm.FnSkAssign)},
		{"bpf_skc_lookup_tcp for tc programs", newerKernel, helper(ebpf.SchedCLS, asm.FnSkcLookupTcp)},
		{"socket storage for tc programs", newerKernel, helper(ebpf.SchedCLS, asm.FnSkStorageGet)},
		{"tcx links", newerKernel, haveTCX},
	}
}

// Probe asks the kernel, by trying, whether pods can be captured on this node.
// It reads no version number: distributions move features between versions.
// The error names everything that is missing and what to do about it.
func Probe() (Features, error) { return probe(needs()) }

func probe(list []need) (Features, error) {
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
	if err := errors.Join(missing...); err != nil {
		return Features{}, fmt.Errorf("pods cannot be captured on this node: %w", err)
	}
	return Features{Keep: haveType("bpf_iter__tcp") == nil, Reset: haveFunc("bpf_sock_destroy") == nil}, nil
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

// haveTCX attaches a program to lo, in a namespace of its own.
func haveTCX() error {
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type:         ebpf.SchedCLS,
		Instructions: asm.Instructions{asm.LoadImm(asm.R0, -1, asm.DWord), asm.Return()},
		License:      "GPL",
	})
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
