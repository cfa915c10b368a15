package loop

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	h2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/weft-mesh/weft/hbone"
	"github.com/weft-mesh/weft/internal/http2"
)

// allEnded reports whether no tunnel of e carries anything from the network any
// more.
func allEnded(e *Engine) bool {
	ended := true
	for _, l := range e.loops {
		l.call(func() {
			for _, tn := range l.tunnels {
				ended = ended && (tn == nil || tn.ended)
			}
		})
	}
	return ended
}

// unreadEnd returns a world with a connection that has ended in order but for
// what its client's application, behind c, has not read of the size bytes for it.
func unreadEnd(t *testing.T, opts ...option) (w *world, c *net.TCPConn, size int64) {
	ready := make(chan struct{}) // closed when w is there
	sent := make(chan int64, 1)
	w = newWorld(t, func(c *net.TCPConn) {
		defer c.Close()
		<-ready
		_, _ = io.Copy(io.Discard, c)
		n := int64(0)
		for w.client.Unread() < 64<<10 {
			k, err := c.Write(payload(32 << 10))
			n += int64(k)
			if err != nil {
				t.Error(err)
				break
			}
			eventually(t, "that it is at the other end", func() bool { return w.theOut(0).ToApp()+w.client.Unread() == n })
		}
		sent <- n
	}, opts...)
	close(ready)
	c = w.dial()
	_ = c.CloseWrite()
	size = <-sent
	if err := w.over(w.theIn(0)); err != nil {
		t.Fatal(err)
	}
	e, l := w.theOut(0), w.client.loops[0]
	eventually(t, "the end of the stream", func() (whole bool) {
		l.call(func() { whole = e.is(connPeerEnd) })
		return whole
	})
	return w, c, size
}

// What came whole before its tunnel ended is the application's, which may take
// its time.
func TestTunnelEndsBeforeItsApplicationReads(t *testing.T) {
	relay, cut := cuttable()
	for name, end := range map[string]func(w *world){
		"in order": func(w *world) { w.server.Shutdown() },
		"cut":      func(*world) { cut() },
	} {
		t.Run(name, func(t *testing.T) {
			w, c, size := unreadEnd(t, relay)
			end(w)
			eventually(t, "the end of the tunnel", func() bool { return allEnded(w.client) })
			if got, err := io.Copy(io.Discard, c); err != nil || got != size {
				t.Errorf("the application got %d bytes of %d, %v", got, size, err)
			}
			if err := w.over(w.theOut(0)); err != nil {
				t.Errorf("the connection ended with %v", err)
			}
			eventually(t, "that nothing is left", func() bool {
				w.pool.mu.Lock()
				defer w.pool.mu.Unlock()
				return len(w.pool.entries) == 0 && w.client.Unread() == 0
			})
		})
	}
}

// Whoever ends what is open does not wait for those applications.
func TestAbortAfterTheTunnel(t *testing.T) {
	w, c, _ := unreadEnd(t)
	w.server.Shutdown()
	eventually(t, "the end of the tunnel", func() bool { return allEnded(w.client) })
	w.pool.CloseOwner("pod-1")
	if err := w.over(w.theOut(0)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the connection ended with %v", err)
	}
	if _, err := io.Copy(io.Discard, c); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the application saw %v, want a reset", err)
	}
	w.pool.Close() // it waits for nothing
}

// The last bytes of a tunnel that ends in order arrive, though the peer is slow
// to read and has something to say itself.
func TestLastBytesOfATunnel(t *testing.T) {
	p := payload(150 << 10)
	w := newWorld(t, func(c *net.TCPConn) {
		defer c.Close()
		_, _ = io.Copy(io.Discard, c)
		_, _ = c.Write(p)
	}, func(w *world, _ *ServerConfig, _ *PoolConfig) { w.serving.patience = time.Minute })
	c := dialSlow(t, w)
	var out bytes.Buffer
	fr := h2.NewFramer(&out, c)
	fr.SetMaxReadFrameSize(1 << 20)
	var block bytes.Buffer
	enc := hpack.NewEncoder(&block)
	out.WriteString(h2.ClientPreface)
	if err := errors.Join(
		fr.WriteSettings(h2.Setting{ID: h2.SettingInitialWindowSize, Val: 1 << 20}),
		fr.WriteWindowUpdate(0, 1<<20),
		enc.WriteField(hpack.HeaderField{Name: ":method", Value: "CONNECT"}),
		enc.WriteField(hpack.HeaderField{Name: ":authority", Value: target}),
		fr.WriteHeaders(h2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true, EndStream: true}),
	); err != nil {
		t.Fatal(err)
	}
	if _, err := out.WriteTo(c); err != nil {
		t.Fatal(err)
	}
	if err := w.over(w.theIn(0)); err != nil {
		t.Fatal(err)
	}
	w.server.Shutdown()
	eventually(t, "the end of the tunnel", func() bool { return allEnded(w.serving) })
	if err := fr.WriteWindowUpdate(0, 1); err != nil {
		t.Fatal(err)
	}
	if _, err := out.WriteTo(c); err != nil {
		t.Fatal(err)
	}
	var got []byte
	for whole := false; !whole; {
		f, err := fr.ReadFrame()
		if err != nil {
			t.Fatalf("after %d bytes of %d: %v", len(got), len(p), err)
		}
		if d, ok := f.(*h2.DataFrame); ok {
			got = append(got, d.Data()...)
			whole = d.StreamEnded()
		}
	}
	if !bytes.Equal(got, p) {
		t.Errorf("%d bytes came as %d others", len(p), len(got))
	}
	if _, err := io.Copy(io.Discard, c); err != nil {
		t.Errorf("the tunnel did not end in order: %v", err)
	}
	w.server.Wait() // though this peer does not hang up
}

// dialSlow connects to the world's server as a client whose socket takes little
// that was not read. The server's takes much.
func dialSlow(t *testing.T, w *world) *tls.Conn {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	small := net.Dialer{Control: func(_, _ string, raw syscall.RawConn) (err error) {
		cerr := raw.Control(func(fd uintptr) { err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 4<<10) })
		return errors.Join(cerr, err)
	}}
	near, err := small.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	far, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if err := far.(*net.TCPConn).SetWriteBuffer(1 << 20); err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- w.server.Serve(t.Context(), far.(*net.TCPConn)) }()
	c := tls.Client(near, h2TLS(w.clientTLS(web, cart)))
	t.Cleanup(func() { _ = near.Close() })
	_ = c.SetDeadline(time.Now().Add(60 * time.Second))
	if err := errors.Join(c.Handshake(), <-served); err != nil {
		t.Fatal(err)
	}
	return c
}

// A peer that was killed hangs up without a word: a FIN, and no close_notify.
// What it has not answered goes through the next tunnel.
func TestPeerHangsUpOverARequest(t *testing.T) {
	var dying atomic.Bool
	cut := make(chan struct{}, 1)
	w := newWorld(t, echo, func(w *world, sc *ServerConfig, _ *PoolConfig) {
		handle := sc.Handle
		sc.Handle = func(r *Request) {
			if dying.CompareAndSwap(true, false) {
				cut <- struct{}{}
				<-t.Context().Done()
				return
			}
			handle(r)
		}
		w.tunnels = listen(t, func(c *net.TCPConn) {
			a, b := sockets(t)
			go func() { _ = w.server.Serve(t.Context(), b) }()
			go func() { _, _ = io.Copy(a, c) }()
			gone := make(chan struct{})
			go func() { defer close(gone); _, _ = io.Copy(c, a) }()
			select {
			case <-gone:
			case <-cut:
			case <-t.Context().Done():
			}
			_ = c.CloseWrite()
		})
	})
	roundTrip(t, w.dial(), "hello")
	dying.Store(true)
	exchange(t, w.dial(), []byte("what was sent before the answer"))
	if n := w.dials.Load(); n != 2 {
		t.Errorf("%d tunnels were made, want 2", n)
	}
}

// When the ids of a tunnel's streams are used up the next connection gets
// another tunnel, and those on it go on.
func TestStreamIDsEnd(t *testing.T) {
	w := newWorld(t, echo)
	first := w.dial()
	roundTrip(t, first, "hello")
	l := w.client.loops[0]
	l.call(func() {
		for _, tn := range l.tunnels {
			s, err := tn.core.State(time.Now())
			if err != nil {
				t.Error(err)
				return
			}
			s.Next = http2.MaxStreamID
			if tn.core, err = hbone.ResumeTunnel(s, time.Now()); err != nil {
				t.Error(err)
			}
		}
	})
	conns := []*net.TCPConn{first}
	for i := range 3 {
		c := w.dial()
		roundTrip(t, c, fmt.Sprintf("hello %d", i))
		conns = append(conns, c)
	}
	for _, c := range conns {
		roundTrip(t, c, "still there")
		exchange(t, c, []byte("bye"))
	}
	if n := w.dials.Load(); n != 2 {
		t.Errorf("%d tunnels were made, want 2", n)
	}
	eventually(t, "the end of the tunnel that is used up", func() bool { return w.server.Tunnels() == 1 })
}
