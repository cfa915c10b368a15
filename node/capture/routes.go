package capture

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/internal/netns"
)

// The routing of a captured pod, in its own namespace. Priority 0, the local
// table, stays first, so what is for the pod itself is not affected.
const (
	table = 1500 // "local default dev lo": everything is delivered here

	ruleLocal       = 99  // mark of what must stay here: table 1500, captured or not
	ruleProxy       = 100 // the proxy's mark: as without capture
	ruleUnreachable = 101 // the proxy's mark and no route: an error, not back to itself
	ruleCapture     = 102 // all other TCP that is generated here: table 1500
	ruleDNS         = 103 // and UDP to port 53, if the proxy gets name queries

	portDomain = 53

	routeProtocol = 80 // rtnetlink(7): who made the route; a number of our own

	// What the table delivers does not leave the pod, so nothing is congested
	// there. Reno, which every TCP of Linux has, just sends; BBR, if that is
	// what the node uses, would hold back each burst with a timer. This is for
	// the app's ends of captured connections; the proxy cares for its own.
	congestion = "reno"
)

// rules returns the rules of one family, in order, ruleDNS included. They say
// "iif lo", which means generated here: without it, the reverse path check of
// every packet that arrives would match too and drop it.
func rules(family int) []*netlink.Rule {
	mask := uint32(MarkMask)
	rule := func(priority int) *netlink.Rule {
		r := netlink.NewRule()
		r.Family, r.Priority, r.Protocol = family, priority, routeProtocol
		return r
	}
	local, proxy, unreachable, capture := rule(ruleLocal), rule(ruleProxy), rule(ruleUnreachable), rule(ruleCapture)
	local.Mark, local.Mask, local.IifName, local.IPProto, local.Table = MarkLocal, &mask, "lo", unix.IPPROTO_TCP, table
	proxy.Mark, proxy.Mask, proxy.Table = MarkProxy, &mask, unix.RT_TABLE_MAIN
	unreachable.Mark, unreachable.Mask, unreachable.Type = MarkProxy, &mask, unix.RTN_UNREACHABLE
	capture.IifName, capture.IPProto, capture.Table = "lo", unix.IPPROTO_TCP, table
	dns := rule(ruleDNS)
	dns.IifName, dns.IPProto, dns.Dport, dns.Table = "lo", unix.IPPROTO_UDP, netlink.NewRulePortRange(portDomain, portDomain), table
	return []*netlink.Rule{local, proxy, unreachable, capture, dns}
}

// families calls f for each family that the pod has.
func (w place) families(f func(family int, src net.IP) error) error {
	if w.v4.IsValid() {
		if err := f(netlink.FAMILY_V4, w.v4.AsSlice()); err != nil {
			return fmt.Errorf("IPv4: %w", err)
		}
	}
	if w.v6.IsValid() {
		if err := f(netlink.FAMILY_V6, w.v6.AsSlice()); err != nil {
			return fmt.Errorf("IPv6: %w", err)
		}
	}
	return nil
}

// routed runs f with a netlink handle inside the namespace.
func routed(ns *netns.NS, f func(nl *netlink.Handle) error) error {
	return ns.Do(func() error {
		nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer nl.Close()
		return f(nl)
	})
}

// addLocal makes the table, and the rule that holds what is marked to stay:
// without it, the app's answers to connections that the proxy makes to it in a
// client's name would leave. What is there already stays.
func (w place) addLocal(ns *netns.NS) error {
	return w.add(ns, func(nl *netlink.Handle, family int, src net.IP) error {
		lo, err := nl.LinkByName("lo")
		if err != nil {
			return err
		}
		if err := nl.RouteReplace(defaultToLo(family, lo.Attrs().Index, src)); err != nil {
			return fmt.Errorf("add route to table %d: %w", table, err)
		}
		return addRules(nl, rules(family)[:1])
	})
}

// addCapture makes the other rules but ruleDNS. The capturing one is last, so
// that it never holds without the others.
func (w place) addCapture(ns *netns.NS) error {
	return w.add(ns, func(nl *netlink.Handle, family int, _ net.IP) error {
		return addRules(nl, rules(family)[1:4])
	})
}

// setDNS adds or removes ruleDNS.
func (w place) setDNS(ns *netns.NS, on bool) error {
	if on {
		return w.add(ns, func(nl *netlink.Handle, family int, _ net.IP) error {
			return addRules(nl, rules(family)[4:])
		})
	}
	return w.add(ns, func(nl *netlink.Handle, family int, _ net.IP) error {
		if err := nl.RuleDel(rules(family)[4]); err != nil && !gone(err) {
			return fmt.Errorf("delete rule %d: %w", ruleDNS, err)
		}
		return nil
	})
}

func (w place) add(ns *netns.NS, f func(nl *netlink.Handle, family int, src net.IP) error) error {
	err := routed(ns, func(nl *netlink.Handle) error {
		return w.families(func(family int, src net.IP) error { return f(nl, family, src) })
	})
	if err != nil {
		return fmt.Errorf("set up the pod's routing: %w", err)
	}
	return nil
}

func addRules(nl *netlink.Handle, list []*netlink.Rule) error {
	for _, r := range list {
		if err := nl.RuleAdd(r); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add rule %d: %w", r.Priority, err)
		}
	}
	return nil
}

func defaultToLo(family, lo int, src net.IP) *netlink.Route {
	all := &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
	if family == netlink.FAMILY_V6 {
		all = &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
	}
	return &netlink.Route{
		LinkIndex: lo, Dst: all, Src: src, Table: table,
		Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST, Protocol: routeProtocol, Congctl: congestion,
	}
}

// removeRules removes the rules but the one that holds draining connections,
// the capturing one first. What is gone already is no error.
func (w place) removeRules(ns *netns.NS) error {
	err := routed(ns, func(nl *netlink.Handle) error {
		return w.families(func(family int, _ net.IP) error {
			list := rules(family)
			for i := len(list) - 1; i >= 0; i-- {
				if list[i].Priority == ruleLocal {
					continue
				}
				if err := nl.RuleDel(list[i]); err != nil && !gone(err) {
					return fmt.Errorf("delete rule %d: %w", list[i].Priority, err)
				}
			}
			return nil
		})
	})
	if err != nil {
		return fmt.Errorf("take down the pod's routing: %w", err)
	}
	return nil
}

// removeLocal removes what removeRules left.
func (w place) removeLocal(ns *netns.NS) error {
	err := routed(ns, func(nl *netlink.Handle) error {
		lo, err := nl.LinkByName("lo")
		if err != nil {
			return err
		}
		return w.families(func(family int, src net.IP) error {
			if err := nl.RuleDel(rules(family)[0]); err != nil && !gone(err) {
				return fmt.Errorf("delete rule %d: %w", ruleLocal, err)
			}
			route := defaultToLo(family, lo.Attrs().Index, src)
			route.Congctl = "" // whatever it has: an older agent gave it none
			if err := nl.RouteDel(route); err != nil && !gone(err) {
				return fmt.Errorf("delete route of table %d: %w", table, err)
			}
			return nil
		})
	})
	if err != nil {
		return fmt.Errorf("take down the pod's routing: %w", err)
	}
	return nil
}

func gone(err error) bool { return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) }

// acceptMark makes the answers to a marked packet carry its mark: a probe's
// leave by the wire, and those to the proxy stay here. That is for the app's
// sockets (net.ipv4.tcp_fwmark_accept, IPv6 included), and for the kernel,
// which refuses a connection to a port on which nobody listens (fwmark_reflect).
func (c *Capture) acceptMark(ns *netns.NS) error {
	for _, key := range acceptKeys() {
		err := c.turnOn(ns, key)
		if errors.Is(err, fs.ErrNotExist) && strings.HasPrefix(key, "net/ipv6/") {
			continue // a kernel without IPv6
		}
		name := strings.ReplaceAll(key, "/", ".")
		if errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EROFS) {
			return fmt.Errorf("set %s in the pod (is %s the host's proc, mounted writable?): %w", name, c.cfg.ProcRoot, err)
		}
		if err != nil {
			return fmt.Errorf("set %s in the pod: %w", name, err)
		}
	}
	return nil
}

func acceptKeys() []string {
	return []string{"net/ipv4/tcp_fwmark_accept", "net/ipv4/fwmark_reflect", "net/ipv6/fwmark_reflect"}
}

// turnOn sets a value below /proc/sys in the namespace to 1.
func (c *Capture) turnOn(ns *netns.NS, key string) error {
	// The kernel shows the values of the namespace of the thread that opens.
	return ns.Do(func() error {
		// Opened without O_CREATE and O_TRUNC, which proc does not want.
		f, err := os.OpenFile(filepath.Join(c.cfg.ProcRoot, "sys", key), os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		_, err = f.WriteString("1")
		return errors.Join(err, f.Close())
	})
}
