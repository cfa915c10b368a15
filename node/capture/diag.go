package capture

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Where the kernel has no socket iterators, connections cannot be kept. They
// are found and destroyed by sock_diag(7) then.

// A connection is one end of a TCP connection in the pod's namespace.
type connection struct {
	family        uint8
	local, remote netip.AddrPort
	iface         uint32
	cookie        [2]uint32
	mark          uint32
}

// mirrored is the key of the other end.
func (c connection) mirrored() [2]netip.AddrPort { return [2]netip.AddrPort{c.remote, c.local} }

// toReset returns which connections end when a pod joins the mesh, or, with
// captured, when it leaves. What has both ends in the namespace is captured, if
// it is not of the pod with itself; the app's end is the one with an address of
// the pod as its own. A listener that was not there before is no concern: it has
// no remote address.
func toReset(all []connection, own []netip.Addr, captured bool) []connection {
	there := map[[2]netip.AddrPort]bool{}
	for _, c := range all {
		there[[2]netip.AddrPort{c.local, c.remote}] = true
	}
	isOwn := map[netip.Addr]bool{}
	for _, a := range own {
		isOwn[a] = true
	}
	var out []connection
	for _, c := range all {
		if !isOwn[c.local.Addr()] || isOwn[c.remote.Addr()] || c.mark == MarkProxy {
			continue
		}
		if there[c.mirrored()] == captured {
			out = append(out, c)
		}
	}
	return out
}

// reset destroys connections of the pod, and returns how many.
func (p *Pod) reset(captured bool) (int, error) {
	n := 0
	err := p.ns.Do(func() error {
		var all []connection
		for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
			list, err := connections(family)
			if err != nil {
				return fmt.Errorf("list the pod's connections: %w", err)
			}
			all = append(all, list...)
		}
		for _, c := range toReset(all, p.place.addrs, captured) {
			err := c.destroy()
			if errors.Is(err, unix.ENOENT) { // it has just ended
				continue
			}
			if err != nil {
				return fmt.Errorf("destroy the connection from %v to %v: %w", c.local, c.remote, err)
			}
			n++
		}
		return nil
	})
	return n, err
}

// diagRequest is struct inet_diag_req_v2 of linux/inet_diag.h.
type diagRequest struct {
	family, protocol, ext uint8
	states                uint32
	connection
}

const (
	diagRequestLen = 56
	diagMessageLen = 72
	diagMark       = 15 // INET_DIAG_MARK
)

func (r diagRequest) Len() int { return diagRequestLen }

func (r diagRequest) Serialize() []byte {
	b := make([]byte, diagRequestLen)
	b[0], b[1], b[2] = r.family, r.protocol, r.ext
	binary.NativeEndian.PutUint32(b[4:], r.states)
	binary.BigEndian.PutUint16(b[8:], r.local.Port())
	binary.BigEndian.PutUint16(b[10:], r.remote.Port())
	if r.local.IsValid() {
		putAddr(b[12:28], r.family, r.local.Addr())
		putAddr(b[28:44], r.family, r.remote.Addr())
	}
	binary.NativeEndian.PutUint32(b[44:], r.iface)
	binary.NativeEndian.PutUint32(b[48:], r.cookie[0])
	binary.NativeEndian.PutUint32(b[52:], r.cookie[1])
	return b
}

func putAddr(b []byte, family uint8, a netip.Addr) {
	if family == unix.AF_INET {
		v4 := a.As4()
		copy(b, v4[:])
		return
	}
	v6 := a.As16()
	copy(b, v6[:])
}

// connections lists those of the calling thread's namespace.
func connections(family uint8) ([]connection, error) {
	const listen, timeWait, closed = 1 << 10, 1 << 6, 1 << 7
	req := nl.NewNetlinkRequest(unix.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP)
	req.AddData(diagRequest{family: family, protocol: unix.IPPROTO_TCP, states: 0xfff &^ (listen | timeWait | closed)})
	msgs, err := req.Execute(unix.NETLINK_INET_DIAG, 0)
	if err != nil {
		return nil, os.NewSyscallError("sock_diag", err)
	}
	var out []connection
	for _, m := range msgs {
		if c, ok := parseDiag(m); ok {
			out = append(out, c)
		}
	}
	return out, nil
}

// parseDiag reads a struct inet_diag_msg and the attributes behind it.
func parseDiag(b []byte) (c connection, ok bool) {
	if len(b) < diagMessageLen {
		return c, false
	}
	addr := func(b []byte) netip.Addr {
		if c.family == unix.AF_INET {
			return netip.AddrFrom4([4]byte(b[:4]))
		}
		return netip.AddrFrom16([16]byte(b[:16])).Unmap()
	}
	c.family = b[0]
	c.local = netip.AddrPortFrom(addr(b[8:24]), binary.BigEndian.Uint16(b[4:]))
	c.remote = netip.AddrPortFrom(addr(b[24:40]), binary.BigEndian.Uint16(b[6:]))
	c.iface = binary.NativeEndian.Uint32(b[40:])
	c.cookie = [2]uint32{binary.NativeEndian.Uint32(b[44:]), binary.NativeEndian.Uint32(b[48:])}
	attrs, err := nl.ParseRouteAttr(b[diagMessageLen:])
	if err != nil {
		return c, false
	}
	for _, a := range attrs {
		if a.Attr.Type == diagMark && len(a.Value) >= 4 {
			c.mark = binary.NativeEndian.Uint32(a.Value)
		}
	}
	return c, true
}

// destroy resets the connection (SOCK_DESTROY).
func (c connection) destroy() error {
	req := nl.NewNetlinkRequest(unix.SOCK_DESTROY, unix.NLM_F_ACK)
	req.AddData(diagRequest{family: c.family, protocol: unix.IPPROTO_TCP, states: 0xffffffff, connection: c})
	_, err := req.Execute(unix.NETLINK_INET_DIAG, 0)
	return err
}
