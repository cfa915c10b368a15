package loop

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/hbone"
	"github.com/weft-mesh/weft/hbone/record"
	"github.com/weft-mesh/weft/internal/http2"
	"github.com/weft-mesh/weft/mesh"
)

// A tunnel is one HBONE connection: the state of the protocol, what seals and
// opens it, and its socket. Its loop alone touches it, but for what is marked.
type tunnel struct {
	loop   *eventLoop // does not change
	host   host       // nor does this
	peer   mesh.Identity
	client bool
	remote netip.AddrPort
	local  netip.AddrPort

	load atomic.Int32               // connections on it, or on their way to it; anybody's
	room atomic.Int32               // how many it takes; anybody reads it
	gone atomic.Bool                // it takes no more; anybody reads it
	why  atomic.Pointer[abortCause] // it has ended with an error; anybody reads it
	move atomic.Bool                // it moves to another process; anybody reads it

	fd   int32
	slot int32
	core *hbone.Tunnel
	seal *record.Sealer
	open *record.Opener

	left   []byte // the beginning of a record; nil if there is none
	unsent []byte // sealed, and the socket was full
	memory []byte // that unsent is a part of

	conns    http2.Streams[Conn]
	requests http2.Streams[Request] // server: not yet answered
	last     *Conn                  // the connection that had the last data
	waiting  []*Conn                // for room in the tunnel, in the order of their turns
	waitHead int
	opening  int // connections that the peer has not answered
	queued   int // bytes in the queues of all connections

	blocked bool  // the socket is full
	corked  bool  // the socket keeps a packet that is not full, until the end of the batch
	greedy  bool  // a short read does not mean that all was read
	dirty   bool  // in loop.dirty
	again   bool  // in loop.againTunnels
	held    bool  // in loop.held
	owed    bool  // the peer has asked for a new key
	greeted bool  // the peer has spoken
	ended   bool  // nothing goes through it any more
	parting bool  // it has said its last word in order, and waits for the peer's
	frozen  bool  // it moves to another process, or from one
	sendErr error // the socket cannot be written

	unused   time.Time     // since when there is no connection
	idle     time.Duration // client: unused for so long, it ends; 0 is never
	proof    time.Time     // until when the peer's certificate is good
	closeBy  time.Time     // when the last words have had their time
	unacked  int           // while it parts: bytes that the peer's kernel has not confirmed
	closeErr error
	late     []work         // put aside while it is frozen
	ahead    map[uint32]int // by stream: how much of its queue was given out by Mover.Ahead
}

// A host is what a tunnel was made for.
type host interface {
	// limits bound a new tunnel.
	limits() hbone.Limits
	// requested begins the work for a request.
	requested(r *Request)
	// over is called when the tunnel has ended.
	over(t *tunnel, err error)
}

// full reports whether nothing should be added to what the socket is to take.
func (t *tunnel) full() bool { return t.blocked || t.sendErr != nil }

// queueUp puts c behind those that wait for room.
func (t *tunnel) queueUp(c *Conn) {
	if !c.is(connInLine) {
		c.flags |= connInLine
		t.waiting = append(t.waiting, c)
	}
}

// nextInLine removes the first of those that wait.
func (t *tunnel) nextInLine() *Conn {
	c := t.waiting[t.waitHead]
	t.waiting[t.waitHead] = nil
	if t.waitHead++; t.waitHead == len(t.waiting) {
		t.waiting, t.waitHead = t.waiting[:0], 0
	}
	c.flags &^= connInLine
	return c
}

// leaveLine removes c, which ends, from those that wait.
func (t *tunnel) leaveLine(c *Conn) {
	k := t.waitHead
	for _, o := range t.waiting[t.waitHead:] {
		if o != c {
			t.waiting[k] = o
			k++
		}
	}
	clear(t.waiting[k:])
	t.waiting = t.waiting[:k]
	if t.waitHead == k {
		t.waiting, t.waitHead = t.waiting[:0], 0
	}
	c.flags &^= connInLine
}

// emit seals what is queued, and after it p, which has a byte of capacity
// behind it, and sends it. The socket is not full.
func (t *tunnel) emit(p []byte) {
	l := t.loop
	out := l.sealed[:0]
	var err error
	if len(t.core.Output()) > 0 {
		q := t.core.TakeOutput(nil)
		if len(q) == cap(q) {
			q = append(q, 0)[:len(q)]
		}
		out, err = t.protect(out, q)
		l.store.freePlain(q)
	}
	if len(p) > 0 && err == nil {
		out, err = t.protect(out, p)
	}
	l.sealed = out[:0] // it may have grown
	if err != nil {
		t.sendErr = err
		return
	}
	t.write(out, out)
}

// cork lets the socket send only full packets until the end of the batch, as
// more follows at once. Else the last bytes of each read would go in a packet
// of their own, which costs the way through two nodes like a full one.
func (t *tunnel) cork() {
	if !t.corked {
		t.corked = true
		cork(t.fd, true)
	}
}

// protect seals p, which it changes for the while, and first pays the change
// of keys that the peer is owed.
func (t *tunnel) protect(out, p []byte) ([]byte, error) {
	if t.owed {
		t.owed = false
		var err error
		if out, err = t.seal.Update(out, false); err != nil {
			return out, err
		}
	}
	return t.seal.SealOwned(out, p)
}

// write sends out, which lies in memory, and keeps what the socket does not
// take.
func (t *tunnel) write(out, memory []byte) {
	for len(out) > 0 {
		n, e := send(t.fd, out)
		switch {
		case e == unix.EINTR:
			continue
		case e == unix.EAGAIN:
		case e != 0:
			t.sendErr = os.NewSyscallError("write", e)
			t.loop.touch(t)
			return
		default:
			if out = out[n:]; len(out) == 0 {
				return
			}
		}
		// A short write is a full socket: the kernel will say when it is not.
		t.blocked = true
		t.keep(out, memory)
		return
	}
}

// keep holds on to what the socket did not take.
func (t *tunnel) keep(out, memory []byte) {
	l := t.loop
	switch {
	case len(t.memory) > 0 || cap(t.memory) > 0:
		t.unsent = out // a part of t.memory already
	case len(out) <= gather:
		t.memory = append(l.store.plain(), out...)
		t.unsent = t.memory
	default:
		// Cheaper than a copy: the loop takes other memory for the next.
		t.memory, t.unsent = memory, out
		l.sealed = l.store.bigBuffer()
	}
}

// writable goes on with what the socket did not take.
func (t *tunnel) writable() {
	if !t.blocked {
		return
	}
	t.blocked = false
	t.write(t.unsent, t.memory)
	if !t.blocked {
		t.freeUnsent()
	}
	t.loop.touch(t)
}

func (t *tunnel) freeUnsent() {
	if cap(t.memory) > 0 {
		t.loop.store.freeSealed(t.memory)
	}
	t.memory, t.unsent = nil, nil
}

// tunnelEvent acts on what epoll says of t.
func (l *eventLoop) tunnelEvent(t *tunnel, ev uint32) {
	if ev&(unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR|unix.EPOLLPRI) != 0 {
		t.greedy = true
	}
	if ev&(unix.EPOLLOUT|unix.EPOLLERR|unix.EPOLLHUP) != 0 {
		t.writable()
	}
	if ev&(unix.EPOLLIN|unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR) != 0 && !t.again {
		l.readTunnel(t)
	}
}

// readTunnel takes what the peer has sent, a bounded number of times.
func (l *eventLoop) readTunnel(t *tunnel) {
	if t.parting {
		l.readParting(t)
		return
	}
	for turn := 0; !t.ended; turn++ {
		if turn == turns {
			t.again = true
			l.againTunnels = append(l.againTunnels, t)
			return
		}
		k := copy(l.cipher, t.left)
		n, e := recv(t.fd, l.cipher[k:])
		switch {
		case e == unix.EINTR:
			continue
		case e == unix.EAGAIN:
			return
		case e != 0:
			l.endRead(t, os.NewSyscallError("read", e))
			return
		case n == 0:
			l.endRead(t, io.ErrUnexpectedEOF)
			return
		}
		l.moved += n
		if cap(t.left) > 0 {
			l.store.freeRecord(t.left)
			t.left = nil
		}
		l.input(t, l.cipher[:k+n])
		if k+n < len(l.cipher) && !t.greedy {
			return
		}
	}
}

// input opens the records in p and acts on what is in them.
func (l *eventLoop) input(t *tunnel, p []byte) {
	plain := l.plain[:0]
	var failed error
	for {
		var used bool
		plain, p, used, failed = t.open.OpenTo(plain, p)
		if failed != nil || !used {
			break
		}
	}
	if len(p) > 0 && failed == nil {
		t.left = append(l.store.record(), p...)
	}
	l.plain = plain[:0]
	t.owed = t.open.KeyUpdateOwed() || t.owed
	if len(plain) > 0 {
		l.touch(t)
		err := t.core.Receive(l.now, plain, t)
		l.finishParcel()
		if err != nil {
			l.endTunnel(t, err, true)
			return
		}
	}
	if failed != nil {
		l.endRead(t, failed)
	}
}

// endRead ends a tunnel because nothing more can be read.
func (l *eventLoop) endRead(t *tunnel, err error) {
	var alert tls.AlertError
	var bad *record.Error
	cutOff := !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) || t.core.Streams() > 0
	switch {
	case errors.As(err, &bad):
		t.say(bad.Alert)
		l.endTunnel(t, fmt.Errorf("read from the tunnel: %w", err), false)
	case errors.As(err, &alert):
		l.endTunnel(t, fmt.Errorf("the peer ended the tunnel: %w", err), false)
	case t.sendErr != nil:
		l.endTunnel(t, fmt.Errorf("write to the tunnel: %w", t.sendErr), false)
	case cutOff:
		l.endTunnel(t, fmt.Errorf("read from the tunnel: %w", err), false)
	default:
		l.endTunnel(t, nil, false)
	}
}

// say sends an alert, if the socket takes it.
func (t *tunnel) say(alert uint8) {
	if t.full() {
		return
	}
	if out, err := t.seal.Alert(t.loop.sealed[:0], alert); err == nil {
		_, _ = send(t.fd, out) // whether the peer hears it changes nothing
	}
}

// errEnded is why connections end when their tunnel has no other reason.
var errEnded = errors.New("the tunnel was closed")

// endTunnel ends t and its connections, but for those that have come whole: their
// applications get what they have not read. With flush what is queued is still
// sent, for as long as flushPatience; without an error as long as the peer takes it.
func (l *eventLoop) endTunnel(t *tunnel, err error, flush bool) {
	if t.ended {
		return
	}
	t.ended = true
	if err != nil {
		t.why.Store(&abortCause{err})
	}
	t.gone.Store(true)
	t.core.Close()
	cause := err
	if cause == nil {
		cause = errEnded
	}
	cause = &resetError{"the tunnel ended", cause}
	for _, c := range t.conns.All() {
		// The peer has never seen it, or has died over it: then nothing of the
		// application was sent, for that waits for the answer.
		if c.opening != nil && t.greeted && !flush && (c.opening.sent > t.sent() || cutOff(err)) {
			l.bounce(c, cause)
			continue
		}
		if !c.whole() || t.ahead[c.id] > 0 {
			l.endConn(c, cause)
		}
	}
	for _, r := range t.requests.All() {
		l.forgetRequest(r)
	}
	t.closeErr = err
	if flush && !t.full() {
		t.emit(nil)
	}
	switch {
	case !flush || t.sendErr != nil || err != nil && !t.blocked:
		l.closeTunnel(t)
	case !t.blocked:
		l.part(t)
	default:
		t.closeBy = l.now.Add(flushPatience)
		if err == nil {
			t.closeBy = l.now.Add(l.engine.patience)
		}
		l.wakeAt(t.closeBy)
	}
}

// killTunnel ends t and all its connections, because somebody here says so.
func (l *eventLoop) killTunnel(t *tunnel, cause error) {
	l.endTunnel(t, cause, false)
	for _, c := range t.conns.All() {
		l.endConn(c, &resetError{"the tunnel ended", cause})
	}
	l.closeTunnel(t)
}

// part says the last word of a tunnel that ends in order, and waits for the
// peer's. The last bytes of its streams may still be on their way, and what the
// peer says to a socket that is closed resets the connection (RFC 1122 4.2.2.13),
// which takes them from the peer.
func (l *eventLoop) part(t *tunnel) {
	t.parting = true
	t.say(0) // close_notify
	t.seal.Wipe()
	t.open.Wipe()
	if shutdown(t.fd) != 0 {
		l.closeTunnel(t)
		return
	}
	t.unacked = unacked(t.fd)
	t.closeBy = l.now.Add(l.engine.patience)
	l.wakeAt(t.due(l.now))
	l.readParting(t)
}

// readParting drops what comes, until the peer ends too.
func (l *eventLoop) readParting(t *tunnel) {
	for range turns {
		if t.fd < 0 {
			return
		}
		n, e := recv(t.fd, l.cipher)
		switch {
		case e == unix.EINTR:
		case e == unix.EAGAIN:
			return
		case e != 0 || n == 0:
			l.closeTunnel(t)
		}
	}
	if t.fd >= 0 && !t.again {
		t.again = true
		l.againTunnels = append(l.againTunnels, t)
	}
}

// stillParting reports whether the peer has yet to confirm something, and does
// so, if only slowly.
func (l *eventLoop) stillParting(t *tunnel) bool {
	n := unacked(t.fd)
	if n < t.unacked {
		t.unacked = n
		t.closeBy = l.now.Add(l.engine.patience)
	}
	return n > 0 && l.now.Before(t.closeBy)
}

// closeTunnel closes the socket of a tunnel that has ended.
func (l *eventLoop) closeTunnel(t *tunnel) {
	if t.fd < 0 {
		return
	}
	t.say(0) // close_notify
	_ = unix.Close(int(t.fd))
	t.fd = -1
	t.seal.Wipe()
	t.open.Wipe()
	t.freeUnsent()
	if t.left != nil {
		l.store.freeRecord(t.left)
		t.left = nil
	}
	l.forgetTunnel(t)
}

// forgetTunnel lets go of a tunnel that is closed, once it has no connection.
func (l *eventLoop) forgetTunnel(t *tunnel) {
	if t.conns.Len() > 0 {
		return
	}
	l.unread(t, -t.queued)
	l.tunnels[t.slot] = nil
	l.freedTunnels = append(l.freedTunnels, t.slot)
	l.open--
	t.host.over(t, t.closeErr)
}

// sent returns how many bytes of the protocol's output were sealed.
func (t *tunnel) sent() uint64 { return t.core.Taken() }

// flush ends a batch for t: what it has is sent, those that wait get their
// turns, and what has come due is done.
func (l *eventLoop) flush(t *tunnel) {
	t.dirty = false
	if t.ended {
		switch {
		case t.fd < 0 || t.parting:
		case t.blocked:
			if t.closeErr == nil { // the socket has taken something
				t.closeBy = l.now.Add(l.engine.patience)
			}
		case t.closeErr != nil || t.sendErr != nil:
			l.closeTunnel(t)
		default:
			l.part(t)
		}
		return
	}
	if !t.full() {
		t.emit(nil)
	}
	for t.waitHead < len(t.waiting) && !t.full() && t.core.ConnRoom() > 0 {
		l.readApp(t.nextInLine(), 1)
	}
	if !t.full() && len(t.core.Output()) > 0 {
		t.emit(nil)
	}
	if t.corked {
		t.corked = false
		cork(t.fd, false)
	}
	if t.sendErr != nil {
		// The peer may have said why, with TLS 1.3 also why it refused our
		// certificate: what it sent before is still there.
		t.greedy = true
		l.readTunnel(t)
		l.endTunnel(t, fmt.Errorf("write to the tunnel: %w", t.sendErr), false)
		return
	}
	if t.core.Finished() {
		l.endTunnel(t, nil, true)
		return
	}
	if !t.blocked && len(t.core.Output()) == 0 {
		if p := t.core.TakeOutput(nil); cap(p) > 0 {
			l.store.freePlain(p)
		}
	}
	t.settle(l.now)
}

// settle notes what others look at.
func (t *tunnel) settle(now time.Time) {
	switch {
	case t.core.Streams() > 0:
		t.unused = time.Time{}
	case t.unused.IsZero():
		t.unused = now
	}
	if t.core.Draining() {
		t.gone.Store(true)
	}
	if n := int32(t.core.MaxStreams()); n != t.room.Load() {
		t.room.Store(n)
	}
}

// tick does what is due at now.
func (l *eventLoop) tick(t *tunnel) {
	now := l.now
	if t.ended {
		switch {
		case t.fd < 0, t.parting && l.stillParting(t), !t.parting && now.Before(t.closeBy):
		default:
			l.closeTunnel(t)
		}
		return
	}
	if !now.Before(t.core.Deadline()) {
		l.touch(t)
		if err := t.core.Tick(now); err != nil {
			l.endTunnel(t, err, true)
			return
		}
	}
	if t.idle > 0 && !t.unused.IsZero() && now.Sub(t.unused) >= t.idle && t.load.Load() == 0 {
		l.touch(t)
		t.core.Shutdown(now)
	}
	if !t.proof.IsZero() && !now.Before(t.proof) {
		// Who the peer is has been proved until now. What is open goes on;
		// what is new needs a new proof.
		t.proof = time.Time{}
		l.touch(t)
		t.core.Shutdown(now)
	}
	if t.opening == 0 {
		return
	}
	for _, c := range t.conns.All() {
		if c.opening != nil && now.After(c.opening.deadline) {
			l.endConn(c, errNoAnswer)
		}
	}
}

// due returns when t wants tick.
func (t *tunnel) due(now time.Time) time.Time {
	if t.ended {
		if t.parting {
			return earlier(t.closeBy, now.Add(partPause))
		}
		return t.closeBy
	}
	at := t.core.Deadline()
	if t.idle > 0 && !t.unused.IsZero() && !t.core.Draining() {
		at = earlier(at, t.unused.Add(t.idle))
	}
	if !t.proof.IsZero() {
		at = earlier(at, t.proof)
	}
	if t.opening > 0 {
		at = earlier(at, now.Add(time.Second))
	}
	return at
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

// errNoAnswer is why a connection ends that the peer does not answer.
var errNoAnswer = fmt.Errorf("the peer does not answer: %w", syscall.ETIMEDOUT)
