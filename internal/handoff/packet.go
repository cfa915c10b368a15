package handoff

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// pipe sends and receives messages. Neither method may run twice at a time.
type pipe struct {
	conn *net.UnixConn
	buf  []byte
	oob  []byte
}

func newPipe(c *net.UnixConn) *pipe {
	return &pipe{
		conn: c,
		buf:  make([]byte, maxPacket+1),
		oob:  make([]byte, unix.CmsgSpace(4*maxFiles)),
	}
}

// send writes m with the files of f, which stay the caller's.
func (p *pipe) send(m message, f Files) error {
	files := m.attach(f)
	b, err := json.Marshal(m)
	if err != nil {
		return fmt.Errorf("send handoff message %q: %w", m.Kind, err)
	}
	if len(b) > maxPacket {
		return fmt.Errorf("send handoff message %q: it has %d bytes, at most %d fit", m.Kind, len(b), maxPacket)
	}
	var oob []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, file := range files {
			// Fd would make the file blocking for everybody who shares its
			// description, listeners among them; the raw connection does not.
			if fds[i], err = rawFd(file); err != nil {
				return fmt.Errorf("send handoff message %q: %w", m.Kind, err)
			}
		}
		oob = unix.UnixRights(fds...)
	}
	if _, _, err := p.conn.WriteMsgUnix(b, oob, nil); err != nil {
		return fmt.Errorf("send handoff message %q: %w", m.Kind, err)
	}
	return nil
}

// rawFd returns the descriptor number of f, which must stay open while it is
// used.
func rawFd(f *os.File) (int, error) {
	rc, err := f.SyscallConn()
	if err != nil {
		return -1, err
	}
	fd := -1
	err = rc.Control(func(n uintptr) { fd = int(n) })
	return fd, err
}

// receive reads one message. The files that came with it are the caller's;
// when it fails, all have been closed. At the end of the connection the error
// is io.EOF.
func (p *pipe) receive() (message, Files, error) {
	n, oobn, flags, _, err := p.conn.ReadMsgUnix(p.buf, p.oob)
	files, ferr := openRights(p.oob[:oobn])
	fail := func(err error) (message, Files, error) {
		for _, f := range files {
			f.Close()
		}
		return message{}, Files{}, err
	}
	switch {
	case errors.Is(err, io.EOF):
		return fail(io.EOF)
	case err != nil:
		return fail(fmt.Errorf("receive handoff message: %w", err))
	case ferr != nil:
		return fail(fmt.Errorf("receive handoff message: %w", ferr))
	case flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 || n > maxPacket:
		// With MSG_CTRUNC the kernel has delivered some files and dropped
		// others: what is here cannot be told apart from what is not.
		return fail(fmt.Errorf("receive handoff message: the packet was cut: more than %d bytes or %d files", maxPacket, maxFiles))
	}
	m, err := decode(p.buf[:n], len(files))
	if err != nil {
		return fail(err)
	}
	return m, m.detach(files), nil
}

// openRights takes the files out of control data. Those that it could read are
// returned even beside an error, so that the caller can close them. The
// descriptors are close-on-exec already: the net package receives with
// MSG_CMSG_CLOEXEC.
func openRights(oob []byte) ([]*os.File, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("parse control data: %w", err)
	}
	var files []*os.File
	var errs []error
	for _, m := range msgs {
		if m.Header.Level != unix.SOL_SOCKET || m.Header.Type != unix.SCM_RIGHTS {
			errs = append(errs, fmt.Errorf("control data of level %d type %d is not wanted", m.Header.Level, m.Header.Type))
			continue
		}
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			errs = append(errs, fmt.Errorf("parse file descriptors: %w", err))
			continue
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "handoff"))
		}
	}
	return files, errors.Join(errs...)
}

// checkPeer wants the process at the other end to run as the user of this one:
// in a cluster both are root, and nobody else may give or take pods.
func checkPeer(c *net.UnixConn) error {
	rc, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var cerr error
	if err := rc.Control(func(fd uintptr) {
		cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return err
	}
	if cerr != nil {
		return fmt.Errorf("ask who is at the other end: %w", cerr)
	}
	if want := uint32(syscall.Geteuid()); cred.Uid != want {
		return fmt.Errorf("process %d of user %d is at the other end, want user %d", cred.Pid, cred.Uid, want)
	}
	return nil
}
