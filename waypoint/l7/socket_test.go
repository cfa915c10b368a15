package l7

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
)

// tcpPair returns both ends of a connection.
func tcpPair(t *testing.T) (a, b *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	near, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	far, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { near.Close(); far.Close() })
	return near.(*net.TCPConn), far.(*net.TCPConn)
}

// until waits for a condition of the kernel's.
func until(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("it is never so: %s", what)
		}
	}
}

func TestSocket(t *testing.T) {
	near, far := tcpPair(t)
	s := newSocket(near)
	if newSocket(&replay{}) != nil {
		t.Error("what is no TCP connection is a socket")
	}
	if !s.silent() || s.left() {
		t.Error("a connection on which nothing has happened is not silent")
	}
	in := make([]byte, 16)
	calls := 0
	go func() { // answers what it hears
		b := make([]byte, 6)
		io.ReadFull(far, b)
		far.Write(bytes.ToUpper(b))
	}()
	n, err := s.exchange([]byte("abc"), []byte("def"), in, func() { calls++ }, nil)
	if string(in[:n]) != "ABCDEF" || err != nil || calls != 1 {
		t.Errorf("answered %q, %v; told %d times that it was sent", in[:n], err, calls)
	}
	far.Write([]byte("x"))
	until(t, "a byte has come", func() bool { return !s.silent() })
	if n, err := s.Read(in); n != 1 || err != nil || !s.silent() {
		t.Errorf("read %d, %v", n, err)
	}

	// An interrupted read sends all the same what it was to send before.
	interrupt(near)
	if n, err := s.exchange([]byte("late"), nil, in, nil, nil); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("interrupted: %d, %v", n, err)
	}
	if n, err := io.ReadFull(far, in[:4]); string(in[:n]) != "late" {
		t.Errorf("got %q, %v", in[:n], err)
	}
	near.SetReadDeadline(time.Time{})

	far.CloseWrite()
	until(t, "the peer has left", s.left)
	if n, err := s.Read(in); n != 0 || err != io.EOF {
		t.Errorf("after the end: %d, %v", n, err)
	}
	far.SetLinger(0)
	far.Close()
	until(t, "writes fail", func() bool { _, err := s.Write([]byte("x")); return err != nil })
	if _, err := s.exchange([]byte("x"), nil, in, nil, nil); err == nil {
		t.Error("an exchange with nobody succeeds")
	}
	near.Close()
	if _, err := s.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
		t.Errorf("closed: %v", err)
	}
}

// What does not find room at once is written when there is.
func TestSocketWritesAll(t *testing.T) {
	near, far := tcpPair(t)
	near.SetWriteBuffer(4 << 10)
	s := newSocket(near)
	p, more := bytes.Repeat([]byte("p"), 1<<20), bytes.Repeat([]byte("m"), 3<<20)
	var got []byte
	var wg sync.WaitGroup
	wg.Go(func() {
		got = make([]byte, 2*(len(p)+len(more)))
		io.ReadFull(far, got[:len(got)/2])
		far.Write([]byte("ok"))
		io.ReadFull(far, got[len(got)/2:])
	})
	in := make([]byte, 16)
	if n, err := s.exchange(p, more, nil, nil, func() []byte { return in }); string(in[:n]) != "ok" || err != nil {
		t.Errorf("answered %q, %v", in[:n], err)
	}
	if n, err := s.writeTwo(p, more); n != len(p)+len(more) || err != nil {
		t.Errorf("wrote %d, %v", n, err)
	}
	wg.Wait()
	want := append(append([]byte(nil), p...), more...)
	if !bytes.Equal(got[:len(want)], want) || !bytes.Equal(got[len(want):], want) {
		t.Error("something else came")
	}
}

// A front is an engine behind a listener of TCP, in front of a server.
type front struct {
	addr string
	rec  *world // keeps what the exchanges were
}

func newFront(t *testing.T, h func(net.Conn)) *front {
	t.Helper()
	listen := func() net.Listener {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	serve := func(l net.Listener, f func(net.Conn)) func() {
		var wg sync.WaitGroup
		wg.Go(func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				wg.Go(func() { defer c.Close(); f(c) })
			}
		})
		return func() { l.Close(); wg.Wait() }
	}
	back, l := listen(), listen()
	e, err := benchEngine(back.Addr().(*net.TCPAddr).AddrPort(), io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	f := &front{addr: l.Addr().String(), rec: &world{t: t}}
	e.filters = append(e.filters, &recorder{w: f.rec})
	ctx, cancel := context.WithCancel(context.Background())
	var run sync.WaitGroup
	run.Go(func() { e.Run(ctx) })
	endBack := serve(back, h)
	endFront := serve(l, func(c net.Conn) {
		e.Serve(ctx, c, Facts{Service: cart, Port: 80, Source: c.RemoteAddr().(*net.TCPAddr).AddrPort()})
	})
	t.Cleanup(func() { cancel(); endFront(); run.Wait(); endBack() })
	return f
}

func (f *front) dial(t *testing.T) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", f.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn)
}

// ended waits for the exchange that ends n-th.
func (f *front) ended(t *testing.T, n int) *Exchange {
	t.Helper()
	var x *Exchange
	until(t, "an exchange ends", func() bool {
		f.rec.mu.Lock()
		defer f.rec.mu.Unlock()
		if len(f.rec.ended) < n {
			return false
		}
		x = &f.rec.ended[n-1]
		return true
	})
	return x
}

// A client that leaves while the endpoint thinks, or between two pieces of an
// answer, takes its request back.
func TestClientLeavesTCP(t *testing.T) {
	for name, begun := range map[string]string{"before": "", "within": "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf"} {
		for how, leave := range map[string]func(*net.TCPConn){
			"closes":    func(c *net.TCPConn) { c.Close() },
			"ends":      func(c *net.TCPConn) { c.CloseWrite() },
			"resets":    func(c *net.TCPConn) { c.SetLinger(0); c.Close() },
			"pipelines": func(c *net.TCPConn) { io.WriteString(c, "GET /2 HTTP/1.1\r\nHost: cart\r\n\r\n"); c.Close() },
		} {
			t.Run(name+" "+how, func(t *testing.T) {
				asked, left := make(chan struct{}), make(chan error, 1)
				f := newFront(t, func(c net.Conn) {
					r, err := http.ReadRequest(bufio.NewReader(c))
					if err != nil {
						return
					}
					io.Copy(io.Discard, r.Body)
					io.WriteString(c, begun)
					close(asked)
					_, err = c.Read(make([]byte, 1))
					left <- err
				})
				c := f.dial(t)
				io.WriteString(c, "POST / HTTP/1.1\r\nHost: cart\r\nContent-Length: 3\r\n\r\nabc")
				<-asked
				if begun != "" {
					io.ReadFull(c, make([]byte, len("HTTP/1.1 200 OK\r\n")))
				}
				leave(c)
				if err := <-left; err == nil {
					t.Error("the endpoint heard more")
				}
				if x := f.ended(t, 1); x.Flags&FlagDownstreamClosed == 0 || x.Details != "downstream_remote_disconnect" {
					t.Errorf("flags %v, %s", x.Flags, x.Details)
				}
			})
		}
	}
}

// The end of an answer is sent with the wait for the next request: also when
// that has come already, and when the client leaves instead.
func TestPipelinedTCP(t *testing.T) {
	f := newFront(t, func(c net.Conn) { serveHTTP(c, echo("a")) })
	c := f.dial(t)
	io.WriteString(c, strings.Repeat("GET /1 HTTP/1.1\r\nHost: cart\r\n\r\n", 3)+"HEAD /2 HTTP/1.1\r\nHost: cart\r\n\r\nGET /3 HTTP/1.1\r\nHost: cart\r\nConnection: close\r\n\r\n")
	r := bufio.NewReader(c)
	for i, method := range []string{"GET", "GET", "GET", "HEAD", "GET"} {
		a, err := http.ReadResponse(r, &http.Request{Method: method})
		if err != nil {
			t.Fatalf("answer %d: %v", i, err)
		}
		if _, err := io.Copy(io.Discard, a.Body); err != nil || a.StatusCode != 200 {
			t.Errorf("answer %d: %d, %v", i, a.StatusCode, err)
		}
	}
	if _, err := r.ReadByte(); err != io.EOF {
		t.Errorf("after the last answer: %v", err)
	}
}

// Long bodies are moved by the kernel.
func TestSplice(t *testing.T) {
	const long = 5<<20 + 123
	body := make([]byte, long)
	for i := range body {
		body[i] = byte(i >> 8 * i)
	}
	f := newFront(t, func(c net.Conn) {
		r := bufio.NewReader(c)
		for {
			q, err := http.ReadRequest(r)
			if err != nil {
				return
			}
			fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", long)
			if q.URL.Path == "/half" {
				c.Write(body[:long/2])
				return
			}
			c.Write(body)
		}
	})
	c := f.dial(t)
	r := bufio.NewReader(c)
	get := func(path string) ([]byte, error) {
		fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: cart\r\n\r\n", path)
		a, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatal(err)
		}
		return io.ReadAll(a.Body)
	}
	for i := range 3 {
		if got, err := get("/"); err != nil || !bytes.Equal(got, body) {
			t.Fatalf("answer %d: %d bytes, %v", i, len(got), err)
		}
		if x := f.ended(t, i+1); x.ResponseBytes != long || x.Flags != 0 {
			t.Errorf("counted %d bytes, flags %v", x.ResponseBytes, x.Flags)
		}
	}
	if got, err := get("/half"); err == nil || len(got) > long/2 {
		t.Errorf("half an answer: %d bytes, %v", len(got), err)
	}
	if x := f.ended(t, 4); x.Flags&FlagUpstreamClosed == 0 {
		t.Errorf("half an answer: flags %v, %s", x.Flags, x.Failure)
	}
	// A client that does not want the rest.
	c = f.dial(t)
	r = bufio.NewReader(c)
	fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: cart\r\n\r\n")
	r.ReadByte()
	c.SetLinger(0)
	c.Close()
	if x := f.ended(t, 5); x.Flags&FlagDownstreamClosed == 0 {
		t.Errorf("the client left: flags %v, %s", x.Flags, x.Failure)
	}
}
