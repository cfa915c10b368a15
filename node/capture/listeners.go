package capture

import (
	"errors"
	"fmt"
	"os"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/bpf"
	"github.com/weft-mesh/weft/internal/netns"
)

// Ports of the proxy inside a pod's namespace.
const (
	PortOutbound = 15001
	PortInbound  = 15006
	PortHBONE    = 15008
	PortDNS      = 15053 // UDP
)

// Marks of sockets in a pod's namespace. They route; they prove nothing.
const (
	// MarkProxy is for sockets of the proxy that use the wire.
	MarkProxy = 0x539
	// MarkLocal is for sockets of the proxy that connect to the app, so that
	// the app's answers stay in the namespace also while a pod leaves the
	// mesh. Capture itself sets it on sockets of the app when a pod leaves.
	MarkLocal = 0x53a
	// MarkMask is the part of the mark that is the mesh's.
	MarkMask = 0xfff
)

// Listeners are the proxy's sockets in a pod, by role: out4, out6, in4, in6,
// hb4, hb6, which listen for TCP, and dns4, dns6, which get name queries. The
// latter report the address that was asked (IP_RECVORIGDSTADDR). Those of a
// family that the pod has not are nil, and dns4 and dns6 without Target.DNS.
type Listeners [8]*os.File

// Close closes the descriptors.
func (l *Listeners) Close() error {
	var errs []error
	for i, f := range l {
		if f != nil {
			errs = append(errs, f.Close())
			l[i] = nil
		}
	}
	return errors.Join(errs...)
}

func (l *Listeners) dup() (Listeners, error) {
	var out Listeners
	for i, f := range l {
		if f == nil {
			continue
		}
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			out.Close()
			return Listeners{}, fmt.Errorf("duplicate listener: %w", err)
		}
		out[i] = os.NewFile(uintptr(fd), f.Name())
	}
	return out, nil
}

// A role is one listener, as the programs know it.
type role struct {
	slot   bpf.CaptureRole
	family int
	port   int
	mark   int  // inherited by accepted sockets
	wire   bool // the socket, or accepted ones, use the wire, so they are blessed
	udp    bool
}

func (r role) String() string {
	host, network := "0.0.0.0", "TCP"
	if r.family == unix.AF_INET6 {
		host = "[::]"
	}
	if r.udp {
		network = "UDP"
	}
	return fmt.Sprintf("%s:%d (%s)", host, r.port, network)
}

// roles returns the roles of the families that the pod has.
func (w place) roles() []role {
	var out []role
	if w.dns && w.v4.IsValid() {
		out = append(out, role{slot: bpf.CaptureRoleROLE_DNS4, family: unix.AF_INET, port: PortDNS, mark: MarkProxy, wire: true, udp: true})
	}
	if w.dns && w.v6.IsValid() {
		out = append(out, role{slot: bpf.CaptureRoleROLE_DNS6, family: unix.AF_INET6, port: PortDNS, mark: MarkProxy, wire: true, udp: true})
	}
	if w.v4.IsValid() {
		out = append(out,
			role{slot: bpf.CaptureRoleROLE_OUT4, family: unix.AF_INET, port: PortOutbound},
			role{slot: bpf.CaptureRoleROLE_IN4, family: unix.AF_INET, port: PortInbound, mark: MarkProxy, wire: true},
			role{slot: bpf.CaptureRoleROLE_HB4, family: unix.AF_INET, port: PortHBONE, mark: MarkProxy, wire: true})
	}
	if w.v6.IsValid() {
		out = append(out,
			role{slot: bpf.CaptureRoleROLE_OUT6, family: unix.AF_INET6, port: PortOutbound},
			role{slot: bpf.CaptureRoleROLE_IN6, family: unix.AF_INET6, port: PortInbound, mark: MarkProxy, wire: true},
			role{slot: bpf.CaptureRoleROLE_HB6, family: unix.AF_INET6, port: PortHBONE, mark: MarkProxy, wire: true})
	}
	return out
}

// listen makes the listeners of all roles inside the namespace.
func listen(ns *netns.NS, roles []role) (Listeners, error) {
	var l Listeners
	err := ns.Do(func() error {
		for _, r := range roles {
			f, err := r.listen()
			if err != nil {
				return fmt.Errorf("listen on %v in the pod: %w", r, err)
			}
			l[r.slot] = f
		}
		return nil
	})
	if err != nil {
		l.Close()
		return Listeners{}, err
	}
	return l, nil
}

// listen makes one listener in the namespace of the calling thread.
func (r role) listen() (*os.File, error) {
	// IPPROTO_TCP, never MPTCP: bpf_sk_assign takes plain TCP only.
	kind, protocol := unix.SOCK_STREAM, unix.IPPROTO_TCP
	if r.udp {
		kind, protocol = unix.SOCK_DGRAM, unix.IPPROTO_UDP
	}
	fd, err := unix.Socket(r.family, kind|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	if err := r.setup(fd); err != nil {
		unix.Close(fd)
		if errors.Is(err, unix.EADDRINUSE) {
			return nil, fmt.Errorf("the port is taken, by a program in the pod or by a proxy that has not handed over its listeners: %w", err)
		}
		return nil, err
	}
	return os.NewFile(uintptr(fd), r.String()), nil
}

// setup sets no SO_REUSEPORT: before 6.6, bpf_sk_assign refuses such sockets.
// For UDP, SO_REUSEADDR would let a program in the pod share the port.
func (r role) setup(fd int) error {
	if !r.udp {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
			return os.NewSyscallError("setsockopt SO_REUSEADDR", err)
		}
	}
	if r.mark != 0 {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, r.mark); err != nil {
			return os.NewSyscallError("setsockopt SO_MARK", err)
		}
	}
	var sa unix.Sockaddr = &unix.SockaddrInet4{Port: r.port}
	if r.family == unix.AF_INET6 {
		sa = &unix.SockaddrInet6{Port: r.port}
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1); err != nil {
			return os.NewSyscallError("setsockopt IPV6_V6ONLY", err)
		}
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_TRANSPARENT, 1); err != nil {
			return os.NewSyscallError("setsockopt IPV6_TRANSPARENT", err)
		}
	} else if err := unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_TRANSPARENT, 1); err != nil {
		return os.NewSyscallError("setsockopt IP_TRANSPARENT", err)
	}
	if r.udp {
		level, option := unix.IPPROTO_IP, unix.IP_RECVORIGDSTADDR
		if r.family == unix.AF_INET6 {
			level, option = unix.IPPROTO_IPV6, unix.IPV6_RECVORIGDSTADDR
		}
		if err := unix.SetsockoptInt(fd, level, option, 1); err != nil {
			return os.NewSyscallError("setsockopt RECVORIGDSTADDR", err)
		}
	}
	if err := unix.Bind(fd, sa); err != nil {
		return os.NewSyscallError("bind", err)
	}
	if r.udp {
		return nil
	}
	// The kernel cuts the backlog to net.core.somaxconn of the namespace.
	return os.NewSyscallError("listen", unix.Listen(fd, 1<<16-1))
}

// adopt takes over listeners that a proxy has kept while there was no agent.
// It duplicates; the caller keeps its own. Every role for TCP must be there:
// connections may wait in it. The sockets for name queries are made if they
// are missing: the proxy may be one that did not take them.
func adopt(ns *netns.NS, roles []role, have Listeners) (Listeners, error) {
	cookie, err := netnsCookie(ns)
	if err != nil {
		return Listeners{}, err
	}
	var keep Listeners
	var missing []role
	for _, r := range roles {
		f := have[r.slot]
		if f == nil && r.udp {
			missing = append(missing, r)
			continue
		}
		if f == nil {
			return Listeners{}, fmt.Errorf("adopt listeners: %v is missing", r)
		}
		if err := r.check(f, cookie); err != nil {
			return Listeners{}, fmt.Errorf("adopt listener %v: %w", r, err)
		}
		keep[r.slot] = f
	}
	made, err := listen(ns, missing)
	if err != nil {
		return Listeners{}, err
	}
	out, err := keep.dup()
	if err != nil {
		made.Close()
		return Listeners{}, err
	}
	for _, r := range missing {
		out[r.slot] = made[r.slot]
	}
	return out, nil
}

// netnsCookie returns the namespace's cookie, 0 if the kernel has none (it
// gives them since 5.14).
func netnsCookie(ns *netns.NS) (cookie uint64, err error) {
	err = ns.Do(func() error {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return os.NewSyscallError("socket", err)
		}
		defer unix.Close(fd)
		cookie, err = unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
		if errors.Is(err, unix.ENOPROTOOPT) {
			return nil
		}
		return os.NewSyscallError("getsockopt SO_NETNS_COOKIE", err)
	})
	return cookie, err
}

// check refuses a socket that is not this role's listener in the namespace.
func (r role) check(f *os.File, cookie uint64) error {
	fd := int(f.Fd())
	if cookie != 0 {
		got, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
		if err != nil {
			return os.NewSyscallError("getsockopt SO_NETNS_COOKIE", err)
		}
		if got != cookie {
			return errors.New("it is a socket of another network namespace")
		}
	}
	listening, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	if err != nil {
		return os.NewSyscallError("getsockopt SO_ACCEPTCONN", err)
	}
	protocol, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL)
	if err != nil {
		return os.NewSyscallError("getsockopt SO_PROTOCOL", err)
	}
	mark, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK)
	if err != nil {
		return os.NewSyscallError("getsockopt SO_MARK", err)
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return os.NewSyscallError("getsockname", err)
	}
	family, port := unix.AF_UNSPEC, 0
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		family, port = unix.AF_INET, sa.Port
	case *unix.SockaddrInet6:
		family, port = unix.AF_INET6, sa.Port
	}
	right := listening != 0 && protocol == unix.IPPROTO_TCP
	if r.udp {
		right = protocol == unix.IPPROTO_UDP
	}
	if !right || family != r.family || port != r.port || mark != r.mark {
		return fmt.Errorf("it is not what it should be: protocol %d, listening %d, family %d, port %d, mark %#x", protocol, listening, family, port, mark)
	}
	return nil
}

// enlist blesses the listeners and gives them to the programs.
func enlist(pod uint32, roles []role, l Listeners, listeners, blessed *ebpf.Map) error {
	for _, r := range roles {
		fd := l[r.slot].Fd()
		if r.wire {
			if err := blessed.Put(int32(fd), uint32(1)); err != nil {
				return fmt.Errorf("bless listener %v: %w", r, err)
			}
		}
		if err := listeners.Put(bpf.CaptureListener{Pod: pod, Role: r.slot}, uint64(fd)); err != nil {
			return fmt.Errorf("enter listener %v into the map: %w", r, err)
		}
	}
	return nil
}
