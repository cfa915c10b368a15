package ztunnel

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/hbone/loop"
	"github.com/weft-mesh/weft/internal/netns"
)

// A listener is a listening socket: a *net.TCPListener, or a *door.
type listener interface {
	syscall.Conn
	SetDeadline(time.Time) error // what accepts fails from then on
	Close() error
}

// A door is a listening socket whose connections mostly go on in an event loop,
// so that Go's poller need not hear of each.
type door struct {
	*os.File
	raw  syscall.RawConn
	next func(fd uintptr) (done bool) // accepts into what follows; made once, as it is needed often

	fd     int
	from   netip.AddrPort
	failed error
}

// openDoor opens a listening socket a second time. What it accepts inherits
// that small segments are not held back, and that it stays in the pod.
func openDoor(f *os.File) (*door, error) {
	fd, err := dupFD(f)
	if err != nil {
		return nil, err
	}
	// The poller takes only descriptors that do not block.
	err = errors.Join(unix.SetNonblock(fd, true), unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1))
	doNotPace(fd)
	d := &door{File: os.NewFile(uintptr(fd), f.Name())}
	d.next = d.tryAccept
	if err == nil {
		d.raw, err = d.SyscallConn()
	}
	if err == nil {
		err = d.SetDeadline(time.Time{}) // it fails if the poller has not taken it
	}
	if err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
}

// tryAccept accepts a connection, and reports false if there is none yet.
func (d *door) tryAccept(fd uintptr) (done bool) {
	for {
		d.fd, d.from, d.failed = netns.Accept(int(fd))
		// A connection that was aborted in the backlog is no failure.
		if d.failed != syscall.EINTR && d.failed != syscall.ECONNABORTED {
			return d.failed != syscall.EAGAIN
		}
	}
}

// accept waits for the next connection, which it writes into a. There is one
// caller at a time.
func (d *door) accept(a *arrival) error {
	*a = arrival{fd: -1}
	switch err := d.raw.Read(d.next); {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return err
	case err != nil: // which the poller says in words of its own
		return fmt.Errorf("%w: %w", net.ErrClosed, err)
	case d.failed != nil:
		return os.NewSyscallError("accept", d.failed)
	}
	a.fd, a.src = d.fd, d.from
	var err error
	if a.dst, err = netns.Local(a.fd); err != nil {
		a.refuse()
		return os.NewSyscallError("getsockname", err)
	}
	return nil
}

// An arrival is a connection of the pod's processes as accept(2) gives it.
type arrival struct {
	fd       int // -1 when it is somebody else's
	src, dst netip.AddrPort
}

// take returns the descriptor, which is the caller's from then on.
func (a *arrival) take() int {
	fd := a.fd
	a.fd = -1
	return fd
}

// refuse aborts the connection, unless somebody else has it.
func (a *arrival) refuse() {
	if a.fd >= 0 {
		loop.Abort(a.take())
	}
}

// conn gives the connection to Go's poller.
func (a *arrival) conn() (*net.TCPConn, error) {
	f := os.NewFile(uintptr(a.take()), "tcp")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		c.Close()
		return nil, errors.New("it is no TCP connection")
	}
	return tuned(tcp, nil)
}
