package l7

import (
	"io"
	"net"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A socket is a TCP connection whose system calls do not tell Go's scheduler.
// They do not wait, and telling it costs more than it seems: the first one after
// the process was idle wakes the runtime's monitor, whose own calls took a third
// of the CPU time of a proxy with one request at a time. Engine.Run wakes it now
// and then, for whoever needs it.
//
// One goroutine reads at a time, and one writes.
type socket struct {
	*net.TCPConn
	raw syscall.RawConn
	// What the poller calls is made once: a request must not allocate.
	onRead, onWrite, onExchange, onPeek func(fd uintptr) bool

	in, out transfer
	writing bool          // of an exchange: out is not sent yet
	sent    func()        // of an exchange: is called when out is; may be nil
	room    func() []byte // of an exchange: where to read to, if in has no place
	quiet   bool
	one     [1]byte
	iov     [2]syscall.Iovec
}

// A transfer is one call's.
type transfer struct {
	p, more []byte // more is for writes: what follows p
	n       int    // so far
	err     syscall.Errno
}

// result returns what a Read or Write returns.
func (t *transfer) result(op string, err error) (int, error) {
	t.p, t.more = nil, nil
	switch {
	case err != nil:
		return t.n, err
	case t.err != 0:
		return t.n, &net.OpError{Op: op, Net: "tcp", Err: os.NewSyscallError(op, t.err)}
	}
	return t.n, nil
}

// newSocket returns conn as a socket, nil if it is none.
func newSocket(conn net.Conn) *socket {
	c, ok := conn.(*net.TCPConn)
	if !ok {
		return nil
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return nil // it is closed: whoever uses it finds out
	}
	s := &socket{TCPConn: c, raw: raw}
	s.onRead, s.onWrite, s.onExchange, s.onPeek = s.tryRead, s.tryWrite, s.tryExchange, s.tryPeek
	return s
}

// Read implements net.Conn.
func (s *socket) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	s.in = transfer{p: p}
	n, err := s.in.result("read", s.raw.Read(s.onRead))
	if n == 0 && err == nil {
		err = io.EOF
	}
	return n, err
}

// Write implements net.Conn.
func (s *socket) Write(p []byte) (int, error) { return s.writeTwo(p, nil) }

// writeTwo writes p, and more behind it.
func (s *socket) writeTwo(p, more []byte) (int, error) {
	s.out = transfer{p: p, more: more}
	return s.out.result("write", s.raw.Write(s.onWrite))
}

// exchange sends p, and more behind it, and reads into in what comes then: the
// read waits before anything is sent, for one that is tried right after finds
// nothing, and costs a system call of each request. sent, if it is not nil, is
// called as soon as p and more are needed no longer; room, if in is nil, when
// there is something to read: many exchanges that wait need not have buffers,
// and the few that do not wait find theirs in the processor's cache.
func (s *socket) exchange(p, more, in []byte, sent func(), room func() []byte) (int, error) {
	s.in, s.out, s.writing, s.sent, s.room = transfer{p: in}, transfer{p: p, more: more}, true, sent, room
	err := s.raw.Read(s.onExchange)
	s.sent, s.room = nil, nil
	k, werr := s.out.result("write", nil)
	n, rerr := s.in.result("read", err)
	if werr == nil && k < len(p)+len(more) {
		// There was not room for all, or the read was interrupted before.
		if k < len(p) {
			_, werr = s.writeTwo(p[k:], more)
		} else {
			_, werr = s.Write(more[k-len(p):])
		}
		if sent != nil {
			sent()
		}
		if werr == nil && rerr == nil {
			if in == nil {
				in = room()
			}
			return s.Read(in)
		}
	}
	if rerr == nil && werr != nil {
		return 0, werr
	}
	if n == 0 && rerr == nil {
		rerr = io.EOF
	}
	return n, rerr
}

// silent reports whether nothing has come, not even the end.
func (s *socket) silent() bool {
	s.quiet = false
	err := s.raw.Read(s.onPeek)
	return err == nil && s.quiet
}

// left reports whether the peer has ended its direction, or the connection. It
// may be called while others read and write.
func (s *socket) left() bool {
	gone := false
	err := s.raw.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		n, err := unix.Poll(p, 0)
		gone = err == nil && n > 0
	})
	return err != nil || gone
}

func (s *socket) tryRead(fd uintptr) bool {
	k, e := recv(fd, s.in.p, 0)
	if e == syscall.EAGAIN {
		return false
	}
	s.in.n, s.in.err = k, e
	return true
}

func (s *socket) tryWrite(fd uintptr) bool {
	t := &s.out
	for t.n < len(t.p)+len(t.more) {
		k, e := s.send(fd)
		if e == syscall.EAGAIN {
			return false
		}
		if e != 0 {
			t.err = e
			return true
		}
		t.n += k
	}
	return true
}

// tryExchange is called first when the read waits already, and then whenever
// there may be something to read.
func (s *socket) tryExchange(fd uintptr) bool {
	if !s.writing {
		if s.in.p == nil {
			s.in.p = s.room()
		}
		return s.tryRead(fd)
	}
	s.writing = false
	t := &s.out
	k, e := s.send(fd)
	if e != 0 && e != syscall.EAGAIN {
		t.err = e
		return true
	}
	if t.n = k; k < len(t.p)+len(t.more) {
		return true // the rest has to wait for room, not for an answer
	}
	if s.sent != nil {
		s.sent()
	}
	return false
}

func (s *socket) tryPeek(fd uintptr) bool {
	_, e := recv(fd, s.one[:], syscall.MSG_PEEK)
	s.quiet = e == syscall.EAGAIN
	return true
}

// send writes what finds room of what is not written yet.
func (s *socket) send(fd uintptr) (int, syscall.Errno) {
	t := &s.out
	p, more := t.p, t.more
	if t.n >= len(p) {
		p, more = more[t.n-len(p):], nil
	} else {
		p = p[t.n:]
	}
	const flags = syscall.MSG_DONTWAIT | syscall.MSG_NOSIGNAL
	for {
		var n uintptr
		var e syscall.Errno
		if len(more) == 0 {
			n, _, e = syscall.RawSyscall6(syscall.SYS_SENDTO, fd, uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), flags, 0, 0)
		} else {
			s.iov[0].Base, s.iov[1].Base = unsafe.SliceData(p), unsafe.SliceData(more)
			s.iov[0].SetLen(len(p))
			s.iov[1].SetLen(len(more))
			m := syscall.Msghdr{Iov: &s.iov[0], Iovlen: 2}
			n, _, e = syscall.RawSyscall6(syscall.SYS_SENDMSG, fd, uintptr(unsafe.Pointer(&m)), flags, 0, 0, 0)
			s.iov = [2]syscall.Iovec{}
		}
		if e == 0 {
			return int(n), 0
		}
		if e != syscall.EINTR {
			return 0, e
		}
	}
}

// recv reads what is there.
func recv(fd uintptr, p []byte, flags uintptr) (int, syscall.Errno) {
	for {
		n, _, e := syscall.RawSyscall6(syscall.SYS_RECVFROM, fd, uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), flags|syscall.MSG_DONTWAIT, 0, 0)
		if e == 0 {
			return int(n), 0
		}
		if e != syscall.EINTR {
			return 0, e
		}
	}
}
