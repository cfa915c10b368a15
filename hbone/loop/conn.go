package loop

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/internal/http2"
	"github.com/weft-mesh/weft/mesh"
)

// An Owner is told what becomes of a connection. Its methods run on the
// goroutine that carries many others: they do not block, and they do not call
// the engine but for Conn.Abort.
type Owner interface {
	// Opened: peer, who is at the other end of the tunnel, has accepted the
	// connection. peer does not change. It is called for connections that were
	// asked for with Pool.Connect.
	Opened(peer *mesh.Identity)
	// Ended: the connection is over and its sockets are closed. err is nil if
	// both directions ended in order. It is called once, and nothing after it.
	Ended(err error)
}

// A Conn is a TCP connection of an application that goes on in a tunnel. Its
// zero value is ready to be given to Pool.Connect or Request.Accept, once. Its
// owner may hold it by value: it does not move after that.
type Conn struct {
	owner   Owner
	loop    atomic.Pointer[eventLoop] // who carries it; nil before
	cause   atomic.Pointer[abortCause]
	fromApp atomic.Int64
	toApp   atomic.Int64

	// What follows is the loop's.
	tunnel  *tunnel
	opening *opening // until the peer has answered; nil for a server
	queue   *queue   // what the application has not taken; nil if nothing
	id      uint32   // of the stream
	fd      int32    // of the application's socket
	slot    int32    // in loop.conns
	flags   connFlags
}

// abortCause is why a connection was aborted from outside.
type abortCause struct{ err error }

type connFlags uint16

const (
	connWatched connFlags = 1 << iota // its socket is in the epoll
	connOpen                          // the peer has accepted
	connGreedy                        // a short read does not mean that all was read
	connBulk                          // the last read filled what it was given
	connReadEnd                       // the application has ended its direction
	connPeerEnd                       // the peer has ended its
	connShut                          // and the application was told
	connStalled                       // the stream's window is full
	connInLine                        // in tunnel.waiting
	connAgain                         // in loop.again
	connDeaf                          // the stream is gone after the peer's end: nobody hears the application
	connDead                          // Ended was called
)

func (c *Conn) is(f connFlags) bool { return c.flags&f != 0 }

// FromApp returns how many bytes the application has sent so far.
func (c *Conn) FromApp() int64 { return c.fromApp.Load() }

// ToApp returns how many bytes the application has been given so far.
func (c *Conn) ToApp() int64 { return c.toApp.Load() }

// Abort ends the connection at once, at both ends with an error, for a reason
// that Owner.Ended gets. It may be called at any time and from any goroutine.
// Only the first call counts.
func (c *Conn) Abort(cause error) {
	if !c.cause.CompareAndSwap(nil, &abortCause{cause}) {
		return
	}
	if l := c.loop.Load(); l != nil {
		l.post(work{kind: workAbort, conn: c}) // else whoever takes it looks at cause
	}
}

// Cause returns what the connection was aborted for, or nil.
func (c *Conn) Cause() error {
	if a := c.cause.Load(); a != nil {
		return a.err
	}
	return nil
}

// errDeaf is why a connection ends whose application goes on sending to a peer
// that is gone.
var errDeaf = errors.New("the peer has closed the connection and takes no more data")

// reset is why a connection ends that was not ended in order. It is
// ECONNRESET to those who ask with errors.Is.
type resetError struct {
	what string
	err  error
}

// Error says who ended the connection.
func (e *resetError) Error() string { return fmt.Sprintf("%s: %v", e.what, e.err) }

// Unwrap returns the reason and ECONNRESET.
func (e *resetError) Unwrap() []error { return []error{e.err, syscall.ECONNRESET} }

func appError(call string, e syscall.Errno) error {
	return &resetError{"the application's connection", os.NewSyscallError(call, e)}
}

// adopt makes c the loop's, as a stream of t. It reports false if c has ended
// instead.
func (l *eventLoop) adopt(c *Conn, t *tunnel, id uint32) bool {
	c.tunnel, c.id = t, id
	t.conns.Put(id, c)
	c.slot = l.connSlot(c)
	if c.cause.Load() != nil {
		l.endConn(c, errors.New("aborted"))
		return false
	}
	err := cutAtDeath(c.fd)
	if err == nil {
		err = watch(l.ep, int(c.fd), aboutConn, c.slot)
	}
	if err != nil {
		l.endConn(c, err)
		return false
	}
	c.flags |= connWatched
	return true
}

// endConn ends c: with err nil in order, and else with an error for both ends.
func (l *eventLoop) endConn(c *Conn, err error) {
	if c.is(connDead) {
		return
	}
	t := c.tunnel
	l.touch(t)
	if err != nil {
		t.core.Reset(c.id, http2.Cancel)
	}
	l.dropConn(c)
	if err != nil {
		abortSocket(c.fd)
	} else {
		closeSocket(c.fd)
	}
	c.fd = -1
	c.over(err)
	if t.ended && t.fd < 0 {
		l.forgetTunnel(t)
	}
}

// whole reports whether the peer has sent all of c in order, and nothing more can
// be sent to it, but the application has yet to take some.
func (c *Conn) whole() bool {
	return c.is(connOpen) && c.is(connPeerEnd) && !c.is(connShut) && c.is(connReadEnd|connDeaf)
}

// over tells the owner.
func (c *Conn) over(err error) {
	c.flags |= connDead
	if cause := c.Cause(); cause != nil {
		err = cause
	}
	owner := c.owner
	c.owner, c.tunnel, c.opening = nil, nil, nil
	owner.Ended(err)
}

// dropConn takes c out of its tunnel and the loop's table.
func (l *eventLoop) dropConn(c *Conn) {
	t := c.tunnel
	if l.parcel.to == c {
		t.core.Consumed(c.id, l.parcel.size)
		l.parcel.clear()
	}
	if q := c.queue; q != nil {
		n := q.n
		if t.ahead[c.id] == 0 {
			q.clear(&l.store)
			l.store.release(q)
		} // else somebody reads it
		c.queue = nil
		l.unread(t, -n)
		t.core.Consumed(c.id, n)
	}
	if c.opening != nil {
		t.opening--
	}
	t.conns.Delete(c.id)
	if t.last == c {
		t.last = nil
	}
	if c.is(connInLine) {
		t.leaveLine(c)
	}
	l.conns[c.slot] = nil
	l.freedConns = append(l.freedConns, c.slot)
	t.load.Add(-1)
}

// connEvent acts on what epoll says of c.
func (l *eventLoop) connEvent(c *Conn, ev uint32) {
	if ev&(unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR|unix.EPOLLPRI) != 0 {
		c.flags |= connGreedy
	}
	if ev&(unix.EPOLLOUT|unix.EPOLLERR|unix.EPOLLHUP) != 0 && c.queue != nil && c.is(connOpen) {
		l.drainQueue(c)
	}
	if ev&(unix.EPOLLIN|unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR) != 0 && !c.is(connAgain|connInLine|connStalled) {
		l.readApp(c, turns)
	}
}

// readApp moves what the application has sent into the tunnel, a bounded
// number of times.
func (l *eventLoop) readApp(c *Conn, turns int) {
	for ; ; turns-- {
		if c.flags&(connOpen|connDead|connReadEnd) != connOpen {
			return
		}
		t := c.tunnel
		if c.is(connDeaf) {
			l.readDeaf(c)
			return
		}
		if turns == 0 {
			l.later(c)
			return
		}
		l.touch(t)
		if t.full() || t.core.ConnRoom() == 0 {
			t.queueUp(c)
			return
		}
		room := t.core.Room(c.id)
		if room == 0 {
			c.flags |= connStalled
			return
		}
		n, want, e := l.fill(c, t.core.PieceLen(), room)
		switch {
		case e == unix.EAGAIN:
			return
		case e == unix.EINTR:
			continue
		case e != 0:
			l.endConn(c, appError("read", e))
			return
		case n == 0:
			c.flags |= connReadEnd
			t.core.Send(c.id, nil, true)
			if c.is(connShut) {
				l.endConn(c, nil)
			}
			return
		}
		c.fromApp.Add(int64(n))
		l.moved += n
		if n <= smallRead {
			t.core.Send(c.id, l.read[http2.HeaderLen:http2.HeaderLen+n], false)
			if len(t.core.Output()) >= gather {
				t.emit(nil)
			}
		} else {
			if n == want && turns > 1 {
				t.cork() // a full read promises another
			}
			t.emit(t.core.Pieces(c.id, l.read, n))
		}
		if n < want && !c.is(connGreedy) {
			return // what comes next is told (epoll(7): a short read empties the socket)
		}
	}
}

// fill reads from the application's socket into l.read, in pieces that leave
// room for a frame header before each. It returns how much it asked for.
func (l *eventLoop) fill(c *Conn, piece, room int) (n, want int, e syscall.Errno) {
	size := piece - http2.HeaderLen
	if !c.is(connBulk) || room <= size {
		want = min(size, room)
		n, e = recv(c.fd, l.read[http2.HeaderLen:http2.HeaderLen+want])
	} else {
		iov := l.iov[:0]
		for at := 0; at+piece <= readLen && want < room; at += piece {
			k := min(size, room-want)
			v := unix.Iovec{Base: &l.read[at+http2.HeaderLen]}
			v.SetLen(k)
			iov = append(iov, v)
			want += k
		}
		n, e = readv(c.fd, iov)
	}
	if n >= size {
		c.flags |= connBulk
	} else {
		c.flags &^= connBulk
	}
	return n, want, e
}

// readDeaf waits for the end of an application that nobody hears any more.
func (l *eventLoop) readDeaf(c *Conn) {
	n, e := recv(c.fd, l.read[:1])
	switch {
	case e == unix.EAGAIN || e == unix.EINTR:
	case e != 0:
		l.endConn(c, appError("read", e))
	case n > 0:
		l.endConn(c, &resetError{"the tunnelled connection", errDeaf})
	case c.is(connShut):
		l.endConn(c, nil)
	default:
		c.flags |= connReadEnd
	}
}

// later puts c in line for another turn.
func (l *eventLoop) later(c *Conn) {
	if !c.is(connAgain) {
		c.flags |= connAgain
		l.again = append(l.again, c)
	}
}

// deliver gives p to the application, and queues what it does not take. What
// was taken is Consumed, and so is all of it if the connection ends. While more
// of the stream is there, p waits for it in l.parcel.
func (l *eventLoop) deliver(c *Conn, p []byte) {
	if l.parcel.to != c {
		l.finishParcel()
	}
	if c.queue != nil || !c.is(connOpen) {
		l.enqueue(c, p)
		return
	}
	more := c.tunnel.core.More()
	if more || l.parcel.to == c {
		l.parcel.add(c, p)
		if !more || l.parcel.full() {
			l.finishParcel()
		}
		return
	}
	n, e := send(c.fd, p)
	for e == unix.EINTR {
		n, e = send(c.fd, p)
	}
	if n, ok := l.took(c, n, e, len(p)); ok && n < len(p) {
		l.enqueue(c, p[n:])
	}
}

// took accounts for what the application took of size bytes, n or none at all
// because of e. It reports false if that has ended the connection.
func (l *eventLoop) took(c *Conn, n int, e syscall.Errno, size int) (int, bool) {
	if e == unix.EAGAIN {
		n = 0
	} else if e != 0 {
		c.tunnel.core.Consumed(c.id, size)
		l.endConn(c, appError("write", e))
		return 0, false
	}
	c.toApp.Add(int64(n))
	c.tunnel.core.Consumed(c.id, n)
	return n, true
}

// enqueue keeps p until the application takes it. It reports false if the
// connection has ended instead.
func (l *eventLoop) enqueue(c *Conn, p []byte) bool {
	t := c.tunnel
	if l.overCap() && c.queue != nil && c.queue.n > fairShare {
		t.core.Consumed(c.id, len(p))
		l.endConn(c, errNodeFull)
		return false
	}
	if c.queue == nil {
		c.queue = l.store.queue()
	}
	c.queue.write(&l.store, p)
	l.unread(t, len(p))
	return true
}

// drainQueue gives the application what waits for it.
func (l *eventLoop) drainQueue(c *Conn) {
	t, q := c.tunnel, c.queue
	if t.ahead[c.id] > 0 {
		return
	}
	l.touch(t)
	total := 0
	var e syscall.Errno
	for q.n > 0 {
		p := q.front()
		var n int
		if n, e = send(c.fd, p); e == unix.EINTR {
			continue
		}
		if e != 0 {
			break
		}
		q.drop(&l.store, n)
		total += n
		if n < len(p) {
			break // the socket is full, and the kernel will say when it is not
		}
	}
	c.toApp.Add(int64(total))
	l.unread(t, -total)
	t.core.Consumed(c.id, total)
	if e != 0 && e != unix.EAGAIN {
		l.endConn(c, appError("write", e))
		return
	}
	if q.n == 0 {
		l.store.release(q)
		c.queue = nil
		l.passEnd(c)
	}
}

// passEnd tells the application of the peer's end, once it has all before it.
func (l *eventLoop) passEnd(c *Conn) {
	if c.flags&(connPeerEnd|connOpen|connShut) != connPeerEnd|connOpen || c.queue != nil {
		return
	}
	c.flags |= connShut
	if c.is(connReadEnd) || c.tunnel.ended {
		l.endConn(c, nil) // which tells the application, too
		return
	}
	if e := shutdown(c.fd); e != 0 && e != unix.ENOTCONN {
		l.endConn(c, appError("shutdown", e))
	}
}
