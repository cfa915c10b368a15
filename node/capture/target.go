package capture

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/bpf"
	"github.com/weft-mesh/weft/internal/netns"
)

// A Target is a pod to capture.
type Target struct {
	// UID is the pod's UID, the name of its pins.
	UID string
	// Netns is the pod's network namespace. The caller closes it; Prepare
	// keeps a descriptor of its own.
	Netns *netns.NS
	// Addrs are the pod's addresses, as the control plane knows them: one
	// of a family at most, or two of which the first is used as the source
	// of captured connections. All must be present in Netns.
	Addrs []netip.Addr
	// DNS: the proxy gets what the pod sends over UDP to port 53 of others.
	// It must be one that answers; see Pod.CaptureDNS.
	DNS bool
}

// A place is what was found out about a pod's network.
type place struct {
	addrs  []netip.Addr // every address in the namespace
	v4, v6 netip.Addr   // source of captured connections; zero if the family is off
	eth0   int          // index of the pod's end of the veth
	veth   int          // index of the host's end
	dns    bool         // name queries are captured

	nsid     int // the pod's namespace as the host's numbers it
	hostNsid int // the host's namespace as the pod's numbers it
}

// survey finds the pod's addresses and both ends of its wire. It refuses a
// namespace that is the host's, or that has not the pod's addresses: a wrong
// namespace here would capture somebody else as this pod.
func (c *Capture) survey(t Target) (place, error) {
	id, err := t.Netns.ID()
	if err != nil {
		return place{}, err
	}
	if id == c.hostID {
		return place{}, errors.New("its network namespace is the host's; pods with hostNetwork cannot be captured")
	}
	if len(t.Addrs) == 0 {
		return place{}, errors.New("it has no address yet")
	}
	w := place{dns: t.DNS}
	for _, a := range t.Addrs {
		a = a.Unmap()
		switch {
		case a.Is4() && !w.v4.IsValid():
			w.v4 = a
		case a.Is6() && !w.v6.IsValid():
			w.v6 = a
		}
	}
	if w.addrs, err = t.Netns.Addrs(); err != nil {
		return place{}, err
	}
	for _, a := range t.Addrs {
		if !slices.Contains(w.addrs, a.Unmap()) {
			return place{}, fmt.Errorf("its network namespace has the addresses %v and not %v: it is another pod's, or the pod is being restarted", w.addrs, a)
		}
	}
	peer, err := w.findPodEnd(c.cfg.HostNS, t)
	if err != nil {
		return place{}, err
	}
	return w, w.findHostEnd(c.cfg.HostNS, t.Netns, peer)
}

// findPodEnd finds the interface with the pod's address and returns the index
// of its peer.
func (w *place) findPodEnd(host *netns.NS, t Target) (peer int, err error) {
	err = t.Netns.Do(func() error {
		nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer nl.Close()
		list, err := nl.AddrList(nil, netlink.FAMILY_ALL)
		if err != nil {
			return fmt.Errorf("list addresses: %w", err)
		}
		first := t.Addrs[0].Unmap()
		for _, a := range list {
			if addr, ok := netip.AddrFromSlice(a.IP); ok && addr.Unmap() == first {
				w.eth0 = a.LinkIndex
			}
		}
		l, err := nl.LinkByIndex(w.eth0)
		if err != nil {
			return fmt.Errorf("find the interface with address %v: %w", first, err)
		}
		if l.Type() != "veth" {
			return fmt.Errorf("interface %s with address %v is of kind %s; only veth can be captured", l.Attrs().Name, first, l.Type())
		}
		peer = l.Attrs().ParentIndex
		if w.hostNsid, err = numberOf(nl, host); err != nil {
			return fmt.Errorf("number the host's namespace in the pod's: %w", err)
		}
		return nil
	})
	return peer, err
}

// numberOf returns the number that the namespace of nl has for ns. It gives it
// one if it has none; nobody can change it then.
func numberOf(nl *netlink.Handle, ns *netns.NS) (int, error) {
	nsid, err := nl.GetNetNsIdByFd(ns.Fd())
	if err == nil && nsid < 0 {
		// -1 asks the kernel to choose. EEXIST: somebody was faster.
		if err = nl.SetNetNsIdByFd(ns.Fd(), -1); err == nil || errors.Is(err, unix.EEXIST) {
			nsid, err = nl.GetNetNsIdByFd(ns.Fd())
		}
	}
	if err == nil && nsid < 0 {
		err = fmt.Errorf("got the number %d", nsid)
	}
	return nsid, err
}

// findHostEnd finds the pod's veth in the host's namespace, and the number
// that the host's namespace has for the pod's.
func (w *place) findHostEnd(host, pod *netns.NS, index int) error {
	return host.Do(func() error {
		nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer nl.Close()
		nsid, err := numberOf(nl, pod)
		if err != nil {
			return fmt.Errorf("number the pod's namespace in the host's: %w", err)
		}
		l, err := nl.LinkByIndex(index)
		if err != nil {
			return fmt.Errorf("find the host's end of the pod's veth, index %d in the host's namespace: %w", index, err)
		}
		// An index means something in one namespace only: make sure that
		// this is the other end of this wire.
		if a := l.Attrs(); l.Type() != "veth" || a.ParentIndex != w.eth0 || a.NetNsID != nsid {
			return fmt.Errorf("interface %s (%s) of the host is not the other end of the pod's veth; is the pod attached to another namespace than the host's?", a.Name, l.Type())
		}
		w.veth, w.nsid = index, nsid
		return nil
	})
}

// entry is what the programs know about the pod, but for its mode.
func (w place) entry() (bpf.CapturePod, error) {
	e := bpf.CapturePod{Nsid: uint32(w.nsid), HostNsid: uint32(w.hostNsid)}
	var n4, n6 int
	for _, a := range w.addrs {
		if a.Is4() && n4 < len(e.Ip4) {
			b := a.As4()
			e.Ip4[n4] = binary.NativeEndian.Uint32(b[:])
			n4++
			continue
		}
		if a.Is6() && n6 < len(e.Ip6) {
			b := a.As16()
			for i := range 4 {
				e.Ip6[n6][i] = binary.NativeEndian.Uint32(b[4*i:])
			}
			n6++
			continue
		}
		return e, fmt.Errorf("the pod has more than %d addresses of one family, the programs hold no more: %v", len(e.Ip4), w.addrs)
	}
	return e, nil
}
