package loop

import (
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The calls below do not block, so they do not tell Go's scheduler, which would
// cost more than most of them: RawSyscall6 keeps the processor.

func result(n uintptr, e syscall.Errno) (int, syscall.Errno) {
	if e != 0 {
		return -1, e
	}
	return int(n), 0
}

// send writes to a socket what it takes at once.
func send(fd int32, p []byte) (int, syscall.Errno) {
	n, _, e := syscall.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT, 0, 0)
	return result(n, e)
}

// sendmsg is send from the places that m names.
func sendmsg(fd int32, m *unix.Msghdr) (int, syscall.Errno) {
	n, _, e := syscall.RawSyscall6(unix.SYS_SENDMSG, uintptr(fd), uintptr(unsafe.Pointer(m)), unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT, 0, 0, 0)
	return result(n, e)
}

// recv reads from a socket what is there.
func recv(fd int32, p []byte) (int, syscall.Errno) {
	n, _, e := syscall.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), unix.MSG_DONTWAIT, 0, 0)
	return result(n, e)
}

// readv is recv into several places. The socket does not block.
func readv(fd int32, iov []unix.Iovec) (int, syscall.Errno) {
	n, _, e := syscall.RawSyscall6(unix.SYS_READV, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(iov))), uintptr(len(iov)), 0, 0, 0)
	return result(n, e)
}

// The events of every socket. They are asked for once; edge-triggered, the
// kernel tells of each change. EPOLLPRI says that there is urgent data, at which
// a read stops short.
const events = unix.EPOLLIN | unix.EPOLLOUT | unix.EPOLLRDHUP | unix.EPOLLPRI | unix.EPOLLET&0xffffffff

// What an event is about, in the upper half of its data; the lower half is the
// place in a table.
const (
	aboutWake = iota
	aboutConn
	aboutTunnel
)

// watch adds a socket to an epoll.
func watch(ep, fd int, what, slot int32) error {
	e := unix.EpollEvent{Events: events, Fd: slot, Pad: what}
	if _, _, errno := syscall.RawSyscall6(unix.SYS_EPOLL_CTL, uintptr(ep), unix.EPOLL_CTL_ADD, uintptr(fd), uintptr(unsafe.Pointer(&e)), 0, 0); errno != 0 {
		return fmt.Errorf("watch socket: %w", os.NewSyscallError("epoll_ctl", errno))
	}
	return nil
}

// poll returns the events that are there, without waiting.
func poll(ep int, evs []unix.EpollEvent) int {
	n, _, e := syscall.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(ep), uintptr(unsafe.Pointer(unsafe.SliceData(evs))), uintptr(len(evs)), 0, 0, 0)
	if e != 0 {
		return 0
	}
	return int(n)
}

// Detach takes the descriptor of c out of the care of Go's poller, and closes
// c. The descriptor is the caller's, also of a connection that has failed.
func Detach(c *net.TCPConn) (int, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		_ = c.Close() // it is closed already
		return -1, err
	}
	fd := -1
	var dupErr error
	err = raw.Control(func(old uintptr) { fd, dupErr = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) })
	cerr := c.Close()
	if err = errors.Join(err, os.NewSyscallError("fcntl", dupErr)); err != nil {
		return -1, err
	}
	if cerr != nil {
		unix.Close(fd)
		return -1, cerr
	}
	return fd, nil
}

// cutAtDeath makes the kernel reset a connection when its last descriptor is
// closed (tcp(7), SO_LINGER with nothing to linger for). That is also what
// happens when the process is killed: a stream that it cuts short must not
// look whole.
func cutAtDeath(fd int32) error { return linger(fd, unix.Linger{Onoff: 1}) }

func linger(fd int32, l unix.Linger) error {
	_, _, e := syscall.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_LINGER, uintptr(unsafe.Pointer(&l)), unsafe.Sizeof(l), 0)
	if e != 0 {
		return os.NewSyscallError("setsockopt", e)
	}
	return nil
}

// cork makes the kernel keep a last packet that is not full for what comes
// next, or send it (tcp(7), TCP_CORK).
func cork(fd int32, on bool) {
	var v int32
	if on {
		v = 1
	}
	// It fails only if the connection is gone.
	_, _, _ = syscall.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), unix.IPPROTO_TCP, unix.TCP_CORK, uintptr(unsafe.Pointer(&v)), unsafe.Sizeof(v), 0)
}

// shutdown ends what is written to a socket.
func shutdown(fd int32) syscall.Errno {
	_, _, e := syscall.RawSyscall(unix.SYS_SHUTDOWN, uintptr(fd), unix.SHUT_WR, 0)
	return e
}

// unacked returns how much of what was written to a socket, and of its end, the
// other end has not confirmed.
func unacked(fd int32) int {
	n, err := unix.IoctlGetInt(int(fd), unix.SIOCOUTQ)
	if err != nil {
		return 0 // the connection is gone
	}
	return n
}

// closeSocket closes a TCP socket whose directions have both ended.
func closeSocket(fd int32) {
	_ = linger(fd, unix.Linger{}) // if it fails the connection is gone already
	// Whoever does not linger does not wait (close(2)).
	_, _, _ = syscall.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0)
}

// abortSocket closes a TCP socket so that its peer sees an error.
func abortSocket(fd int32) {
	_ = cutAtDeath(fd) // as above
	_, _, _ = syscall.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0)
}

// Abort closes a descriptor of a TCP connection so that its peer sees an RST.
func Abort(fd int) { abortSocket(int32(fd)) }
