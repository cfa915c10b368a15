//lint:file-ignore SA1019 these tests are about golang.org/x/net/http2

package loop

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"

	h2 "golang.org/x/net/http2"

	"github.com/weft-mesh/weft/hbone"
	"github.com/weft-mesh/weft/internal/relay"
)

var interopSizes = []int{0, 1, 8192, 16375, 16384, 100_000, 3 << 20}

func exchangeAll(t *testing.T, w *world) {
	var wg sync.WaitGroup
	for _, n := range interopSizes {
		c := w.dial()
		wg.Go(func() { exchange(t, c, payload(n)) })
	}
	wg.Wait()
	for i := range interopSizes {
		if err := w.over(w.theOut(i)); err != nil {
			t.Errorf("connection %d: %v", i, err)
		}
	}
}

// The client's engine against the server that has goroutines.
func TestAgainstTheOtherServer(t *testing.T) {
	exchangeAll(t, newWorld(t, echo, func(w *world, sc *ServerConfig, _ *PoolConfig) {
		cfg := sc.Shake
		cfg.Handle = func(ctx context.Context, r *hbone.Request) {
			up, err := net.Dial("tcp", w.app)
			if err != nil {
				_ = r.Reject(503)
				return
			}
			down, err := r.Accept(hbone.Header{})
			if err != nil {
				_ = up.Close()
				return
			}
			_ = relay.Copy(ctx, down, up, nil)
		}
		s := hbone.NewServer(cfg)
		ctx, stop := context.WithCancel(context.Background())
		w.tunnels = listen(t, func(c *net.TCPConn) { _ = s.ServeConn(ctx, c) })
		t.Cleanup(stop)
	}))
}

// The server's engine against the pool that has goroutines.
func TestAgainstTheOtherPool(t *testing.T) {
	w := newWorld(t, echo)
	pool := hbone.NewPool(hbone.PoolConfig{
		TLS: func(tg hbone.Target) (*tls.Config, error) { return w.clientTLS(tg.Source, tg.Peers...), nil },
		Dial: func(ctx context.Context, tg hbone.Target) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", tg.Address.String())
		},
	})
	t.Cleanup(pool.Close)
	var wg sync.WaitGroup
	for _, n := range interopSizes {
		s, err := pool.Connect(t.Context(), w.target(), target, hbone.Header{})
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			defer s.Close()
			p := payload(n)
			go func() {
				_, _ = s.Write(p)
				_ = s.CloseWrite()
			}()
			got, err := io.ReadAll(s)
			if err != nil || string(got) != string(p) {
				t.Errorf("echo of %d bytes: %d, %v", n, len(got), err)
			}
		})
	}
	wg.Wait()
}

// The client's engine against the server of x/net.
func TestAgainstTheServerOfXNet(t *testing.T) {
	for _, srv := range []*h2.Server{{}, {MaxReadFrameSize: 1 << 20, MaxUploadBufferPerStream: 1 << 20, MaxUploadBufferPerConnection: 4 << 20}, {MaxConcurrentStreams: 2}} {
		exchangeAll(t, newWorld(t, echo, func(w *world, _ *ServerConfig, _ *PoolConfig) {
			w.tunnels = listen(t, func(c *net.TCPConn) {
				s := tls.Server(c, h2TLS(w.serverTLS(cart)))
				if err := s.Handshake(); err != nil {
					t.Error(err)
					return
				}
				srv.ServeConn(s, &h2.ServeConnOpts{
					Handler: http.HandlerFunc(xEcho), BaseConfig: &http.Server{ErrorLog: log.New(io.Discard, "", 0)},
				})
			})
		}))
	}
}

func h2TLS(c *tls.Config) *tls.Config {
	c = c.Clone()
	c.NextProtos = []string{"h2"}
	return c
}

func xEcho(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodConnect || r.Host != target {
		http.Error(w, "not for us", http.StatusBadRequest)
		return
	}
	rc := http.NewResponseController(w)
	w.WriteHeader(200)
	_ = rc.Flush()
	buf := make([]byte, 32<<10)
	for {
		n, err := r.Body.Read(buf)
		if n > 0 {
			if _, err := w.Write(buf[:n]); err != nil {
				return
			}
			_ = rc.Flush()
		}
		if err != nil {
			return
		}
	}
}

// The server's engine against the client of x/net.
func TestAgainstTheClientOfXNet(t *testing.T) {
	w := newWorld(t, echo)
	raw, err := tls.Dial("tcp", w.tunnels, h2TLS(w.clientTLS(web, cart)))
	if err != nil {
		t.Fatal(err)
	}
	cc, err := (&h2.Transport{AllowHTTP: true}).NewClientConn(raw)
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	for _, n := range interopSizes {
		pr, pw := io.Pipe()
		req, err := http.NewRequest(http.MethodConnect, "https://"+target, pr)
		if err != nil {
			t.Fatal(err)
		}
		req.Host = target
		res, err := cc.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		p := payload(n)
		go func() {
			_, _ = pw.Write(p)
			_ = pw.Close()
		}()
		got, err := io.ReadAll(res.Body)
		if err != nil || string(got) != string(p) {
			t.Errorf("echo of %d bytes: %d, %v", n, len(got), err)
		}
	}
}

// A peer that is no peer: wrong certificate, no HTTP/2, no answer.
func TestWrongPeers(t *testing.T) {
	t.Run("identity", func(t *testing.T) {
		w := newWorld(t, echo, func(w *world, sc *ServerConfig, _ *PoolConfig) { sc.Shake.TLS = w.serverTLS(web) })
		w.attempt()
		if err := w.over(w.theOut(0)); err == nil {
			t.Error("it was taken")
		}
		if w.dials.Load() != 1 {
			t.Errorf("%d attempts at a wrong peer, want 1", w.dials.Load())
		}
	})
	t.Run("refuses us", func(t *testing.T) {
		w := newWorld(t, echo, func(w *world, sc *ServerConfig, _ *PoolConfig) {
			sc.Shake.TLS = sc.Shake.TLS.Clone()
			sc.Shake.TLS.VerifyConnection = func(tls.ConnectionState) error { return errors.New("not you") }
		})
		w.attempt()
		err := w.over(w.theOut(0))
		var alert tls.AlertError
		if !errors.As(err, &alert) {
			t.Errorf("%v, want the alert", err)
		}
		if w.dials.Load() > 2 {
			t.Errorf("%d attempts, want no more than one or two", w.dials.Load())
		}
	})
	t.Run("silent", func(t *testing.T) {
		done := make(chan struct{})
		w := newWorld(t, echo, func(w *world, _ *ServerConfig, pc *PoolConfig) {
			pc.AnswerTimeout = 100 * time.Millisecond
			w.tunnels = listen(t, func(c *net.TCPConn) {
				s := tls.Server(c, h2TLS(w.serverTLS(cart)))
				_ = s.Handshake()
				<-done
				_ = c.Close()
			})
		})
		t.Cleanup(func() { close(done) })
		w.attempt()
		if err := w.over(w.theOut(0)); !errors.Is(err, errNoAnswer) {
			t.Errorf("%v, want %v", err, errNoAnswer)
		}
	})
}
