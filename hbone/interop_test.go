//lint:file-ignore SA1019 these tests are about golang.org/x/net/http2

package hbone

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	h2 "golang.org/x/net/http2"

	"github.com/weft-mesh/weft/internal/relay"
)

// xServer makes the world's server an x/net one that echoes.
func xServer(srv *h2.Server) option {
	return func(w *world, _ *ServerConfig, pc *PoolConfig) {
		var wg sync.WaitGroup
		w.t.Cleanup(wg.Wait)
		pc.Dial = func(context.Context, Target) (net.Conn, error) {
			w.dials.Add(1)
			a, b := socketPipe(w.t)
			wg.Go(func() {
				c := tls.Server(b, w.serverTLS(cart))
				if err := c.Handshake(); err != nil {
					w.t.Error(err)
					return
				}
				srv.ServeConn(c, &h2.ServeConnOpts{
					Handler:    http.HandlerFunc(xEcho),
					BaseConfig: &http.Server{ErrorLog: log.New(io.Discard, "", 0)},
				})
			})
			return a, nil
		}
	}
}

func xEcho(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodConnect || r.Host != target || r.URL.Path != "" {
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

func payload(n int) []byte {
	p := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(n), byte(n >> 8), byte(n >> 16)}).Read(p) // does not fail
	return p
}

// payloads is how many payloads a case sends: a few, but for those where the
// bytes are the point.
func payloads(name string) int {
	if strings.HasSuffix(name, "frames") || strings.HasSuffix(name, "streams") {
		return 20
	}
	return 5
}

// sizes are random, but the same in every run.
func sizes(n int) []int {
	r := rand.New(rand.NewPCG(7, 7))
	s := []int{0, 1}
	for len(s) < n {
		s = append(s, int(r.Uint32N(7<<20)))
	}
	return s
}

func TestPoolWithForeignServer(t *testing.T) {
	for name, srv := range map[string]*h2.Server{
		"16 KiB frames":   {},
		"1 MiB frames":    {MaxReadFrameSize: 1 << 20, MaxUploadBufferPerStream: 4 << 20, MaxUploadBufferPerConnection: 16 << 20},
		"small windows":   {MaxUploadBufferPerStream: 65536, MaxUploadBufferPerConnection: 65536},
		"eager to ping":   {ReadIdleTimeout: time.Millisecond, PingTimeout: time.Minute},
		"tiny HPACK":      {MaxDecoderHeaderTableSize: 1, MaxEncoderHeaderTableSize: 1},
		"fifteen streams": {MaxConcurrentStreams: 15},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, nil, xServer(srv))
			var wg sync.WaitGroup
			for _, n := range sizes(payloads(name)) {
				wg.Go(func() {
					s, err := w.pool.Connect(t.Context(), w.target(), target, Header{Baggage: "k8s.namespace.name=shop", Forwarded: "for=\"1.2.3.4:5\""})
					if err != nil {
						t.Error(err)
						return
					}
					defer s.Close()
					exchange(t, s, payload(n))
				})
			}
			wg.Wait()
			var status *StatusError
			if _, err := w.pool.Connect(t.Context(), w.target(), "10.9.9.9:1", Header{}); !errors.As(err, &status) || status.Code != 400 {
				t.Errorf("Connect elsewhere: %v, want status 400", err)
			}
		})
	}
}

// xClient connects an x/net client to the world's server.
func (w *world) xClient(tr *h2.Transport) *h2.ClientConn {
	w.t.Helper()
	a, err := w.pool.cfg.Dial(w.t.Context(), w.target())
	if err != nil {
		w.t.Fatal(err)
	}
	c := tls.Client(a, w.clientTLS(web, cart))
	if err := c.Handshake(); err != nil {
		w.t.Fatal(err)
	}
	cc, err := tr.NewClientConn(c)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = cc.Close() })
	return cc
}

func connectRequest(ctx context.Context, authority string, body io.ReadCloser) *http.Request {
	r, err := http.NewRequestWithContext(ctx, http.MethodConnect, "https://"+authority, body)
	if err != nil {
		panic(err)
	}
	r.ContentLength = -1
	return r
}

func overSockets(w *world, _ *ServerConfig, pc *PoolConfig) {
	var wg sync.WaitGroup
	ctx, stop := context.WithCancel(context.Background())
	w.t.Cleanup(func() {
		stop()
		wg.Wait()
	})
	w.stop = stop
	pc.Dial = func(context.Context, Target) (net.Conn, error) {
		w.dials.Add(1)
		a, b := socketPipe(w.t)
		wg.Go(func() { w.errs <- w.server.ServeConn(ctx, b) })
		return a, nil
	}
}

func TestForeignClientWithServer(t *testing.T) {
	for name, tr := range map[string]*h2.Transport{
		"16 KiB frames": {},
		"1 MiB frames":  {MaxReadFrameSize: 1 << 20},
		"eager to ping": {ReadIdleTimeout: time.Millisecond, PingTimeout: time.Minute},
		"tiny HPACK":    {MaxDecoderHeaderTableSize: 1, MaxEncoderHeaderTableSize: 1},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, echo, overSockets)
			cc := w.xClient(tr)
			var wg sync.WaitGroup
			for _, n := range sizes(payloads(name)) {
				wg.Go(func() {
					p := payload(n)
					resp, err := cc.RoundTrip(connectRequest(t.Context(), target, io.NopCloser(bytes.NewReader(p))))
					if err != nil {
						t.Error(err)
						return
					}
					defer resp.Body.Close()
					got, err := io.ReadAll(resp.Body)
					if err != nil || resp.StatusCode != 200 || !bytes.Equal(got, p) {
						t.Errorf("status %d, %d of %d bytes, %v", resp.StatusCode, len(got), n, err)
					}
				})
			}
			wg.Wait()
			resp, err := cc.RoundTrip(connectRequest(t.Context(), "10.0.0.1", http.NoBody))
			if err != nil || resp.StatusCode != 400 {
				t.Errorf("a bad authority: %+v, %v", resp, err)
			}
			get, _ := http.NewRequestWithContext(t.Context(), "GET", "https://cart/", nil)
			if resp, err := cc.RoundTrip(get); err != nil || resp.StatusCode != 400 {
				t.Errorf("GET: %+v, %v", resp, err)
			}
		})
	}
}

// A foreign client that goes away in the middle is an abort, not an end.
func TestForeignClientCancels(t *testing.T) {
	got := make(chan error, 1)
	ended := make(chan struct{})
	w := newWorld(t, func(ctx context.Context, r *Request) {
		s, err := r.Accept(Header{})
		if err != nil {
			t.Error(err)
			return
		}
		_, err = io.ReadAll(s)
		got <- err
		<-ctx.Done()
		close(ended)
	}, overSockets)
	cc := w.xClient(&h2.Transport{})
	body, feed := io.Pipe()
	resp, err := cc.RoundTrip(connectRequest(t.Context(), target, body))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := feed.Write([]byte("half of a sentence")); err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if err := <-got; err == nil {
		t.Error("the server took half for the whole")
	}
	<-ended
}

// A foreign server that goes away in order is left for another tunnel.
func TestForeignServerGoesAway(t *testing.T) {
	base := &http.Server{}
	srv := &h2.Server{}
	if err := h2.ConfigureServer(base, srv); err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, nil, func(w *world, _ *ServerConfig, pc *PoolConfig) {
		var wg sync.WaitGroup
		w.t.Cleanup(wg.Wait)
		pc.Dial = func(context.Context, Target) (net.Conn, error) {
			w.dials.Add(1)
			a, b := socketPipe(t)
			wg.Go(func() {
				c := tls.Server(b, w.serverTLS(cart))
				_ = c.Handshake()
				srv.ServeConn(c, &h2.ServeConnOpts{Handler: http.HandlerFunc(xEcho), BaseConfig: base})
			})
			return a, nil
		}
	})
	s := w.connect()
	if err := base.Shutdown(t.Context()); err != nil { // starts GOAWAY on every connection
		t.Fatal(err)
	}
	deadline := time.Now().Add(10 * time.Second)
	for w.dials.Load() == 1 {
		if time.Now().After(deadline) {
			t.Fatal("new connections still go to the server that goes away")
		}
		c := w.connect()
		_ = c.Close()
	}
	exchange(t, s, payload(1<<20)) // the open connection goes on
}

// relayed is the path of a real connection: application, pool, server,
// application.
func TestRelayThroughTunnel(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(wg.Wait)
	t.Cleanup(func() { _ = ln.Close() })
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				_, _ = io.Copy(c, c)
				_ = c.(*net.TCPConn).CloseWrite()
			})
		}
	})
	w := newWorld(t, func(ctx context.Context, r *Request) {
		up, err := net.Dial("tcp", r.Authority.AddrPort().String())
		if err != nil {
			_ = r.Reject(503)
			return
		}
		down, err := r.Accept(Header{})
		if err != nil {
			_ = up.Close()
			return
		}
		if err := relay.Copy(ctx, down, up, nil); err != nil {
			t.Errorf("server's relay: %v", err)
		}
	}, overSockets)
	var clients sync.WaitGroup
	defer clients.Wait()
	for _, n := range sizes(8) {
		clients.Go(func() {
			app, inside := socketPipe(t)
			defer app.Close()
			s, err := w.pool.Connect(t.Context(), w.target(), ln.Addr().String(), Header{})
			if err != nil {
				t.Error(err)
				return
			}
			var stats relay.Stats
			done := make(chan error, 1)
			clients.Go(func() { done <- relay.Copy(t.Context(), inside, s, &stats) })
			exchange(t, app, payload(n))
			if err := <-done; err != nil || stats.Sent.Load() != int64(n) || stats.Received.Load() != int64(n) {
				t.Errorf("relay of %d bytes: %v, %d and %d", n, err, stats.Sent.Load(), stats.Received.Load())
			}
		})
	}
}
