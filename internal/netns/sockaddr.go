package netns

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strconv"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The calls below are those of package unix for sockets of TCP, with the
// addresses of package netip. Package unix allocates each address, which is more
// than all else that many a new connection leaves to the garbage collector.

// A sockaddr is an address as the kernel takes and gives it (ip(7), ipv6(7)).
// The zero sockaddr is none.
type sockaddr struct {
	unix.RawSockaddrInet6 // has room for a RawSockaddrInet4
	n                     uint32
}

func (s *sockaddr) v4() *unix.RawSockaddrInet4 {
	return (*unix.RawSockaddrInet4)(unsafe.Pointer(&s.RawSockaddrInet6))
}

// sockaddrOf returns a for a socket of a family. A zone is the index of an
// interface: names mean something else in each namespace.
func sockaddrOf(family int, a netip.AddrPort) (s sockaddr, err error) {
	s.Family, s.Port = uint16(family), swapped(a.Port())
	if family == unix.AF_INET {
		s.v4().Addr, s.n = a.Addr().Unmap().As4(), unix.SizeofSockaddrInet4
		return s, nil
	}
	s.Addr, s.n = a.Addr().As16(), unix.SizeofSockaddrInet6
	if zone := a.Addr().Zone(); zone != "" {
		index, err := strconv.ParseUint(zone, 10, 32)
		if err != nil {
			return s, fmt.Errorf("zone %q of %v is not an interface index: names mean something else in each namespace", zone, a)
		}
		s.Scope_id = uint32(index)
	}
	return s, nil
}

// addrPort returns s as the mesh writes addresses, without a zone.
func (s *sockaddr) addrPort() netip.AddrPort {
	switch s.Family {
	case unix.AF_INET:
		return netip.AddrPortFrom(netip.AddrFrom4(s.v4().Addr), swapped(s.Port))
	case unix.AF_INET6:
		return netip.AddrPortFrom(netip.AddrFrom16(s.Addr).Unmap(), swapped(s.Port))
	}
	return netip.AddrPort{}
}

// swapped turns a port from the order of bytes of the host into that of the
// network, and back.
func swapped(port uint16) uint16 {
	var b [2]byte
	binary.NativeEndian.PutUint16(b[:], port)
	return binary.BigEndian.Uint16(b[:])
}

// Accept accepts a connection on a listening socket that does not block, and
// returns the address of its peer. The error is a syscall.Errno.
func Accept(fd int) (conn int, peer netip.AddrPort, err error) {
	s := sockaddr{n: unix.SizeofSockaddrInet6}
	n, _, e := unix.Syscall6(unix.SYS_ACCEPT4, uintptr(fd), uintptr(unsafe.Pointer(&s.RawSockaddrInet6)), uintptr(unsafe.Pointer(&s.n)), unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0, 0)
	if e != 0 {
		return -1, netip.AddrPort{}, e
	}
	return int(n), s.addrPort(), nil
}

// Local returns the address that a socket is bound to. The error is a
// syscall.Errno.
func Local(fd int) (netip.AddrPort, error) { return addressBy(unix.SYS_GETSOCKNAME, fd) }

// Connected reports whether a TCP socket is connected. One that is not may be
// on the way to be, or have failed.
func Connected(fd int) bool {
	_, err := addressBy(unix.SYS_GETPEERNAME, fd) // ENOTCONN before the peer has answered, and after it has refused
	return err == nil
}

func addressBy(call uintptr, fd int) (netip.AddrPort, error) {
	s := sockaddr{n: unix.SizeofSockaddrInet6}
	if _, _, e := syscall.RawSyscall(call, uintptr(fd), uintptr(unsafe.Pointer(&s.RawSockaddrInet6)), uintptr(unsafe.Pointer(&s.n))); e != 0 {
		return netip.AddrPort{}, e
	}
	return s.addrPort(), nil
}

// Bind binds a socket of a's family, that of Addr.Is4 or of IPv6. The error is a
// syscall.Errno, but for a zone that is not the index of an interface.
func Bind(fd int, a netip.AddrPort) error {
	return withAddress(unix.SYS_BIND, fd, familyFor(a), a)
}

func familyFor(a netip.AddrPort) int {
	if a.Addr().Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func withAddress(call uintptr, fd, family int, a netip.AddrPort) error {
	s, err := sockaddrOf(family, a)
	if err != nil {
		return err
	}
	if _, _, e := unix.Syscall(call, uintptr(fd), uintptr(unsafe.Pointer(&s.RawSockaddrInet6)), uintptr(s.n)); e != 0 {
		return e
	}
	return nil
}
