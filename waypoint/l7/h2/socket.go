package h2

import (
	"io"
	"net"
	"os"
	"syscall"
	"unsafe"
)

// A socket reads and writes a TCP connection by system calls that do not tell
// Go's scheduler: they do not wait, and telling it costs as much as handling a
// frame. Its zero value is none.
type socket struct {
	raw syscall.RawConn // nil: the connection is none of TCP
	// What the poller calls is made once.
	onRead, onWrite func(fd uintptr) bool
	// idle is called when nothing is there to be read, before the wait. It must
	// not close the connection, which waits for whoever reads.
	idle func()

	in    []byte
	got   int
	inErr syscall.Errno

	out    []byte // of whoever writes: one at a time does
	put    int
	outErr syscall.Errno
}

// open takes the connection, if it is one of TCP.
func (s *socket) open(conn net.Conn, idle func()) {
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return
	}
	s.raw, _ = tcp.SyscallConn() // without it, net.Conn finds out why
	s.onRead, s.onWrite, s.idle = s.tryRead, s.tryWrite, idle
}

// read is net.Conn's Read.
func (s *socket) read(p []byte) (int, error) {
	s.in, s.got, s.inErr = p, 0, 0
	err := s.raw.Read(s.onRead)
	s.in = nil
	switch {
	case err != nil:
		return 0, err
	case s.inErr != 0:
		return 0, &net.OpError{Op: "read", Net: "tcp", Err: os.NewSyscallError("recvfrom", s.inErr)}
	case s.got == 0:
		return 0, io.EOF
	}
	return s.got, nil
}

// write writes as much of p as finds room now.
func (s *socket) write(p []byte) (int, error) {
	s.out, s.put, s.outErr = p, 0, 0
	err := s.raw.Write(s.onWrite)
	s.out = nil
	switch {
	case err != nil:
		return s.put, err
	case s.outErr != 0:
		return s.put, &net.OpError{Op: "write", Net: "tcp", Err: os.NewSyscallError("sendto", s.outErr)}
	}
	return s.put, nil
}

func (s *socket) tryRead(fd uintptr) bool {
	n, e := again(syscall.SYS_RECVFROM, fd, s.in, syscall.MSG_DONTWAIT)
	if e == syscall.EAGAIN {
		s.idle()
		return false
	}
	s.got, s.inErr = n, e
	return true
}

func (s *socket) tryWrite(fd uintptr) bool {
	n, e := again(syscall.SYS_SENDTO, fd, s.out, syscall.MSG_DONTWAIT|syscall.MSG_NOSIGNAL)
	if e == syscall.EAGAIN {
		return true
	}
	s.put, s.outErr = n, e
	return true
}

// again makes a call of a socket until no signal has interrupted it.
func again(call, fd uintptr, p []byte, flags uintptr) (int, syscall.Errno) {
	for {
		n, _, e := syscall.RawSyscall6(call, fd, uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), flags, 0, 0)
		if e == 0 {
			return int(n), 0
		}
		if e != syscall.EINTR {
			return 0, e
		}
	}
}
