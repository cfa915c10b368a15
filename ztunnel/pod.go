package ztunnel

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/hbone"
	"github.com/weft-mesh/weft/hbone/loop"
	"github.com/weft-mesh/weft/identity"
	"github.com/weft-mesh/weft/internal/handoff"
	"github.com/weft-mesh/weft/mesh"
)

// pod is one captured pod.
type pod struct {
	proxy *Proxy
	owner string                      // unique over all pods ever served, also with one UID
	id    mesh.Identity               // from the node agent, never from the View
	info  atomic.Pointer[handoff.Pod] // addresses may be corrected

	// inUse is read-locked while out and files are used. A dial may outlive
	// what it was for, and a descriptor that is closed under it may be another
	// pod's by then.
	inUse     sync.RWMutex
	closed    bool // guarded by inUse
	out       outlet
	files     handoff.Files // netns and map; the listeners are below
	listeners [handoff.Roles]listener
	resolver  *resolver // nil if the pod's name queries are not captured
	server    *loop.Server

	// serving ends when the pod leaves: nothing more is accepted. alive ends
	// when what is open must close.
	serving, alive         context.Context
	stopServing, forceStop context.CancelFunc
	accepts, conns         sync.WaitGroup // conns: what is not inside a tunnel of server

	open       atomic.Int64 // flows
	complained atomic.Int64 // when the log last said that there are too many
	clients    plainClients
	baggage    atomic.Pointer[podBaggage] // that was said last
}

// podBaggage is what baggage returns for a workload, which is the same for
// connection after connection.
type podBaggage struct {
	of   *mesh.Workload
	text string
}

// baggageOf returns the baggage of a connection of the pod, which is w in the
// View of now.
func (q *pod) baggageOf(w *mesh.Workload) string {
	b := q.baggage.Load()
	if b == nil || b.of != w { // what a View holds does not change
		b = &podBaggage{of: w, text: baggage(w, q.proxy.cfg.Cluster)}
		q.baggage.Store(b)
	}
	return b.text
}

// newPod takes over f, unless it fails.
func newPod(p *Proxy, info handoff.Pod, id mesh.Identity, owner string, f handoff.Files) (*pod, error) {
	q := &pod{proxy: p, owner: owner, id: id, files: handoff.Files{Netns: f.Netns, Blessed: f.Blessed}}
	q.info.Store(&info)
	for r, file := range f.Listeners {
		if file == nil || handoff.Role(r) == handoff.DNS4 || handoff.Role(r) == handoff.DNS6 {
			continue
		}
		var err error
		if q.listeners[r], err = listen(handoff.Role(r), file); err != nil {
			q.closeListeners()
			return nil, fmt.Errorf("open listener %v: %w", handoff.Role(r), err)
		}
	}
	out, err := p.enter(f)
	if err != nil {
		q.closeListeners()
		return nil, err
	}
	q.out = out
	if q.resolver, err = newResolver(q, f); err != nil {
		q.closeListeners()
		out.Close()
		return nil, err
	}
	q.alive, q.forceStop = context.WithCancel(context.Background())
	q.serving, q.stopServing = context.WithCancel(q.alive)
	log := p.cfg.Log.With("pod", info.Name, "namespace", info.Namespace)
	q.server = p.engine.NewServer(loop.ServerConfig{
		Shake: hbone.ServerConfig{
			TLS: identity.ServerTLS(p.cfg.Identity.Only(id), p.cfg.Roots, p.cfg.TrustDomain),
			Ready: func(ctx context.Context) error {
				_, err := p.cfg.Identity.Certificate(ctx, id)
				return err
			},
			Handshakes: p.handshakes,
		},
		Begin: q.beginTunnel,
		Log:   log,
	})
	for _, file := range f.Listeners { // FileListener has made its own
		if file != nil {
			file.Close()
		}
	}
	return q, nil
}

// listen opens a listening socket a second time, to accept on it.
func listen(r handoff.Role, file *os.File) (listener, error) {
	if r == handoff.Out4 || r == handoff.Out6 {
		d, err := openDoor(file)
		if err != nil {
			return nil, err // not a door that is nil
		}
		return d, nil
	}
	l, err := net.FileListener(file)
	if err != nil {
		return nil, err
	}
	tcp, ok := l.(*net.TCPListener)
	if !ok {
		l.Close()
		return nil, fmt.Errorf("it is a %T", l)
	}
	return tcp, nil
}

// start accepts on every listener.
func (q *pod) start() {
	for r, l := range q.listeners {
		switch l := l.(type) {
		case *door:
			q.accepts.Go(func() { q.accept(q.nextOutbound(l)) })
		case *net.TCPListener:
			serve := q.servePlain
			if handoff.Role(r) == handoff.HB4 || handoff.Role(r) == handoff.HB6 {
				serve = q.serveHBONE
			}
			q.accepts.Go(func() { q.accept(q.nextInbound(l, serve)) })
		}
	}
	q.resolver.start()
}

// nextOutbound returns what accepts one connection of the pod's processes and
// serves it: at once if that needs no wait, else in a goroutine.
func (q *pod) nextOutbound(d *door) func() error {
	a := new(arrival)
	return func() error {
		if err := d.accept(a); err != nil {
			return err
		}
		q.proxy.arriving.Add(1)
		if rest := q.beginOutbound(a); rest != nil {
			q.conns.Go(rest)
			a = new(arrival) // rest has the other
		}
		return nil
	}
}

// nextInbound returns what accepts one connection and lets serve have it, in a
// goroutine. Serve takes it out of the proxy's count of those that arrive.
func (q *pod) nextInbound(l *net.TCPListener, serve func(*net.TCPConn)) func() error {
	return func() error {
		c, err := l.AcceptTCP()
		if err != nil {
			return err
		}
		q.proxy.arriving.Add(1)
		q.conns.Go(func() {
			defer c.Close()
			if err := tune(c); err != nil { // it is gone already
				q.proxy.arriving.Add(-1)
				return
			}
			serve(c)
		})
		return nil
	}
}

// accept calls next until its listener is closed.
func (q *pod) accept(next func() error) {
	var complained time.Time
	for {
		err := next()
		if err == nil {
			continue
		}
		if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, net.ErrClosed) || q.serving.Err() != nil {
			return
		}
		// Out of files or memory: those in the backlog wait. One line a minute
		// says so: every pod of the node is in the same place.
		if now := time.Now(); now.Sub(complained) >= time.Minute {
			complained = now
			q.proxy.cfg.Log.Error("cannot accept a connection: trying again", "pod", q.info.Load().Name, "error", err)
		}
		select {
		case <-q.serving.Done():
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// serveHBONE takes one tunnel into the mesh, and gives it to an event loop. Why
// one fails is not worth more than a line for who looks closer: anybody can make
// them fail.
func (q *pod) serveHBONE(c *net.TCPConn) {
	defer q.proxy.arriving.Add(-1)
	stop := context.AfterFunc(q.alive, func() { c.Close() })
	defer stop()
	from := c.RemoteAddr()
	if err := q.server.Serve(q.serving, c); err != nil {
		q.proxy.cfg.Log.Debug("a tunnel was refused", "pod", q.info.Load().Name, "from", from, "error", err)
	}
}

// stop accepts what arrives within linger, then nothing more, and tells those
// at the other ends of tunnels.
func (q *pod) stop(linger time.Duration) {
	if linger > 0 {
		until := time.Now().Add(linger)
		for _, l := range q.listeners {
			if l != nil {
				l.SetDeadline(until) // fails only if it is closed
			}
		}
		q.accepts.Wait()
	}
	q.stopServing()
	q.closeListeners()
	q.accepts.Wait()
	q.server.Shutdown()
	q.resolver.stop()
}

// finish returns when every connection has ended. Those that last longer than
// timeout are aborted.
func (q *pod) finish(timeout time.Duration) {
	t := time.AfterFunc(timeout, q.force)
	defer t.Stop()
	q.conns.Wait()
	q.server.Wait()
	q.forceStop()
}

// force aborts every connection.
func (q *pod) force() {
	cause := errors.New("closed: the drain time is over")
	for _, f := range q.proxy.flows.all() {
		if f.pod() == q {
			f.abort(cause)
		}
	}
	q.server.Abort(cause)
	q.forceStop() // what has not begun yet
}

func (q *pod) closeListeners() {
	for _, l := range q.listeners {
		if l != nil {
			l.Close()
		}
	}
}

// close lets go of everything, once nobody dials. No connection may be open.
func (q *pod) close() {
	q.resolver.close()
	q.inUse.Lock()
	defer q.inUse.Unlock()
	q.closed = true
	q.out.Close()
	q.files.Close()
}

// dupFiles returns copies of the pod's files.
func (q *pod) dupFiles() (handoff.Files, error) {
	var f handoff.Files
	var errs [3 + handoff.Roles]error
	f.Netns, errs[0] = dup(q.files.Netns)
	f.Blessed, errs[1] = dup(q.files.Blessed)
	for r, l := range q.listeners {
		if l != nil {
			f.Listeners[r], errs[2+r] = dupSocket(l)
		}
	}
	errs[2+handoff.Roles] = q.resolver.dup(&f)
	if err := errors.Join(errs[:]...); err != nil {
		f.Close()
		return handoff.Files{}, err
	}
	return f, nil
}

// sameSockets reports whether f has the sockets that are served already.
func (q *pod) sameSockets(f handoff.Files) bool {
	for r, l := range q.listeners {
		if handoff.Role(r) == handoff.DNS4 || handoff.Role(r) == handoff.DNS6 {
			continue
		}
		if (l == nil) != (f.Listeners[r] == nil) {
			return false
		}
		if l != nil && !sameFile(l, f.Listeners[r]) {
			return false
		}
	}
	return q.resolver.same(f)
}

// sameFile reports whether both are one open socket.
func sameFile(a, b syscall.Conn) bool {
	var st [2]syscall.Stat_t
	for i, c := range []syscall.Conn{a, b} {
		raw, err := c.SyscallConn()
		if err != nil {
			return false
		}
		var serr error
		if err := raw.Control(func(fd uintptr) { serr = syscall.Fstat(int(fd), &st[i]) }); err != nil || serr != nil {
			return false
		}
	}
	return st[0].Dev == st[1].Dev && st[0].Ino == st[1].Ino
}

// dupSocket returns a copy of a listening socket.
func dupSocket(c syscall.Conn) (*os.File, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	fd := -1
	var failed error
	if err := raw.Control(func(old uintptr) { fd, failed = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) }); err != nil {
		return nil, err
	}
	if failed != nil {
		return nil, os.NewSyscallError("fcntl", failed)
	}
	return os.NewFile(uintptr(fd), "listener"), nil
}

func dup(f *os.File) (*os.File, error) {
	fd, err := dupFD(f)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// plainClients are the remote ends of the plain connections that are open
// towards the pod. A connection that the proxy opens to the application in the
// client's name must not have the port of one of them: its packets could not
// be told from theirs.
type plainClients struct {
	mu   sync.Mutex
	open map[netip.AddrPort]int
}

func (p *plainClients) add(a netip.AddrPort) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.open == nil {
		p.open = make(map[netip.AddrPort]int)
	}
	p.open[a]++
}

func (p *plainClients) remove(a netip.AddrPort) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.open[a]--; p.open[a] == 0 {
		delete(p.open, a)
	}
}

func (p *plainClients) has(a netip.AddrPort) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.open[a] > 0
}
