package ztunnel

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/internal/handoff"
	"github.com/weft-mesh/weft/internal/netns"
	"github.com/weft-mesh/weft/ztunnel/dns"
)

const (
	domainPort = 53
	// maxQuery bounds a query over UDP, and an answer of a name server. What is
	// longer goes over TCP.
	maxQuery = 4096
	// maxUpstream bounds the queries of one pod that wait for its name server,
	// and maxUpstreamNode those of all pods: each has a socket. What is more is
	// dropped, as a busy server would, and the client asks again.
	maxUpstream     = 256
	maxUpstreamNode = 8192
	// upstreamTimeout is how long a name server may take. Clients give up after
	// 5 s unless they are told otherwise (resolv.conf(5)).
	upstreamTimeout = 5 * time.Second
)

// A resolver answers the name queries of one pod: those for names of the mesh
// itself, the others by asking whom the pod has asked, in the pod's name.
// Make it with newResolver, then call start.
type resolver struct {
	pod     *pod
	ns      *netns.NS
	conns   []*net.UDPConn // get the pod's queries
	roles   []handoff.Role // of conns
	answers *spoofer

	waiting chan struct{} // a place for each query at a name server
	streams chan struct{} // a place for each connection

	reads sync.WaitGroup // from conns
	asks  sync.WaitGroup // at name servers
}

// newResolver returns the resolver for the sockets of f, and nil if there are
// none: the pod's queries are not captured. It does not take over f.
func newResolver(q *pod, f handoff.Files) (*resolver, error) {
	r := &resolver{pod: q, waiting: make(chan struct{}, maxUpstream), streams: make(chan struct{}, maxStreams)}
	for _, role := range []handoff.Role{handoff.DNS4, handoff.DNS6} {
		file := f.Listeners[role]
		if file == nil {
			continue
		}
		c, err := net.FilePacketConn(file)
		if err == nil {
			udp, ok := c.(*net.UDPConn)
			if !ok {
				c.Close()
				err = fmt.Errorf("it is a %T", c)
			} else {
				r.conns, r.roles = append(r.conns, udp), append(r.roles, role)
			}
		}
		if err != nil {
			r.close()
			return nil, fmt.Errorf("open socket %v: %w", role, err)
		}
	}
	if len(r.conns) == 0 {
		return nil, nil
	}
	fd, err := dupFD(f.Netns)
	if err == nil {
		r.ns, err = netns.FromFD(fd)
	}
	if err == nil {
		r.answers, err = newSpoofer(r.ns)
	}
	if err != nil {
		r.close()
		return nil, fmt.Errorf("answer name queries: %w", err)
	}
	return r, nil
}

// start reads queries, each socket with a goroutine of its own: a pod that
// floods delays nobody but itself.
func (r *resolver) start() {
	if r == nil {
		return
	}
	for _, c := range r.conns {
		r.reads.Go(func() { r.read(c) })
	}
}

// stop reads no more. What is at name servers is still answered. Whoever else
// has the sockets reads on: each query is for one of us.
func (r *resolver) stop() {
	if r == nil {
		return
	}
	for _, c := range r.conns {
		c.Close()
	}
	r.reads.Wait()
}

// close lets go of everything. It waits for answers, so that it takes at most
// upstreamTimeout, and less if the pod was forced to end.
func (r *resolver) close() {
	if r == nil {
		return
	}
	r.stop()
	r.asks.Wait()
	if r.answers != nil {
		r.answers.close()
	}
	if r.ns != nil {
		r.ns.Close()
	}
}

// dup puts copies of the sockets into f.
func (r *resolver) dup(f *handoff.Files) error {
	if r == nil {
		return nil
	}
	var errs []error
	for i, c := range r.conns {
		file, err := c.File()
		f.Listeners[r.roles[i]] = file
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// same reports whether f has the sockets of r, and no others.
func (r *resolver) same(f handoff.Files) bool {
	var have [handoff.Roles]*net.UDPConn
	if r != nil {
		for i, c := range r.conns {
			have[r.roles[i]] = c
		}
	}
	for _, role := range []handoff.Role{handoff.DNS4, handoff.DNS6} {
		switch c, file := have[role], f.Listeners[role]; {
		case c == nil && file == nil:
		case c == nil || file == nil || !sameFile(c, file):
			return false
		}
	}
	return true
}

// A datagram is a query as it arrived.
type datagram struct {
	message     []byte
	from, asked netip.AddrPort
}

// read serves what arrives on c until it is closed.
func (r *resolver) read(c *net.UDPConn) {
	b, oob := make([]byte, maxQuery), make([]byte, 128)
	reply, packet := make([]byte, 0, maxQuery), make([]byte, 0, maxQuery+ipv6Header+udpHeader)
	for {
		n, oobn, flags, from, err := c.ReadMsgUDPAddrPort(b, oob)
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil || flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0:
			// What is longer is for TCP. Errors of single packets pass; one
			// that does not must not keep a processor busy.
			if err != nil {
				select {
				case <-r.pod.serving.Done():
					return
				case <-time.After(time.Millisecond):
				}
			}
			continue
		}
		asked, err := originalDestination(oob[:oobn])
		if err != nil {
			r.pod.proxy.cfg.Log.Debug("a name query was dropped", "pod", r.pod.info.Load().Name, "error", err)
			continue
		}
		r.serve(datagram{b[:n], unmap(from), unmap(asked)}, reply, packet)
	}
}

// serve answers a query, or has it answered. The buffers are the caller's.
func (r *resolver) serve(d datagram, reply, packet []byte) {
	q := r.pod
	if d.asked.Port() != domainPort || d.from.Port() == 0 {
		return // dialed our own port
	}
	v := q.proxy.cfg.View.Load()
	info := q.info.Load()
	who := r.labels(v, "udp")
	decision := dns.Decide(v, dns.Client{Namespace: info.Namespace, Network: q.proxy.cfg.Network}, dns.Packet{Message: d.message, Buffer: reply}, rand.Uint64())
	if decision.Verdict == dns.Drop {
		return
	}
	who.kind = decision.Type
	q.proxy.telemetry.names.request(who)
	if decision.Verdict == dns.Reply {
		r.answer(packet, d, decision.Message)
		return
	}
	// Sent on, it would come back here for ever.
	if stays, err := q.out.Holds(d.asked.Addr(), false); err != nil || stays {
		r.answer(packet, d, dns.Failure(d.message))
		return
	}
	if !r.admit() {
		q.proxy.telemetry.names.failed(who)
		return
	}
	d.message = append([]byte(nil), d.message...)
	r.asks.Go(func() {
		defer r.release()
		began := time.Now()
		answer, err := r.ask(q.alive, d)
		q.proxy.telemetry.names.upstream(who, time.Since(began), err)
		if err != nil {
			q.proxy.cfg.Log.Debug("a name server did not answer", "pod", info.Name, "namespace", info.Namespace, "server", d.asked, "error", err)
		}
		if answer != nil {
			r.answer(nil, d, answer)
		}
	})
}

// admit takes a place for a query at a name server.
func (r *resolver) admit() bool {
	select {
	case r.waiting <- struct{}{}:
	default:
		return false
	}
	select {
	case r.pod.proxy.telemetry.names.places <- struct{}{}:
		return true
	default:
		<-r.waiting
		return false
	}
}

func (r *resolver) release() {
	<-r.pod.proxy.telemetry.names.places
	<-r.waiting
}

// answer sends message to the client, from whom it asked.
func (r *resolver) answer(packet []byte, d datagram, message []byte) {
	if len(message) == 0 {
		return
	}
	if err := r.answers.send(packet, d.asked, d.from, message); err != nil {
		r.pod.proxy.cfg.Log.Debug("a name query could not be answered", "pod", r.pod.info.Load().Name, "client", d.from, "error", err)
	}
}

// originalDestination returns where a packet was sent to, from the control data
// beside it.
func originalDestination(oob []byte) (netip.AddrPort, error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("read the control data of a packet: %w", err)
	}
	for _, m := range messages {
		sa, err := unix.ParseOrigDstAddr(&m)
		if err != nil {
			continue // something else
		}
		switch sa := sa.(type) {
		case *unix.SockaddrInet4:
			return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port)), nil
		case *unix.SockaddrInet6:
			return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port)), nil
		}
	}
	return netip.AddrPort{}, errors.New("the kernel does not say where a packet was sent to")
}

// ask asks the server that the client has asked, in the pod's name, and returns
// what the client is told: the server's answer, or a failure if the server
// cannot be reached. A server that says nothing is no answer, so that the
// client waits as it would without us.
func (r *resolver) ask(ctx context.Context, d datagram) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, upstreamTimeout)
	defer cancel()
	s, err := r.connect(d.asked)
	if err != nil {
		return dns.Failure(d.message), err
	}
	defer s.Close()
	deadline, _ := ctx.Deadline()
	if err := s.SetDeadline(deadline); err != nil {
		return dns.Failure(d.message), err
	}
	stop := context.AfterFunc(ctx, func() { s.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	answer, err := dns.Exchange(s, d.message, maxQuery)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil, err
	}
	if err != nil {
		return dns.Failure(d.message), err
	}
	return answer, nil
}

// connect returns a UDP socket inside the pod that is connected to a server, so
// that the kernel drops what others send. Its port is the kernel's choice, by
// chance. The mark keeps it from being captured; the guards ask nothing of UDP.
func (r *resolver) connect(to netip.AddrPort) (*os.File, error) {
	family := unix.AF_INET6
	var sa unix.Sockaddr = &unix.SockaddrInet6{Addr: to.Addr().As16(), Port: int(to.Port())}
	if to.Addr().Is4() {
		family, sa = unix.AF_INET, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}
	}
	fd := -1
	err := r.ns.Do(func() (err error) {
		fd, err = unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_UDP)
		return os.NewSyscallError("socket", err)
	})
	if err != nil {
		return nil, err
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, wireMark); err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("setsockopt", err)
	}
	if err := unix.Connect(fd, sa); err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("connect", err)
	}
	return os.NewFile(uintptr(fd), "dns"), nil // does not block, so the poller has it
}
