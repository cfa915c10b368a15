package loop

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/hbone"
	"github.com/weft-mesh/weft/internal/pack"
	"github.com/weft-mesh/weft/mesh"
)

// A second is what tunnels of a world move to, and back from.
type second struct {
	w       *world
	engines [2]*Engine // of the client and of the server
	pool    *Pool
	server  *Server
}

func newSecond(w *world, pc PoolConfig, sc ServerConfig) *second {
	s := &second{w: w, engines: [2]*Engine{New(Config{}), New(Config{})}}
	s.pool, s.server = s.engines[0].NewPool(pc), s.engines[1].NewServer(sc)
	run(w.t, s.engines[0])
	run(w.t, s.engines[1])
	w.t.Cleanup(func() {
		s.pool.Close()
		s.server.Abort(errors.New("the test is over"))
		s.server.Wait()
	})
	return s
}

// movable makes a world with a second.
func movable(t testing.TB, serve func(*net.TCPConn), opts ...option) (*world, *second) {
	var pcs PoolConfig
	var scs ServerConfig
	w := newWorld(t, serve, append(opts, func(_ *world, sc *ServerConfig, pc *PoolConfig) { pcs, scs = *pc, *sc })...)
	return w, newSecond(w, pcs, scs)
}

// copies duplicates descriptors, as a socket that carries them does.
func copies(t testing.TB, fds []int) []int {
	var out []int
	for _, fd := range fds {
		n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, n)
	}
	return out
}

// move moves a tunnel by way of bytes. The owners stay the same, each with a
// Conn of its own, or they are those that the test made.
func move(t testing.TB, m Mover, resume func(TunnelState, []int, []Place) (*Arrival, error), fail bool) error {
	early := map[uint32][][]byte{}
	for range 2 {
		for _, b := range m.Ahead() {
			for _, p := range b.Pieces {
				early[b.ID] = append(early[b.ID], slices.Clone(p))
			}
		}
	}
	f, err := m.Freeze()
	if err != nil {
		return err
	}
	var s TunnelState
	b := pack.Write(f.State.Pack)
	f.State.Wipe()
	if err := pack.Read(b, s.Pack); err != nil {
		t.Fatal(err)
	}
	for i := range s.Conns {
		s.Conns[i].Early = early[s.Conns[i].ID]
	}
	files := copies(t, f.Files)
	var places []Place
	for _, o := range f.Owners {
		e := &mover{end: under(o)}
		places = append(places, Place{&e.Conn, e})
	}
	a, err := resume(s, files, places)
	if err != nil {
		t.Fatal(err)
	}
	if fail {
		a.Discard()
		f.Thaw()
		return nil
	}
	f.Release()
	a.Go(func() {})
	return nil
}

// A mover owns a connection that has moved, for the end that had it first.
type mover struct {
	Conn
	end *end
}

func under(o Owner) *end {
	if m, ok := o.(*mover); ok {
		return m.end
	}
	return o.(*end)
}

func (m *mover) Opened(p *mesh.Identity) { m.end.Opened(p) }
func (m *mover) Ended(err error) {
	if !errors.Is(err, ErrMoved) {
		m.end.ended <- err
	}
}

// everything moves all tunnels to the second, or back.
func (s *second) everything(back, fail bool) (moved int) {
	pools, servers := [2]*Pool{s.w.pool, s.pool}, [2]*Server{s.w.server, s.server}
	from, to := 0, 1
	if back {
		from, to = 1, 0
	}
	for _, m := range pools[from].Movers("pod-1") {
		if move(s.w.t, m, func(st TunnelState, fds []int, ps []Place) (*Arrival, error) {
			return pools[to].Resume("pod-1", st, fds, ps)
		}, fail) == nil {
			moved++
		}
	}
	for _, m := range servers[from].Movers() {
		if move(s.w.t, m, servers[to].Resume, fail) == nil {
			moved++
		}
	}
	return moved
}

// restless moves everything to and fro until the test has what it wants, and
// fails every third time before the other end could begin.
func (s *second) restless(t testing.TB) (stop func() int) {
	ctx, cancel := context.WithCancel(context.Background())
	total := make(chan int)
	go func() {
		n := 0
		for i := 0; ctx.Err() == nil; i++ {
			n += s.everything(i%2 == 1, i%3 == 2)
			n += s.everything(i%2 == 0, false)
		}
		total <- n
	}()
	return func() int {
		cancel()
		return <-total
	}
}

// TestMovedTunnelsCarryOn sends payloads, both ways and in every state of
// being stuck, while the tunnels at both ends move to other engines all the
// time. New connections come meanwhile.
func TestMovedTunnelsCarryOn(t *testing.T) {
	for _, tc := range []struct {
		name string
		opts []option
	}{
		{"defaults", nil},
		{"small windows and frames", []option{limited(hbone.Limits{StreamWindow: 65535, MaxStreamWindow: 65535, ConnWindow: 65535, MaxFrame: 16 << 10})}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w, s := movable(t, echo, tc.opts...)
			stop := s.restless(t)
			var wg sync.WaitGroup
			for i := range 40 {
				wg.Go(func() {
					c := w.dial()
					for k := range 20 {
						if err := tryRoundTrip(c, fmt.Sprint("echo ", i, k)); err != nil {
							t.Errorf("connection %d: %v", i, err)
							return
						}
					}
					exchange(t, c, payload(100_000*(i%5)+i))
				})
			}
			wg.Wait()
			if n := stop(); n < 20 {
				t.Errorf("tunnels moved %d times: too few to show anything", n)
			}
			eventually(t, "that nothing is unread", func() bool {
				return w.client.Unread() == 0 && w.serving.Unread() == 0 && s.engines[0].Unread() == 0 && s.engines[1].Unread() == 0
			})
		})
	}
}

// TestMovedConnectionsKeepTheirState moves once, in each state that a
// connection can stand in.
func TestMovedConnectionsKeepTheirState(t *testing.T) {
	apps := make(chan *net.TCPConn, 16)
	w, s := movable(t, func(c *net.TCPConn) { apps <- c })
	next := func() (client, app *net.TCPConn) {
		client = w.dial()
		app = <-apps
		_ = app.SetDeadline(time.Now().Add(30 * time.Second))
		t.Cleanup(func() { _ = app.Close() })
		return client, app
	}
	idle, idleApp := next()
	halfOut, halfOutApp := next() // the client has ended
	_ = halfOut.CloseWrite()
	if p, err := io.ReadAll(halfOutApp); err != nil || len(p) != 0 {
		t.Fatal(p, err)
	}
	halfIn, halfInApp := next() // the server has ended
	_ = halfInApp.CloseWrite()
	if p, err := io.ReadAll(halfIn); err != nil || len(p) != 0 {
		t.Fatal(p, err)
	}
	stuck, stuckApp := next() // the server does not read
	wrote := make(chan error, 1)
	big := payload(9 << 20)
	go func() {
		_, err := stuck.Write(big)
		wrote <- errors.Join(err, stuck.CloseWrite())
	}()
	eventually(t, "that something is unread", func() bool { return w.serving.Unread() > 0 })

	if n := s.everything(false, false); n != 2 {
		t.Fatalf("%d tunnels moved, want one at each end", n)
	}
	if w.serving.Unread() != 0 || w.client.Unread() != 0 {
		t.Error("what has moved is counted where it was")
	}
	roundTripEcho := func(a, b *net.TCPConn, text string) {
		t.Helper()
		if _, err := io.WriteString(a, text); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(text))
		if _, err := io.ReadFull(b, got); err != nil || string(got) != text {
			t.Fatalf("%q, %v", got, err)
		}
	}
	roundTripEcho(idle, idleApp, "there")
	roundTripEcho(idleApp, idle, "and back")
	roundTripEcho(halfOutApp, halfOut, "the answer")
	roundTripEcho(halfIn, halfInApp, "the question")
	got, err := io.ReadAll(stuckApp)
	if err := errors.Join(err, <-wrote); err != nil || string(got) != string(big) {
		t.Errorf("%d of %d bytes, %v", len(got), len(big), err)
	}
	_ = halfOutApp.Close()
	_ = halfIn.Close()
	for i := range 4 {
		if i > 0 { // the first is still open
			if err := w.over(w.theOut(i)); err != nil && !errors.Is(err, ErrMoved) {
				t.Errorf("connection %d: %v", i, err)
			}
		}
	}
	// A reset goes through as well.
	_ = idle.SetLinger(0)
	_ = idle.Close()
	if _, err := idleApp.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("after a reset: %v", err)
	}
}

// TestBacklogsWaitAhead gives out what waits for applications that do not read.
// It does not change, and they get none of it, until the tunnel is kept, or
// thawed: then they get all. One that ends meanwhile takes nothing with it.
func TestBacklogsWaitAhead(t *testing.T) {
	apps := make(chan *net.TCPConn, 16)
	w, _ := movable(t, func(c *net.TCPConn) { apps <- c })
	big := payload(9 << 20)
	var all []*net.TCPConn
	for range 3 {
		c := w.dial()
		app := <-apps
		_ = app.SetDeadline(time.Now().Add(30 * time.Second))
		t.Cleanup(func() { _ = app.Close() })
		all = append(all, app)
		go func() {
			_, _ = c.Write(big)
			_ = c.CloseWrite()
		}()
	}
	m := w.server.Movers()[0]
	var given map[uint32][]byte
	var pieces map[uint32][][]byte
	take := func() {
		t.Helper()
		given, pieces = map[uint32][]byte{}, map[uint32][][]byte{}
		eventually(t, "that much waits for each", func() bool {
			for _, b := range m.Ahead() {
				pieces[b.ID] = append(pieces[b.ID], b.Pieces...)
				given[b.ID] = append(given[b.ID], bytes.Join(b.Pieces, nil)...)
			}
			return len(given) == 3
		})
	}
	take()
	total := 0
	for id, p := range given {
		if !bytes.Contains(big, p) {
			t.Errorf("stream %d: %d bytes that were not sent", id, len(p))
		}
		total += len(p)
	}
	if n := w.serving.Unread(); n < int64(total) {
		t.Errorf("%d bytes are unread, and %d were given out", n, total)
	}
	// What the socket has it may have, and no more comes.
	before := w.serving.Unread()
	if _, err := io.ReadFull(all[0], make([]byte, 64<<10)); err != nil {
		t.Fatal(err)
	}
	m.t.loop.call(func() {}) // a batch, in which it would be served
	if n := w.serving.Unread(); n < before {
		t.Errorf("%d bytes are unread, after %d: the application was served", n, before)
	}
	_ = all[2].SetLinger(0)
	_ = all[2].Close()
	eventually(t, "the end of the third", func() bool {
		n := 0
		m.t.loop.call(func() { n = m.t.conns.Len() })
		return n == 2
	})
	for id, ps := range pieces {
		if !bytes.Equal(bytes.Join(ps, nil), given[id]) {
			t.Errorf("stream %d: what was given out has changed", id)
		}
	}
	m.Keep()
	if _, err := io.ReadFull(all[0], make([]byte, 2<<20)); err != nil {
		t.Errorf("after it was kept: %v", err)
	}
	eventually(t, "more to send ahead", func() bool { return len(m.Ahead()) > 0 })
	f, err := m.Freeze()
	if err != nil {
		t.Fatal(err)
	}
	f.Thaw()
	for i, app := range all[:2] {
		n, err := io.Copy(io.Discard, app)
		if want := len(big) - (1-i)*(2<<20+64<<10); err != nil || int(n) != want {
			t.Errorf("connection %d: %d bytes, want %d, %v", i, n, want, err)
		}
	}
}

// TestRequestsMove moves a server while nobody has answered a request: it is
// asked again where it went.
func TestRequestsMove(t *testing.T) {
	asked, answer, late := make(chan struct{}), make(chan struct{}), newEnd()
	var w *world
	handle := func(r *Request) {
		close(asked)
		<-answer
		app, err := net.Dial("tcp", w.app)
		if err != nil {
			t.Error(err)
			return
		}
		accept(r, late, app)
	}
	var s *second
	w, s = movable(t, echo, func(_ *world, sc *ServerConfig, _ *PoolConfig) { sc.Handle = handle })
	s.server.cfg.Handle = w.handle
	c := w.dial()
	<-asked
	if n := s.everything(false, false); n != 2 {
		t.Fatalf("%d tunnels moved, want one at each end", n)
	}
	exchange(t, c, []byte("asked twice"))
	close(answer)
	if err := w.over(late); err == nil {
		t.Error("a request that moved was accepted where it had been")
	}
}

// TestFrozenConnectionsWait shows that what is wanted of a frozen tunnel is done
// when it goes on, and that a malformed arrival leaves it as it was.
func TestFrozenConnectionsWait(t *testing.T) {
	w, s := movable(t, echo)
	c := w.dial()
	roundTrip(t, c, "hello")
	d := w.dial()
	roundTrip(t, d, "hello")
	ms := w.pool.Movers("pod-1")
	if len(ms) != 1 {
		t.Fatalf("%d tunnels", len(ms))
	}
	f, err := ms[0].Freeze()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ms[0].Freeze(); err == nil {
		t.Error("a frozen tunnel was frozen")
	}
	w.theOut(0).Abort(errors.New("wanted"))
	for name, change := range map[string]func(*TunnelState){
		"role":    func(s *TunnelState) { s.Core.Role = hbone.ServerRole },
		"peer":    func(s *TunnelState) { s.Peer = web },
		"conn":    func(s *TunnelState) { s.Conns[0].ID = 99 },
		"closed":  func(s *TunnelState) { s.Conns[0].Open = false },
		"missing": func(s *TunnelState) { s.Conns = s.Conns[1:] },
		"secret":  func(s *TunnelState) { s.Seal.Secret = nil },
		"queue":   func(s *TunnelState) { s.Conns[0].Queue = make([]byte, 1) },
		"ahead":   func(s *TunnelState) { s.Conns[0].Ahead = 1 },
		"early":   func(s *TunnelState) { s.Conns[0].Early = [][]byte{{1}} },
		"both":    func(s *TunnelState) { s.Conns[0].Ahead, s.Conns[0].Early = 1, [][]byte{{1}} },
		"request": func(s *TunnelState) { s.Requests = []RequestState{{ID: 1}} },
	} {
		st := TunnelState{}
		if err := pack.Read(pack.Write(f.State.Pack), st.Pack); err != nil {
			t.Fatal(err)
		}
		change(&st)
		if _, err := s.pool.Resume("pod-1", st, f.Files, []Place{{new(Conn), newEnd()}, {new(Conn), newEnd()}}); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	f.Thaw()
	if err := w.over(w.theOut(0)); err == nil || err.Error() != "wanted" {
		t.Errorf("the aborted connection: %v", err)
	}
	roundTrip(t, d, "goes on")
}

// FuzzArrival resumes states from anything, on sockets that nobody reads.
func FuzzArrival(f *testing.F) {
	w, s := movable(f, echo)
	c := w.dial()
	roundTrip(f, c, "hello")
	for _, m := range append(w.pool.Movers("pod-1"), w.server.Movers()...) {
		fr, err := m.Freeze()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(pack.Write(fr.State.Pack))
		fr.Thaw()
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var st TunnelState
		if pack.Read(b, st.Pack) != nil {
			return
		}
		var fds []int
		var places []Place
		for i := range 1 + min(len(st.Conns), 8) {
			pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
			if err != nil {
				t.Fatal(err)
			}
			_ = unix.Close(pair[1])
			fds = append(fds, pair[0])
			if i > 0 {
				places = append(places, Place{new(Conn), newEnd()})
			}
		}
		a, err := s.server.Resume(st, fds, places)
		if err != nil {
			a, err = s.pool.Resume("pod-1", st, fds, places)
		}
		if err != nil {
			for _, fd := range fds {
				_ = unix.Close(fd)
			}
			return
		}
		a.Go(func() {})
	})
}
