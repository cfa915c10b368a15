// Package netns enters network namespaces: it runs code in one, and dials from
// one without keeping a thread there.
package netns

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// An NS is an open network namespace. It keeps the namespace alive, also when
// all its processes are gone, until Close. It is safe for concurrent use, but
// for Close.
type NS struct {
	file *os.File

	mu             sync.Mutex // of what follows
	closed         bool
	spare4, spare6 []int // sockets for Begin
}

// home is the namespace of the process, to which threads come back. It is one
// descriptor for all, which stays open. Whoever asks first must be on a thread
// that is at home.
var home = sync.OnceValues(func() (*os.File, error) { return os.Open("/proc/thread-self/ns/net") })

// An ID tells namespaces apart: the device and inode number of the namespace
// file (namespaces(7)). It is comparable; the zero ID is no namespace. An
// inode number is used again after its namespace has ended, so an ID means
// something only while somebody holds the namespace.
type ID struct {
	Dev, Ino uint64
}

// Open opens the namespace at path, for example /proc/1/ns/net or a bind mount
// of it. The caller must Close it.
func Open(path string) (*NS, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open network namespace: %w", err)
	}
	return newNS(f)
}

// FromFD takes ownership of fd, an open network namespace, also when it fails.
func FromFD(fd int) (*NS, error) {
	return newNS(os.NewFile(uintptr(fd), "netns"))
}

// Current opens the namespace of the calling thread.
func Current() (*NS, error) { return Open("/proc/thread-self/ns/net") }

func newNS(f *os.File) (*NS, error) {
	if f == nil {
		return nil, errors.New("open network namespace: the descriptor is not valid")
	}
	// NS_GET_NSTYPE, ioctl_ns(2): a plain file here would make every later
	// setns fail, with less to say about why.
	kind, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_NSTYPE)
	if err != nil || kind != unix.CLONE_NEWNET {
		f.Close()
		return nil, fmt.Errorf("open network namespace %s: it is not a network namespace", f.Name())
	}
	return &NS{file: f}, nil
}

// Close lets go of the namespace.
func (n *NS) Close() error {
	n.mu.Lock()
	for _, fd := range append(n.spare4, n.spare6...) {
		_ = unix.Close(fd) // it was never used
	}
	n.spare4, n.spare6, n.closed = nil, nil, true
	n.mu.Unlock()
	return n.file.Close()
}

// Fd returns the descriptor. It is n's, and valid until Close.
func (n *NS) Fd() int { return int(n.file.Fd()) }

// Dup returns a second descriptor of the namespace, which the caller must close.
func (n *NS) Dup() (*os.File, error) {
	fd, err := unix.FcntlInt(n.file.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("duplicate network namespace: %w", err)
	}
	return os.NewFile(uintptr(fd), "netns"), nil
}

// ID returns the identity of the namespace.
func (n *NS) ID() (ID, error) {
	var st unix.Stat_t
	if err := unix.Fstat(n.Fd(), &st); err != nil {
		return ID{}, fmt.Errorf("stat network namespace: %w", err)
	}
	return ID{Dev: uint64(st.Dev), Ino: st.Ino}, nil
}

// Do runs f inside the namespace, on a thread that does nothing else meanwhile,
// and returns f's error. Goroutines that f starts run outside. A thread that
// cannot be brought back is ended, so no other goroutine ever finds itself in
// a foreign namespace.
func (n *NS) Do(f func() error) error {
	done := make(chan error, 1)
	go func() {
		err := errors.New("run in network namespace: the function ended its goroutine")
		// Before the deferred send, so that the caller goes on only when
		// the thread is home or about to end.
		defer func() { done <- err }()
		runtime.LockOSThread() // a goroutine that ends locked takes its thread with it
		back, e := home()
		if e != nil {
			runtime.UnlockOSThread()
			err = fmt.Errorf("remember the network namespace: %w", e)
			return
		}
		if e := unix.Setns(n.Fd(), unix.CLONE_NEWNET); e != nil {
			runtime.UnlockOSThread()
			err = fmt.Errorf("enter network namespace: %w", e)
			return
		}
		defer func() {
			if unix.Setns(int(back.Fd()), unix.CLONE_NEWNET) == nil {
				runtime.UnlockOSThread()
			}
		}()
		err = f()
	}()
	return <-done
}

// Addrs returns every address of every interface of the namespace but lo's
// loopback addresses, IPv4 first, in the kernel's order.
func (n *NS) Addrs() ([]netip.Addr, error) {
	var out []netip.Addr
	err := n.Do(func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer h.Close()
		for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			list, err := h.AddrList(nil, family)
			if err != nil {
				return err
			}
			for _, a := range list {
				if addr, ok := netip.AddrFromSlice(a.IP); ok && !addr.Unmap().IsLoopback() {
					out = append(out, addr.Unmap())
				}
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list addresses of network namespace: %w", err)
	}
	return out, nil
}
