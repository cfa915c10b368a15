package ztunnel

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/internal/handoff"
	"github.com/weft-mesh/weft/internal/netns"
)

// The marks of the proxy's own sockets inside a pod. They route, by rules that
// the node agent made; they prove nothing.
const (
	wireMark  = 0x539 // leaves the pod; what lacks it is captured
	localMark = 0x53a // stays in the pod, also while the pod leaves the mesh
)

// outlet is the way from the proxy into a pod's network namespace.
type outlet interface {
	// Dial connects from inside the namespace, as netns.NS.Dial does.
	Dial(ctx context.Context, network string, local, remote netip.AddrPort, control func(fd int) error) (*net.TCPConn, error)
	// Begin begins to connect, as netns.NS.Begin does.
	Begin(local, remote netip.AddrPort, control func(fd int) error) (fd int, err error)
	// Holds reports whether a connection to a would stay in the namespace. A
	// fresh answer costs a question to the kernel. It fails when that cannot
	// be known.
	Holds(a netip.Addr, fresh bool) (bool, error)
	// KeepAlive says when a socket of the namespace will probe its peer, as
	// netns.NS.KeepAlive does.
	KeepAlive(local, remote netip.AddrPort) (time.Duration, error)
	Close() error
}

// namespace is the outlet of a real pod.
type namespace struct {
	*netns.NS

	mu    sync.Mutex
	addrs []netip.Addr // of its interfaces
	until time.Time    // when addrs are out of date
}

// enterNamespace opens the namespace of f a second time: the outlet closes its
// own.
func enterNamespace(f handoff.Files) (outlet, error) {
	fd, err := dupFD(f.Netns)
	if err != nil {
		return nil, fmt.Errorf("open network namespace: %w", err)
	}
	ns, err := netns.FromFD(fd)
	if err != nil {
		return nil, err
	}
	return &namespace{NS: ns}, nil
}

// Holds knows addresses that are up to a second old if fresh is not set.
func (n *namespace) Holds(a netip.Addr, fresh bool) (bool, error) {
	if a.IsLoopback() || a.IsUnspecified() {
		return true, nil
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if now := time.Now(); fresh || now.After(n.until) {
		addrs, err := n.Addrs()
		if err != nil {
			return false, err
		}
		n.addrs, n.until = addrs, now.Add(time.Second)
	}
	return slices.Contains(n.addrs, a), nil
}

// dupFD copies the descriptor of a file that is not a socket.
func dupFD(f *os.File) (int, error) {
	if f == nil {
		return -1, errors.New("the file is missing")
	}
	return unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
}

// dialOut connects from the pod to the outside. The socket is marked, so that
// it is not captured, and blessed before its SYN, so that the guards let it
// pass.
func (q *pod) dialOut(ctx context.Context, to netip.AddrPort) (*net.TCPConn, error) {
	c, err := q.dial(ctx, to, func(fd int) error {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, wireMark); err != nil {
			return fmt.Errorf("mark socket: %w", err)
		}
		return handoff.Bless(int(q.files.Blessed.Fd()), fd)
	})
	return tuned(c, err)
}

// dial connects from inside the pod, unless the pod has been closed. It keeps
// the pod from being closed meanwhile, and ends with it.
func (q *pod) dial(ctx context.Context, to netip.AddrPort, control func(fd int) error) (*net.TCPConn, error) {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	stop := context.AfterFunc(q.alive, cancel)
	defer stop()
	q.inUse.RLock()
	defer q.inUse.RUnlock()
	if q.closed {
		return nil, errPodLeft
	}
	return q.out.Dial(ctx, "tcp", netip.AddrPort{}, to, control)
}

// errPodLeft says that a pod is not served any more.
var errPodLeft = errors.New("the pod has left")

// appTries bounds the ports that are tried for one connection to an
// application.
const appTries = 16

// errPortTaken says that a port is not to be used.
var errPortTaken = errors.New("the client has a plain connection with this port")

// dialApp connects to the pod's own application in the name of client. The
// mark passes to the application's side of the connection, so that its answers
// come back here and not to the client itself.
func (q *pod) dialApp(ctx context.Context, client netip.Addr, to netip.AddrPort) (*net.TCPConn, error) {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	for try := 0; ; try++ {
		c, err := q.dial(ctx, to, func(fd int) error { return q.disguise(fd, client, try) })
		if !portTaken(err) || try == appTries {
			return tuned(c, err)
		}
	}
}

// portTaken reports whether a port is to blame for err.
func portTaken(err error) bool {
	return errors.Is(err, errPortTaken) || errors.Is(err, unix.EADDRINUSE) || errors.Is(err, unix.EADDRNOTAVAIL)
}

// disguise prepares a socket for dialApp.
func (q *pod) disguise(fd int, client netip.Addr, try int) error {
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, localMark); err != nil {
		return fmt.Errorf("mark socket: %w", err)
	}
	doNotPace(fd)
	return q.bindAs(fd, netip.AddrPortFrom(client, appPort(try, rand.Uint32())))
}

// doNotPace gives a socket towards an application, or a listener for such, a
// congestion control that lets it send when it has something. These connections
// stay on the pod's lo, where nothing is congested, and BBR, if that is what the
// node uses, would hold back each burst with a timer. The application's ends get
// the same from the route that the node agent has made. Sockets on the wire
// keep what the administrator has chosen.
func doNotPace(fd int) {
	// Reno is part of every TCP of Linux. If it is refused nothing is lost but
	// time.
	_ = unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, "reno")
}

// beginApp is dialApp without the wait: the connection may be under way when it
// returns.
func (q *pod) beginApp(client netip.Addr, to netip.AddrPort) (fd int, err error) {
	if !q.inUse.TryRLock() { // it is about to be closed
		return -1, errPodLeft
	}
	defer q.inUse.RUnlock()
	if q.closed {
		return -1, errPodLeft
	}
	try := 0
	control := func(fd int) error { return q.disguise(fd, client, try) }
	for ; ; try++ {
		fd, err = q.out.Begin(netip.AddrPort{}, to, control)
		if !portTaken(err) || try == appTries {
			return fd, err
		}
	}
}

// finishApp waits for a connection that beginApp has begun, and closes it if it
// fails.
func (q *pod) finishApp(ctx context.Context, fd int) (*net.TCPConn, error) {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	return tuned(netns.Finish(ctx, fd))
}

// appPort chooses the port for a connection in a client's name. It keeps out of
// the range that clients take their own ports from (32768 to 60999 unless it
// was changed): as long as ours is open, a plain connection of the client
// with the same port to the same application could not be told from it, and
// would hang. Above that range there are few ports, so the next tries go below
// it, and the last ones, with 0, leave it to the kernel.
func appPort(try int, rnd uint32) uint16 {
	switch {
	case try < 6:
		return 61000 + uint16(rnd%(65536-61000))
	case try < 12:
		return 16384 + uint16(rnd%(32768-16384))
	}
	return 0
}

// bindAs binds a socket to an address that is not ours. The port is known
// before the SYN, so that it can be judged.
func (q *pod) bindAs(fd int, client netip.AddrPort) error {
	level, option := unix.SOL_IP, unix.IP_TRANSPARENT
	if !client.Addr().Is4() {
		level, option = unix.SOL_IPV6, unix.IPV6_TRANSPARENT
	}
	if err := unix.SetsockoptInt(fd, level, option, 1); err != nil {
		return fmt.Errorf("keep the client's address: make socket transparent: %w", err)
	}
	// So that an application can still listen on a port that is in use here.
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return fmt.Errorf("keep the client's address: %w", err)
	}
	if err := netns.Bind(fd, client); err != nil {
		return fmt.Errorf("keep the client's address: bind to %v: %w", client, err)
	}
	if client.Port() == 0 { // the kernel has chosen
		bound, err := netns.Local(fd)
		if err != nil {
			return fmt.Errorf("keep the client's address: %w", err)
		}
		client = bound
	}
	if q.clients.has(client) {
		return errPortTaken
	}
	return nil
}

func tuned(c *net.TCPConn, err error) (*net.TCPConn, error) {
	if err != nil {
		return nil, err
	}
	if err := tune(c); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}
