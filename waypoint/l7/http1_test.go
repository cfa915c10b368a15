package l7

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/weft-mesh/weft/mesh"
)

// inWorld runs a test in a bubble, with two backends that echo.
func inWorld(t *testing.T, name string, f func(t *testing.T, w *world), rules ...mesh.Rule) {
	t.Helper()
	t.Run(name, func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, rules...)
			w.backend("10.0.0.1:8080", echo("a"))
			w.backend("10.0.0.2:8080", echo("b"))
			w.backend("10.0.0.3:8080", echo("c"))
			f(t, w)
		})
	})
}

// everywhere lets one function serve all of cart's endpoints.
func (w *world) everywhere(f func(net.Conn)) {
	w.raw("10.0.0.1:8080", f)
	w.raw("10.0.0.2:8080", f)
}

// script is a backend that reads a request's head and says a text.
func script(answer string) func(net.Conn) {
	return func(c net.Conn) {
		r := bufio.NewReader(c)
		for {
			req, err := http.ReadRequest(r)
			if err != nil {
				return
			}
			io.Copy(io.Discard, req.Body)
			if _, err := io.WriteString(c, answer); err != nil {
				return
			}
		}
	}
}

func TestBodies(t *testing.T) {
	big := strings.Repeat("0123456789abcdef", 20_000)
	inWorld(t, "small, of known length", func(t *testing.T, w *world) {
		c := w.client(80)
		c.say("POST /p HTTP/1.1\r\nHost: cart\r\nContent-Length: 5\r\n\r\nhello")
		if _, b := c.answer("POST"); b != "POST cart /p 5:hello" {
			t.Errorf("got %q", b)
		}
		if x := w.last(); x.RequestBytes != 5 || x.ResponseBytes != 20 {
			t.Errorf("counted %d and %d bytes", x.RequestBytes, x.ResponseBytes)
		}
	})
	inWorld(t, "that comes in pieces", func(t *testing.T, w *world) {
		c := w.client(80)
		go func() {
			for _, p := range []string{"POST /p HT", "TP/1.1\r\nHost: cart\r\nContent-Le", "ngth: 5\r\n\r", "\nhe", "llo"} {
				io.WriteString(c.Conn, p)
				time.Sleep(time.Millisecond)
			}
		}()
		if _, b := c.answer("POST"); b != "POST cart /p 5:hello" {
			t.Errorf("got %q", b)
		}
	})
	inWorld(t, "large, of known length", func(t *testing.T, w *world) {
		c := w.client(80)
		for range 2 {
			c.say(fmt.Sprintf("POST /p HTTP/1.1\r\nHost: cart\r\nContent-Length: %d\r\n\r\n%s", len(big), big))
			if _, b := c.answer("POST"); b != fmt.Sprintf("POST cart /p %d:%s", len(big), big) {
				t.Errorf("got %d bytes", len(b))
			}
		}
	})
	inWorld(t, "in chunks", func(t *testing.T, w *world) {
		c := w.client(80)
		for range 2 {
			c.say("POST /p HTTP/1.1\r\nHost: cart\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\n\r\n")
			if _, b := c.answer("POST"); b != "POST cart /p 5:hello" {
				t.Errorf("got %q", b)
			}
		}
	})
	inWorld(t, "large, in chunks", func(t *testing.T, w *world) {
		c := w.client(80)
		for range 2 {
			c.say(fmt.Sprintf("POST /p HTTP/1.1\r\nHost: cart\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n%x\r\n%s\r\n0\r\n\r\n", len(big), big))
			if _, b := c.answer("POST"); b != fmt.Sprintf("POST cart /p %d:hello%s", len(big)+5, big) {
				t.Errorf("got %d bytes", len(b))
			}
		}
	})
	inWorld(t, "an answer in chunks with trailers", func(t *testing.T, w *world) {
		w.everywhere(script("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n3\r\nabc\r\n3\r\ndef\r\n0\r\nX-Sum: 7\r\nContent-Length: 3\r\n\r\n"))
		c := w.client(80)
		for range 2 {
			r, b := c.get("/")
			if b != "abcdef" || r.Trailer.Get("X-Sum") != "7" || len(r.Trailer) != 1 {
				t.Errorf("got %q with trailers %v", b, r.Trailer)
			}
		}
	})
	inWorld(t, "an answer that ends with its connection", func(t *testing.T, w *world) {
		w.everywhere(func(c net.Conn) {
			http.ReadRequest(bufio.NewReader(c))
			io.WriteString(c, "HTTP/1.0 200 OK\r\n\r\nabc")
			io.WriteString(c, "def")
		})
		c := w.client(80)
		for range 2 {
			if _, b := c.get("/"); b != "abcdef" {
				t.Errorf("got %q", b)
			}
		}
	})
	inWorld(t, "an answer that is cut short is not made whole", func(t *testing.T, w *world) {
		w.everywhere(func(c net.Conn) {
			http.ReadRequest(bufio.NewReader(c))
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")
		})
		c := w.client(80)
		c.say("GET / HTTP/1.1\r\nHost: cart\r\n\r\n")
		r, err := http.ReadResponse(c.r, nil)
		if err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(r.Body); err == nil {
			t.Errorf("took %q for whole", b)
		}
	})
	inWorld(t, "HEAD, 204 and 304 have none", func(t *testing.T, w *world) {
		w.everywhere(func(c net.Conn) {
			serveHTTP(c, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
				switch r.URL.Path {
				case "/204":
					rw.WriteHeader(204)
				case "/304":
					rw.Header().Set("Etag", "x")
					rw.WriteHeader(304)
				default:
					rw.Header().Set("Content-Length", "77")
				}
			}))
		})
		c := w.client(80)
		for range 2 {
			c.say("HEAD / HTTP/1.1\r\nHost: cart\r\n\r\n")
			if r, _ := c.answer("HEAD"); r.ContentLength != 77 {
				t.Errorf("HEAD says %d bytes", r.ContentLength)
			}
			if r, _ := c.get("/204"); r.StatusCode != 204 || r.Header.Get("Content-Length") != "" {
				t.Errorf("got %v", r)
			}
			if r, _ := c.get("/304"); r.StatusCode != 304 || r.Header.Get("Etag") != "x" {
				t.Errorf("got %v", r)
			}
		}
	})
	inWorld(t, "HTTP/1.0 gets no chunks, and keeps its connection if it asks", func(t *testing.T, w *world) {
		c := w.client(80)
		c.say("GET /a HTTP/1.0\r\nHost: cart\r\nConnection: keep-alive\r\n\r\n")
		if r, b := c.answer("GET"); b != "GET cart /a 0:" || r.Header.Get("Connection") != "keep-alive" {
			t.Errorf("got %q, %v", b, r.Header)
		}
		w.everywhere(script("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"))
		w.e.sweep()
		c = w.client(80)
		c.say("GET /b HTTP/1.0\r\nHost: cart\r\nConnection: keep-alive\r\n\r\n")
		r, b := c.answer("GET")
		if r.TransferEncoding != nil || !strings.HasPrefix(b, "GET") && b != "abc" {
			t.Errorf("got %q %v", b, r.TransferEncoding)
		}
	})
}

func TestContinue(t *testing.T) {
	inWorld(t, "100 is sent when the body is wanted", func(t *testing.T, w *world) {
		c := w.client(80)
		for _, framing := range []string{"Content-Length: 5", "Transfer-Encoding: chunked"} {
			c.say("POST /p HTTP/1.1\r\nHost: cart\r\n" + framing + "\r\nExpect: 100-continue\r\n\r\n")
			if r, err := http.ReadResponse(c.r, nil); err != nil || r.StatusCode != 100 {
				t.Fatalf("got %v, %v", r, err)
			}
			if framing[0] == 'C' {
				c.say("hello")
			} else {
				c.say("5\r\nhello\r\n0\r\n\r\n")
			}
			if _, b := c.answer("POST"); b != "POST cart /p 5:hello" {
				t.Errorf("got %q", b)
			}
		}
	})
	inWorld(t, "a body that nobody wants is not asked for, and ends the connection", func(t *testing.T, w *world) {
		c := w.client(80)
		c.say("POST /p HTTP/1.1\r\nHost: cart\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n")
		if r, _ := c.answer("POST"); r.StatusCode != 500 || !r.Close {
			t.Errorf("got %v", r)
		}
		c.closed()
	}, mesh.Rule{Broken: "nobody understands it"})
	inWorld(t, "interim answers pass", func(t *testing.T, w *world) {
		w.everywhere(script("HTTP/1.1 103 Early Hints\r\nLink: </s>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"))
		c := w.client(80)
		c.say("GET / HTTP/1.1\r\nHost: cart\r\n\r\n")
		if r, err := http.ReadResponse(c.r, nil); err != nil || r.StatusCode != 103 || r.Header.Get("Link") != "</s>" {
			t.Fatalf("got %v, %v", r, err)
		}
		if _, b := c.answer("GET"); b != "ok" {
			t.Errorf("got %q", b)
		}
	})
}

func TestPipelining(t *testing.T) {
	inWorld(t, "answers come in order", func(t *testing.T, w *world) {
		c := w.client(80)
		var b strings.Builder
		for i := range 20 {
			fmt.Fprintf(&b, "POST /%d HTTP/1.1\r\nHost: cart\r\nContent-Length: 2\r\n\r\nxy", i)
		}
		c.say(b.String())
		for i := range 20 {
			if _, got := c.answer("POST"); got != fmt.Sprintf("POST cart /%d 2:xy", i) {
				t.Fatalf("answer %d is %q", i, got)
			}
		}
	})
	inWorld(t, "nothing after close", func(t *testing.T, w *world) {
		c := w.client(80)
		c.say("GET /1 HTTP/1.1\r\nHost: cart\r\nConnection: close\r\n\r\nGET /2 HTTP/1.1\r\nHost: cart\r\n\r\n")
		if r, _ := c.answer("GET"); !r.Close {
			t.Error("the answer does not say close")
		}
		c.closed()
	})
}

func TestUpgrade(t *testing.T) {
	upgrade := func(answer string) func(net.Conn) {
		return func(c net.Conn) {
			r := bufio.NewReader(c)
			req, err := http.ReadRequest(r)
			if err != nil {
				return
			}
			io.WriteString(c, answer)
			if req.Method != "CONNECT" && (req.Header.Get("Upgrade") != "websocket" || !strings.EqualFold(req.Header.Get("Connection"), "upgrade")) {
				io.WriteString(c, "no upgrade was asked for")
				return
			}
			line, _ := r.ReadString('\n')
			io.WriteString(c, "echo "+line)
		}
	}
	inWorld(t, "both ends are joined, with what came early", func(t *testing.T, w *world) {
		w.everywhere(upgrade("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nX-Key: k\r\n\r\nfirst "))
		c := w.client(80)
		c.say("GET /ws HTTP/1.1\r\nHost: cart\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n\r\nhello\n")
		r, err := http.ReadResponse(c.r, nil)
		if err != nil || r.StatusCode != 101 || r.Header.Get("Upgrade") != "websocket" || r.Header.Get("X-Key") != "k" {
			t.Fatalf("got %v, %v", r, err)
		}
		c.expect("first echo hello\n")
	})
	inWorld(t, "a refused upgrade is an answer like others", func(t *testing.T, w *world) {
		c := w.client(80)
		for range 2 {
			if _, b := c.get("/ws", "Connection: Upgrade", "Upgrade: websocket"); b != "GET cart /ws 0:" {
				t.Errorf("got %q", b)
			}
		}
	})
	inWorld(t, "CONNECT passes", func(t *testing.T, w *world) {
		w.everywhere(upgrade("HTTP/1.1 200 OK\r\n\r\n"))
		c := w.client(80)
		c.say("CONNECT cart:80 HTTP/1.1\r\nHost: cart:80\r\n\r\nhello\n")
		if r, err := http.ReadResponse(c.r, &http.Request{Method: "CONNECT"}); err != nil || r.StatusCode != 200 {
			t.Fatalf("got %v, %v", r, err)
		}
		c.expect("echo hello\n")
	})
}

func TestHeadersForwarded(t *testing.T) {
	inWorld(t, "what endpoint and client see", func(t *testing.T, w *world) {
		var got http.Header
		w.everywhere(func(c net.Conn) {
			serveHTTP(c, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
				got = r.Header
				rw.Header().Set("Connection", "x-hop")
				rw.Header().Set("X-Hop", "1")
				rw.Header().Set("X-Stay", "1")
			}))
		})
		c := w.client(80)
		r, _ := c.get("/", "X-Forwarded-For: 1.2.3.4", "X-One: 1", "Connection: x-nominated, keep-alive", "X-Nominated: 1", "TE: gzip",
			"Keep-Alive: 5", "Proxy-Connection: x", "x-envoy-attempt-count: 7", "x-envoy-peer-metadata: lies")
		want := http.Header{"X-Forwarded-For": {"1.2.3.4, 10.0.9.9"}, "X-Forwarded-Proto": {"http"}, "X-One": {"1"}, "X-Envoy-Attempt-Count": {"1"}}
		for k, v := range want {
			if fmt.Sprint(got[k]) != fmt.Sprint(v) {
				t.Errorf("%s is %v, want %v", k, got[k], v)
			}
			delete(got, k)
		}
		delete(got, "X-Request-Id")
		if len(got) != 0 {
			t.Errorf("and these: %v", got)
		}
		if r.Header.Get("X-Stay") != "1" || r.Header.Get("X-Hop") != "" || r.Header.Get("X-Envoy-Upstream-Service-Time") != "0" {
			t.Errorf("client got %v", r.Header)
		}
	})
	inWorld(t, "the path is forwarded as it is matched", func(t *testing.T, w *world) {
		c := w.client(80)
		if _, b := c.get("/a/./b/%2e%2e//c%41?x=%2e."); b != "GET cart /a/cA?x=%2e. 0:" {
			t.Errorf("got %q", b)
		}
	})
	inWorld(t, "an absolute target becomes one of origin", func(t *testing.T, w *world) {
		c := w.client(80)
		c.say("GET http://cart/x?y HTTP/1.1\r\nHost: cart\r\n\r\n")
		if _, b := c.answer("GET"); b != "GET cart /x?y 0:" {
			t.Errorf("got %q", b)
		}
	})
}

// A connection on which something came that nobody asked for is never used: it
// would be taken for the answer to the next request.
func TestPoisonedConnection(t *testing.T) {
	inWorld(t, "behind an answer", func(t *testing.T, w *world) {
		w.everywhere(script("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"))
		c := w.client(80)
		for range 5 {
			if _, b := c.get("/"); b != "ok" {
				t.Errorf("got %q", b)
			}
		}
	})
}

func TestEarlyAnswer(t *testing.T) {
	inWorld(t, "the client gets it although it still sends", func(t *testing.T, w *world) {
		w.everywhere(func(c net.Conn) {
			http.ReadRequest(bufio.NewReader(c))
			io.WriteString(c, "HTTP/1.1 413 Payload Too Large\r\nContent-Length: 3\r\n\r\nbig")
			io.Copy(io.Discard, c)
		})
		c := w.client(80)
		c.say("POST / HTTP/1.1\r\nHost: cart\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
		if r, b := c.answer("POST"); r.StatusCode != 413 || b != "big" {
			t.Errorf("got %d %q", r.StatusCode, b)
		}
		c.closed()
	})
	inWorld(t, "bodies flow both ways at once", func(t *testing.T, w *world) {
		w.everywhere(func(c net.Conn) {
			serveHTTP(c, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
				rc := http.NewResponseController(rw)
				rc.EnableFullDuplex()
				b := make([]byte, 10)
				for {
					n, err := r.Body.Read(b)
					rw.Write(bytes.ToUpper(b[:n]))
					rc.Flush()
					if err != nil {
						return
					}
				}
			}))
		})
		c := w.client(80)
		c.say("POST / HTTP/1.1\r\nHost: cart\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
		r, err := http.ReadResponse(c.r, nil)
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 3)
		for range 3 {
			if _, err := io.ReadFull(r.Body, b); err != nil || string(b) != "ABC" {
				t.Fatalf("got %q, %v", b, err)
			}
			c.say("3\r\nabc\r\n")
		}
		io.ReadFull(r.Body, b)
		c.say("0\r\n\r\n")
		if rest, err := io.ReadAll(r.Body); len(rest) > 0 || err != nil {
			t.Errorf("rest is %q, %v", rest, err)
		}
		if _, b := c.get("/again"); b != "" {
			t.Errorf("then got %q", b)
		}
	})
}
