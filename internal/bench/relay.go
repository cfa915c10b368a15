package bench

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// Relay is the least that a proxy does, on one thread: it accepts connections
// at listeners, and copies bytes between each and the one that begin makes for
// it, through memory. begin gets the listener's index and the accepted socket,
// and returns one that does not block and is connected or about to be.
// Relay returns only if it fails.
func Relay(listeners []int, begin func(i, fd int) (int, error)) error {
	p, err := newPoller()
	if err != nil {
		return err
	}
	r := &relay{p: p, begin: begin, listeners: map[int]int{}, ends: map[int]*end{}, buf: make([]byte, bufLen)}
	for i, fd := range listeners {
		r.listeners[fd] = i
		if err := errors.Join(unix.SetNonblock(fd, true), p.add(fd, unix.EPOLLIN)); err != nil {
			return fmt.Errorf("listener %d: %w", i, err)
		}
	}
	for {
		events, err := p.wait(-time.Millisecond)
		if err != nil {
			return err
		}
		for _, e := range events {
			if i, ok := r.listeners[int(e.Fd)]; ok {
				err = r.accept(i, int(e.Fd))
			} else if x := r.ends[int(e.Fd)]; x != nil && r.turn(x, e.Events) != nil {
				err = r.close(x)
			}
			if err != nil {
				return err
			}
		}
	}
}

type relay struct {
	p         *poller
	begin     func(i, fd int) (int, error)
	listeners map[int]int
	ends      map[int]*end
	buf       []byte
}

// An end is one socket of two.
type end struct {
	fd         int
	other      *end
	connecting bool
	owed       []byte // came from the other, and is not yet taken
	ended      bool   // nothing more comes from this one
}

// accept takes one connection. More are told again.
func (r *relay) accept(i, listener int) error {
	fd, _, err := unix.Accept4(listener, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
	if err != nil {
		return unlessAgain(err)
	}
	up, err := r.begin(i, fd)
	if err != nil {
		return unix.Close(fd)
	}
	for _, fd := range []int{fd, up} {
		_ = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1) // a matter of speed
	}
	a, b := &end{fd: fd}, &end{fd: up, connecting: true}
	a.other, b.other = b, a
	r.ends[fd], r.ends[up] = a, b
	return r.p.add(up, unix.EPOLLOUT)
}

// turn does what an end is ready for. An error is the end of both.
func (r *relay) turn(x *end, events uint32) error {
	if x.connecting {
		if code, err := unix.GetsockoptInt(x.fd, unix.SOL_SOCKET, unix.SO_ERROR); err != nil || code != 0 {
			return errEnd
		}
		x.connecting = false
		return errors.Join(r.p.change(x.fd, unix.EPOLLIN), r.p.add(x.other.fd, unix.EPOLLIN))
	}
	if len(x.owed) > 0 {
		if events&(unix.EPOLLERR|unix.EPOLLHUP) != 0 {
			return errEnd
		}
		if events&unix.EPOLLOUT != 0 {
			return r.settle(x)
		}
	}
	n, err := unix.Read(x.fd, r.buf)
	if err != nil {
		return unlessAgain(err)
	}
	if n == 0 {
		x.ended = true
		if x.other.ended {
			return errEnd
		}
		return errors.Join(unix.Shutdown(x.other.fd, unix.SHUT_WR), r.listen(x))
	}
	return r.give(x.other, r.buf[:n])
}

// give writes b to x, and keeps what is not taken.
func (r *relay) give(x *end, b []byte) error {
	n, err := unix.Write(x.fd, b)
	if err != nil && unlessAgain(err) != nil {
		return err
	}
	if n = max(n, 0); n == len(b) {
		return nil
	}
	x.owed = append([]byte(nil), b[n:]...)
	return errors.Join(r.listen(x), r.listen(x.other))
}

// settle writes what x is owed.
func (r *relay) settle(x *end) error {
	n, err := unix.Write(x.fd, x.owed)
	if err != nil {
		return unlessAgain(err)
	}
	if x.owed = x.owed[n:]; len(x.owed) > 0 {
		return nil
	}
	return errors.Join(r.listen(x), r.listen(x.other))
}

// listen asks for what x can be ready for: it is read while the other takes all.
func (r *relay) listen(x *end) error {
	var events uint32
	if !x.ended && len(x.other.owed) == 0 {
		events |= unix.EPOLLIN
	}
	if len(x.owed) > 0 {
		events |= unix.EPOLLOUT
	}
	return r.p.change(x.fd, events)
}

func (r *relay) close(x *end) error {
	delete(r.ends, x.fd)
	delete(r.ends, x.other.fd)
	return errors.Join(unix.Close(x.fd), unix.Close(x.other.fd))
}

// Dial begins a connection from a socket that control has prepared, bound to
// local if that is valid. The socket does not block.
func Dial(local, remote netip.AddrPort, control func(fd int) error) (int, error) {
	sa, family := sockaddr(remote)
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if err = control(fd); err == nil && local.IsValid() {
		from, _ := sockaddr(local)
		err = unix.Bind(fd, from)
	}
	if err == nil {
		if err = unix.Connect(fd, sa); err == unix.EINPROGRESS {
			err = nil
		}
	}
	if err != nil {
		_ = unix.Close(fd) // what went wrong before it is what matters
		return -1, fmt.Errorf("connect to %v: %w", remote, err)
	}
	return fd, nil
}
