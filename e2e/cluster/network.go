package cluster

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/e2e/cluster/internal/enter"
)

const netnsDir = "/run/netns"

// netnsPath returns the file of a network namespace of the cluster: "control"
// or a node's name.
func (c *Cluster) netnsPath(part string) string {
	return filepath.Join(netnsDir, c.record.name()+"-"+part)
}

// NodeNetns returns the file of a node's network namespace. Its link to the
// other nodes is eth0.
func (c *Cluster) NodeNetns(node string) string { return c.netnsPath(node) }

// ControlNetns returns the file of the control plane's network namespace, from
// where the API server, the nodes and the pods can be reached.
func (c *Cluster) ControlNetns() string { return c.netnsPath("control") }

// makeNetwork makes the network namespaces, joins them by a bridge in the
// control plane's, and routes the pods of each node by way of the node. The
// machine's own network namespace gets no link, address, route or setting.
func (c *Cluster) makeNetwork() error {
	if c.record.Networked {
		return nil
	}
	c.removeNetwork() // what an interrupted attempt left
	control, err := newNetns(c.netnsPath("control"))
	if err != nil {
		return err
	}
	defer control.Close()
	h, err := netlink.NewHandleAt(control)
	if err != nil {
		return fmt.Errorf("open netlink in network namespace: %w", err)
	}
	defer h.Close()
	if err := makeBridge(h); err != nil {
		return err
	}
	if err := enter.Net(c.netnsPath("control"), quietBridge); err != nil {
		return err
	}
	for n := 1; n <= nodes; n++ {
		if err := c.joinNode(h, n); err != nil {
			return fmt.Errorf("join %s to the network: %w", NodeName(n), err)
		}
	}
	c.record.Networked = true
	return c.record.write(c.State)
}

const bridgeName = "nodes"

func makeBridge(h *netlink.Handle) error {
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: bridgeName}}
	if err := h.LinkAdd(bridge); err != nil {
		return fmt.Errorf("add a bridge: %w: the kernel needs CONFIG_BRIDGE (try: modprobe bridge)", err)
	}
	if err := addAddresses(h, bridge, []string{controlIP4, controlIP6}); err != nil {
		return err
	}
	return linksUp(h, bridgeName, "lo")
}

// quietBridge keeps what crosses the bridge out of iptables, which is how a
// switch between nodes behaves. The setting belongs to the network namespace;
// it is absent when br_netfilter is not loaded.
func quietBridge() error {
	for _, name := range []string{"iptables", "ip6tables", "arptables"} {
		err := os.WriteFile("/proc/sys/net/bridge/bridge-nf-call-"+name, []byte("0"), 0)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// joinNode makes the network namespace of node n and its link to the bridge.
func (c *Cluster) joinNode(control *netlink.Handle, n int) error {
	ns, err := newNetns(c.netnsPath(NodeName(n)))
	if err != nil {
		return err
	}
	defer ns.Close()
	veth := &netlink.Veth{
		LinkAttrs:     netlink.LinkAttrs{Name: NodeName(n)},
		PeerName:      "eth0",
		PeerNamespace: netlink.NsFd(int(ns)),
	}
	if err := control.LinkAdd(veth); err != nil {
		return fmt.Errorf("add a veth pair: %w: the kernel needs CONFIG_VETH (try: modprobe veth)", err)
	}
	bridge, err := control.LinkByName(bridgeName)
	if err != nil {
		return err
	}
	if err := control.LinkSetMaster(veth, bridge); err != nil {
		return err
	}
	if err := linksUp(control, NodeName(n)); err != nil {
		return err
	}
	if err := addRoutes(control, n); err != nil {
		return err
	}
	h, err := netlink.NewHandleAt(ns)
	if err != nil {
		return err
	}
	defer h.Close()
	eth0, err := h.LinkByName("eth0")
	if err != nil {
		return err
	}
	if err := addAddresses(h, eth0, nodeAddresses(n)); err != nil {
		return err
	}
	if err := linksUp(h, "lo", "eth0"); err != nil {
		return err
	}
	for other := 1; other <= nodes; other++ {
		if other != n {
			if err := addRoutes(h, other); err != nil {
				return err
			}
		}
	}
	return addDefaults(h)
}

// addRoutes routes the pods of node n by way of the node.
func addRoutes(h *netlink.Handle, n int) error {
	for i, cidr := range nodePodCIDRs(n) {
		if err := addRoute(h, cidr, nodeAddresses(n)[i]); err != nil {
			return err
		}
	}
	return nil
}

// addDefaults routes everything else to the control plane, which drops it: a
// node without a default route could not even begin to connect to a Service.
func addDefaults(h *netlink.Handle) error {
	if err := addRoute(h, "0.0.0.0/0", controlIP4); err != nil {
		return err
	}
	return addRoute(h, "::/0", controlIP6)
}

func addRoute(h *netlink.Handle, cidr, via string) error {
	_, dst, err := net.ParseCIDR(cidr)
	if err != nil {
		return err
	}
	if err := h.RouteAdd(&netlink.Route{Dst: dst, Gw: net.ParseIP(via)}); err != nil {
		return fmt.Errorf("route %s via %s: %w", cidr, via, err)
	}
	return nil
}

func addAddresses(h *netlink.Handle, l netlink.Link, addresses []string) error {
	for _, a := range addresses {
		ip := net.ParseIP(a)
		addr := &netlink.Addr{IPNet: &net.IPNet{IP: ip, Mask: net.CIDRMask(64, 128)}, Flags: unix.IFA_F_NODAD}
		if ip.To4() != nil {
			addr = &netlink.Addr{IPNet: &net.IPNet{IP: ip, Mask: net.CIDRMask(24, 32)}}
		}
		if err := h.AddrAdd(l, addr); err != nil {
			return fmt.Errorf("add address %s: %w: the cluster is dual stack; is IPv6 disabled in the kernel?", a, err)
		}
	}
	return nil
}

func linksUp(h *netlink.Handle, names ...string) error {
	for _, name := range names {
		l, err := h.LinkByName(name)
		if err != nil {
			return err
		}
		if err := h.LinkSetUp(l); err != nil {
			return fmt.Errorf("bring up %s: %w", name, err)
		}
	}
	return nil
}

// newNetns makes a network namespace and keeps it at path.
func newNetns(path string) (netns.NsHandle, error) {
	type result struct {
		ns  netns.NsHandle
		err error
	}
	made := make(chan result, 1)
	go func() {
		// The thread stays in the new namespace and ends with the goroutine.
		runtime.LockOSThread()
		ns, err := netns.NewNamed(filepath.Base(path))
		made <- result{ns, err}
	}()
	r := <-made
	if r.err != nil {
		return r.ns, fmt.Errorf("make network namespace %s: %w", path, r.err)
	}
	return r.ns, nil
}

// removeNetwork removes the network namespaces, and with them every link.
func (c *Cluster) removeNetwork() {
	files, _ := filepath.Glob(c.netnsPath("*"))
	for _, f := range files {
		unix.Unmount(f, unix.MNT_DETACH)
		os.Remove(f)
	}
}
