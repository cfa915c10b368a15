package loop

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/hbone"
)

// A Config says how an Engine works. Every zero field means its default.
type Config struct {
	// Loops is how many goroutines carry connections: a quarter of GOMAXPROCS, and
	// at least one. There should be more processors than loops.
	Loops int
	// MaxUnread bounds the bytes that applications have not read, of all
	// connections together: 256 MiB. Over it peers are not given more window,
	// and connections that go on to fill end.
	MaxUnread int64
}

// An Engine carries connections through tunnels. It is safe for concurrent use.
// Use New; nothing moves before Run.
type Engine struct {
	loops     []*eventLoop
	maxUnread int64
	patience  time.Duration // partPatience; tests on a busy machine have more
	unread    atomic.Int64
	next      atomic.Uint32
	ran       atomic.Bool
}

// New returns an engine.
func New(cfg Config) *Engine {
	if cfg.Loops <= 0 {
		cfg.Loops = loopsFor(runtime.GOMAXPROCS(0), runtime.NumCPU())
	}
	if cfg.MaxUnread <= 0 {
		cfg.MaxUnread = 256 << 20
	}
	e := &Engine{maxUnread: cfg.MaxUnread, patience: partPatience}
	for range cfg.Loops {
		e.loops = append(e.loops, newEventLoop(e))
	}
	return e
}

// loopsFor returns the default number of loops for a process that may use some
// of a machine's processors.
func loopsFor(granted, machine int) int {
	if granted < machine {
		return max(1, granted-1)
	}
	return max(1, machine/4) // the rest is for the applications
}

// Run carries until ctx ends, and then aborts what is left. It may be called
// once. An error says that the kernel has nothing to wait on.
func (e *Engine) Run(ctx context.Context) error {
	if e.ran.Swap(true) {
		return errors.New("run event loops: they run, or have run, already")
	}
	var wg sync.WaitGroup
	var errs []error
	for _, l := range e.loops {
		if err := l.start(); err != nil {
			errs = append(errs, fmt.Errorf("start event loop: %w", err))
			l.close()
			continue
		}
		wg.Go(l.run)
	}
	if len(errs) == 0 {
		<-ctx.Done()
	}
	for _, l := range e.loops {
		l.post(work{kind: workStop})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// Unread returns how many bytes applications have not read.
func (e *Engine) Unread() int64 { return e.unread.Load() }

// pick returns the loop for a new tunnel: each in its turn, but those that do
// not keep up only if no loop does.
func (e *Engine) pick() *eventLoop {
	turn := int(e.next.Add(1) - 1)
	if l := e.rested(turn, nil); l != nil {
		return l
	}
	return e.loops[turn%len(e.loops)]
}

// rested returns the first loop from turn on that keeps up and has none of some
// tunnels, or nil.
func (e *Engine) rested(turn int, without []*tunnel) *eventLoop {
	for i := range e.loops {
		l := e.loops[(turn+i)%len(e.loops)]
		if !l.saturated() && !slices.ContainsFunc(without, func(t *tunnel) bool { return t.loop == l }) {
			return l
		}
	}
	return nil
}

// newTunnel takes a secured connection from Go's poller to a loop. over of h is
// called once for it, unless newTunnel fails. With idle above 0 it ends when it
// is unused for so long.
func (l *eventLoop) newTunnel(c *net.TCPConn, s hbone.Secured, client bool, idle time.Duration, h host) (*tunnel, error) {
	t := &tunnel{
		loop: l, host: h, peer: s.Peer, client: client, idle: idle, proof: s.Ends,
		remote: addrPort(c.RemoteAddr()), local: addrPort(c.LocalAddr()),
	}
	t.room.Store(int32(h.limits().MaxStreams))
	fd, err := Detach(c)
	if err != nil {
		s.Conn.Wipe()
		return nil, err
	}
	t.fd = int32(fd)
	seal, open, unread := s.Conn.Detach()
	t.seal, t.open = seal, open
	if !l.post(work{kind: workTunnel, tunnel: t, unread: unread}) {
		t.discard()
		return nil, errStopped
	}
	return t, nil
}

// discard lets go of a tunnel that never began.
func (t *tunnel) discard() {
	t.gone.Store(true)
	_ = unix.Close(int(t.fd)) // nothing was sent
	t.fd = -1
	t.seal.Wipe()
	t.open.Wipe()
}
