// Package wire watches a network link and says what crossed it: plain text, or
// TLS to the mesh's port.
package wire

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"
)

// HBONE is the port on which meshed pods accept mutual TLS.
const HBONE = 15008

// A Segment is a TCP segment.
type Segment struct {
	When     time.Time
	Src, Dst netip.AddrPort
	SYN      bool // it asks for a connection: SYN without ACK
	Payload  []byte
}

// drainTime bounds how long Close reads what is left, on a link that is never
// silent.
const drainTime = 5 * time.Second

// A Tap records the TCP segments with a payload that cross one interface. Close
// it after use.
type Tap struct {
	fd     int
	length int           // of a frame that is read; the rest is cut off
	each   func(Segment) // of OpenFunc
	closed atomic.Bool
	reader sync.WaitGroup

	mu       sync.Mutex
	segments []Segment
	err      error
}

// Open starts to record at an interface of the network namespace at path, for
// example "/run/netns/node1" and "eth0"; an empty interface is all of them. It
// needs CAP_NET_RAW and CAP_SYS_ADMIN.
func Open(path, iface string) (*Tap, error) {
	t := &Tap{length: 1 << 17}
	t.each = t.record
	return t, t.open(path, iface)
}

// OpenFunc is Open, but keeps nothing: each segment, also one without payload,
// is given to a function, one after the other until Close returns. Of the
// payload only the beginning is there.
func OpenFunc(path, iface string, each func(Segment)) (*Tap, error) {
	t := &Tap{length: 512, each: each}
	return t, t.open(path, iface)
}

func (t *Tap) open(path, iface string) error {
	var err error
	if t.fd, err = packetSocket(path, iface); err != nil {
		return fmt.Errorf("watch %s in %s: %w", iface, path, err)
	}
	t.reader.Go(t.read)
	return nil
}

// packetSocket makes a packet socket inside the namespace. The thread that
// entered it is thrown away.
func packetSocket(path, iface string) (int, error) {
	type result struct {
		fd  int
		err error
	}
	c := make(chan result)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		fd, err := packetSocketHere(path, iface)
		c <- result{fd, err}
	}()
	r := <-c
	return r.fd, r.err
}

func packetSocketHere(path, iface string) (int, error) {
	ns, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	defer unix.Close(ns)
	if err := unix.Setns(ns, unix.CLONE_NEWNET); err != nil {
		return -1, fmt.Errorf("enter namespace: %w", err)
	}
	const all = 0x0300 // ETH_P_ALL in network order
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("packet socket: %w", err)
	}
	index, err := indexOf(fd, iface)
	if err == nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 32<<20)
		_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000})
		err = unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: index})
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// indexOf returns the index of an interface of the socket's namespace; 0, for
// all, if it has no name.
func indexOf(fd int, iface string) (int, error) {
	if iface == "" {
		return 0, nil
	}
	ifr, err := unix.NewIfreq(iface)
	if err != nil {
		return 0, err
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, ifr); err != nil {
		return 0, err
	}
	return int(ifr.Uint32()), nil
}

func (t *Tap) read() {
	buf := make([]byte, t.length)
	flags := 0
	var end time.Time // what crossed the interface before Close is read to here
	for {
		if flags == 0 && t.closed.Load() {
			flags, end = unix.MSG_DONTWAIT, time.Now().Add(drainTime)
		}
		n, _, err := unix.Recvfrom(t.fd, buf, flags)
		switch {
		case flags != 0 && (errors.Is(err, unix.EAGAIN) || time.Now().After(end)):
			return
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
			continue
		}
		if err != nil {
			t.mu.Lock()
			t.err = err
			t.mu.Unlock()
			return
		}
		if s, ok := parse(buf[:n]); ok {
			t.each(s)
		}
	}
}

// record keeps a segment that has a payload.
func (t *Tap) record(s Segment) {
	if len(s.Payload) == 0 {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.segments = append(t.segments, s)
}

// parse reads an Ethernet frame. It reports false for anything but a TCP
// segment.
func parse(frame []byte) (Segment, bool) {
	p := gopacket.NewPacket(frame, layers.LayerTypeEthernet, gopacket.NoCopy)
	tcp, ok := p.Layer(layers.LayerTypeTCP).(*layers.TCP)
	if !ok || p.NetworkLayer() == nil {
		return Segment{}, false
	}
	src, _ := netip.AddrFromSlice(p.NetworkLayer().NetworkFlow().Src().Raw())
	dst, _ := netip.AddrFromSlice(p.NetworkLayer().NetworkFlow().Dst().Raw())
	return Segment{
		When:    time.Now(),
		Src:     netip.AddrPortFrom(src, uint16(tcp.SrcPort)),
		Dst:     netip.AddrPortFrom(dst, uint16(tcp.DstPort)),
		SYN:     tcp.SYN && !tcp.ACK,
		Payload: bytes.Clone(tcp.Payload),
	}, true
}

// Close stops recording; what crossed the interface before is recorded. It returns the error that stopped the recording
// early, if one did: then what was seen is not all there was.
func (t *Tap) Close() error {
	t.closed.Store(true)
	t.reader.Wait()
	unix.Close(t.fd)
	return t.err
}

// A Sighting sums up what was seen between some addresses.
type Sighting struct {
	Segments int // TCP segments with a payload
	Marked   int // those that hold the marker: plain text
	Tunnel   int // those to or from port 15008
	Other    int // those of any other port
	TLS13    int // ServerHello messages that chose TLS 1.3, from port 15008
	// FirstOther is an example of Other, for the message of a failure.
	FirstOther string
}

// Between sums up the segments since a moment of which both ends are among
// addrs. An empty marker marks nothing.
func (t *Tap) Between(addrs []netip.Addr, marker []byte, since time.Time) (Sighting, error) {
	among := make(map[netip.Addr]bool, len(addrs))
	for _, a := range addrs {
		among[a] = true
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	var s Sighting
	for _, g := range t.segments {
		if g.When.Before(since) || !among[g.Src.Addr()] || !among[g.Dst.Addr()] {
			continue
		}
		s.add(g, marker)
	}
	return s, t.err
}

func (s *Sighting) add(g Segment, marker []byte) {
	s.Segments++
	if len(marker) > 0 && bytes.Contains(g.Payload, marker) {
		s.Marked++
	}
	if g.Src.Port() != HBONE && g.Dst.Port() != HBONE {
		s.Other++
		if s.FirstOther == "" {
			s.FirstOther = fmt.Sprintf("%v to %v: %.60q", g.Src, g.Dst, g.Payload)
		}
		return
	}
	s.Tunnel++
	if g.Src.Port() == HBONE && choosesTLS13(g.Payload) {
		s.TLS13++
	}
}

// choosesTLS13 reports whether p begins with a handshake record that holds a
// ServerHello with supported_versions 0x0304 (RFC 8446, 4.2.1).
func choosesTLS13(p []byte) bool {
	return len(p) > 6 && p[0] == 22 && p[5] == 2 && bytes.Contains(p, []byte{0, 43, 0, 2, 3, 4})
}
