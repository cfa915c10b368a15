package netns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Dial connects over TCP (never MPTCP) from inside the namespace. network is
// "tcp", "tcp4" or "tcp6". A valid local is bound to before connecting, with
// port 0 for any; to bind to an address of someone else, let control make the
// socket transparent. control, if not nil, sets options on the socket before
// it is bound.
//
// Only socket(2) runs inside the namespace. The wait for the peer is the
// runtime poller's, no thread is blocked, and the end of ctx ends it.
func (n *NS) Dial(ctx context.Context, network string, local, remote netip.AddrPort, control func(fd int) error) (*net.TCPConn, error) {
	c, err := n.dial(ctx, network, local, remote, control)
	if err != nil {
		op := &net.OpError{Op: "dial", Net: network, Addr: net.TCPAddrFromAddrPort(remote), Err: err}
		if local.IsValid() {
			op.Source = net.TCPAddrFromAddrPort(local)
		}
		return nil, op
	}
	return c, nil
}

func (n *NS) dial(ctx context.Context, network string, local, remote netip.AddrPort, control func(fd int) error) (*net.TCPConn, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	family, err := familyOf(network, local, remote)
	if err != nil {
		return nil, err
	}
	fd, err := n.socket(family)
	if err != nil {
		return nil, err
	}
	if err := begin(fd, family, local, remote, control); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return Finish(ctx, fd)
}

// Finish waits for a connection that Begin has begun, as Dial does. The
// descriptor is taken over, also if it fails.
func Finish(ctx context.Context, fd int) (*net.TCPConn, error) {
	// NewFile sees that the descriptor does not block and gives it to the
	// poller.
	f := os.NewFile(uintptr(fd), "tcp")
	defer f.Close()
	if err := connected(ctx, f); err != nil {
		return nil, err
	}
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		c.Close()
		return nil, fmt.Errorf("socket became a %T", c)
	}
	return tcp, nil
}

// Begin begins to connect, as Dial does, and does not wait: of the descriptor
// it returns Connected says whether it is connected already, as it mostly is to
// an address of the namespace itself. It keeps a few sockets ready, so that not
// every call has to visit the namespace.
func (n *NS) Begin(local, remote netip.AddrPort, control func(fd int) error) (fd int, err error) {
	family, err := familyOf("tcp", local, remote)
	if err != nil {
		return -1, err
	}
	if fd, err = n.ready(family); err != nil {
		return -1, err
	}
	if err := begin(fd, family, local, remote, control); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// spareSockets is how many sockets are made ready at once.
const spareSockets = 8

// ready returns a new socket of the namespace.
func (n *NS) ready(family int) (int, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return -1, os.ErrClosed
	}
	spare := &n.spare4
	if family == unix.AF_INET6 {
		spare = &n.spare6
	}
	if len(*spare) == 0 {
		if err := n.Do(func() error {
			for len(*spare) < spareSockets {
				fd, err := newSocket(family)
				if err != nil && len(*spare) == 0 {
					return err
				}
				if err != nil {
					return nil // some are better than none
				}
				*spare = append(*spare, fd)
			}
			return nil
		}); err != nil {
			return -1, err
		}
	}
	last := len(*spare) - 1
	fd := (*spare)[last]
	*spare = (*spare)[:last]
	return fd, nil
}

func familyOf(network string, local, remote netip.AddrPort) (int, error) {
	v4 := remote.Addr().Unmap().Is4()
	switch {
	case !remote.IsValid():
		return 0, errors.New("no address to connect to")
	case network != "tcp" && network != "tcp4" && network != "tcp6":
		return 0, net.UnknownNetworkError(network)
	case network == "tcp4" && !v4, network == "tcp6" && v4, local.IsValid() && local.Addr().Unmap().Is4() != v4:
		return 0, fmt.Errorf("addresses of different families: network %s, from %v, to %v", network, local, remote)
	case v4:
		return unix.AF_INET, nil
	}
	return unix.AF_INET6, nil
}

func (n *NS) socket(family int) (fd int, err error) {
	err = n.Do(func() error {
		fd, err = newSocket(family)
		return err
	})
	return fd, err
}

func newSocket(family int) (int, error) {
	// IPPROTO_TCP, because with 0 a kernel can be told to make it MPTCP.
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	return fd, os.NewSyscallError("socket", err)
}

// begin starts to connect. The connection is there when fd is writable.
func begin(fd, family int, local, remote netip.AddrPort, control func(fd int) error) error {
	// As package net does; the caller may turn it off.
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
		return os.NewSyscallError("setsockopt", err)
	}
	if control != nil {
		if err := control(fd); err != nil {
			return err
		}
	}
	if local.IsValid() {
		if local.Port() == 0 {
			// The port is then chosen when the peer is known, and need
			// only differ among connections to the same peer.
			if err := unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1); err != nil {
				return os.NewSyscallError("setsockopt", err)
			}
		}
		if err := withAddress(unix.SYS_BIND, fd, family, local); err != nil {
			return failed("bind", err)
		}
	}
	// A connect that a signal interrupted goes on by itself, as in progress.
	if err := withAddress(unix.SYS_CONNECT, fd, family, remote); err != nil && err != unix.EINPROGRESS && err != unix.EINTR {
		return failed("connect", err)
	}
	return nil
}

// failed says which call it was that failed, if it was the kernel's.
func failed(call string, err error) error {
	if _, ok := err.(syscall.Errno); ok {
		return os.NewSyscallError(call, err)
	}
	return err
}

// connected waits until f is connected or failed to be.
func connected(ctx context.Context, f *os.File) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	if deadline, ok := ctx.Deadline(); ok {
		if err := f.SetWriteDeadline(deadline); err != nil {
			return err
		}
	}
	stop := context.AfterFunc(ctx, func() { f.SetWriteDeadline(time.Unix(1, 0)) })
	defer stop()
	var failed error
	err = raw.Write(func(fd uintptr) bool {
		done, err := status(int(fd))
		failed = err
		return done
	})
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, os.ErrDeadlineExceeded):
		return context.DeadlineExceeded // the poller was a little ahead of ctx
	case err != nil:
		return err
	}
	return failed
}

// status reports whether the connect of fd is over, and how it failed.
func status(fd int) (done bool, err error) {
	code, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err != nil {
		return true, os.NewSyscallError("getsockopt", err)
	}
	switch e := unix.Errno(code); e {
	case 0:
	case unix.EINPROGRESS, unix.EALREADY, unix.EINTR:
		return false, nil
	default:
		return true, os.NewSyscallError("connect", e)
	}
	// Writable with no error can be a spurious wakeup.
	if _, err := unix.Getpeername(fd); err != nil {
		return false, nil
	}
	return true, nil
}
