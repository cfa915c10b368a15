// Package testnet builds small worlds of network namespaces for tests on the
// real kernel: nodes that forward, pods behind veths, hosts outside.
//
// A namespace lives in a descriptor of the test process and in nothing else,
// so worlds of different processes cannot meet, and one whose process was
// killed leaves nothing behind. Building one needs root.
package testnet

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/internal/netns"
)

// A Host is a network namespace with lo up. It is gone when the test ends.
type Host struct {
	*netns.NS
	Name string
	// V4 and V6 are its addresses; zero if it has none of that family.
	V4, V6 netip.Addr

	t testing.TB
}

// newHost makes a namespace. It skips the test without root.
func newHost(t testing.TB, name string) *Host {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make network namespaces")
	}
	ns, err := unshare()
	if err != nil {
		t.Fatalf("make network namespace %s: %v", name, err)
	}
	t.Cleanup(func() { ns.Close() })
	h := &Host{NS: ns, Name: name, t: t}
	h.links(func(nl *netlink.Handle) error { return up(nl, "lo") })
	// Addresses must be usable at once, not after duplicate detection.
	for _, which := range []string{"all", "default"} {
		h.Sysctl("net/ipv6/conf/"+which+"/accept_dad", "0")
		h.Sysctl("net/ipv6/conf/"+which+"/router_solicitations", "0")
	}
	return h
}

// unshare makes a namespace on a thread that ends with it.
func unshare() (ns *netns.NS, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread is in the new namespace
		if err = unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return
		}
		ns, err = netns.Current()
	}()
	<-done
	return ns, err
}

// links runs f with a netlink handle inside the namespace.
func (h *Host) links(f func(nl *netlink.Handle) error) {
	h.t.Helper()
	err := h.Do(func() error {
		nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer nl.Close()
		return f(nl)
	})
	if err != nil {
		h.t.Fatalf("configure %s: %v", h.Name, err)
	}
}

func up(nl *netlink.Handle, name string) error {
	l, err := nl.LinkByName(name)
	if err != nil {
		return err
	}
	return nl.LinkSetUp(l)
}

// Sysctl sets a value below /proc/sys in the namespace.
func (h *Host) Sysctl(key, value string) {
	h.t.Helper()
	err := h.Do(func() error { return os.WriteFile(filepath.Join("/proc/sys", key), []byte(value), 0) })
	if err != nil {
		h.t.Fatalf("sysctl in %s: %v", h.Name, err)
	}
}

// Run runs a command in the namespace and returns its output. It fails the
// test if the command does.
func (h *Host) Run(name string, args ...string) string {
	h.t.Helper()
	var out []byte
	// A process is born in the namespace of the thread that starts it.
	err := h.Do(func() (err error) {
		out, err = exec.Command(name, args...).CombinedOutput()
		return err
	})
	if err != nil {
		h.t.Fatalf("%s %s in %s: %v\n%s", name, strings.Join(args, " "), h.Name, err, out)
	}
	return string(out)
}

// Listen listens as an ordinary program in the namespace would. The listener
// is closed when the test ends.
func (h *Host) Listen(address string) *net.TCPListener {
	h.t.Helper()
	var l net.Listener
	err := h.Do(func() (err error) {
		l, err = net.Listen("tcp", address)
		return err
	})
	if err != nil {
		h.t.Fatalf("listen in %s: %v", h.Name, err)
	}
	h.t.Cleanup(func() { l.Close() })
	return l.(*net.TCPListener)
}

// Dial connects as an ordinary program in the namespace would. It is for what
// works, so it has the time that a busy machine may need. The connection is
// closed when the test ends.
func (h *Host) Dial(to netip.AddrPort) (*net.TCPConn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	c, err := h.NS.Dial(ctx, "tcp", netip.AddrPort{}, to, nil)
	if err != nil {
		return nil, err
	}
	h.t.Cleanup(func() { c.Close() })
	return c, nil
}

// A World is a switch with nodes and other hosts around it.
type World struct {
	t     testing.TB
	sw    *Host
	hosts int
	all   []*Host // on the switch
	nodes []*Node
}

// New returns a world without nodes. It skips the test without root.
func New(t testing.TB) *World {
	t.Helper()
	w := &World{t: t, sw: newHost(t, "switch")}
	w.sw.links(func(nl *netlink.Handle) error {
		if err := nl.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}}); err != nil {
			return err
		}
		return up(nl, "br0")
	})
	return w
}

// Host adds a host to the switch: 10.70.0.N and fd70::N on its uplink, with
// routes to the pods of the nodes that exist.
func (w *World) Host(name string) *Host {
	w.t.Helper()
	h := newHost(w.t, name)
	w.hosts++
	w.all = append(w.all, h)
	h.V4 = netip.AddrFrom4([4]byte{10, 70, 0, byte(w.hosts)})
	h.V6 = netip.MustParseAddr("fd70::" + strconv.Itoa(w.hosts))
	port := "port" + strconv.Itoa(w.hosts)
	w.sw.veth(port, "uplink", h, "")
	w.sw.links(func(nl *netlink.Handle) error {
		l, err := nl.LinkByName(port)
		if err != nil {
			return err
		}
		br, err := nl.LinkByName("br0")
		if err != nil {
			return err
		}
		return nl.LinkSetMaster(l, br)
	})
	h.addr("uplink", netip.PrefixFrom(h.V4, 24), netip.PrefixFrom(h.V6, 64))
	for _, n := range w.nodes {
		h.route(n.pods4, n.V4, "uplink")
		h.route(n.pods6, n.V6, "uplink")
	}
	return h
}

// A Node is a host that forwards for its pods, with a strict reverse path
// filter, as Kubernetes nodes have.
type Node struct {
	*Host
	w            *World
	pods         int
	bridged      bool
	pods4, pods6 netip.Prefix
}

// Node adds a node to the switch, with routes to and from those before it.
func (w *World) Node(name string) *Node {
	w.t.Helper()
	i := len(w.nodes) + 1
	n := &Node{
		Host:  w.Host(name),
		w:     w,
		pods4: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 77, byte(i), 0}), 24),
		pods6: netip.MustParsePrefix(fmt.Sprintf("fd77:0:0:%d::/64", i)),
	}
	n.Sysctl("net/ipv4/ip_forward", "1")
	n.Sysctl("net/ipv6/conf/all/forwarding", "1")
	n.Sysctl("net/ipv4/conf/all/rp_filter", "1")
	n.Sysctl("net/ipv4/conf/default/rp_filter", "1")
	for _, other := range w.nodes {
		other.route(n.pods4, n.V4, "uplink")
		other.route(n.pods6, n.V6, "uplink")
	}
	w.nodes = append(w.nodes, n)
	return n
}

// A Pod is a namespace behind a veth of its node.
type Pod struct {
	*Host
	Node *Node
	// Veth is the name of the host's side.
	Veth string
	// Interface is the name of the pod's side, eth0 unless a Shape says
	// otherwise.
	Interface string
}

// Kind is how a pod is attached to its node.
type Kind int

const (
	Routed  Kind = iota // a /32 and a route on the node, as Calico and the ptp plug-in do
	Bridged             // an address of the node's bridge's subnet, as the bridge plug-in does
)

// Pod adds a pod to the node.
func (n *Node) Pod(name string, kind Kind) *Pod { return n.ShapedPod(name, kind, Shape{}) }

// PodWithoutIPv6 adds a pod in which IPv6 is switched off.
func (n *Node) PodWithoutIPv6(name string, kind Kind) *Pod {
	return n.ShapedPod(name, kind, Shape{NoIPv6: true})
}

// A Shape is how a pod differs from the usual one.
type Shape struct {
	Interface string // eth0 if empty
	NoIPv4    bool   // the pod has no IPv4 address
	NoIPv6    bool   // IPv6 is switched off in the pod
}

// ShapedPod adds a pod of this shape to the node.
func (n *Node) ShapedPod(name string, kind Kind, shape Shape) *Pod {
	n.t.Helper()
	n.pods++
	p := &Pod{Host: newHost(n.t, name), Node: n, Veth: "veth" + strconv.Itoa(n.pods), Interface: cmp.Or(shape.Interface, "eth0")}
	last := n.pods + 10
	range4, range6 := n.pods4, n.pods6
	if kind == Bridged {
		range4, range6 = n.bridge()
	}
	if !shape.NoIPv4 {
		a4 := range4.Addr().As4()
		a4[3] += byte(last)
		p.V4 = netip.AddrFrom4(a4)
	}
	if shape.NoIPv6 {
		p.Sysctl("net/ipv6/conf/all/disable_ipv6", "1")
		p.Sysctl("net/ipv6/conf/default/disable_ipv6", "1")
	} else {
		a6 := range6.Addr().As16()
		a6[15] = byte(last)
		p.V6 = netip.AddrFrom16(a6)
	}
	n.veth(p.Veth, p.Interface, p.Host, "02:00:00:00:00:"+fmt.Sprintf("%02x", last))
	if kind == Bridged {
		n.plug(p)
	} else {
		n.wire(p)
	}
	return p
}

// bridge returns the part of the pods' ranges that is the bridge's subnet.
func (n *Node) bridge() (v4, v6 netip.Prefix) {
	a4, a6 := n.pods4.Addr().As4(), n.pods6.Addr().As16()
	a4[3] = 128
	a6[9] = 1
	return netip.PrefixFrom(netip.AddrFrom4(a4), 25), netip.PrefixFrom(netip.AddrFrom16(a6), 80)
}

// plug connects the pod to the node's bridge.
func (n *Node) plug(p *Pod) {
	range4, range6 := n.bridge()
	gw4, gw6 := range4.Addr().Next(), range6.Addr().Next()
	if !n.bridged {
		n.bridged = true
		n.links(func(nl *netlink.Handle) error {
			if err := nl.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "cni0"}}); err != nil {
				return err
			}
			return up(nl, "cni0")
		})
		n.addr("cni0", netip.PrefixFrom(gw4, range4.Bits()), netip.PrefixFrom(gw6, range6.Bits()))
	}
	n.links(func(nl *netlink.Handle) error {
		l, err := nl.LinkByName(p.Veth)
		if err != nil {
			return err
		}
		br, err := nl.LinkByName("cni0")
		if err != nil {
			return err
		}
		if err := nl.LinkSetMaster(l, br); err != nil {
			return err
		}
		return nl.LinkSetHairpin(l, true)
	})
	p.addr(p.Interface, prefix(p.V4, range4.Bits()), prefix(p.V6, range6.Bits()))
	if p.V4.IsValid() {
		p.route(netip.MustParsePrefix("0.0.0.0/0"), gw4, p.Interface)
	}
	if p.V6.IsValid() {
		p.route(netip.MustParsePrefix("::/0"), gw6, p.Interface)
	}
}

// gateway is the hardware address of the node's ends of routed pods' wires.
const gateway = "ee:ee:ee:ee:00:01"

// wire gives the pod an address of its own and routes it.
func (n *Node) wire(p *Pod) {
	n.links(func(nl *netlink.Handle) error {
		l, err := nl.LinkByName(p.Veth)
		if err != nil {
			return err
		}
		hw, _ := net.ParseMAC(gateway)
		return nl.LinkSetHardwareAddr(l, hw)
	})
	p.addr(p.Interface, prefix(p.V4, 32), prefix(p.V6, 128))
	podHW := p.hardware(p.Interface)
	for _, way := range []struct {
		pod      netip.Addr
		gateway  string
		anywhere string
	}{{p.V4, "169.254.1.1", "0.0.0.0/0"}, {p.V6, "fe80::1", "::/0"}} {
		if !way.pod.IsValid() {
			continue
		}
		via := netip.MustParseAddr(way.gateway)
		p.neighbour(p.Interface, via, gateway)
		p.route(netip.MustParsePrefix(way.anywhere), via, p.Interface)
		n.route(prefix(way.pod, way.pod.BitLen()), netip.Addr{}, p.Veth)
		n.neighbour(p.Veth, way.pod, podHW)
	}
}

// prefix returns a/bits, or the zero prefix if there is no a.
func prefix(a netip.Addr, bits int) netip.Prefix {
	if !a.IsValid() {
		return netip.Prefix{}
	}
	return netip.PrefixFrom(a, bits)
}

// veth makes a pair with one end, name, in h and the other, peer, in to.
func (h *Host) veth(name, peer string, to *Host, peerHW string) {
	h.t.Helper()
	h.links(func(nl *netlink.Handle) error {
		v := &netlink.Veth{
			LinkAttrs:     netlink.LinkAttrs{Name: name},
			PeerName:      peer,
			PeerNamespace: netlink.NsFd(to.Fd()),
		}
		if peerHW != "" {
			v.PeerHardwareAddr, _ = net.ParseMAC(peerHW)
		}
		if err := nl.LinkAdd(v); err != nil {
			return err
		}
		return up(nl, name)
	})
	to.links(func(nl *netlink.Handle) error { return up(nl, peer) })
}

func (h *Host) addr(link string, prefixes ...netip.Prefix) {
	h.t.Helper()
	h.links(func(nl *netlink.Handle) error {
		l, err := nl.LinkByName(link)
		if err != nil {
			return err
		}
		for _, p := range prefixes {
			if !p.IsValid() {
				continue
			}
			a := &netlink.Addr{IPNet: ipnet(p)}
			if p.Addr().Is6() {
				a.Flags = unix.IFA_F_NODAD
			}
			if err := nl.AddrAdd(l, a); err != nil {
				return err
			}
		}
		return nil
	})
}

func (h *Host) route(to netip.Prefix, via netip.Addr, link string) {
	h.t.Helper()
	h.links(func(nl *netlink.Handle) error {
		l, err := nl.LinkByName(link)
		if err != nil {
			return err
		}
		r := &netlink.Route{LinkIndex: l.Attrs().Index, Dst: ipnet(to)}
		if via.IsValid() {
			r.Gw = via.AsSlice()
			r.Flags = int(netlink.FLAG_ONLINK)
		}
		return nl.RouteReplace(r)
	})
}

func (h *Host) neighbour(link string, a netip.Addr, hw string) {
	h.t.Helper()
	h.links(func(nl *netlink.Handle) error {
		l, err := nl.LinkByName(link)
		if err != nil {
			return err
		}
		mac, err := net.ParseMAC(hw)
		if err != nil {
			return err
		}
		return nl.NeighSet(&netlink.Neigh{LinkIndex: l.Attrs().Index, State: netlink.NUD_PERMANENT, IP: a.AsSlice(), HardwareAddr: mac})
	})
}

func (h *Host) hardware(link string) (hw string) {
	h.t.Helper()
	h.links(func(nl *netlink.Handle) error {
		l, err := nl.LinkByName(link)
		if err != nil {
			return err
		}
		hw = l.Attrs().HardwareAddr.String()
		return nil
	})
	return hw
}

func ipnet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
