package loop

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	h2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/hbone"
)

// An application that begins to read when its socket is full gets what came in
// the order in which it came, whatever frames the peer has made of it.
func TestParcelForLateReader(t *testing.T) {
	for _, frame := range []int{1 << 10, 16 << 10, 40 << 10} {
		t.Run(fmt.Sprint(frame), func(t *testing.T) {
			got := make(chan []byte, 1)
			read := make(chan struct{})
			w := newWorld(t, func(c *net.TCPConn) {
				defer c.Close()
				<-read
				b, err := io.ReadAll(c)
				if err != nil {
					t.Error(err)
				}
				got <- b
			}, limited(hbone.Limits{StreamWindow: 16 << 20, MaxStreamWindow: 16 << 20}))
			r := newRaw(t, w)
			r.connect(1)
			p := payload(8 << 20)
			for rest := p; len(rest) > 0; {
				n := min(frame, len(rest))
				r.must(r.fr.WriteData(1, n == len(rest), rest[:n]))
				rest = rest[n:]
			}
			r.flush()
			eventually(t, "that the application's socket is full", func() bool { return w.serving.Unread() > 1<<20 })
			close(read)
			if b := <-got; !bytes.Equal(b, p) {
				t.Errorf("%d bytes came as %d others", len(p), len(b))
			}
			eventually(t, "that nothing is unread", func() bool { return w.serving.Unread() == 0 })
		})
	}
}

// A stream that is reset for what follows its data, while that still waits for
// more, takes nobody else with it, and nobody else gets its data.
func TestParcelOfBrokenStream(t *testing.T) {
	got := make(chan string, 8)
	w := newWorld(t, func(c *net.TCPConn) {
		defer c.Close()
		b := make([]byte, 5)
		for {
			if _, err := io.ReadFull(c, b); err != nil {
				return
			}
			got <- string(b)
		}
	}, limited(hbone.Limits{StreamWindow: 65535, MaxStreamWindow: 65535}))
	r := newRaw(t, w)
	broken, _ := r.open(w, 0, 1), r.open(w, 1, 3)
	r.must(r.fr.WriteData(1, false, []byte("first")))
	r.must(r.fr.WriteData(1, false, make([]byte, 65535))) // more than the window
	r.must(r.fr.WriteData(3, false, []byte("third")))
	r.flush()
	if err := w.over(broken); err == nil {
		t.Error("a stream that broke the window has ended in order")
	}
	for {
		switch s := <-got; s {
		case "hello", "first": // it may have had that
			continue
		case "third":
		default:
			t.Errorf("an application got %q", s)
		}
		break
	}
	eventually(t, "that nothing is unread", func() bool { return w.serving.Unread() == 0 })
}

// What came before the frame for which a tunnel ends is still given to its
// application.
func TestParcelOfBrokenTunnel(t *testing.T) {
	w := newWorld(t, echo)
	r := newRaw(t, w)
	in := r.open(w, 0, 1)
	r.must(r.fr.WriteData(1, false, []byte("first")))
	r.must(r.fr.WriteData(1, false, make([]byte, 1<<20+1))) // more than a frame may have
	_, _ = r.out.WriteTo(r.c)                               // it may end before it has all
	if err := w.over(in); err == nil {
		t.Error("the connection has ended in order")
	}
	if n := in.ToApp(); n != int64(len("hello")+len("first")) {
		t.Errorf("the application got %d bytes", n)
	}
}

// A raw is a client that writes frames as it likes, all of them at once.
type raw struct {
	t   *testing.T
	c   *tls.Conn
	out bytes.Buffer
	fr  *h2.Framer
}

// newRaw connects to the world's server, and reads what that says.
func newRaw(t *testing.T, w *world) *raw {
	c, err := tls.Dial("tcp", w.tunnels, h2TLS(w.clientTLS(web, cart)))
	if err != nil {
		t.Fatal(err)
	}
	r := &raw{t: t, c: c}
	_ = c.SetDeadline(time.Now().Add(60 * time.Second))
	r.fr = h2.NewFramer(&r.out, nil)
	r.fr.AllowIllegalWrites = true
	r.out.WriteString(h2.ClientPreface)
	r.must(r.fr.WriteSettings())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(io.Discard, c) // until it is closed
	}()
	t.Cleanup(func() {
		_ = c.Close()
		<-done
	})
	return r
}

func (r *raw) must(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

func (r *raw) connect(id uint32) {
	var block bytes.Buffer
	enc := hpack.NewEncoder(&block)
	r.must(enc.WriteField(hpack.HeaderField{Name: ":method", Value: "CONNECT"}))
	r.must(enc.WriteField(hpack.HeaderField{Name: ":authority", Value: target}))
	r.must(r.fr.WriteHeaders(h2.HeadersFrameParam{StreamID: id, BlockFragment: block.Bytes(), EndHeaders: true}))
	r.flush()
}

// open opens the n-th connection of the world, whose stream is id, and returns
// it once its application was given a first word.
func (r *raw) open(w *world, n int, id uint32) *end {
	r.t.Helper()
	r.connect(id)
	r.must(r.fr.WriteData(id, false, []byte("hello")))
	r.flush()
	e := w.theIn(n)
	eventually(r.t, "the first word", func() bool { return e.ToApp() == int64(len("hello")) })
	return e
}

func (r *raw) flush() {
	r.t.Helper()
	_, err := r.out.WriteTo(r.c)
	r.must(err)
}

// At the end of each batch a tunnel's socket keeps nothing back.
func TestNothingStaysCorked(t *testing.T) {
	w := newWorld(t, echo)
	exchange(t, w.dial(), payload(8<<20))
	for _, e := range []*Engine{w.client, w.serving} {
		for _, l := range e.loops {
			l.call(func() {
				for _, tn := range l.tunnels {
					if tn == nil {
						continue
					}
					if v, err := unix.GetsockoptInt(int(tn.fd), unix.IPPROTO_TCP, unix.TCP_CORK); err != nil || v != 0 {
						t.Errorf("TCP_CORK of a tunnel that is idle: %d, %v", v, err)
					}
				}
			})
		}
	}
}
