package ztunnel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/internal/netns"
)

const (
	udpHeader  = 8
	ipv4Header = 20
	ipv6Header = 40
	maxIPv4    = 65535 // bytes of a packet, header included
	protoUDP   = 17
)

// appendDatagram appends a whole UDP packet to b: RFC 791 or 8200, and 768. It
// fails when the addresses are of different families or data is too long.
func appendDatagram(b []byte, from, to netip.AddrPort, data []byte) ([]byte, error) {
	src, dst := from.Addr().Unmap(), to.Addr().Unmap()
	if !src.IsValid() || src.Is4() != dst.Is4() {
		return nil, fmt.Errorf("a packet from %v to %v has two families", from, to)
	}
	size := udpHeader + len(data)
	if ipv6Header+size > maxIPv4 {
		return nil, fmt.Errorf("%d bytes do not fit into a UDP packet", len(data))
	}
	be := binary.BigEndian
	if src.Is4() {
		b = append(b, 0x45, 0)                           // version, header of 5 words
		b = be.AppendUint16(b, uint16(ipv4Header+size))  // the kernel fills in the rest
		b = append(b, 0, 0, 0x40, 0, 64, protoUDP, 0, 0) // do not fragment, hop limit
		b = append(append(b, src.AsSlice()...), dst.AsSlice()...)
	} else {
		b = append(b, 0x60, 0, 0, 0)
		b = be.AppendUint16(b, uint16(size))
		b = append(b, protoUDP, 64)
		b = append(append(b, src.AsSlice()...), dst.AsSlice()...)
	}
	at := len(b)
	b = be.AppendUint16(b, from.Port())
	b = be.AppendUint16(b, to.Port())
	b = be.AppendUint16(b, uint16(size))
	b = append(append(b, 0, 0), data...)
	be.PutUint16(b[at+6:], udpChecksum(src, dst, b[at:]))
	return b, nil
}

// udpChecksum returns the checksum of a UDP packet whose own is zero.
func udpChecksum(src, dst netip.Addr, packet []byte) uint16 {
	sum := uint32(protoUDP + len(packet))
	add := func(b []byte) {
		for ; len(b) >= 2; b = b[2:] {
			sum += uint32(b[0])<<8 | uint32(b[1])
		}
		if len(b) == 1 {
			sum += uint32(b[0]) << 8
		}
	}
	add(src.AsSlice())
	add(dst.AsSlice())
	add(packet)
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	if sum == 0xffff {
		return 0xffff // 0 would say that there is none
	}
	return ^uint16(sum)
}

// A spoofer sends UDP packets inside a pod's namespace that come from addresses
// and ports that are not ours. A bound socket could too, but a port is taken
// while it is bound, also for a process of the pod that wants it on all
// addresses: a name server could not start, or not be answered.
type spoofer struct {
	v4, v6 *os.File
}

// newSpoofer makes the sockets inside ns. It needs CAP_NET_RAW.
func newSpoofer(ns *netns.NS) (*spoofer, error) {
	var s spoofer
	err := ns.Do(func() (err error) {
		for _, f := range []struct {
			family int
			file   **os.File
		}{{unix.AF_INET, &s.v4}, {unix.AF_INET6, &s.v6}} {
			// IPPROTO_RAW only sends, and sends what has its own header.
			fd, err := unix.Socket(f.family, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_RAW)
			if errors.Is(err, unix.EAFNOSUPPORT) {
				continue // a node without IPv6
			}
			if err != nil {
				return fmt.Errorf("make a socket for answers in the names of others (it needs CAP_NET_RAW): %w", err)
			}
			*f.file = os.NewFile(uintptr(fd), "raw")
			if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, wireMark); err != nil {
				return fmt.Errorf("mark socket: %w", err)
			}
		}
		return nil
	})
	if err != nil {
		s.close()
		return nil, err
	}
	return &s, nil
}

// send sends data. packet is a buffer for it, which may be nil.
func (s *spoofer) send(packet []byte, from, to netip.AddrPort, data []byte) error {
	packet, err := appendDatagram(packet[:0], from, to, data)
	if err != nil {
		return err
	}
	var sa unix.Sockaddr
	file := s.v4
	if a := to.Addr().Unmap(); a.Is4() {
		sa = &unix.SockaddrInet4{Addr: a.As4()}
	} else {
		file, sa = s.v6, &unix.SockaddrInet6{Addr: a.As16()}
	}
	raw, err := file.SyscallConn() // fails also without a file
	if err != nil {
		return err
	}
	var sendErr error
	if err := raw.Control(func(fd uintptr) { sendErr = unix.Sendto(int(fd), packet, unix.MSG_DONTWAIT, sa) }); err != nil {
		return err
	}
	return os.NewSyscallError("sendto", sendErr)
}

func (s *spoofer) close() {
	for _, f := range []*os.File{s.v4, s.v6} {
		if f != nil {
			f.Close()
		}
	}
}
