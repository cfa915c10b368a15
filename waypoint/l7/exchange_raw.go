package l7

import (
	"io"
	"net"
	"os"
	"syscall"
)

// An armedRead sends a request while the read of its answer is armed already: a
// read that is tried after the write would find nothing, and cost a system call
// of each request. Its functions are made once, because a request must not
// allocate.
type armedRead struct {
	peek, step func(fd uintptr) bool

	out, in []byte
	writing bool
	sent, n int
	err     error
	still   bool
	one     [1]byte
}

func newArmedRead() *armedRead {
	a := &armedRead{}
	a.peek, a.step = a.onPeek, a.onStep
	return a
}

// quiet reports whether nothing has come on a connection, not even its end.
func (a *armedRead) quiet(c syscall.RawConn) bool {
	a.still = false
	err := c.Read(a.peek)
	return err == nil && a.still
}

func (a *armedRead) onPeek(fd uintptr) bool {
	for {
		_, _, err := syscall.Recvfrom(int(fd), a.one[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		if err == syscall.EINTR {
			continue
		}
		a.still = err == syscall.EAGAIN
		return true
	}
}

// exchange sends out and reads what comes then into in. If not all of out could
// be sent at once, nothing was read.
func (a *armedRead) exchange(c syscall.RawConn, out, in []byte) (n, sent int, err error) {
	a.out, a.in, a.writing, a.sent, a.n, a.err = out, in, true, 0, 0, nil
	err = c.Read(a.step)
	n, sent = a.n, a.sent
	if err == nil && a.err != nil {
		err = &net.OpError{Op: "exchange", Net: "tcp", Err: os.NewSyscallError("exchange", a.err)}
	}
	if err == nil && sent == len(out) && n == 0 {
		err = io.EOF
	}
	a.out, a.in = nil, nil
	return n, sent, err
}

// onStep is called first when the read is armed, and then whenever there may be
// something to read.
func (a *armedRead) onStep(fd uintptr) bool {
	for a.writing {
		k, err := syscall.Write(int(fd), a.out)
		switch {
		case err == syscall.EINTR:
		case err == syscall.EAGAIN:
			return true
		case err != nil:
			a.err = err
			return true
		default:
			a.sent = k
			a.writing = false
			return k < len(a.out)
		}
	}
	for {
		k, err := syscall.Read(int(fd), a.in)
		switch err {
		case nil:
			a.n = k
			return true
		case syscall.EINTR:
		case syscall.EAGAIN:
			return false
		default:
			a.err = err
			return true
		}
	}
}
