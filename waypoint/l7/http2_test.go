//lint:file-ignore SA1019 golang.org/x/net/http2 is the oracle: net/http hides the frames.

package l7

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	xhttp2 "golang.org/x/net/http2"

	"github.com/weft-mesh/weft/mesh"
)

// backend2 serves HTTP/2 at an address with x/net/http2.
func (w *world) backend2(address string, h http.HandlerFunc) {
	// x/net keeps channels in a sync.Pool, and those of an earlier bubble must
	// not be used in this one: two collections empty it.
	w.pools.Do(func() {
		runtime.GC()
		runtime.GC()
	})
	w.raw(address, func(c net.Conn) {
		s := &xhttp2.Server{}
		s.ServeConn(c, &xhttp2.ServeConnOpts{Handler: h, Context: w.ctx})
	})
}

// client2 connects a client of HTTP/2 to a port of cart.
func (w *world) client2(port uint16) *xhttp2.ClientConn {
	w.t.Helper()
	cc, err := (&xhttp2.Transport{AllowHTTP: true}).NewClientConn(w.pipe(port))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { cc.Close() })
	return cc
}

// pipe connects somebody to a port of cart.
func (w *world) pipe(port uint16) net.Conn {
	near, far := net.Pipe()
	w.wg.Go(func() {
		w.e.Serve(w.ctx, far, Facts{Service: cart, Port: port, Source: netip.MustParseAddrPort("10.0.9.9:4000"),
			Peer: mesh.Identity{TrustDomain: "td", Namespace: "web", ServiceAccount: "front"}})
	})
	w.t.Cleanup(func() { near.Close() })
	return near
}

func (w *world) do(cc *xhttp2.ClientConn, method, path, body string, fields ...string) (*http.Response, string) {
	w.t.Helper()
	var r io.Reader
	if body != "" {
		r = strings.NewReader(body)
	}
	req, err := http.NewRequest(method, "http://cart"+path, r)
	if err != nil {
		w.t.Fatal(err)
	}
	for i := 0; i+1 < len(fields); i += 2 {
		req.Header.Add(fields[i], fields[i+1])
	}
	resp, err := cc.RoundTrip(req)
	if err != nil {
		w.t.Fatalf("%s %s: %v", method, path, err)
	}
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		w.t.Fatalf("%s %s: after %d bytes: %v", method, path, len(b), err)
	}
	return resp, string(b)
}

// in2 runs a test in a bubble for each way over which a request can go: HTTP/2
// on both sides, and on one only.
func in2(t *testing.T, name string, f func(t *testing.T, w *world, cc *xhttp2.ClientConn), h http.HandlerFunc) {
	t.Helper()
	t.Run(name+", HTTP/2 to HTTP/2", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			w.backend2("10.0.0.1:8081", h)
			w.backend2("10.0.0.2:8081", h)
			f(t, w, w.client2(81))
		})
	})
	t.Run(name+", HTTP/2 to HTTP/1", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			w.backend("10.0.0.1:8080", h)
			w.backend("10.0.0.2:8080", h)
			f(t, w, w.client2(80))
		})
	})
}

func echoAll(w http.ResponseWriter, r *http.Request) {
	b, err := io.ReadAll(r.Body)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	w.Header().Set("X-Saw", fmt.Sprintf("%s %s %s cookie=%q te=%q", r.Method, r.Host, r.URL, r.Header["Cookie"], r.Header["Te"]))
	w.Write(b)
}

func TestHTTP2Bodies(t *testing.T) {
	big := strings.Repeat("0123456789abcdef", 100_000) // more than all windows
	in2(t, "bodies", func(t *testing.T, w *world, cc *xhttp2.ClientConn) {
		for _, body := range []string{"", "hello", big, "", big} {
			resp, b := w.do(cc, "POST", "/p?q=1", body, "Cookie", "a=1", "Cookie", "b=2")
			if b != body || resp.StatusCode != 200 {
				t.Fatalf("sent %d bytes, got %d with status %d", len(body), len(b), resp.StatusCode)
			}
			if want := `POST cart /p?q=1 cookie=["a=1; b=2"]`; !strings.HasPrefix(resp.Header.Get("X-Saw"), want) {
				t.Errorf("the backend saw %s, want %s", resp.Header.Get("X-Saw"), want)
			}
		}
		if resp, b := w.do(cc, "HEAD", "/", ""); b != "" || resp.StatusCode != 200 {
			t.Errorf("HEAD: %d, %q", resp.StatusCode, b)
		}
	}, echoAll)
}

// The last piece of a body opens the windows of the connection, too.
func TestHTTP2WindowsDoNotLeak(t *testing.T) {
	body := strings.Repeat("x", 50_000)
	in2(t, "many bodies of one piece", func(t *testing.T, w *world, cc *xhttp2.ClientConn) {
		for i := range 100 {
			if _, b := w.do(cc, "POST", "/", body); b != body {
				t.Fatalf("request %d: got %d bytes", i, len(b))
			}
		}
	}, echoAll)
}

func TestHTTP2Statuses(t *testing.T) {
	in2(t, "statuses", func(t *testing.T, w *world, cc *xhttp2.ClientConn) {
		for _, status := range []int{200, 204, 304, 404, 500} {
			if resp, _ := w.do(cc, "GET", fmt.Sprint("/", status), ""); resp.StatusCode != status {
				t.Errorf("got %d, want %d", resp.StatusCode, status)
			}
		}
	}, func(w http.ResponseWriter, r *http.Request) {
		var status int
		fmt.Sscanf(r.URL.Path, "/%d", &status)
		w.WriteHeader(status)
	})
}

func TestHTTP2Trailers(t *testing.T) {
	in2(t, "trailers", func(t *testing.T, w *world, cc *xhttp2.ClientConn) {
		resp, b := w.do(cc, "GET", "/", "", "Te", "trailers")
		if b != "body" || resp.Trailer.Get("X-Sum") != "7" {
			t.Errorf("got %q and trailers %v", b, resp.Trailer)
		}
	}, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Trailer", "X-Sum")
		io.WriteString(w, "body")
		w.Header().Set("X-Sum", "7")
	})
}

func TestHTTP2ManyAtOnce(t *testing.T) {
	in2(t, "many at once", func(t *testing.T, w *world, cc *xhttp2.ClientConn) {
		var wg sync.WaitGroup
		for i := range 200 {
			wg.Go(func() {
				body := strings.Repeat(fmt.Sprint(i, " "), i*10)
				if _, b := w.do(cc, "POST", "/", body); b != body {
					t.Errorf("request %d: sent %d bytes and got %d", i, len(body), len(b))
				}
			})
		}
		wg.Wait()
	}, echoAll)
}

func TestHTTP1ToHTTP2(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorldWith(t, Config{}, nil, []*mesh.TrafficPolicy{{Service: cart, Connections: mesh.Connections{HTTP2: "upgrade"}}})
		w.backend2("10.0.0.1:8080", echoAll)
		w.backend2("10.0.0.2:8080", echoAll)
		c := w.client(80)
		c.say("POST /p HTTP/1.1\r\nHost: cart\r\nConnection: keep-alive, te\r\nTE: gzip, trailers\r\nKeep-Alive: 3\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n")
		resp, b := c.answer("POST")
		if b != "hello" || resp.StatusCode != 200 {
			t.Errorf("got %d %q", resp.StatusCode, b)
		}
	})
}

// The client hears each piece before the next is sent, and the other way round.
func TestHTTP2StreamsBothWays(t *testing.T) {
	in2(t, "both ways", func(t *testing.T, w *world, cc *xhttp2.ClientConn) {
		pr, pw := io.Pipe()
		req, _ := http.NewRequest("POST", "http://cart/", pr)
		go io.WriteString(pw, "0")
		resp, err := cc.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 1)
		for i := range 10 {
			if _, err := io.ReadFull(resp.Body, buf); err != nil || buf[0] != byte('0'+i) {
				t.Fatalf("piece %d: %q, %v", i, buf, err)
			}
			if i < 9 {
				pw.Write([]byte{byte('1' + i)})
			}
		}
		pw.Close()
		if n, err := resp.Body.Read(buf); n != 0 || err != io.EOF {
			t.Errorf("after the end: %d, %v", n, err)
		}
	}, func(w http.ResponseWriter, r *http.Request) {
		rc := http.NewResponseController(w)
		rc.EnableFullDuplex() // of HTTP/1
		buf := make([]byte, 1)
		for {
			if _, err := r.Body.Read(buf); err != nil {
				return
			}
			w.Write(buf)
			rc.Flush()
		}
	})
}

// A client that does not read holds back the backend, and nobody else.
func TestHTTP2BackPressure(t *testing.T) {
	var mu sync.Mutex
	sent := 0
	in2(t, "back-pressure", func(t *testing.T, w *world, cc *xhttp2.ClientConn) {
		mu.Lock()
		sent = 0
		mu.Unlock()
		req, _ := http.NewRequest("GET", "http://cart/endless", nil)
		ctx, cancel := context.WithCancel(t.Context())
		resp, err := cc.RoundTrip(req.WithContext(ctx))
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		mu.Lock()
		if sent > 8<<20 {
			t.Errorf("the backend could send %d bytes to a client that reads none", sent)
		}
		mu.Unlock()
		if _, b := w.do(cc, "GET", "/short", ""); b != "short" {
			t.Errorf("beside it: %q", b)
		}
		cancel()
		resp.Body.Close()
	}, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/endless" {
			io.WriteString(w, "short")
			return
		}
		piece := make([]byte, 16<<10)
		for {
			n, err := w.Write(piece)
			mu.Lock()
			sent += n
			mu.Unlock()
			if err != nil {
				return
			}
		}
	})
}

func TestHTTP2ClientGoesAway(t *testing.T) {
	in2(t, "client resets", func(t *testing.T, w *world, cc *xhttp2.ClientConn) {
		ctx, cancel := context.WithCancel(t.Context())
		req, _ := http.NewRequest("GET", "http://cart/", nil)
		done := make(chan error)
		go func() {
			_, err := cc.RoundTrip(req.WithContext(ctx))
			done <- err
		}()
		synctest.Wait()
		cancel()
		if err := <-done; err == nil {
			t.Error("a response to a request that nobody answers")
		}
		synctest.Wait() // the backend's handler returns, for its stream is gone
		if x := w.last(); x.Flags&FlagDownstreamClosed == 0 {
			t.Errorf("flags %v, want DC", x.Flags)
		}
	}, func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
}

func TestHTTP2BackendResets(t *testing.T) {
	in2(t, "backend cuts a body", func(t *testing.T, w *world, cc *xhttp2.ClientConn) {
		req, _ := http.NewRequest("GET", "http://cart/", nil)
		resp, err := cc.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(resp.Body); err == nil {
			t.Errorf("a part of the body was passed on as the whole: %q", b)
		}
	}, func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "half")
		http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	})
	in2(t, "backend cuts before the head", func(t *testing.T, w *world, cc *xhttp2.ClientConn) {
		resp, b := w.do(cc, "POST", "/", "x")
		if resp.StatusCode != 503 || !strings.HasPrefix(b, "upstream connect error or disconnect/reset before headers") {
			t.Errorf("%d %q", resp.StatusCode, b)
		}
	}, func(w http.ResponseWriter, r *http.Request) {
		panic(http.ErrAbortHandler)
	})
}

// An endpoint resets a call of gRPC when the time is over that the client has
// given it, and the client is told that it is this.
func TestGRPCDeadline(t *testing.T) {
	for timeout, want := range map[string]string{"50m": "4", "49999u": "4", "51m": "14", "8S": "14", "": "14", "50": "14", "x50m": "14", "123456789n": "14"} {
		in2(t, "timeout "+timeout, func(t *testing.T, w *world, cc *xhttp2.ClientConn) {
			resp, _ := w.do(cc, "POST", "/", "", "Content-Type", "application/grpc", "Grpc-Timeout", timeout)
			if got := resp.Header.Get("Grpc-Status"); got != want {
				t.Errorf("with a timeout of %q the status is %q, want %q", timeout, got, want)
			}
		}, func(http.ResponseWriter, *http.Request) {
			time.Sleep(50 * time.Millisecond)
			panic(http.ErrAbortHandler)
		})
	}
}

func TestHTTP2LocalAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		cc := w.client2(81) // nobody listens
		if resp, b := w.do(cc, "GET", "/", ""); resp.StatusCode != 503 || resp.Header.Get("Content-Type") != "text/plain" || b == "" {
			t.Errorf("%d %v %q", resp.StatusCode, resp.Header, b)
		}
		resp, b := w.do(cc, "POST", "/", "", "Content-Type", "application/grpc")
		if resp.StatusCode != 200 || b != "" || resp.Header.Get("Grpc-Status") != "14" || resp.Header.Get("Content-Type") != "application/grpc" {
			t.Errorf("gRPC: %d %v %q, want trailers only with grpc-status 14", resp.StatusCode, resp.Header, b)
		}
		long := strings.Repeat("x", 9<<10)
		if resp, _ := w.do(cc, "GET", "/"+long, ""); resp.StatusCode != 414 {
			t.Errorf("a path of 9 KiB: %d, want 414", resp.StatusCode)
		}
		var many []string
		for i := range 150 {
			many = append(many, fmt.Sprint("x-", i), "1")
		}
		if resp, _ := w.do(cc, "GET", "/", "", many...); resp.StatusCode != 431 {
			t.Errorf("150 fields: %d, want 431", resp.StatusCode)
		}
	})
}

func TestHTTP2ConnectionsAreShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorldWith(t, Config{}, nil, []*mesh.TrafficPolicy{{Service: cart, Connections: mesh.Connections{MaxConcurrentStream: 10}}})
		release := make(chan struct{})
		h := func(w http.ResponseWriter, r *http.Request) { <-release }
		w.backend2("10.0.0.1:8081", h)
		w.backend2("10.0.0.2:8081", h)
		cc := w.client2(81)
		var wg sync.WaitGroup
		for range 32 {
			wg.Go(func() { w.do(cc, "GET", "/", "") })
		}
		synctest.Wait()
		w.mu.Lock()
		n := len(w.dials)
		w.mu.Unlock()
		// 16 streams to each, of 8 (80 %) to a connection; who is chosen is
		// chance, so one may have some more.
		if n < 4 || n > 6 {
			t.Errorf("32 streams were spread over %d connections, want 4 or little more", n)
		}
		close(release)
		wg.Wait()
	})
}

func TestHTTP2Drain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.backend2("10.0.0.1:8081", echoAll)
		w.backend2("10.0.0.2:8081", echoAll)
		cc := w.client2(81)
		w.do(cc, "GET", "/", "")
		w.e.Drain()
		for range 3 {
			req, _ := http.NewRequest("GET", "http://cart/", nil)
			if !cc.CanTakeNewRequest() {
				break
			}
			if resp, err := cc.RoundTrip(req); err != nil || resp.StatusCode != 200 {
				t.Fatalf("while draining: %v", err)
			}
			synctest.Wait()
		}
		if cc.CanTakeNewRequest() {
			t.Error("the client was not told to go elsewhere")
		}
	})
}

func TestHTTP2IdleConnectionEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorldWith(t, Config{Limits: Limits{Idle: time.Minute}}, nil, nil)
		w.backend2("10.0.0.1:8081", echoAll)
		w.backend2("10.0.0.2:8081", echoAll)
		cc := w.client2(81)
		w.do(cc, "GET", "/", "")
		time.Sleep(50 * time.Second)
		w.do(cc, "GET", "/", "")
		time.Sleep(62 * time.Second)
		synctest.Wait()
		if cc.CanTakeNewRequest() {
			t.Error("an idle connection lives on")
		}
	})
}

// An hour of a stream on which something moves now and then.
func TestHTTP2LongStream(t *testing.T) {
	in2(t, "an hour", func(t *testing.T, w *world, cc *xhttp2.ClientConn) {
		begun := time.Now()
		_, b := w.do(cc, "GET", "/", "")
		if len(b) != 60 || time.Since(begun) < 59*time.Minute {
			t.Errorf("got %d pieces in %v", len(b), time.Since(begun))
		}
	}, func(w http.ResponseWriter, r *http.Request) {
		for range 60 {
			io.WriteString(w, ".")
			http.NewResponseController(w).Flush()
			time.Sleep(time.Minute)
		}
	})
}

func TestHTTP2Interim(t *testing.T) {
	in2(t, "103", func(t *testing.T, w *world, cc *xhttp2.ClientConn) {
		if resp, b := w.do(cc, "GET", "/", ""); resp.StatusCode != 200 || b != "done" {
			t.Errorf("%d %q", resp.StatusCode, b)
		}
	}, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Link", "</x>")
		w.WriteHeader(103)
		io.WriteString(w, "done")
	})
	in2(t, "100", func(t *testing.T, w *world, cc *xhttp2.ClientConn) {
		if _, b := w.do(cc, "POST", "/", "hello", "Expect", "100-continue"); b != "hello" {
			t.Errorf("%q", b)
		}
	}, echoAll)
}

// What HTTP/2 cannot say must not reach a backend of HTTP/1.
func TestHTTP2Refuses(t *testing.T) {
	for _, tc := range []struct {
		name   string
		fields []string
	}{
		{"no path", []string{":method", "GET", ":scheme", "http", ":authority", "cart"}},
		{"empty path", []string{":method", "GET", ":scheme", "http", ":authority", "cart", ":path", ""}},
		{"path of another form", []string{":method", "GET", ":scheme", "http", ":authority", "cart", ":path", "http://cart/"}},
		{"space in the path", []string{":method", "GET", ":scheme", "http", ":authority", "cart", ":path", "/a b"}},
		{"line end in the path", []string{":method", "GET", ":scheme", "http", ":authority", "cart", ":path", "/a\r\nx: y"}},
		{"fragment", []string{":method", "GET", ":scheme", "http", ":authority", "cart", ":path", "/a#b"}},
		{"space in the method", []string{":method", "GET /x", ":scheme", "http", ":authority", "cart", ":path", "/"}},
		{"another scheme", []string{":method", "GET", ":scheme", "ftp", ":authority", "cart", ":path", "/"}},
		{"no authority", []string{":method", "GET", ":scheme", "http", ":path", "/"}},
		{"user in the authority", []string{":method", "GET", ":scheme", "http", ":authority", "a@cart", ":path", "/"}},
		{"host differs", []string{":method", "GET", ":scheme", "http", ":authority", "cart", ":path", "/", "host", "evil"}},
		{"capital in a name", []string{":method", "GET", ":scheme", "http", ":authority", "cart", ":path", "/", "X-Y", "1"}},
		{"line end in a value", []string{":method", "GET", ":scheme", "http", ":authority", "cart", ":path", "/", "x", "1\r\ny: 2"}},
		{"connection", []string{":method", "GET", ":scheme", "http", ":authority", "cart", ":path", "/", "connection", "close"}},
		{"transfer-encoding", []string{":method", "POST", ":scheme", "http", ":authority", "cart", ":path", "/", "transfer-encoding", "chunked"}},
		{"lookalike", []string{":method", "POST", ":scheme", "http", ":authority", "cart", ":path", "/", "transfer_encoding", "chunked"}},
		{"te", []string{":method", "POST", ":scheme", "http", ":authority", "cart", ":path", "/", "te", "gzip"}},
		{"two lengths", []string{":method", "POST", ":scheme", "http", ":authority", "cart", ":path", "/", "content-length", "0", "content-length", "0"}},
		{"a length without a body", []string{":method", "POST", ":scheme", "http", ":authority", "cart", ":path", "/", "content-length", "3"}},
		{"a response's field", []string{":method", "GET", ":scheme", "http", ":authority", "cart", ":path", "/", ":status", "200"}},
		{"pseudo after regular", []string{":method", "GET", ":scheme", "http", "x", "1", ":authority", "cart", ":path", "/"}},
		{"path twice", []string{":method", "GET", ":scheme", "http", ":authority", "cart", ":path", "/", ":path", "/x"}},
		{"WebSocket", []string{":method", "CONNECT", ":protocol", "websocket", ":scheme", "http", ":authority", "cart", ":path", "/"}},
		{"upgrade", []string{":method", "GET", ":scheme", "http", ":authority", "cart", ":path", "/", ":protocol", "websocket"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				h := func(http.ResponseWriter, *http.Request) { t.Error("a backend saw it") }
				w.backend("10.0.0.1:8080", h)
				w.backend("10.0.0.2:8080", h)
				c := newRawClient(t, w.pipe(80))
				c.head(1, true, tc.fields...)
				c.wantReset(1, xhttp2.ErrCodeProtocol)
			})
		})
	}
}

func TestHTTP2LengthAndData(t *testing.T) {
	for _, tc := range []struct {
		name string
		data []string
	}{{"too little", []string{"ab", ""}}, {"too much", []string{"ab", "cd"}}} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				whole := func(_ http.ResponseWriter, r *http.Request) {
					if b, err := io.ReadAll(r.Body); err == nil {
						t.Errorf("a backend took %q for a whole body", b)
					}
				}
				w.backend("10.0.0.1:8080", whole)
				w.backend("10.0.0.2:8080", whole)
				c := newRawClient(t, w.pipe(80))
				c.head(1, false, ":method", "POST", ":scheme", "http", ":authority", "cart", ":path", "/", "content-length", "3")
				for i, d := range tc.data {
					c.do(func() error { return c.WriteData(1, i == len(tc.data)-1, []byte(d)) })
				}
				c.wantReset(1, xhttp2.ErrCodeProtocol)
			})
		})
	}
}

// Floods end the connection, and say so.
func TestHTTP2Floods(t *testing.T) {
	request := []string{":method", "GET", ":scheme", "http", ":authority", "cart", ":path", "/"}
	for _, tc := range []struct {
		name string
		one  func(c *rawClient, i int) error
	}{
		{"rapid reset", func(c *rawClient, i int) error {
			id := uint32(2*i + 1)
			c.head(id, true, request...)
			return c.WriteRSTStream(id, xhttp2.ErrCodeCancel)
		}},
		{"made you reset", func(c *rawClient, i int) error {
			id := uint32(2*i + 1)
			c.head(id, true, request...)
			return c.WriteWindowUpdate(id, 0)
		}},
		{"malformed requests", func(c *rawClient, i int) error {
			c.head(uint32(2*i+1), true, ":method", "GET")
			return nil
		}},
		{"PING", func(c *rawClient, i int) error { return c.WritePing(false, [8]byte{}) }},
		{"SETTINGS", func(c *rawClient, i int) error { return c.WriteSettings() }},
		{"empty DATA", func(c *rawClient, i int) error {
			if i == 0 {
				c.head(1, false, ":method", "POST", ":scheme", "http", ":authority", "cart", ":path", "/")
			}
			return c.WriteData(1, false, nil)
		}},
		{"PRIORITY", func(c *rawClient, i int) error {
			return c.WritePriority(uint32(2*i+1), xhttp2.PriorityParam{Weight: 3})
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				h := func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() }
				w.backend2("10.0.0.1:8081", h)
				w.backend2("10.0.0.2:8081", h)
				c := newRawClient(t, w.pipe(81))
				for i := range 50_000 {
					if err := tc.one(c, i); err != nil || c.gone() {
						break
					}
				}
				if code := c.wantGoAway(); code != xhttp2.ErrCodeEnhanceYourCalm {
					t.Errorf("GOAWAY with %v, want ENHANCE_YOUR_CALM", code)
				}
			})
		})
	}
}

func TestHTTP2HeaderFloods(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		c := newRawClient(t, w.pipe(81))
		c.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0x82}})
		for range 1000 {
			if c.WriteContinuation(1, false, []byte{0x84}) != nil {
				break
			}
		}
		if code := c.wantGoAway(); code != xhttp2.ErrCodeEnhanceYourCalm {
			t.Errorf("GOAWAY with %v, want ENHANCE_YOUR_CALM", code)
		}
	})
}

func TestHTTP2StreamThatDependsOnItself(t *testing.T) {
	for name, f := range map[string]func(c *rawClient) error{
		"HEADERS": func(c *rawClient) error {
			return c.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: 1, EndHeaders: true, BlockFragment: []byte{0x82}, Priority: xhttp2.PriorityParam{StreamDep: 1, Weight: 1}})
		},
		"PRIORITY": func(c *rawClient) error { return c.WritePriority(1, xhttp2.PriorityParam{StreamDep: 1, Weight: 1}) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := newRawClient(t, newWorld(t).pipe(81))
				c.do(func() error { return f(c) })
				if code := c.wantGoAway(); code != xhttp2.ErrCodeProtocol {
					t.Errorf("GOAWAY with %v, want PROTOCOL_ERROR", code)
				}
			})
		})
	}
}

func TestHTTP2TooManyStreams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		h := func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() }
		w.backend2("10.0.0.1:8081", h)
		w.backend2("10.0.0.2:8081", h)
		c := newRawClient(t, w.pipe(81))
		for i := range 257 {
			c.head(uint32(2*i+1), true, ":method", "GET", ":scheme", "http", ":authority", "cart", ":path", "/")
		}
		c.wantReset(2*256+1, xhttp2.ErrCodeRefusedStream)
	})
}

// A refused stream was not looked at, and is tried elsewhere.
func TestHTTP2RefusedIsTriedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, mesh.Rule{Backends: []mesh.Backend{{Service: cart, Weight: 1}}, Retry: &mesh.Retry{Attempts: 2, On: []string{"refused-stream"}}})
		w.set([]mesh.Rule{{Backends: []mesh.Backend{{Service: cart, Port: 81, Weight: 1}}, Retry: &mesh.Retry{Attempts: 2, On: []string{"refused-stream"}}}}, nil)
		w.raw("10.0.0.1:8081", func(c net.Conn) {
			f := xhttp2.NewFramer(c, c)
			io.ReadFull(c, make([]byte, len(xhttp2.ClientPreface)))
			f.WriteSettings()
			for {
				fr, err := f.ReadFrame()
				if err != nil {
					return
				}
				if fr.Header().Type == xhttp2.FrameHeaders {
					f.WriteRSTStream(fr.Header().StreamID, xhttp2.ErrCodeRefusedStream)
				}
			}
		})
		w.backend2("10.0.0.2:8081", echoAll)
		cc := w.client2(80)
		for range 20 {
			if resp, b := w.do(cc, "POST", "/", "hello"); resp.StatusCode != 200 || b != "hello" {
				t.Fatalf("%d %q", resp.StatusCode, b)
			}
		}
	})
}

// rawClient speaks HTTP/2 frame by frame.
type rawClient struct {
	*xhttp2.Framer
	t    *testing.T
	enc  *hpackEncoder
	done chan struct{}

	mu     sync.Mutex
	resets map[uint32]xhttp2.ErrCode
	goaway []xhttp2.ErrCode
}

func newRawClient(t *testing.T, conn net.Conn) *rawClient {
	t.Helper()
	c := &rawClient{Framer: xhttp2.NewFramer(conn, conn), t: t, enc: newHpackEncoder(), done: make(chan struct{}), resets: map[uint32]xhttp2.ErrCode{}}
	c.AllowIllegalWrites = true
	go c.read()
	io.WriteString(conn, xhttp2.ClientPreface)
	c.do(func() error { return c.WriteSettings() })
	return c
}

func (c *rawClient) read() {
	defer close(c.done)
	for {
		f, err := c.ReadFrame()
		if err != nil {
			return
		}
		c.mu.Lock()
		switch f := f.(type) {
		case *xhttp2.RSTStreamFrame:
			c.resets[f.StreamID] = f.ErrCode
		case *xhttp2.GoAwayFrame:
			c.goaway = append(c.goaway, f.ErrCode)
		}
		c.mu.Unlock()
	}
}

func (c *rawClient) gone() bool {
	select {
	case <-c.done:
		return true
	default:
		return false
	}
}

func (c *rawClient) do(f func() error) {
	c.t.Helper()
	if err := f(); err != nil {
		c.t.Fatal(err)
	}
}

func (c *rawClient) head(id uint32, end bool, fields ...string) {
	c.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: id, BlockFragment: c.enc.block(fields...), EndStream: end, EndHeaders: true})
}

func (c *rawClient) wantReset(id uint32, code xhttp2.ErrCode) {
	c.t.Helper()
	synctest.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	if got, ok := c.resets[id]; !ok || got != code {
		c.t.Errorf("stream %d: reset %v with %v, want %v", id, ok, got, code)
	}
}

func (c *rawClient) wantGoAway() xhttp2.ErrCode {
	c.t.Helper()
	select {
	case <-c.done:
	case <-time.After(time.Minute):
		c.t.Fatal("the connection was not ended")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Max(append(c.goaway, 0))
}
