package loop

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/hbone"
	"github.com/weft-mesh/weft/internal/http2"
)

const (
	// readLen is how much is read of a socket at once. From 128 KiB on more
	// brings nothing.
	readLen = 128 << 10
	// recordRoom is room for the beginning of a record that came before.
	recordRoom = 17 << 10
	// smallRead is up to what length data is gathered with that of other
	// streams, and not sealed and sent at once.
	smallRead = 8 << 10
	// gather bounds what is gathered.
	gather = 64 << 10
	// turns is how often one socket is read before others have theirs.
	turns = 4
	// sweepPause is the least time between two looks at the clock of every
	// tunnel.
	sweepPause = 50 * time.Millisecond
	// flushPatience is how long a peer may take to read our last words.
	flushPatience = time.Second
	// partPatience is how long it may take none of the last bytes of a tunnel
	// that ends in order, and partPause how often the kernel is asked.
	partPatience = 5 * time.Second
	partPause    = time.Second
	// tired is how many batches in a row, one directly after the other, say that
	// a loop does not keep up with its work, and restful how many of them one
	// sleep makes up for: so it is about 8/9 of a processor for some tens of
	// milliseconds.
	tired   = 1024
	restful = 8
	// forgetful is how long after a batch its loop is as good as new.
	forgetful = time.Second
	// fairShare is what a connection may have unread also when the node has too
	// much.
	fairShare = 64 << 10
)

// An eventLoop is a goroutine and what it carries.
type eventLoop struct {
	engine *Engine

	ep, wakeFD int             // ep is poller's
	poller     *os.File        // the epoll, which itself is in Go's poller
	raw        syscall.RawConn // of poller
	wakeBy     time.Time       // the deadline of poller; zero if it has none
	moved      int             // bytes that the batch at hand has read
	events     []unix.EpollEvent
	now        time.Time // of the batch at hand
	sweepAt    time.Time // when a tunnel wants tick; zero if none does

	conns        []*Conn   // by slot; nil are free
	tunnels      []*tunnel // as conns
	open         int       // tunnels that are not closed
	freeConns    []int32
	freeTunnels  []int32
	freedConns   []int32 // in this batch: events for them may still be there
	freedTunnels []int32

	dirty        []*tunnel // to be flushed at the end of the batch
	again        []*Conn   // with more to read
	spareAgain   []*Conn
	againTunnels []*tunnel
	spareTunnels []*tunnel
	held         []*tunnel // whose window is held as the node has too much unread

	// Scratch memory.
	cipher []byte // received
	plain  []byte // opened
	read   []byte // of applications
	sealed []byte // to be sent
	iov    []unix.Iovec
	parcel parcel
	store  store

	sleepless int         // batches without a sleep between them, less what sleep made up for
	busy      atomic.Bool // sleepless has reached tired, and is still above half of it

	sleeping atomic.Bool // it waits, or is about to
	pending  atomic.Bool // inbox has something
	mu       sync.Mutex
	inbox    []work // guarded by mu
	closed   bool   // guarded by mu: it takes nothing more
	spareBox []work
	stopping bool
}

// work is something for a loop from another goroutine.
type work struct {
	kind   workKind
	conn   *Conn
	tunnel *tunnel
	req    *Request
	status int
	err    error
	unread []byte // of a new tunnel: what came behind the handshake
	call   func()
}

type workKind uint8

const (
	workTunnel   workKind = iota // a new tunnel
	workConnect                  // a connection for tunnel
	workAnswer                   // a request was accepted for conn, or refused with status
	workAbort                    // of conn
	workShutdown                 // of tunnel, in order
	workEnd                      // of tunnel, at once
	workCall                     // something rare
	workStop
)

func newEventLoop(e *Engine) *eventLoop {
	return &eventLoop{engine: e, ep: -1, wakeFD: -1}
}

// start opens what the loop waits on.
func (l *eventLoop) start() error {
	var err error
	if l.ep, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return os.NewSyscallError("epoll_create", err)
	}
	if err := unix.SetNonblock(l.ep, true); err != nil { // NewFile asks for that
		_ = unix.Close(l.ep)
		l.ep = -1
		return os.NewSyscallError("fcntl", err)
	}
	l.poller = os.NewFile(uintptr(l.ep), "epoll")
	if l.raw, err = l.poller.SyscallConn(); err != nil {
		return err
	}
	if err := l.poller.SetReadDeadline(time.Time{}); err != nil { // without it wait would return at once, always
		return fmt.Errorf("an epoll inside of Go's poller: %w", err)
	}
	l.events = make([]unix.EpollEvent, 256)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.wakeFD, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return os.NewSyscallError("eventfd", err)
	}
	// Edge-triggered, so that it need not be read: each write is told.
	e := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET&0xffffffff, Pad: aboutWake}
	if err := unix.EpollCtl(l.ep, unix.EPOLL_CTL_ADD, l.wakeFD, &e); err != nil {
		return os.NewSyscallError("epoll_ctl", err)
	}
	l.cipher = make([]byte, readLen+recordRoom)
	l.plain = make([]byte, 0, readLen+2*recordRoom)
	l.read = make([]byte, readLen+1)
	l.sealed = l.store.bigBuffer()
	l.iov = make([]unix.Iovec, 0, readLen/http2.MinFrameSize)
	return nil
}

// post gives w to the loop. It reports false if the loop has ended.
func (l *eventLoop) post(w work) bool {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return false
	}
	l.inbox = append(l.inbox, w)
	l.pending.Store(true)
	if l.sleeping.CompareAndSwap(true, false) && l.wakeFD >= 0 {
		one := [8]byte{1}
		_, _ = unix.Write(l.wakeFD, one[:]) // it fails only if the loop is about to wake anyway
	}
	l.mu.Unlock()
	return true
}

// run carries until it is told to stop.
//
// It waits as goroutines do, not in epoll_wait(2). A thread that sleeps in a
// system call keeps its processor until Go's monitor takes that away, for which
// the monitor wakes up every 20 us, on a busy node for a sixth of all CPU time.
// And what the loop starts would wait for another thread to wake up.
func (l *eventLoop) run() {
	carry := l.carry
	for !l.stopping {
		if l.raw.Read(carry) != nil { // the deadline has come
			l.wakeBy = time.Time{}
			_ = l.poller.SetReadDeadline(l.wakeBy) // it has worked before
		}
	}
	l.close()
}

// carry does batch after batch while there is something to do, and reports
// whether the loop is to end. Else Go's poller calls it again when the epoll has
// something new: also if that came before carry returned, so that there is no
// need to look once more before each sleep.
func (l *eventLoop) carry(uintptr) (end bool) {
	l.sleeping.Store(false)
	for first := true; ; first = false {
		ready := poll(l.ep, l.events)
		if ready > 0 || first || l.more() {
			if !first {
				l.hurry()
			}
			l.batch(l.events[:ready])
			if l.stopping {
				return true
			}
			if ready > 1 || l.moved > smallRead || l.more() {
				continue // it is busy: there may be something already
			}
		}
		l.rest()
		if !l.wakeBy.Equal(l.sweepAt) {
			l.wakeBy = l.sweepAt
			_ = l.poller.SetReadDeadline(l.wakeBy) // as above
		}
		l.sleeping.Store(true)
		if !l.pending.Load() {
			return false
		}
		l.sleeping.Store(false)
	}
}

// more reports whether there is something to do of which the epoll knows
// nothing.
func (l *eventLoop) more() bool {
	return len(l.again) > 0 || len(l.againTunnels) > 0 || l.pending.Load()
}

// batch does what there is to do.
func (l *eventLoop) batch(events []unix.EpollEvent) {
	l.moved = 0
	l.tell(time.Now())
	for i := range events {
		l.event(&events[i])
	}
	if l.pending.Load() {
		l.takeInbox()
	}
	l.goOn()
	if !l.sweepAt.IsZero() && !l.now.Before(l.sweepAt) {
		l.sweep()
	}
	for i := 0; i < len(l.dirty); i++ { // it may grow meanwhile
		l.flush(l.dirty[i])
		l.dirty[i] = nil
	}
	l.dirty = l.dirty[:0]
	l.freeConns = append(l.freeConns, l.freedConns...)
	l.freedConns = l.freedConns[:0]
	l.freeTunnels = append(l.freeTunnels, l.freedTunnels...)
	l.freedTunnels = l.freedTunnels[:0]
}

// tell sets the time of a batch. What kept the loop busy long before it is
// forgotten.
func (l *eventLoop) tell(now time.Time) {
	if l.sleepless > 0 && now.Sub(l.now) >= forgetful {
		l.sleepless = 0
		l.busy.Store(false)
	}
	l.now = now
}

// hurry notes that a batch follows another without a sleep.
func (l *eventLoop) hurry() {
	if l.sleepless < tired {
		if l.sleepless++; l.sleepless == tired {
			l.busy.Store(true)
		}
	}
}

// rest notes that the loop has nothing to do.
func (l *eventLoop) rest() {
	if l.sleepless == 0 {
		return
	}
	above := l.sleepless > tired/2
	l.sleepless = max(0, l.sleepless-restful)
	if above && l.sleepless <= tired/2 {
		l.busy.Store(false)
	}
}

// saturated reports whether the loop does not keep up with its work, and would
// be better off without more of it. Anybody may ask.
func (l *eventLoop) saturated() bool { return l.busy.Load() && !l.sleeping.Load() }

func (l *eventLoop) event(ev *unix.EpollEvent) {
	switch ev.Pad {
	case aboutConn:
		if c := l.conns[ev.Fd]; c != nil {
			l.connEvent(c, ev.Events)
		}
	case aboutTunnel:
		if t := l.tunnels[ev.Fd]; t != nil {
			l.tunnelEvent(t, ev.Events)
		}
	} // else somebody has posted
}

// goOn gives those that had more to read another turn.
func (l *eventLoop) goOn() {
	conns := l.again
	l.again, l.spareAgain = l.spareAgain[:0], nil
	for i, c := range conns {
		conns[i] = nil
		c.flags &^= connAgain
		l.readApp(c, turns)
	}
	l.spareAgain = conns
	tunnels := l.againTunnels
	l.againTunnels, l.spareTunnels = l.spareTunnels[:0], nil
	for i, t := range tunnels {
		tunnels[i] = nil
		t.again = false
		l.readTunnel(t)
	}
	l.spareTunnels = tunnels
	if len(l.held) > 0 && !l.overCap() {
		for _, t := range l.held {
			t.held = false
			l.touch(t)
			t.core.Hold(false)
		}
		l.held = nil
	}
}

// sweep lets every tunnel do what is due.
func (l *eventLoop) sweep() {
	l.sweepAt = time.Time{}
	for _, t := range l.tunnels {
		if t == nil {
			continue
		}
		l.tick(t)
		if t.fd >= 0 {
			l.wakeAt(t.due(l.now))
		}
	}
	if least := l.now.Add(sweepPause); !l.sweepAt.IsZero() && l.sweepAt.Before(least) {
		l.sweepAt = least
	}
	if l.open == 0 {
		l.store.trim()
	}
}

// wakeAt makes the loop look at its tunnels at a time.
func (l *eventLoop) wakeAt(at time.Time) {
	if l.sweepAt.IsZero() || at.Before(l.sweepAt) {
		l.sweepAt = at
	}
}

// touch is called before anything is added to a tunnel's output, which is sent
// at the end of the batch.
func (l *eventLoop) touch(t *tunnel) {
	if !t.dirty {
		t.dirty = true
		l.dirty = append(l.dirty, t)
	}
	if t.core.Wants() {
		t.core.Lend(l.store.plain())
	}
}

// unread accounts for n more bytes, or fewer, in the queues of t.
func (l *eventLoop) unread(t *tunnel, n int) {
	t.queued += n
	l.engine.unread.Add(int64(n))
	if n > 0 && !t.held && l.overCap() {
		t.held = true
		t.core.Hold(true)
		l.held = append(l.held, t)
		l.wakeAt(l.now.Add(100 * time.Millisecond)) // others may have emptied theirs by then
	}
}

// overCap reports whether the node has too much unread.
func (l *eventLoop) overCap() bool { return l.engine.unread.Load() > l.engine.maxUnread }

// errNodeFull is why a connection ends whose application does not read while
// the node is out of memory for such.
var errNodeFull = errors.New("the application does not read, and the node holds as much unread data as it may")

func (l *eventLoop) connSlot(c *Conn) int32 {
	if n := len(l.freeConns); n > 0 {
		s := l.freeConns[n-1]
		l.freeConns = l.freeConns[:n-1]
		l.conns[s] = c
		return s
	}
	l.conns = append(l.conns, c)
	return int32(len(l.conns) - 1)
}

func (l *eventLoop) tunnelSlot(t *tunnel) int32 {
	if n := len(l.freeTunnels); n > 0 {
		s := l.freeTunnels[n-1]
		l.freeTunnels = l.freeTunnels[:n-1]
		l.tunnels[s] = t
		return s
	}
	l.tunnels = append(l.tunnels, t)
	return int32(len(l.tunnels) - 1)
}

// takeInbox does what others want.
func (l *eventLoop) takeInbox() {
	l.mu.Lock()
	box := l.inbox
	l.inbox, l.spareBox = l.spareBox[:0], nil
	l.pending.Store(false)
	l.mu.Unlock()
	for i := range box {
		l.do(&box[i])
		box[i] = work{}
	}
	if cap(box) <= 1024 {
		l.spareBox = box[:0]
	}
}

func (l *eventLoop) do(w *work) {
	if l.aside(w) {
		return
	}
	switch w.kind {
	case workTunnel:
		l.begin(w.tunnel, w.unread)
	case workConnect:
		l.connect(w.conn, w.tunnel)
	case workAnswer:
		l.answer(w.req, w.conn, w.status)
	case workAbort:
		l.abort(w)
	case workShutdown:
		if !w.tunnel.ended {
			l.touch(w.tunnel)
			w.tunnel.core.Shutdown(l.now)
			l.wakeAt(w.tunnel.due(l.now))
		}
	case workEnd:
		l.killTunnel(w.tunnel, w.err)
	case workCall:
		w.call()
	case workStop:
		l.stopping = true
	}
}

// abort ends a connection for its owner, wherever it is by now.
func (l *eventLoop) abort(w *work) {
	switch at := w.conn.loop.Load(); {
	case at == l:
		if w.conn.tunnel != nil {
			l.endConn(w.conn, errors.New("aborted")) // its cause is what counts
		}
	case at != nil:
		at.post(*w)
	} // else it is between two tunnels, and whoever takes it looks at its cause
}

// begin takes a tunnel whose handshake is over.
func (l *eventLoop) begin(t *tunnel, unread []byte) {
	t.unused = l.now
	t.slot = l.tunnelSlot(t)
	l.open++
	var err error
	limits := t.host.limits()
	role := hbone.ServerRole
	if t.client {
		role = hbone.ClientRole
	}
	if t.core, err = hbone.NewTunnel(role, limits, l.now); err == nil {
		err = watch(l.ep, int(t.fd), aboutTunnel, t.slot)
	}
	if err != nil {
		if t.core == nil {
			// Only a role that is none is refused.
			panic(fmt.Sprintf("loop: new tunnel: %v", err))
		}
		l.endTunnel(t, err, false)
		return
	}
	l.touch(t)
	l.wakeAt(t.due(l.now))
	if len(unread) > 0 {
		l.input(t, unread)
	}
}

// errStopped is why everything ends when the engine does.
var errStopped = fmt.Errorf("the proxy has ended: %w", syscall.ECONNABORTED)

// close ends everything.
func (l *eventLoop) close() {
	for _, t := range l.tunnels {
		if t != nil {
			l.killTunnel(t, errStopped)
		}
	}
	l.mu.Lock()
	l.closed = true
	box := l.inbox
	l.inbox = nil
	l.mu.Unlock()
	for i := range box {
		box[i].refuse()
	}
	if l.poller != nil {
		_ = l.poller.Close()
	}
	_ = unix.Close(l.wakeFD)
}

// refuse answers for a loop that has ended.
func (w *work) refuse() {
	switch w.kind {
	case workTunnel:
		w.tunnel.discard()
		w.tunnel.host.over(w.tunnel, errStopped)
	case workConnect:
		pool := w.conn.opening.pool
		abortSocket(w.conn.fd)
		w.conn.over(errStopped)
		pool.wg.Done()
	case workAnswer:
		if w.conn != nil {
			abortSocket(w.conn.fd)
			w.conn.over(errStopped)
		}
	case workCall:
		w.call() // who waits for it sees that the loop has ended
	}
}
