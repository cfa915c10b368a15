package loop

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/weft-mesh/weft/hbone"
)

var errTest = errors.New("the test says so")

// An owner may abort its connection in every state.
func TestAbort(t *testing.T) {
	for _, tc := range []struct {
		name  string
		reach func(t *testing.T, w *world, c *net.TCPConn) // brings the connection into the state
	}{
		{"open", func(t *testing.T, w *world, c *net.TCPConn) { roundTrip(t, c, "hello") }},
		{"half closed", func(t *testing.T, w *world, c *net.TCPConn) {
			roundTrip(t, c, "hello")
			_ = c.CloseWrite()
		}},
		{"stalled", func(t *testing.T, w *world, c *net.TCPConn) {
			roundTrip(t, c, "hello")
			roundTrip(t, c, "S") // the application reads no more
			_ = c.SetWriteDeadline(time.Now().Add(time.Second))
			_, _ = c.Write(payload(16 << 20))
		}},
		{"unanswered", func(t *testing.T, w *world, c *net.TCPConn) {}},
	} {
		for _, side := range []string{"client", "server"} {
			t.Run(tc.name+"/"+side, func(t *testing.T) {
				release := make(chan struct{})
				w := newWorld(t, func(c *net.TCPConn) {
					defer c.Close()
					b := make([]byte, 64)
					for {
						n, err := c.Read(b)
						if err != nil {
							<-release
							return
						}
						_, _ = c.Write(b[:n])
						if b[0] == 'S' {
							<-release
							return
						}
					}
				}, func(w *world, sc *ServerConfig, _ *PoolConfig) {
					if tc.name == "unanswered" && side == "client" {
						sc.Handle = func(r *Request) { <-release }
					}
				})
				defer close(release)
				c := w.dial()
				tc.reach(t, w, c)
				e := w.theOut(0)
				if side == "server" {
					e = w.theIn(0)
				}
				e.Abort(errTest)
				e.Abort(errors.New("a second reason"))
				if err := w.over(e); !errors.Is(err, errTest) {
					t.Errorf("ended with %v, want what it was aborted for", err)
				}
				if side == "server" {
					if err := w.over(w.theOut(0)); !errors.Is(err, syscall.ECONNRESET) {
						t.Errorf("the other end: %v, want a reset", err)
					}
				}
				_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
				if _, err := io.Copy(io.Discard, c); !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("the client's application saw %v, want a reset", err)
				}
				e.Abort(errTest) // when it is over
				eventually(t, "that nothing is unread", func() bool { return w.client.Unread() == 0 && w.serving.Unread() == 0 })
			})
		}
	}
}

// An abort before the engine has the connection.
func TestAbortBefore(t *testing.T) {
	w := newWorld(t, echo)
	a, b := sockets(t)
	e := newEnd()
	e.Abort(errTest)
	fd, err := Detach(b)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.pool.Connect(t.Context(), w.target(), target, hbone.Header{}, &e.Conn, fd, e); !errors.Is(err, errTest) {
		t.Errorf("Connect: %v, want %v", err, errTest)
	}
	Abort(fd)
	if _, err := a.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the application saw %v", err)
	}
}

func sockets(t testing.TB) (a, b *net.TCPConn) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	d, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c.(*net.TCPConn), d.(*net.TCPConn)
}

// Connections that are opened, used and aborted from all sides at once end
// once each, and leave nothing behind.
func TestStorm(t *testing.T) {
	w := newWorld(t, echo)
	var wg sync.WaitGroup
	const clients, each = 16, 15
	for k := range clients {
		wg.Go(func() {
			for i := range each {
				c, err := net.Dial("tcp", w.out)
				if errors.Is(err, syscall.ECONNRESET) {
					continue // another's case 2 has met it
				}
				if err != nil {
					t.Error(err)
					return
				}
				_ = c.SetDeadline(time.Now().Add(5 * time.Second))
				p := payload(1 + (k*each+i)*7919%300_000)
				switch (k + i) % 4 {
				case 0: // in order
					go func() { _, _ = c.Write(p) }()
					_, _ = io.ReadFull(c, make([]byte, len(p)))
				case 1: // by the client's application, in the middle
					_, _ = c.Write(p)
					_ = c.(*net.TCPConn).SetLinger(0)
				case 2: // by the client's owner
					_, _ = c.Write(p[:1])
					w.theOut(0)
					w.mu.Lock()
					e := w.outs[len(w.outs)-1]
					w.mu.Unlock()
					e.Abort(errTest)
				case 3: // at once
				}
				_ = c.Close()
			}
		})
	}
	wg.Wait()
	for i := range clients * each {
		w.over(w.theOut(i))
	}
	w.mu.Lock()
	ins := w.ins
	w.mu.Unlock()
	for _, e := range ins {
		w.over(e)
	}
	for _, e := range []*Engine{w.client, w.serving} {
		eventually(t, "that nothing is left", func() bool {
			conns, waiting := 0, 0
			done := make(chan struct{})
			e.loops[0].post(work{kind: workCall, call: func() {
				for _, c := range e.loops[0].conns {
					if c != nil {
						conns++
					}
				}
				for _, t := range e.loops[0].tunnels {
					if t != nil {
						waiting += t.conns.Len() + t.requests.Len() + int(t.load.Load())
					}
				}
				close(done)
			}})
			<-done
			return conns == 0 && waiting == 0 && e.Unread() == 0
		})
	}
}

// cuttable puts a relay between the two ends of every tunnel of the world that
// takes the option. cut resets all that there are.
func cuttable() (o option, cut func()) {
	var mu sync.Mutex
	var raw []*net.TCPConn
	o = func(w *world, _ *ServerConfig, pc *PoolConfig) {
		dial := pc.Dial
		pc.Dial = func(ctx context.Context, tg hbone.Target) (*net.TCPConn, error) {
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				return nil, err
			}
			defer ln.Close()
			c, err := net.Dial("tcp", ln.Addr().String())
			if err != nil {
				return nil, err
			}
			in, err := ln.Accept()
			if err != nil {
				return nil, err
			}
			out, err := dial(ctx, tg)
			if err != nil {
				return nil, err
			}
			mu.Lock()
			raw = append(raw, in.(*net.TCPConn), out)
			mu.Unlock()
			go func() { _, _ = io.Copy(in, out); _ = in.Close() }()
			go func() { _, _ = io.Copy(out, in); _ = out.Close() }()
			return c.(*net.TCPConn), nil
		}
	}
	return o, func() {
		mu.Lock()
		defer mu.Unlock()
		for _, r := range raw {
			_ = r.SetLinger(0)
			_ = r.Close()
		}
	}
}

// A tunnel's peer that dies takes the connections with it, and the next one
// gets a new tunnel.
func TestPeerDies(t *testing.T) {
	relay, cut := cuttable()
	w := newWorld(t, echo, relay)
	for i := range 3 {
		c := w.dial()
		roundTrip(t, c, "hello")
		cut()
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the application saw %v, want a reset", err)
		}
		if err := w.over(w.theOut(i)); err == nil {
			t.Error("it ended in order")
		}
		eventually(t, "that the tunnel is out of the pool", func() bool {
			w.pool.mu.Lock()
			defer w.pool.mu.Unlock()
			return len(w.pool.entries) == 0
		})
	}
}

// A connection that a peer has not answered when it dies goes through the next
// tunnel, and its application notices nothing. One that kills every peer ends.
func TestPeerDiesOverARequest(t *testing.T) {
	relay, cut := cuttable()
	var dying atomic.Int64 // how many requests are left unanswered
	w := newWorld(t, echo, relay, func(_ *world, sc *ServerConfig, _ *PoolConfig) {
		handle := sc.Handle
		sc.Handle = func(r *Request) {
			if dying.Add(-1) < 0 {
				handle(r)
				return
			}
			cut()
		}
	})
	roundTrip(t, w.dial(), "hello")
	dying.Store(1)
	exchange(t, w.dial(), []byte("what was sent before the answer"))
	if n := w.dials.Load(); n != 2 {
		t.Errorf("%d tunnels were made, want 2", n)
	}
	dying.Store(1 << 30)
	w.attempt()
	if err := w.over(w.theOut(2)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a request that kills every peer ended with %v, want a reset", err)
	}
	// Once less if a reset overtakes the greeting of the new tunnel.
	if tried := 1<<30 - dying.Load(); tried < 2 || tried > maxTries {
		t.Errorf("it was tried %d times, want at most %d", tried, maxTries)
	}
}

// A server that ends lets what is open go on, and takes what is new elsewhere.
func TestShutdown(t *testing.T) {
	w := newWorld(t, echo)
	old := w.dial()
	roundTrip(t, old, "hello")
	w.server.Shutdown()
	eventually(t, "that the client knows", func() bool {
		w.pool.mu.Lock()
		defer w.pool.mu.Unlock()
		for _, e := range w.pool.entries {
			for _, tn := range e.tunnels {
				if !tn.gone.Load() {
					return false
				}
			}
		}
		return true
	})
	roundTrip(t, old, "still there")
	exchange(t, old, []byte("bye"))
	w.server.Wait()
	if n := w.server.Tunnels(); n != 0 {
		t.Errorf("%d tunnels are left", n)
	}
}

// A peer whose process ends hangs up on handshakes, or sends away whoever has
// just come. The next connection to it is its successor's. One who always hangs
// up is not asked for ever.
func TestPeerOnItsWayOut(t *testing.T) {
	var came atomic.Int64
	var ready chan struct{} // closed when the world is there
	end := func(n int64, cut func(*net.TCPConn)) option {
		return func(w *world, _ *ServerConfig, _ *PoolConfig) {
			came.Store(0)
			made := make(chan struct{})
			ready = made
			w.tunnels = listen(t, func(c *net.TCPConn) {
				if came.Add(1) <= n {
					cut(c)
					return
				}
				<-made
				if err := w.server.Serve(context.Background(), c); err != nil {
					t.Logf("serve: %v", err)
				}
			})
		}
	}
	for name, cut := range map[string]func(*net.TCPConn){
		"closed": func(c *net.TCPConn) { _ = c.Close() },
		"reset":  func(c *net.TCPConn) { _ = c.SetLinger(0); _ = c.Close() },
		"closed when half the handshake was done": func(c *net.TCPConn) {
			_, _ = io.ReadAtLeast(c, make([]byte, 1<<12), 1)
			_ = c.Close()
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, echo, end(1, cut))
			close(ready)
			roundTrip(t, w.dial(), "hello")
		})
		t.Run("always "+name, func(t *testing.T) {
			w := newWorld(t, echo, end(1<<30, cut))
			if c, err := net.Dial("tcp", w.out); err == nil { // else the reset was faster
				defer c.Close()
			}
			if err := w.over(w.theOut(0)); err == nil || came.Load() != 2 {
				t.Errorf("%v after %d attempts, want an error after 2", err, came.Load())
			}
		})
	}
	t.Run("sent away", func(t *testing.T) {
		var going *Server
		w := newWorld(t, echo, func(w *world, sc *ServerConfig, pc *PoolConfig) {
			going = w.serving.NewServer(*sc)
			end(1, func(c *net.TCPConn) { _ = going.Serve(context.Background(), c) })(w, sc, pc)
		})
		close(ready)
		going.Shutdown()
		roundTrip(t, w.dial(), "hello")
		going.Abort(errors.New("the test is over"))
		going.Wait()
	})
}

// An unused tunnel is released, and a dead peer is noticed.
func TestIdle(t *testing.T) {
	w := newWorld(t, echo, func(_ *world, _ *ServerConfig, pc *PoolConfig) { pc.IdleTimeout = 50 * time.Millisecond })
	c := w.dial()
	roundTrip(t, c, "hello")
	exchange(t, c, nil)
	eventually(t, "that the tunnel is gone at both ends", func() bool {
		w.pool.mu.Lock()
		defer w.pool.mu.Unlock()
		return len(w.pool.entries) == 0 && w.server.Tunnels() == 0
	})
	roundTrip(t, w.dial(), "and again")
}

func TestDeadPeer(t *testing.T) {
	w := newWorld(t, echo, limited(hbone.Limits{PingInterval: 50 * time.Millisecond, PingTimeout: 100 * time.Millisecond}))
	c := w.dial()
	roundTrip(t, c, "hello")
	// The server's loop stops, as a node does that has lost its power.
	stop, stopped := make(chan struct{}), make(chan struct{})
	w.serving.loops[0].post(work{kind: workCall, call: func() { close(stopped); <-stop }})
	<-stopped
	if err := w.over(w.theOut(0)); err == nil {
		t.Error("it ended in order")
	}
	close(stop)
}

// Over its bound the node ends those that do not read, and no others.
func TestMaxUnread(t *testing.T) {
	release := make(chan struct{})
	w := newWorld(t, func(c *net.TCPConn) {
		defer c.Close()
		b := make([]byte, 5)
		_, _ = io.ReadFull(c, b)
		_, _ = c.Write(b)
		if b[0] == 's' {
			<-release
			return
		}
		_, _ = io.Copy(c, c)
	}, func(w *world, _ *ServerConfig, _ *PoolConfig) { w.serving.maxUnread = 1 << 20 })
	defer close(release)
	for range 8 {
		c := w.dial()
		roundTrip(t, c, "stall")
		go func() { _, _ = c.Write(payload(8 << 20)) }()
	}
	for i := range 8 {
		e := w.theIn(i)
		select {
		case err := <-e.ended:
			if !errors.Is(err, errNodeFull) {
				t.Errorf("ended with %v", err)
			}
		case <-time.After(100 * time.Millisecond):
		}
	}
	if n := w.serving.Unread(); n > 8<<20 {
		t.Errorf("%d bytes are unread", n)
	}
	c := w.dial()
	roundTrip(t, c, "hello")
	exchange(t, c, payload(1<<20))
}
