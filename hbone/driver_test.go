package hbone

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	h2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"golang.org/x/sync/semaphore"

	"github.com/weft-mesh/weft/identity"
	"github.com/weft-mesh/weft/internal/http2"
)

func TestStalledStreamsDoNotBlockAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		stalled := make(chan *Stream, 100)
		release := make(chan struct{})
		w := newWorld(t, func(ctx context.Context, r *Request) {
			if r.Authority.Port == 9 {
				s, err := r.Accept(Header{})
				if err != nil {
					t.Error(err)
					return
				}
				stalled <- s
				<-release // reads nothing
				return
			}
			echo(ctx, r)
		})
		defer close(release)
		var wg sync.WaitGroup
		const n = 90
		for range n {
			s, err := w.pool.Connect(t.Context(), w.target(), "10.0.0.7:9", Header{})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			wg.Go(func() { _, _ = s.Write(make([]byte, 10<<20)) })
			t.Cleanup(wg.Wait)
			defer s.Reset()
		}
		synctest.Wait()
		exchange(t, w.connect(), payload(20<<20))
		s := <-stalled
		l := s.link
		l.mu.Lock()
		defer l.mu.Unlock()
		if q, most := l.tunnel.Queued(), n*256<<10; q > most || q < most/2 {
			t.Errorf("%d bytes wait for %d stalled streams, want at most %d", q, n, most)
		}
		if w.dials.Load() != 1 {
			t.Error("the stalled streams were not on the same tunnel")
		}
	})
}

func TestHalfClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		done := make(chan struct{})
		w := newWorld(t, func(_ context.Context, r *Request) {
			s, err := r.Accept(Header{})
			if err != nil {
				t.Error(err)
				return
			}
			defer close(done)
			defer s.Close()
			// The server ends first, and still hears all of the client.
			_, _ = io.WriteString(s, "bye")
			_ = s.CloseWrite()
			got, err := io.ReadAll(s)
			if err != nil || len(got) != 1<<20 {
				t.Errorf("server got %d bytes, %v", len(got), err)
			}
		})
		s := w.connect()
		if got, err := io.ReadAll(s); err != nil || string(got) != "bye" {
			t.Errorf("client got %q, %v", got, err)
		}
		if _, err := s.Write(make([]byte, 1<<20)); err != nil {
			t.Errorf("write after the peer's end: %v", err)
		}
		if err := s.CloseWrite(); err != nil {
			t.Error(err)
		}
		<-done
		if err := s.CloseWrite(); err != nil {
			t.Errorf("CloseWrite again: %v", err)
		}
		if _, err := s.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
			t.Errorf("write after CloseWrite: %v", err)
		}
	})
}

func TestResetIsNotAnEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(ctx context.Context, r *Request) {
			s, err := r.Accept(Header{})
			if err != nil {
				t.Error(err)
				return
			}
			_, _ = io.WriteString(s, "half of a sen")
			if r.Authority.Port == 1 {
				s.Reset()
			} // or else the handler forgets it, which must not look like an end either
		})
		for _, a := range []string{"10.0.0.7:1", "10.0.0.7:2"} {
			s, err := w.pool.Connect(t.Context(), w.target(), a, Header{})
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(s)
			if string(got) != "half of a sen" || !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("%s: read %q, %v, want ECONNRESET", a, got, err)
			}
			if _, err := s.Write([]byte("x")); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("%s: write: %v, want ECONNRESET", a, err)
			}
			_ = s.Close()
		}
	})
}

// Only END_STREAM ends a direction: a reset that calls itself no error, and
// comes without it, has cut the sender short like any other.
func TestResetWithoutErrorIsNotAnEnd(t *testing.T) {
	got := make(chan error, 1)
	accepted := make(chan struct{})
	w := newWorld(t, func(_ context.Context, r *Request) {
		s, err := r.Accept(Header{})
		if err != nil {
			t.Error(err)
			return
		}
		close(accepted)
		_, err = io.ReadAll(s)
		got <- err
	}, overSockets)
	fr, _ := w.rawClient()
	var block bytes.Buffer
	enc := hpack.NewEncoder(&block)
	for _, f := range [][2]string{{":method", "CONNECT"}, {":authority", target}} {
		if err := enc.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]}); err != nil {
			t.Fatal(err)
		}
	}
	err := fr.WriteHeaders(h2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true})
	if err == nil {
		<-accepted
		err = errors.Join(fr.WriteData(1, false, []byte("half of a sen")), fr.WriteRSTStream(1, h2.ErrCodeNo))
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := <-got; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the reader of a stream that was cut off sees %v, want ECONNRESET", err)
	}
}

func TestClientResetEndsHandler(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ended := make(chan error, 1)
		w := newWorld(t, func(ctx context.Context, r *Request) {
			if _, err := r.Accept(Header{}); err != nil {
				t.Error(err)
			}
			<-ctx.Done()
			ended <- context.Cause(ctx)
		})
		w.connect().Reset()
		if err := <-ended; !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("handler's context: %v", err)
		}
	})
}

func TestUnansweredRequestIsReset(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(context.Context, *Request) {})
		_, err := w.pool.Connect(t.Context(), w.target(), target, Header{})
		if err == nil || !strings.Contains(err.Error(), "INTERNAL_ERROR") {
			t.Errorf("Connect: %v", err)
		}
		if n := w.dials.Load(); n != 1 {
			t.Errorf("%d dials", n)
		}
	})
}

func TestSecondAnswerFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		done := make(chan struct{})
		w := newWorld(t, func(_ context.Context, r *Request) {
			defer close(done)
			if err := r.Reject(200); err == nil {
				t.Error("Reject(200): no error")
			}
			if _, err := r.Accept(Header{Baggage: "a\r\nb"}); err == nil {
				t.Error("a line break in a header was accepted")
			}
			if err := r.Reject(401); err != nil {
				t.Error(err)
			}
			if _, err := r.Accept(Header{}); err == nil {
				t.Error("Accept after Reject: no error")
			}
		})
		_, err := w.pool.Connect(t.Context(), w.target(), target, Header{})
		var status *StatusError
		if !errors.As(err, &status) || status.Code != 401 {
			t.Errorf("Connect: %v", err)
		}
		<-done
	})
}

func TestDeadlines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(ctx context.Context, r *Request) {
			if _, err := r.Accept(Header{}); err != nil {
				t.Error(err)
			}
			<-ctx.Done() // reads and writes nothing
		})
		s := w.connect()
		start := time.Now()
		_ = s.SetReadDeadline(start.Add(time.Second))
		if _, err := s.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(start) != time.Second {
			t.Errorf("Read: %v after %v", err, time.Since(start))
		}
		_ = s.SetWriteDeadline(start.Add(3 * time.Second))
		n, err := s.Write(make([]byte, 1<<20))
		if !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(start) != 3*time.Second || n != 256<<10 {
			t.Errorf("Write: %d, %v after %v", n, err, time.Since(start))
		}
		// A deadline that is moved while somebody waits.
		_ = s.SetDeadline(time.Time{})
		got := make(chan error, 1)
		go func() {
			_, err := s.Read(make([]byte, 1))
			got <- err
		}()
		synctest.Wait()
		_ = s.SetReadDeadline(time.Now().Add(time.Hour))
		synctest.Wait()
		_ = s.SetReadDeadline(time.Now())
		if err := <-got; !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("Read: %v", err)
		}
		_ = s.Close()
		if _, err := s.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Read after Close: %v", err)
		}
		if err := s.SetDeadline(time.Now()); !errors.Is(err, net.ErrClosed) {
			t.Errorf("SetDeadline after Close: %v", err)
		}
	})
}

func TestCloseWakesReaderAndWriter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(ctx context.Context, r *Request) {
			if _, err := r.Accept(Header{}); err != nil {
				t.Error(err)
			}
			<-ctx.Done()
		})
		s := w.connect()
		errs := make(chan error, 2)
		go func() { _, err := s.Read(make([]byte, 1)); errs <- err }()
		go func() { _, err := s.Write(make([]byte, 1<<20)); errs <- err }()
		synctest.Wait()
		_ = s.Close()
		for range 2 {
			if err := <-errs; !errors.Is(err, net.ErrClosed) {
				t.Errorf("%v, want net.ErrClosed", err)
			}
		}
	})
}

// What was written before Close arrives, though the peer was still sending.
func TestCloseDeliversWhatWasWritten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		got := make(chan int, 1)
		w := newWorld(t, func(_ context.Context, r *Request) {
			s, err := r.Accept(Header{})
			if err != nil {
				t.Error(err)
				return
			}
			p, err := io.ReadAll(s)
			if err != nil {
				t.Errorf("server: %v", err)
			}
			got <- len(p)
		})
		s := w.connect()
		if _, err := s.Write(make([]byte, 100_000)); err != nil {
			t.Fatal(err)
		}
		_ = s.Close()
		if n := <-got; n != 100_000 {
			t.Errorf("%d bytes arrived", n)
		}
	})
}

func TestDrain(t *testing.T) {
	for _, polite := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, echo)
			s := w.connect()
			start := time.Now()
			w.stop()
			synctest.Wait()
			if polite {
				time.Sleep(3 * time.Second)
				exchange(t, s, payload(1<<20))
				_ = s.Close()
				// Both ends close at once, and a pipe is synchronous: one waits
				// for its last word to be read.
				if err := <-w.errs; err != nil || time.Since(start) > 4*time.Second {
					t.Errorf("ServeConn: %v after %v", err, time.Since(start))
				}
				return
			}
			_, err := io.ReadAll(s)
			if !errors.Is(err, syscall.ECONNRESET) || time.Since(start) != 5*time.Second {
				t.Errorf("an endless stream ended with %v after %v", err, time.Since(start))
			}
			if err := <-w.errs; !errors.Is(err, errDrained) {
				t.Errorf("ServeConn: %v", err)
			}
		})
	}
}

func TestNewConnectionsLeaveADrainingTunnel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, echo)
		s := w.connect()
		s.link.mu.Lock()
		s.link.tunnel.draining = true
		s.link.mu.Unlock()
		exchange(t, w.connect(), []byte("x"))
		exchange(t, s, []byte("y"))
		if n := w.dials.Load(); n != 2 {
			t.Errorf("%d tunnels, want 2", n)
		}
	})
}

func TestDeadPeerIsNoticed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, echo, func(w *world, _ *ServerConfig, pc *PoolConfig) {
			dial := pc.Dial
			pc.Dial = func(ctx context.Context, tg Target) (net.Conn, error) {
				c, err := dial(ctx, tg)
				return &mute{Conn: c, dead: make(chan struct{})}, err
			}
		})
		s := w.connect()
		m := s.link.conn.NetConn().(*slotConn).Conn.(*mute)
		start := time.Now()
		close(m.dead)
		_, err := io.ReadAll(s)
		if err == nil || time.Since(start) > 31*time.Second {
			t.Errorf("Read: %v after %v", err, time.Since(start))
		}
		t.Logf("noticed after %v: %v", time.Since(start), err)
	})
}

// mute is a connection that swallows all that is written once it is dead.
type mute struct {
	net.Conn
	dead chan struct{}
}

func (m *mute) Write(p []byte) (int, error) {
	select {
	case <-m.dead:
		return len(p), nil
	default:
		return m.Conn.Write(p)
	}
}

// A peer that takes nothing more does not hold up the end of the tunnel.
func TestBlockedPeerIsNoticed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, echo, func(w *world, _ *ServerConfig, pc *PoolConfig) {
			dial := pc.Dial
			pc.Dial = func(ctx context.Context, tg Target) (net.Conn, error) {
				c, err := dial(ctx, tg)
				return &stuck{Conn: c}, err
			}
		})
		s := w.connect()
		s.link.conn.NetConn().(*slotConn).Conn.(*stuck).block()
		if _, err := s.Write(make([]byte, 4<<20)); err == nil {
			t.Error("Write: no error")
		}
		w.pool.Close()
	})
}

// stuck is a connection whose writes block once it is told to.
type stuck struct {
	net.Conn
	mu      sync.Mutex
	blocked net.Conn
}

func (s *stuck) block() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.blocked, _ = net.Pipe()
}

func (s *stuck) dest() net.Conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.blocked != nil {
		return s.blocked
	}
	return s.Conn
}

func (s *stuck) Write(p []byte) (int, error)        { return s.dest().Write(p) }
func (s *stuck) SetWriteDeadline(t time.Time) error { return s.dest().SetWriteDeadline(t) }
func (s *stuck) Close() error {
	_ = s.dest().Close()
	return s.Conn.Close()
}

func TestStaleTunnelIsReplaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, echo)
		exchange(t, w.connect(), []byte("x"))
		w.conns.Lock()
		_ = w.raw[0].Close()
		w.conns.Unlock()
		synctest.Wait()
		exchange(t, w.connect(), []byte("y"))
		if n := w.dials.Load(); n != 2 {
			t.Errorf("%d tunnels, want 2", n)
		}
	})
}

// A request that no byte was sent of is repeated on another tunnel.
func TestUnsentRequestIsRepeated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, echo, func(w *world, _ *ServerConfig, pc *PoolConfig) {
			dial := pc.Dial
			pc.Dial = func(ctx context.Context, tg Target) (net.Conn, error) {
				c, err := dial(ctx, tg)
				return &stuck{Conn: c}, err
			}
		})
		s := w.connect()
		first := s.link.conn.NetConn().(*slotConn).Conn.(*stuck)
		first.block()
		if _, err := s.Write([]byte("stuck")); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		done := make(chan struct{})
		go func() {
			exchange(t, w.connect(), []byte("x"))
			close(done)
		}()
		synctest.Wait()
		if n := w.dials.Load(); n != 1 {
			t.Fatalf("%d dials", n)
		}
		_ = first.Close()
		<-done
		if n := w.dials.Load(); n != 2 {
			t.Errorf("%d tunnels, want 2", n)
		}
	})
}

// A request that may have been acted on is not sent again.
func TestUncertainRequestIsNotRepeated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var requests int
		w := newWorld(t, nil)
		w.server.cfg.Handle = func(ctx context.Context, r *Request) {
			if requests++; requests == 1 {
				echo(ctx, r)
				return
			}
			_ = r.stream.link.conn.NetConn().Close()
		}
		exchange(t, w.connect(), []byte("x"))
		if _, err := w.pool.Connect(t.Context(), w.target(), target, Header{}); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("Connect: %v", err)
		}
		synctest.Wait()
		if requests != 2 || w.dials.Load() != 1 {
			t.Errorf("%d requests on %d tunnels", requests, w.dials.Load())
		}
	})
}

func TestDialErrorReachesAllWaiters(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		refused := errors.New("connection refused")
		w := newWorld(t, echo, func(w *world, _ *ServerConfig, pc *PoolConfig) {
			pc.Dial = func(context.Context, Target) (net.Conn, error) {
				w.dials.Add(1)
				time.Sleep(time.Second)
				return nil, refused
			}
		})
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() {
				if _, err := w.pool.Connect(t.Context(), w.target(), target, Header{}); !errors.Is(err, refused) {
					t.Errorf("Connect: %v", err)
				}
			})
		}
		wg.Wait()
		if n := w.dials.Load(); n != 1 {
			t.Errorf("%d dials", n)
		}
	})
}

// The one who started a dial may give up without harm to those who wait too.
func TestDialOutlivesItsFirstWaiter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, echo, func(w *world, _ *ServerConfig, pc *PoolConfig) {
			dial := pc.Dial
			pc.Dial = func(ctx context.Context, tg Target) (net.Conn, error) {
				time.Sleep(time.Second)
				return dial(ctx, tg)
			}
		})
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		go func() { _, _ = w.pool.Connect(ctx, w.target(), target, Header{}) }()
		synctest.Wait()
		exchange(t, w.connect(), []byte("x"))
		if n := w.dials.Load(); n != 1 {
			t.Errorf("%d dials", n)
		}
	})
}

// Silent peers hold no slot of those that bound handshakes.
func TestSilentHandshakesDoNotBlockOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		slots := semaphore.NewWeighted(1)
		w := newWorld(t, echo, func(_ *world, sc *ServerConfig, pc *PoolConfig) { sc.Handshakes, pc.Handshakes = slots, slots })
		errs := make(chan error, 50)
		for range cap(errs) {
			a, b := net.Pipe()
			defer a.Close()
			go func() { errs <- w.server.ServeConn(t.Context(), b) }()
		}
		synctest.Wait()
		start := time.Now()
		exchange(t, w.connect(), []byte("x"))
		if d := time.Since(start); d > 0 {
			t.Errorf("waited %v", d)
		}
		for range cap(errs) {
			if err := <-errs; err == nil {
				t.Error("a silent peer was served")
			}
		}
		if d := time.Since(start); d != 10*time.Second {
			t.Errorf("silent peers were kept for %v", d)
		}
	})
}

// A tunnel proves who is at its other end no longer than a certificate does:
// whichever end's is over, new connections want a new proof. Open ones go on.
func TestTunnelTakesNothingNewAfterItsProof(t *testing.T) {
	for _, whose := range []string{"server", "client"} {
		t.Run(whose, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, echo, func(w *world, s *ServerConfig, _ *PoolConfig) {
					if whose == "server" {
						return // its certificate is never renewed
					}
					long := w.ca.IssueAs(cart, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(1000 * time.Hour) })
					s.TLS = identity.ServerTLS(func(context.Context) (*tls.Certificate, error) { return &long, nil }, w.roots(), "cluster.local")
				})
				s := w.connect()
				time.Sleep(23 * time.Hour)
				_ = w.connect()
				if n := w.dials.Load(); n != 1 {
					t.Fatalf("%d tunnels while both certificates are good, want 1", n)
				}
				time.Sleep(2 * time.Hour)
				if _, err := s.Write([]byte("x")); err != nil {
					t.Errorf("the open connection: %v", err)
				}
				if _, err := io.ReadFull(s, make([]byte, 1)); err != nil {
					t.Errorf("the open connection: %v", err)
				}
				_, err := w.pool.Connect(t.Context(), w.target(), target, Header{})
				if n := w.dials.Load(); n != 2 || (err == nil) != (whose == "client") {
					t.Errorf("a new connection used tunnel %d, error %v", n, err)
				}
			})
		})
	}
}

// Connections that prove nothing are bounded, and one that ends makes room.
func TestSilentConnectionsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, echo, func(_ *world, s *ServerConfig, _ *PoolConfig) { s.MaxHandshakes = 3 })
		var silent []net.Conn
		for range 3 {
			a, b := pipe(t)
			silent = append(silent, a)
			go func() { _ = w.server.ServeConn(t.Context(), b) }()
		}
		synctest.Wait()
		began := time.Now()
		if _, err := w.pool.Connect(t.Context(), w.target(), target, Header{}); err == nil || time.Since(began) > 0 {
			t.Errorf("one more than the bound: %v after %v, want an error at once", err, time.Since(began))
		}
		_ = silent[0].Close()
		synctest.Wait()
		if _, err := w.pool.Connect(t.Context(), w.target(), target, Header{}); err != nil {
			t.Errorf("with room for it: %v", err)
		}
		for _, c := range silent {
			_ = c.Close()
		}
	})
}

// What a server waits for before a handshake takes no slot, and is bounded.
func TestServerThatIsNotReady(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, echo, func(_ *world, s *ServerConfig, _ *PoolConfig) {
			s.HandshakeTimeout = 3 * time.Second
			s.Ready = func(ctx context.Context) error {
				<-ctx.Done()
				return errors.New("no certificate")
			}
		})
		began := time.Now()
		if _, err := w.pool.Connect(t.Context(), w.target(), target, Header{}); err == nil {
			t.Error("a server that is not ready took a connection")
		}
		if d := time.Since(began); d != 3*time.Second {
			t.Errorf("it ended after %v, want the handshake's timeout", d)
		}
		if err := <-w.errs; err == nil || !strings.Contains(err.Error(), "no certificate") {
			t.Errorf("ServeConn: %v", err)
		}
	})
}

func TestTLSThatVerifiesNobodyIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, echo, func(w *world, sc *ServerConfig, _ *PoolConfig) {
			sc.TLS.VerifyConnection = nil
		})
		if _, err := w.pool.Connect(t.Context(), w.target(), target, Header{}); err == nil {
			t.Error("served")
		}
		a, _ := net.Pipe()
		if err := NewServer(ServerConfig{Handle: echo}).ServeConn(t.Context(), a); err == nil {
			t.Error("served without TLS")
		}
		a, _ = net.Pipe()
		if err := NewServer(ServerConfig{TLS: w.serverTLS(cart)}).ServeConn(t.Context(), a); err == nil {
			t.Error("served without a handler")
		}
	})
}

// A TLS configuration that lets a wrong peer through is caught by the pool.
func TestPoolChecksThePeerItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, echo, func(w *world, sc *ServerConfig, pc *PoolConfig) {
			pc.TLS = func(tg Target) (*tls.Config, error) { return w.clientTLS(tg.Source, cart, web), nil }
		})
		tg := w.target()
		tg.Peers = tg.Peers[:0]
		if _, err := w.pool.Connect(t.Context(), tg, target, Header{}); !errors.Is(err, identity.ErrWrongPeer) {
			t.Errorf("Connect: %v", err)
		}
	})
}

// rawClient speaks to the world's server over TLS, frame by frame.
func (w *world) rawClient() (*h2.Framer, *tls.Conn) {
	w.t.Helper()
	a, err := w.pool.cfg.Dial(w.t.Context(), w.target())
	if err != nil {
		w.t.Fatal(err)
	}
	c := tls.Client(a, w.clientTLS(web, cart))
	if err := c.Handshake(); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = a.Close() })
	if _, err := io.WriteString(c, http2.Preface); err != nil {
		w.t.Fatal(err)
	}
	fr := h2.NewFramer(c, c)
	if err := fr.WriteSettings(); err != nil {
		w.t.Fatal(err)
	}
	return fr, c
}

// A peer that breaks the rules hears why before the connection ends.
func TestViolationIsSaidAndEndsTheTunnel(t *testing.T) {
	w := newWorld(t, echo, overSockets)
	fr, _ := w.rawClient()
	if err := fr.WriteWindowUpdate(0, 0x7fffffff); err != nil {
		t.Fatal(err)
	}
	for {
		f, err := fr.ReadFrame()
		if err != nil {
			t.Fatalf("no GOAWAY: %v", err)
		}
		if g, ok := f.(*h2.GoAwayFrame); ok {
			if g.ErrCode != h2.ErrCodeFlowControl {
				t.Errorf("GOAWAY says %v", g.ErrCode)
			}
			break
		}
	}
	var ce *http2.ConnError
	if err := <-w.errs; !errors.As(err, &ce) {
		t.Errorf("ServeConn: %v", err)
	}
}

// A peer that asks and asks and never reads what we answer is not kept.
func TestPeerThatNeverReads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, echo)
		fr, _ := w.rawClient()
		var err error
		for i := 0; err == nil && i < 100_000; i++ {
			err = fr.WritePing(false, [8]byte{})
		}
		if err == nil {
			t.Error("100000 PINGs without a word")
		}
		if err := <-w.errs; err == nil {
			t.Error("ServeConn: no error")
		}
	})
}

// A storm of connections that are opened and reset leaves nothing behind.
func TestRapidResetLeavesNothing(t *testing.T) {
	w := newWorld(t, func(ctx context.Context, r *Request) { <-ctx.Done() }, overSockets)
	fr, _ := w.rawClient()
	go func() {
		for {
			if _, err := fr.ReadFrame(); err != nil {
				return
			}
		}
	}()
	f := newForeign(t, ServerRole, Limits{})
	block := f.encode(":method=CONNECT", ":authority="+target)
	base := runtime.NumGoroutine()
	most := 0
	for i := range uint32(5000) {
		f.encode() // the table is not used again: the block is sent as it is
		err := fr.WriteHeaders(h2.HeadersFrameParam{StreamID: 2*i + 1, BlockFragment: block, EndHeaders: true})
		if err == nil {
			err = fr.WriteRSTStream(2*i+1, h2.ErrCodeCancel)
		}
		most = max(most, runtime.NumGoroutine()-base)
		if err != nil {
			break
		}
	}
	if most > 450 {
		t.Errorf("%d goroutines at work for one peer", most)
	}
	if err := <-w.errs; err == nil || !strings.Contains(err.Error(), "ENHANCE_YOUR_CALM") {
		t.Errorf("ServeConn: %v", err)
	}
}

func TestWriteToMatchesRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, echo)
		s := w.connect()
		p := payload(3 << 20)
		go func() {
			_, _ = s.Write(p)
			_ = s.CloseWrite()
		}()
		var got bytes.Buffer
		if n, err := s.WriteTo(&got); err != nil || n != int64(len(p)) || !bytes.Equal(got.Bytes(), p) {
			t.Errorf("WriteTo: %d, %v", n, err)
		}
	})
}

func TestCloseReadDropsAndGoesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sent := make(chan error, 1)
		w := newWorld(t, func(_ context.Context, r *Request) {
			s, err := r.Accept(Header{})
			if err != nil {
				t.Error(err)
				return
			}
			defer s.Close()
			_, err = s.Write(make([]byte, 5<<20))
			sent <- err
			_, _ = io.ReadAll(s)
		})
		s := w.connect()
		_ = s.CloseRead()
		if err := <-sent; err != nil {
			t.Errorf("the server's write: %v", err)
		}
		if _, err := s.Write([]byte("still open")); err != nil {
			t.Error(err)
		}
	})
}

// A stream that was kept aside is quiet until something comes for it.
func TestQuiet(t *testing.T) {
	say := make(chan string)
	w := newWorld(t, func(_ context.Context, r *Request) {
		s, err := r.Accept(Header{})
		if err != nil {
			return
		}
		for text := range say {
			io.WriteString(s, text)
		}
		s.Close()
	})
	s := w.connect()
	if !s.Quiet() {
		t.Error("a new stream is not quiet")
	}
	noisy := func(what string) {
		t.Helper()
		for deadline := time.Now().Add(5 * time.Second); s.Quiet(); {
			if time.Now().After(deadline) {
				t.Fatalf("quiet after %s", what)
			}
		}
	}
	say <- "x"
	noisy("a byte")
	if _, err := io.ReadFull(s, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	if !s.Quiet() || s.Left() {
		t.Error("not quiet after the byte was read")
	}
	close(say)
	noisy("the end")
	if !s.Left() {
		t.Error("the end came, and the peer has not left")
	}
}

func TestTryWriteDoesNotWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		read := make(chan struct{})
		got := make(chan int, 1)
		w := newWorld(t, func(_ context.Context, r *Request) {
			s, err := r.Accept(Header{})
			if err != nil {
				t.Error(err)
				return
			}
			<-read
			b, err := io.ReadAll(s)
			if err != nil {
				t.Error(err)
			}
			got <- len(b)
		})
		s := w.connect()
		sent, piece := 0, payload(10<<10)
		for {
			synctest.Wait()
			n, err := s.TryWrite(piece)
			if err != nil {
				t.Fatal(err)
			}
			sent += n
			if n < len(piece) {
				break // the window is full: Write would wait
			}
			if sent > 100<<20 {
				t.Fatal("nothing bounds what is taken for a peer that does not read")
			}
		}
		if sent == 0 {
			t.Fatal("nothing found room")
		}
		// Nor does it wait for a Write, which comes first.
		var wg sync.WaitGroup
		wg.Go(func() {
			if n, err := s.Write(piece); n != len(piece) || err != nil {
				t.Errorf("Write: %d, %v", n, err)
			}
		})
		synctest.Wait()
		if n, err := s.TryWrite(piece); n != 0 || err != nil {
			t.Errorf("TryWrite beside a Write: %d, %v", n, err)
		}
		close(read)
		wg.Wait()
		if err := s.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if n := <-got; n != sent+len(piece) {
			t.Errorf("%d bytes came, want %d", n, sent+len(piece))
		}
		if _, err := s.TryWrite(piece); err == nil {
			t.Error("TryWrite after the end succeeded")
		}
	})
}
