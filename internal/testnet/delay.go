package testnet

import (
	"encoding/binary"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A Delay is a long wire between two hosts.
type Delay struct {
	// Each is how long a frame takes in each direction.
	Each time.Duration
	// LoseEvery loses one frame in so many; 0 loses none. A frame may be a
	// large one that the network card would cut.
	LoseEvery int
}

// Delay takes the wires of two hosts out of the switch and joins them by a long
// one, until the test ends. It is a process that carries frames: the kernel may
// have no queueing discipline that delays.
func (w *World) Delay(a, b *Host, d Delay) {
	w.t.Helper()
	x, y := w.port(a), w.port(b)
	var wg sync.WaitGroup
	w.t.Cleanup(func() {
		_ = x.Close() // what is on its way is lost, as when a cable is cut
		_ = y.Close()
		wg.Wait()
	})
	wg.Go(func() { d.carry(x, y) })
	wg.Go(func() { d.carry(y, x) })
}

// port unplugs a host from the switch and returns a raw socket on its wire.
func (w *World) port(h *Host) *os.File {
	w.t.Helper()
	name := "port" + strconv.Itoa(int(h.V4.As4()[3]))
	var f *os.File
	w.sw.links(func(nl *netlink.Handle) error {
		l, err := nl.LinkByName(name)
		if err != nil {
			return err
		}
		if err := nl.LinkSetNoMaster(l); err != nil {
			return err
		}
		all := binary.NativeEndian.Uint16([]byte{0, unix.ETH_P_ALL}) // htons
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(all))
		if err != nil {
			return os.NewSyscallError("socket", err)
		}
		f = os.NewFile(uintptr(fd), name)
		// With its header frames may be larger than the wire, and lack their
		// checksum, as they are on a veth.
		for _, option := range []int{unix.PACKET_VNET_HDR, unix.PACKET_IGNORE_OUTGOING} {
			if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, option, 1); err != nil {
				return os.NewSyscallError("setsockopt", err)
			}
		}
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 32<<20) // or what it is by default
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 32<<20) // as above
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: l.Attrs().Index})
	})
	return f
}

// carry passes frames on until one of the sockets is closed.
func (d Delay) carry(from, to *os.File) {
	type frame struct {
		b   []byte
		due time.Time
	}
	line := make(chan frame, 1<<14)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer close(line)
	wg.Go(func() {
		for f := range line {
			time.Sleep(time.Until(f.due))
			_, _ = to.Write(f.b) // a frame that is lost is lost
		}
	})
	buf := make([]byte, 1<<17)
	for n := 1; ; n++ {
		k, err := from.Read(buf)
		if err != nil {
			return
		}
		if d.LoseEvery > 0 && n%d.LoseEvery == 0 {
			continue
		}
		select {
		case line <- frame{append([]byte(nil), buf[:k]...), time.Now().Add(d.Each)}:
		default: // the wire is full
		}
	}
}
