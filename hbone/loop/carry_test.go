package loop

import (
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/hbone"
)

func payload(n int) []byte {
	p := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(n), byte(n >> 8), byte(n >> 16)}).Read(p) // does not fail
	return p
}

func TestEcho(t *testing.T) {
	w := newWorld(t, echo)
	c := w.dial()
	roundTrip(t, c, "hello")
	exchange(t, c, []byte("and the end"))
	out, in := w.theOut(0), w.theIn(0)
	if err := w.over(out); err != nil {
		t.Errorf("client's end: %v", err)
	}
	if err := w.over(in); err != nil {
		t.Errorf("server's end: %v", err)
	}
	if p := out.peer.Load(); p == nil || *p != cart {
		t.Errorf("opened by %v, want %v", p, cart)
	}
	const n = len("hello") + len("and the end")
	for _, e := range []*end{out, in} {
		if e.FromApp() != int64(n) || e.ToApp() != int64(n) {
			t.Errorf("counted %d and %d bytes, want %d", e.FromApp(), e.ToApp(), n)
		}
	}
}

func TestPayloads(t *testing.T) {
	for _, tc := range []struct {
		name string
		opts []option
	}{
		{"defaults", nil},
		{"small windows and frames", []option{limited(hbone.Limits{StreamWindow: 65535, MaxStreamWindow: 65535, ConnWindow: 65535, MaxFrame: 16 << 10})}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t, echo, tc.opts...)
			rnd := rand.New(rand.NewPCG(1, 2))
			sizes := []int{0, 1, 8191, 8192, 8193, 16384, 65527, 65528, 131054, 131055}
			for range 12 {
				sizes = append(sizes, rnd.IntN(7<<20))
			}
			var wg sync.WaitGroup
			for _, n := range sizes {
				c := w.dial()
				wg.Go(func() { exchange(t, c, payload(n)) })
			}
			wg.Wait()
			for i := range sizes {
				if err := w.over(w.theOut(i)); err != nil {
					t.Errorf("connection %d: %v", i, err)
				}
			}
			eventually(t, "that nothing is unread", func() bool { return w.client.Unread() == 0 && w.serving.Unread() == 0 })
		})
	}
}

func limited(l hbone.Limits) option {
	return func(_ *world, sc *ServerConfig, pc *PoolConfig) { sc.Shake.Limits, pc.Limits = l, l }
}

// The server's application answers after the client has ended.
func TestHalfClose(t *testing.T) {
	w := newWorld(t, func(c *net.TCPConn) {
		defer c.Close()
		p, err := io.ReadAll(c)
		if err != nil {
			t.Error(err)
		}
		_, _ = c.Write(append([]byte("got "), p...))
	})
	c := w.dial()
	_, _ = io.WriteString(c, "question")
	_ = c.CloseWrite()
	if p, err := io.ReadAll(c); err != nil || string(p) != "got question" {
		t.Errorf("%q, %v", p, err)
	}
	// And the other way round: the server ends first.
	w2 := newWorld(t, func(c *net.TCPConn) {
		defer c.Close()
		_ = c.CloseWrite()
		_, _ = io.Copy(io.Discard, c)
	})
	c = w2.dial()
	if _, err := io.ReadAll(c); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write(payload(1 << 20)); err != nil {
		t.Error(err)
	}
	_ = c.CloseWrite()
	if err := w2.over(w2.theOut(0)); err != nil {
		t.Error(err)
	}
	if err := w2.over(w2.theIn(0)); err != nil {
		t.Error(err)
	}
	if got := w2.theIn(0).ToApp(); got != 1<<20 {
		t.Errorf("the server's application got %d bytes", got)
	}
}

// An application's abort is an abort at the other end.
func TestReset(t *testing.T) {
	t.Run("client", func(t *testing.T) {
		got := make(chan error, 1)
		w := newWorld(t, func(c *net.TCPConn) {
			defer c.Close()
			_, err := io.Copy(c, c)
			got <- err
		})
		c := w.dial()
		roundTrip(t, c, "hello")
		_ = c.SetLinger(0)
		_ = c.Close()
		if err := <-got; !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the server's application saw %v", err)
		}
		if err := w.over(w.theOut(0)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("client's end: %v", err)
		}
		if err := w.over(w.theIn(0)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("server's end: %v", err)
		}
	})
	t.Run("server", func(t *testing.T) {
		w := newWorld(t, func(c *net.TCPConn) {
			b := make([]byte, 5)
			_, _ = io.ReadFull(c, b)
			_, _ = c.Write(b)
			_ = c.SetLinger(0)
			_ = c.Close()
		})
		c := w.dial()
		_, _ = io.WriteString(c, "hello")
		if _, err := io.ReadAll(c); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the client's application saw %v", err)
		}
		w.over(w.theOut(0))
	})
}

// When the process dies the kernel closes its descriptors. What the applications
// have by then must not look whole.
func TestDeathIsNoEnd(t *testing.T) {
	served := make(chan error, 1)
	w := newWorld(t, func(c *net.TCPConn) {
		_, err := io.Copy(c, c)
		served <- err
		c.Close()
	})
	c := w.dial()
	roundTrip(t, c, "hello")
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	for _, e := range []*end{w.theOut(0), w.theIn(0)} {
		// In its place comes a file, so that its number is nobody else's: the
		// last descriptor of the socket is gone, as at death.
		replaced := make(chan error, 1)
		e.loop.Load().post(work{kind: workCall, call: func() {
			replaced <- unix.Dup3(int(null.Fd()), int(e.fd), unix.O_CLOEXEC)
		}})
		if err := <-replaced; err != nil {
			t.Fatal(err)
		}
	}
	if _, err := io.ReadAll(c); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the client's application saw %v", err)
	}
	if err := <-served; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the server's application saw %v", err)
	}
	for _, e := range []*end{w.theOut(0), w.theIn(0)} {
		e.Abort(errors.New("it is dead"))
		w.over(e)
	}
}

func TestRefused(t *testing.T) {
	w := newWorld(t, echo)
	for _, status := range []int{400, 401, 503} {
		w.refuse.Store(int64(status))
		c, err := net.Dial("tcp", w.out)
		if err == nil { // else the reset was faster than connect
			_, err = c.Read(make([]byte, 1))
			c.Close()
		}
		if !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the client's application saw %v", err)
		}
	}
	for i, status := range []int{400, 401, 503} {
		var se *hbone.StatusError
		if err := w.over(w.theOut(i)); !errors.As(err, &se) || se.Code != status {
			t.Errorf("ended with %v, want status %d", err, status)
		}
	}
	w.refuse.Store(0)
	roundTrip(t, w.dial(), "the tunnel is as good as ever")
	if w.dials.Load() != 1 {
		t.Errorf("%d tunnels, want 1", w.dials.Load())
	}
}

// Stalled streams do not stop another.
func TestStalled(t *testing.T) {
	release := make(chan struct{})
	first := make(chan struct{}, 64)
	w := newWorld(t, func(c *net.TCPConn) {
		defer c.Close()
		b := make([]byte, 1)
		if _, err := io.ReadFull(c, b); err != nil {
			return
		}
		if b[0] == 's' { // stall
			first <- struct{}{}
			<-release
		}
		_, _ = io.Copy(c, c)
	})
	const stalled = 8
	var conns []*net.TCPConn
	var wg sync.WaitGroup
	for range stalled {
		c := w.dial()
		_, _ = io.WriteString(c, "s")
		<-first
		conns = append(conns, c)
		wg.Go(func() {
			_, _ = c.Write(payload(12 << 20))
			_ = c.CloseWrite()
		})
	}
	eventually(t, "that they are stalled", func() bool {
		n := int64(0)
		for i := range stalled {
			n += w.theOut(i).FromApp()
		}
		before := n
		time.Sleep(50 * time.Millisecond)
		n = 0
		for i := range stalled {
			n += w.theOut(i).FromApp()
		}
		return n == before && n > stalled*100<<10
	})
	if w.serving.Unread() == 0 {
		t.Error("nothing is unread: the test is wrong")
	}
	c := w.dial()
	_, _ = io.WriteString(c, "go")
	one := make([]byte, 1)
	_, _ = io.ReadFull(c, one)
	p := payload(20 << 20)
	exchange(t, c, p)
	if w.dials.Load() != 1 {
		t.Errorf("%d tunnels, want 1", w.dials.Load())
	}
	close(release)
	for _, c := range conns {
		if got, err := io.Copy(io.Discard, c); err != nil || got != 12<<20 {
			t.Errorf("a stalled stream went on to %d bytes, %v", got, err)
		}
	}
	wg.Wait()
	eventually(t, "that nothing is unread", func() bool { return w.client.Unread() == 0 && w.serving.Unread() == 0 })
}

// One tunnel takes 100 connections; the next makes another.
func TestManyConnections(t *testing.T) {
	w := newWorld(t, echo)
	var conns []*net.TCPConn
	for range 250 {
		c := w.dial()
		roundTrip(t, c, "hello")
		conns = append(conns, c)
	}
	if n := w.dials.Load(); n != 3 {
		t.Errorf("%d tunnels for 250 connections, want 3", n)
	}
	for range 3 {
		for _, c := range conns {
			roundTrip(t, c, "again")
		}
	}
	for _, c := range conns {
		_ = c.Close()
	}
	for i := range conns {
		if err := w.over(w.theOut(i)); err != nil {
			t.Error(err)
		}
	}
}

func TestConcurrentConnections(t *testing.T) {
	w := newWorld(t, echo)
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() {
			for range 20 {
				c, err := net.Dial("tcp", w.out)
				if err != nil {
					t.Error(err)
					return
				}
				if err := tryRoundTrip(c, "hello"); err != nil {
					t.Error(err)
				}
				_ = c.Close()
			}
		})
	}
	wg.Wait()
	for i := range 32 * 20 {
		if err := w.over(w.theOut(i)); err != nil {
			t.Error(err)
		}
	}
}
