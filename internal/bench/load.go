package bench

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The load generators use raw sockets and one thread each: what they cost is
// noise in the figures of what they measure.

const (
	pieceLen = 128 << 10 // of a bulk write
	blockLen = 1 << 20   // what a sink confirms
	patience = 30 * time.Second
)

func sockaddr(a netip.AddrPort) (unix.Sockaddr, int) {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}, unix.AF_INET
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}, unix.AF_INET6
}

// poller is a level-triggered epoll.
type poller struct {
	fd     int
	events []unix.EpollEvent
}

func newPoller() (*poller, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	return &poller{fd, make([]unix.EpollEvent, 256)}, err
}

func (p *poller) add(fd int, events uint32) error {
	return unix.EpollCtl(p.fd, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: events, Fd: int32(fd)})
}

func (p *poller) change(fd int, events uint32) error {
	return unix.EpollCtl(p.fd, unix.EPOLL_CTL_MOD, fd, &unix.EpollEvent{Events: events, Fd: int32(fd)})
}

// wait returns what is ready, nothing after d; a negative d is for ever. The
// call is raw: Go's scheduler, told that a thread sleeps, wakes others, and that
// is a third of the context switches of a request. It can still stop this
// thread, by a signal.
func (p *poller) wait(d time.Duration) ([]unix.EpollEvent, error) {
	for {
		n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(p.fd), uintptr(unsafe.Pointer(&p.events[0])), uintptr(len(p.events)), uintptr(d.Milliseconds()), 0, 0)
		switch errno {
		case 0:
			return p.events[:n], nil
		case unix.EINTR:
		default:
			return nil, errno
		}
	}
}

// Serve runs the server's side in this process: an application that echoes, at
// echo, and one that takes all it gets, at sink: it answers the first byte, and
// each whole block after it, with one byte. (Not the end: there are proxies that
// cannot close one direction.) It returns only if it fails.
// ready is called once both listen.
func Serve(echo, sink netip.AddrPort, ready func()) error {
	p, err := newPoller()
	if err != nil {
		return err
	}
	listeners := map[int]bool{} // whether it is the sink's
	for a, isSink := range map[netip.AddrPort]bool{echo: false, sink: true} {
		sa, family := sockaddr(a)
		fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) // bind would say
		if err := errors.Join(unix.Bind(fd, sa), unix.Listen(fd, 4096), p.add(fd, unix.EPOLLIN)); err != nil {
			return fmt.Errorf("listen at %v: %w", a, err)
		}
		listeners[fd] = isSink
	}
	ready()
	v := &server{p: p, conns: map[int]*served{}, buf: make([]byte, 256<<10)}
	for {
		events, err := p.wait(-time.Millisecond)
		if err != nil {
			return err
		}
		for _, e := range events {
			fd := int(e.Fd)
			if sink, ok := listeners[fd]; ok {
				err = v.accept(fd, sink)
			} else if v.turn(fd, v.conns[fd]) != nil {
				delete(v.conns, fd)
				err = unix.Close(fd)
			}
			if err != nil {
				return err
			}
		}
	}
}

type server struct {
	p     *poller
	conns map[int]*served
	buf   []byte
}

// served is one connection.
type served struct {
	sink bool
	sunk int
	owed []byte // echoed, and not yet taken
}

func (v *server) accept(listener int, sink bool) error {
	for {
		fd, _, err := unix.Accept4(listener, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		if err != nil {
			return nil // for now there are no more
		}
		_ = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1) // a matter of speed
		v.conns[fd] = &served{sink: sink}
		if err := v.p.add(fd, unix.EPOLLIN); err != nil {
			return err
		}
	}
}

// turn does what a connection is ready for. An error is its end.
func (v *server) turn(fd int, c *served) error {
	if len(c.owed) > 0 {
		n, err := unix.Write(fd, c.owed)
		if err != nil {
			return unlessAgain(err)
		}
		if c.owed = c.owed[n:]; len(c.owed) == 0 {
			return v.p.change(fd, unix.EPOLLIN)
		}
		return nil
	}
	n, err := unix.Read(fd, v.buf)
	if err != nil {
		return unlessAgain(err)
	}
	if n == 0 {
		return errEnd
	}
	answer := v.buf[:n]
	if c.sink {
		// One for the first byte, and one for each whole block after it.
		had := c.sunk
		c.sunk += n
		answers := (c.sunk - 1) / blockLen
		if had > 0 {
			answers -= (had - 1) / blockLen
		} else {
			answers++
		}
		answer = v.buf[:answers]
	}
	if len(answer) == 0 {
		return nil
	}
	n, err = unix.Write(fd, answer)
	if n = max(n, 0); n < len(answer) && unlessAgain(err) == nil {
		c.owed = append([]byte(nil), answer[n:]...)
		return v.p.change(fd, unix.EPOLLOUT)
	}
	return err
}

func unlessAgain(err error) error {
	if err == unix.EAGAIN || err == unix.EINTR {
		return nil
	}
	return err
}

var errEnd = errors.New("end")

// writeAll writes b to a socket that does not block, and waits where it must.
func writeAll(fd int, b []byte) error {
	for len(b) > 0 {
		n, err := unix.Write(fd, b)
		switch err {
		case nil:
			b = b[n:]
		case unix.EAGAIN:
			if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, int(patience.Milliseconds())); err != nil && err != unix.EINTR {
				return err
			}
		case unix.EINTR:
		default:
			return err
		}
	}
	return nil
}

// readAll fills b.
func readAll(fd int, b []byte) error {
	for len(b) > 0 {
		n, err := unix.Read(fd, b)
		switch {
		case err == unix.EAGAIN:
			k, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(patience.Milliseconds()))
			if k == 0 && err == nil {
				return fmt.Errorf("nothing came for %v", patience)
			}
		case err == unix.EINTR:
		case err != nil:
			return err
		case n == 0:
			return errEnd
		default:
			b = b[n:]
		}
	}
	return nil
}

// client opens connections and puts load on them.
type client struct {
	conns []int
	size  int
}

// dial begins a connection.
func dial(to netip.AddrPort) (int, error) {
	sa, family := sockaddr(to)
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	_ = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1) // a matter of speed
	if err := unix.Connect(fd, sa); err != nil && err != unix.EINPROGRESS {
		_ = unix.Close(fd) // connect's error is the one that matters
		return -1, fmt.Errorf("connect to %v: %w", to, err)
	}
	return fd, nil
}

// open makes n connections, one after the other, and sends size bytes there and
// back on each; to a sink it is one byte.
func (c *client) open(to netip.AddrPort, n, size int) error {
	c.size = size
	for range n {
		fd, err := dial(to)
		if err != nil {
			return err
		}
		c.conns = append(c.conns, fd)
		if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, int(patience.Milliseconds())); err != nil && err != unix.EINTR {
			return err
		}
		b := make([]byte, size)
		if err := errors.Join(writeAll(fd, b), readAll(fd, b)); err != nil {
			return fmt.Errorf("first bytes of connection %d: %w", len(c.conns), err)
		}
	}
	return nil
}

func (c *client) close() {
	for _, fd := range c.conns {
		_ = unix.Close(fd) // nothing is left to lose
	}
	c.conns = nil
}

// Load is what a client achieved.
type Load struct {
	N        int64   // requests, connections or bytes
	Seconds  float64 // that it took
	P50, P99 float64 // microseconds from request to answer
}

// percentiles of latencies in nanoseconds.
func (l *Load) percentiles(ns []int64) {
	if len(ns) == 0 {
		return
	}
	slices.Sort(ns)
	l.P50 = float64(ns[len(ns)/2]) / 1e3
	l.P99 = float64(ns[len(ns)*99/100]) / 1e3
}

// requests sends size bytes on every connection, again when they have come
// back, for d.
func (c *client) requests(d time.Duration) (Load, error) {
	p, err := newPoller()
	if err != nil {
		return Load{}, err
	}
	defer unix.Close(p.fd)
	top := slices.Max(c.conns) + 1
	sent, have := make([]time.Time, top), make([]int, top)
	b := make([]byte, max(c.size, 64<<10))
	var ns []int64
	start := time.Now()
	for _, fd := range c.conns {
		if err := p.add(fd, unix.EPOLLIN); err != nil {
			return Load{}, err
		}
		sent[fd] = time.Now()
		if err := writeAll(fd, b[:c.size]); err != nil {
			return Load{}, err
		}
	}
	for open := len(c.conns); open > 0; {
		events, err := p.wait(patience)
		if err != nil || len(events) == 0 {
			return Load{}, fmt.Errorf("%d requests are not answered: %v", open, err)
		}
		for _, e := range events {
			fd := int(e.Fd)
			n, err := unix.Read(fd, b[:c.size-have[fd]])
			if err == unix.EAGAIN || err == unix.EINTR {
				continue
			}
			if n <= 0 {
				return Load{}, fmt.Errorf("a connection ended: %v", err)
			}
			if have[fd] += n; have[fd] < c.size {
				continue
			}
			have[fd] = 0
			now := time.Now()
			ns = append(ns, int64(now.Sub(sent[fd])))
			if now.Sub(start) >= d {
				open--
				continue
			}
			sent[fd] = now
			if err := writeAll(fd, b[:c.size]); err != nil {
				return Load{}, err
			}
		}
	}
	l := Load{N: int64(len(ns)), Seconds: time.Since(start).Seconds()}
	l.percentiles(ns)
	return l, nil
}

// connects opens connections, sends size bytes there and back and closes, with
// so many at a time, for d.
func (c *client) connects(to netip.AddrPort, inFlight, size int, d time.Duration) (Load, error) {
	p, err := newPoller()
	if err != nil {
		return Load{}, err
	}
	defer unix.Close(p.fd)
	type state struct {
		start time.Time
		asked bool
		have  int
	}
	states := map[int]*state{}
	begin := func() error {
		fd, err := dial(to)
		if err != nil {
			return err
		}
		states[fd] = &state{start: time.Now()}
		return p.add(fd, unix.EPOLLOUT)
	}
	start := time.Now()
	for range inFlight {
		if err := begin(); err != nil {
			return Load{}, err
		}
	}
	b := make([]byte, size)
	var ns []int64
	for len(states) > 0 {
		events, err := p.wait(patience)
		if err != nil || len(events) == 0 {
			return Load{}, fmt.Errorf("%d connections make no progress: %v", len(states), err)
		}
		for _, e := range events {
			fd := int(e.Fd)
			s := states[fd]
			if !s.asked {
				if err := errors.Join(writeAll(fd, b), p.change(fd, unix.EPOLLIN)); err != nil {
					return Load{}, fmt.Errorf("connect to %v: %w", to, err)
				}
				s.asked = true
				continue
			}
			n, err := unix.Read(fd, b[:size-s.have])
			if err == unix.EAGAIN || err == unix.EINTR {
				continue
			}
			if n <= 0 {
				return Load{}, fmt.Errorf("a connection ended: %v", err)
			}
			if s.have += n; s.have < size {
				continue
			}
			ns = append(ns, int64(time.Since(s.start)))
			delete(states, fd)
			_ = unix.Close(fd) // all has come
			if time.Since(start) < d {
				if err := begin(); err != nil {
					return Load{}, err
				}
			}
		}
	}
	l := Load{N: int64(len(ns)), Seconds: time.Since(start).Seconds()}
	l.percentiles(ns)
	return l, nil
}

// bulk writes whole blocks on every connection to a sink for d, one at the
// least, and returns when the sink has them all. Each connection has been used
// with one byte.
func (c *client) bulk(d time.Duration) (Load, error) {
	p, err := newPoller()
	if err != nil {
		return Load{}, err
	}
	defer unix.Close(p.fd)
	for _, fd := range c.conns {
		if err := p.add(fd, unix.EPOLLOUT); err != nil {
			return Load{}, err
		}
	}
	piece := make([]byte, pieceLen)
	sent := make([]int, slices.Max(c.conns)+1)
	start := time.Now()
	for open := len(c.conns); open > 0; {
		events, err := p.wait(patience)
		if err != nil || len(events) == 0 {
			return Load{}, fmt.Errorf("nothing can be written: %v", err)
		}
		for _, e := range events {
			fd := int(e.Fd)
			late := sent[fd] > 0 && time.Since(start) > d
			if left := blockLen - sent[fd]%blockLen; left == blockLen && late {
				open--
				if err := p.change(fd, 0); err != nil {
					return Load{}, err
				}
				continue
			} else if n, err := unix.Write(fd, piece[:min(left, pieceLen)]); err == nil {
				sent[fd] += n
			} else if err != unix.EAGAIN {
				return Load{}, fmt.Errorf("write: %w", err)
			}
		}
	}
	var total int64
	for _, fd := range c.conns {
		if err := readAll(fd, make([]byte, sent[fd]/blockLen)); err != nil {
			return Load{}, fmt.Errorf("the sink's answers: %w", err)
		}
		total += int64(sent[fd])
	}
	return Load{N: total, Seconds: time.Since(start).Seconds()}, nil
}
