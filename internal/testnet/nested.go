package testnet

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
)

// Nesting is how a namespace made inside a pod is attached to the pod.
type Nesting int

const (
	// NestedVeth: a veth, and the pod forwards, as a container engine inside a
	// pod does. The addresses are 192.168.77.2 and fd68::2, the pod's are ...1.
	NestedVeth Nesting = iota
	// NestedMacvlan: an interface of its own on the pod's wire.
	NestedMacvlan
	// NestedMove: the pod's own interface is moved in, and the pod has none.
	NestedMove
)

// Nest makes a namespace inside the pod, as a process of the pod with
// CAP_NET_ADMIN and CAP_SYS_ADMIN can, with routes to everywhere by the pod's
// wire. On a macvlan or moved interface it takes the pod's addresses as its
// own; the pod must be Routed. Each of prepare is called before the namespace
// is attached.
func (p *Pod) Nest(name string, how Nesting, prepare ...func(h *Host)) *Host {
	p.t.Helper()
	h := newHost(p.t, name)
	for _, f := range prepare {
		f(h)
	}
	if how == NestedVeth {
		p.nestBehind(h)
		return h
	}
	link := p.Interface
	if how != NestedMove {
		link = "inner0"
	}
	p.links(func(nl *netlink.Handle) error {
		wire, err := nl.LinkByName(p.Interface)
		if err != nil {
			return err
		}
		if how == NestedMove {
			return nl.LinkSetNsFd(wire, h.Fd())
		}
		at := netlink.NewLinkAttrs()
		at.Name, at.ParentIndex, at.Namespace = link, wire.Attrs().Index, netlink.NsFd(h.Fd())
		return nl.LinkAdd(&netlink.Macvlan{LinkAttrs: at, Mode: netlink.MACVLAN_MODE_BRIDGE})
	})
	h.links(func(nl *netlink.Handle) error { return up(nl, link) })
	h.waitUp(link)
	p.Node.waitUp(p.Veth)
	h.V4, h.V6 = p.V4, p.V6
	h.addr(link, prefix(h.V4, 32), prefix(h.V6, 128))
	for via, to := range map[string]string{"169.254.1.1": "0.0.0.0/0", "fe80::1": "::/0"} {
		h.neighbour(link, netip.MustParseAddr(via), gateway)
		h.route(netip.MustParsePrefix(to), netip.MustParseAddr(via), link)
	}
	return h
}

// waitUp waits until an interface carries packets.
func (h *Host) waitUp(link string) {
	h.t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for up := false; !up; {
		h.links(func(nl *netlink.Handle) error {
			l, err := nl.LinkByName(link)
			if err != nil {
				return err
			}
			up = l.Attrs().OperState == netlink.OperUp
			if !up && time.Now().After(deadline) {
				return fmt.Errorf("%s does not come up", link)
			}
			return nil
		})
		if !up {
			time.Sleep(5 * time.Millisecond)
		}
	}
}

// nestBehind puts h behind the pod, which forwards for it.
func (p *Pod) nestBehind(h *Host) {
	p.t.Helper()
	h.V4, h.V6 = netip.MustParseAddr("192.168.77.2"), netip.MustParseAddr("fd68::2")
	gw4, gw6 := netip.MustParseAddr("192.168.77.1"), netip.MustParseAddr("fd68::1")
	p.veth("nested0", "inner0", h, "")
	p.addr("nested0", prefix(gw4, 24), prefix(gw6, 64))
	h.addr("inner0", prefix(h.V4, 24), prefix(h.V6, 64))
	h.route(netip.MustParsePrefix("0.0.0.0/0"), gw4, "inner0")
	h.route(netip.MustParsePrefix("::/0"), gw6, "inner0")
	p.Sysctl("net/ipv4/ip_forward", "1")
	p.Sysctl("net/ipv6/conf/all/forwarding", "1")
}

// SetMTU sets the MTU of the switch, of every uplink, and of both ends of the
// given pods' wires.
func (w *World) SetMTU(mtu int, pods ...*Pod) {
	w.t.Helper()
	w.sw.setMTU(mtu, func(string) bool { return true })
	for _, h := range w.all {
		h.setMTU(mtu, func(link string) bool { return link == "uplink" || link == "cni0" })
	}
	for _, p := range pods {
		p.setMTU(mtu, func(link string) bool { return link == p.Interface })
		p.Node.setMTU(mtu, func(link string) bool { return link == p.Veth })
	}
}

func (h *Host) setMTU(mtu int, which func(link string) bool) {
	h.t.Helper()
	h.links(func(nl *netlink.Handle) error {
		list, err := nl.LinkList()
		if err != nil {
			return err
		}
		for _, l := range list {
			if l.Attrs().Name == "lo" || !which(l.Attrs().Name) {
				continue
			}
			if err := nl.LinkSetMTU(l, mtu); err != nil {
				return fmt.Errorf("set the MTU of %s: %w", l.Attrs().Name, err)
			}
		}
		return nil
	})
}
