package loop

import (
	"runtime"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/hbone"
	"github.com/weft-mesh/weft/mesh"
)

// A bareEnd is what an owner must keep, and nothing else.
type bareEnd struct {
	Conn
	w *bareWorld
}

func (e *bareEnd) Opened(*mesh.Identity) {}
func (e *bareEnd) Ended(err error)       { e.w.over.Done() }

// A bareWorld has sockets of the applications that are bare descriptors, so
// that what the process holds is the engine's.
type bareWorld struct {
	*world
	mu     sync.Mutex
	apps   []int
	opened sync.WaitGroup // by the server
	over   sync.WaitGroup
}

func newBareWorld(t testing.TB, opts ...option) *bareWorld {
	b := &bareWorld{}
	b.world = newWorld(t, echo, append(opts, func(_ *world, sc *ServerConfig, _ *PoolConfig) {
		sc.Handle = func(r *Request) {
			e := &bareEnd{w: b}
			r.Accept(&e.Conn, b.socket(), e)
			b.opened.Done()
		}
	})...)
	return b
}

// socket returns one end of a connection, and keeps the other.
func (b *bareWorld) socket() int {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		b.t.Error(err)
		return -1
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.apps = append(b.apps, fds[0])
	return fds[1]
}

// open opens n connections and waits until they are idle.
func (b *bareWorld) open(n int) {
	b.t.Helper()
	for range n {
		b.opened.Add(1)
		b.over.Add(2)
		e := &bareEnd{w: b}
		if err := b.pool.Connect(b.t.Context(), b.target(), target, hbone.Header{}, &e.Conn, b.socket(), e); err != nil {
			b.t.Fatal(err)
		}
		b.opened.Wait() // so that the tunnels fill one after the other
	}
}

func (b *bareWorld) close() {
	for _, fd := range b.apps {
		_ = unix.Close(fd)
	}
	b.over.Wait()
}

// heap is the memory that is in use, stacks included.
func heap() int {
	runtime.GC()
	runtime.GC() // what pools held on to
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc + m.StackInuse)
}

// TestIdleMemory measures what an idle connection and an idle tunnel hold at
// each end. Whoever owns a connection keeps about as much again.
func TestIdleMemory(t *testing.T) {
	const conns, tunnels = 3000, 400
	perConn := 1 << 20
	for range 3 { // what goroutines had for a moment may still count
		b := newBareWorld(t)
		b.open(200)
		before := heap()
		b.open(conns)
		perConn = min(perConn, (heap()-before)/conns/2)
		b.close()
	}

	b := newBareWorld(t, func(_ *world, _ *ServerConfig, pc *PoolConfig) { pc.MaxStreams = 1 })
	b.open(20)
	before := heap()
	b.open(tunnels)
	perTunnel := (heap() - before) / tunnels / 2
	b.close()
	perConn -= perTunnel / 100 // each 100 share one
	t.Logf("idle connection: %d bytes, idle tunnel with a connection: %d bytes, at each end", perConn, perTunnel)
	if perConn > 220 {
		t.Errorf("an idle connection holds %d bytes at each end, want at most 220", perConn)
	}
	if perTunnel > 10<<10 {
		t.Errorf("an idle tunnel holds %d bytes at each end, want at most 10 KiB", perTunnel)
	}
}

// TestNoAllocations wants requests over open connections to leave nothing to
// the garbage collector.
func TestNoAllocations(t *testing.T) {
	w := newWorld(t, echo)
	c := w.dial()
	p, q := payload(128), make([]byte, 128)
	trip := func(n int) {
		for range n {
			if _, err := c.Write(p); err != nil {
				t.Fatal(err)
			}
			for at := 0; at < len(q); {
				n, err := c.Read(q[at:])
				if err != nil {
					t.Fatal(err)
				}
				at += n
			}
		}
	}
	trip(100)
	const n = 5000
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	trip(n)
	runtime.ReadMemStats(&after)
	if got := float64(after.Mallocs-before.Mallocs) / n; got > 0.1 {
		t.Errorf("%.2f allocations for each request, want at most 0.1", got)
	}
}
