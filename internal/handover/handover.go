// Package handover is the unix socket by which a ztunnel gives its established
// connections to its successor: the next version, in the surge pod of a rollout
// or in the same pod. It moves opaque parts, each some bytes with some files; a
// part is one tunnel, or one connection, with all that belongs to it.
//
// The predecessor listens (Server), the successor dials (Client). The socket is
// SOCK_SEQPACKET in a directory of root's; both ends check that the other runs
// as their own user. The parts hold traffic secrets. They travel nowhere else,
// and both ends clear them.
//
//	successor → predecessor   hello, with the versions of parts that it takes
//	predecessor → successor   welcome, with the one to use; or refuse
//	successor → predecessor   ready, once it serves the same pods
//	predecessor → successor   what is large in a part, ahead of it
//	successor → predecessor   ready, when it has read an empty one of these
//	predecessor → successor   a part: text and files, in pieces, with a claim
//	successor → predecessor   taken or declined
//	predecessor → successor   done, after the last part
//
// A part is the predecessor's until the successor has taken its claim, and the
// successor's from then on: so at no time do both of them touch a connection.
// Whatever goes wrong before leaves the part where it was: the predecessor takes
// the claim itself, and a successor that comes later lets go of its copy.
//
// A connection stands still while its part is on the way. So what does not
// change any more until then is sent ahead, while the predecessor still carries
// it, and the successor goes on as soon as it has the part: on a busy node each
// word more between the two costs as much as all their work.
package handover

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Version is the version of the messages here. What is in the parts has
// versions of its own.
const Version = 3

// Bounds of a message. Packets are as large as a socket takes at once by
// default, and carry as many files as the kernel lets them (SCM_MAX_FD).
const (
	// MaxAhead bounds what is sent ahead in one message: 64 KiB, and a little
	// that says what it is.
	MaxAhead = 64<<10 + 64
	maxPiece = MaxAhead
	maxFiles = 253
	// MaxText and MaxPartFiles bound a part: a tunnel with all that its windows
	// let wait in it. What is sent ahead of a part has the same bound once more.
	MaxText      = 160 << 20
	MaxPartFiles = 8192
)

// stepTimeout bounds each step that the other end has to do. A successor that
// takes longer is not one.
const stepTimeout = 4 * time.Second

// kind is what a packet is about. The zero kind is invalid.
type kind uint8

const (
	hello kind = 1 + iota
	welcome
	refuse
	ready
	part
	taken
	declined
	done
	ahead
)

// headerLen is the length of what begins each packet: its kind, whether more
// pieces of the same message follow, and the number of files with it.
const headerLen = 4

// A message is what one or more packets carry.
type message struct {
	kind  kind
	text  []byte
	files []int // the receiver's to close
}

// clear wipes the text. It may hold secrets.
func (m *message) clear() { clear(m.text) }

// close closes the files.
func (m *message) close() {
	for _, fd := range m.files {
		_ = unix.Close(fd) // a copy
	}
	m.files = nil
}

// pipe sends and receives messages over c. Neither method may run twice at a
// time.
type pipe struct {
	c   *net.UnixConn
	in  []byte
	oob []byte
}

func newPipe(c *net.UnixConn) *pipe {
	roomy(c)
	return &pipe{c: c, in: make([]byte, headerLen+maxPiece+1), oob: make([]byte, unix.CmsgSpace(4*maxFiles))}
}

// send writes m, in pieces. Its files stay the caller's.
func (p *pipe) send(m message) error {
	if err := p.c.SetWriteDeadline(time.Now().Add(stepTimeout)); err != nil {
		return err
	}
	buf := make([]byte, headerLen, headerLen+min(len(m.text), maxPiece))
	defer func() { clear(buf[:cap(buf)]) }()
	text, files := m.text, m.files
	for {
		n, k := min(len(text), maxPiece), min(len(files), maxFiles)
		more := n < len(text) || k < len(files)
		buf = append(buf[:headerLen], text[:n]...)
		buf[0], buf[1] = byte(m.kind), 0
		if more {
			buf[1] = 1
		}
		binary.BigEndian.PutUint16(buf[2:], uint16(k))
		var oob []byte
		if k > 0 {
			oob = unix.UnixRights(files[:k]...)
		}
		if _, _, err := p.c.WriteMsgUnix(buf, oob, nil); err != nil {
			return fmt.Errorf("send handover message: %w", err)
		}
		if text, files = text[n:], files[k:]; !more {
			return nil
		}
	}
}

// receive reads one message. Its files are the caller's. deadline may be zero.
func (p *pipe) receive(deadline time.Time) (message, error) {
	if err := p.c.SetReadDeadline(deadline); err != nil {
		return message{}, err
	}
	defer clear(p.in)
	var m message
	for {
		more, err := p.receivePiece(&m)
		if err != nil {
			m.clear()
			m.close()
			return message{}, err
		}
		if !more {
			return m, nil
		}
		if err := p.c.SetReadDeadline(time.Now().Add(stepTimeout)); err != nil {
			m.clear()
			m.close()
			return message{}, err
		}
	}
}

// receivePiece adds one packet to m.
func (p *pipe) receivePiece(m *message) (more bool, err error) {
	n, oobn, flags, _, err := p.c.ReadMsgUnix(p.in, p.oob)
	files, ferr := openRights(p.oob[:oobn])
	m.files = append(m.files, files...)
	switch {
	case err != nil:
		return false, fmt.Errorf("receive handover message: %w", err)
	case ferr != nil:
		return false, ferr
	case flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 || n > headerLen+maxPiece:
		return false, errors.New("receive handover message: a packet was cut, or the process has as many files as it may")
	case n < headerLen:
		return false, errors.New("receive handover message: a packet without a header")
	}
	k := kind(p.in[0])
	switch {
	case k < hello || k > ahead || p.in[1] > 1:
		return false, fmt.Errorf("receive handover message: kind %d is not known", k)
	case m.kind != 0 && m.kind != k:
		return false, errors.New("receive handover message: pieces of two messages")
	case k != part && (len(m.files) > 0 || p.in[1] == 1):
		return false, fmt.Errorf("receive handover message: kind %d with files or pieces", k)
	case int(binary.BigEndian.Uint16(p.in[2:])) != len(files):
		return false, fmt.Errorf("receive handover message: %d files came of %d", len(files), binary.BigEndian.Uint16(p.in[2:]))
	case len(m.text)+n-headerLen > MaxText || len(m.files) > MaxPartFiles+1: // and the claim
		return false, errors.New("receive handover message: it is too large")
	case p.in[1] == 1 && n == headerLen && len(files) == 0:
		return false, errors.New("receive handover message: an empty piece")
	}
	m.kind = k
	m.text = grow(m.text, p.in[headerLen:n])
	return p.in[1] == 1, nil
}

// grow appends p to b, and clears what b outgrows.
func grow(b, p []byte) []byte {
	if cap(b)-len(b) >= len(p) {
		return append(b, p...)
	}
	n := append(make([]byte, 0, 2*len(b)+len(p)), b...)
	clear(b)
	return append(n, p...)
}

// openRights takes the descriptors out of control data; those that it could
// read are returned also beside an error. The net package receives with
// MSG_CMSG_CLOEXEC.
func openRights(oob []byte) ([]int, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("receive handover message: parse control data: %w", err)
	}
	var fds []int
	for i := range msgs {
		got, perr := unix.ParseUnixRights(&msgs[i])
		fds = append(fds, got...)
		err = errors.Join(err, perr)
	}
	return fds, err
}

// roomy makes room for a whole part, as it mostly is, between the two: else
// they wake each other up for every few packets, and connections stand still
// meanwhile. It takes CAP_NET_ADMIN. Without it things are as they are.
func roomy(c *net.UnixConn) {
	rc, err := c.SyscallConn()
	if err != nil {
		return
	}
	_ = rc.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 4<<20)
	})
}

// checkPeer wants the process at the other end to run as the user of this one:
// in a cluster both are root, and nobody else may have connections.
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
		return fmt.Errorf("ask who is at the other end: %w", os.NewSyscallError("getsockopt", cerr))
	}
	if want := uint32(syscall.Geteuid()); cred.Uid != want {
		return fmt.Errorf("process %d of user %d is at the other end, want user %d", cred.Pid, cred.Uid, want)
	}
	return nil
}
