package netns

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// What sock_diag(7) asks and answers with, see linux/inet_diag.h.
const (
	diagByFamily  = 20 // SOCK_DIAG_BY_FAMILY
	diagRequest   = unix.SizeofNlMsghdr + 56
	diagAnswer    = unix.SizeofNlMsghdr + 72
	diagTimer     = unix.SizeofNlMsghdr + 2  // inet_diag_msg.idiag_timer
	diagExpires   = unix.SizeofNlMsghdr + 52 // inet_diag_msg.idiag_expires
	diagKeepAlive = 2                        // a timer of keepalive, and nothing more urgent
	established   = 1                        // TCP_ESTABLISHED
	closeWait     = 8                        // TCP_CLOSE_WAIT
)

// KeepAlive returns when the TCP socket of the namespace that is connected from
// local to remote will probe whether its peer is still there, if nothing happens
// until then: its own idle time at the most. It is 0 if the socket does not
// probe, has something more urgent to do, or is not there.
func (n *NS) KeepAlive(local, remote netip.AddrPort) (time.Duration, error) {
	d, err := n.keepAlive(local, remote)
	if err != nil {
		return 0, fmt.Errorf("look at the socket from %v to %v: %w", local, remote, err)
	}
	return d, nil
}

func (n *NS) keepAlive(local, remote netip.AddrPort) (time.Duration, error) {
	var fd int
	err := n.Do(func() (err error) { // only the socket is of the namespace
		fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_INET_DIAG)
		return os.NewSyscallError("socket", err)
	})
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	if err := unix.Sendto(fd, diagQuery(local, remote), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return 0, os.NewSyscallError("sendto", err)
	}
	// The kernel has answered before sendto came back.
	b := make([]byte, 1024)
	k, _, err := unix.Recvfrom(fd, b, unix.MSG_DONTWAIT)
	if err != nil {
		return 0, os.NewSyscallError("recvfrom", err)
	}
	return parseDiag(b[:k])
}

// diagQuery asks for the one socket that is connected from local to remote.
func diagQuery(local, remote netip.AddrPort) []byte {
	b := make([]byte, diagRequest)
	order := binary.NativeEndian
	order.PutUint32(b, diagRequest)
	order.PutUint16(b[4:], diagByFamily)
	order.PutUint16(b[6:], unix.NLM_F_REQUEST)
	q := b[unix.SizeofNlMsghdr:] // inet_diag_req_v2
	q[0], q[1] = unix.AF_INET6, unix.IPPROTO_TCP
	order.PutUint32(q[4:], 1<<established|1<<closeWait)
	binary.BigEndian.PutUint16(q[8:], local.Port())
	binary.BigEndian.PutUint16(q[10:], remote.Port())
	if l, r := local.Addr().Unmap(), remote.Addr().Unmap(); l.Is4() && r.Is4() {
		q[0] = unix.AF_INET
		copy(q[12:], l.AsSlice())
		copy(q[28:], r.AsSlice())
	} else {
		l, r := local.Addr().As16(), remote.Addr().As16()
		copy(q[12:], l[:])
		copy(q[28:], r[:])
	}
	order.PutUint64(q[48:], ^uint64(0)) // INET_DIAG_NOCOOKIE
	return b
}

// parseDiag reads the kernel's answer.
func parseDiag(b []byte) (time.Duration, error) {
	order := binary.NativeEndian
	if len(b) < unix.SizeofNlMsghdr+4 {
		return 0, fmt.Errorf("an answer of %d bytes", len(b))
	}
	if order.Uint16(b[4:]) == unix.NLMSG_ERROR {
		e := unix.Errno(-int32(order.Uint32(b[unix.SizeofNlMsghdr:])))
		if e == unix.ENOENT {
			return 0, nil
		}
		return 0, e
	}
	if len(b) < diagAnswer {
		return 0, fmt.Errorf("an answer of %d bytes", len(b))
	}
	state, timer := b[unix.SizeofNlMsghdr+1], b[diagTimer]
	if timer != diagKeepAlive || state != established && state != closeWait {
		return 0, nil
	}
	return max(time.Millisecond, time.Duration(order.Uint32(b[diagExpires:]))*time.Millisecond), nil
}
