package testnet

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"os"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A Tap is a raw packet socket on one interface of a host.
type Tap struct {
	h     *Host
	fd    int
	index int
	// MAC is the interface's address.
	MAC net.HardwareAddr
}

// Tap opens a raw packet socket that sees what the interface receives and
// sends. It sends past the queueing discipline (PACKET_QDISC_BYPASS), and so
// past programs at the interface's egress, as a pod with CAP_NET_RAW can.
func (h *Host) Tap(link string) *Tap {
	h.t.Helper()
	tap := &Tap{h: h}
	h.links(func(nl *netlink.Handle) error {
		l, err := nl.LinkByName(link)
		if err != nil {
			return err
		}
		tap.index, tap.MAC = l.Attrs().Index, l.Attrs().HardwareAddr
		all := binary.NativeEndian.Uint16([]byte{0, unix.ETH_P_ALL}) // htons
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(all))
		if err != nil {
			return os.NewSyscallError("socket", err)
		}
		tap.fd = fd
		if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_QDISC_BYPASS, 1); err != nil {
			return os.NewSyscallError("setsockopt", err)
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: tap.index})
	})
	h.t.Cleanup(func() { unix.Close(tap.fd) })
	return tap
}

// Send sends a frame. That a program drops it on the way is no failure.
func (tap *Tap) Send(frame []byte) {
	tap.h.t.Helper()
	err := unix.Sendto(tap.fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: tap.index})
	if err != nil && !errors.Is(err, unix.ENOBUFS) {
		tap.h.t.Fatalf("send a frame from %s: %v", tap.h.Name, err)
	}
}

// Until returns the frames that arrive until one contains last, that one
// excluded. It fails the test if that takes very long. Frames keep their order,
// so what was sent before last and is not returned has not passed.
func (tap *Tap) Until(last []byte) [][]byte {
	tap.h.t.Helper()
	return tap.UntilSent(last, func() {})
}

// UntilSent is Until, and has last sent: at once, and again if it gets lost.
func (tap *Tap) UntilSent(last []byte, send func()) [][]byte {
	tap.h.t.Helper()
	var got [][]byte
	send()
	deadline, again := time.Now().Add(20*time.Second), time.Now().Add(time.Second)
	for time.Now().Before(deadline) {
		if time.Now().After(again) {
			again = again.Add(time.Second)
			send()
		}
		fds := []unix.PollFd{{Fd: int32(tap.fd), Events: unix.POLLIN}}
		if n, err := unix.Poll(fds, 100); n == 0 || errors.Is(err, unix.EINTR) {
			continue
		}
		b := make([]byte, 1<<16)
		n, _, err := unix.Recvfrom(tap.fd, b, 0)
		if err != nil {
			tap.h.t.Fatalf("receive a frame at %s: %v", tap.h.Name, err)
		}
		if bytes.Contains(b[:n], last) {
			return got
		}
		got = append(got, b[:n])
	}
	tap.h.t.Fatalf("the last frame did not arrive at %s", tap.h.Name)
	return nil
}

// MAC returns the address of an interface of the host.
func (h *Host) MAC(link string) net.HardwareAddr {
	h.t.Helper()
	hw, err := net.ParseMAC(h.hardware(link))
	if err != nil {
		h.t.Fatal(err)
	}
	return hw
}

// SendThroughQdisc sends a frame as the kernel sends its own: programs at the
// interface's egress see it.
func (tap *Tap) SendThroughQdisc(frame []byte) {
	tap.h.t.Helper()
	for _, bypass := range []int{0, 1} {
		if err := unix.SetsockoptInt(tap.fd, unix.SOL_PACKET, unix.PACKET_QDISC_BYPASS, bypass); err != nil {
			tap.h.t.Fatalf("set up a raw socket of %s: %v", tap.h.Name, err)
		}
		if bypass == 0 {
			tap.Send(frame)
		}
	}
}
