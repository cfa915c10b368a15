package h2

import (
	"bytes"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/weft-mesh/weft/internal/http2"
	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

// A fedConn is a connection from which a given text comes, so many bytes at a
// time.
type fedConn struct {
	in    []byte
	step  int
	stall bool // nothing finds room

	mu     sync.Mutex
	out    []byte // guarded by mu
	once   sync.Once
	closed chan struct{}
}

func (c *fedConn) Read(p []byte) (int, error) {
	if len(c.in) == 0 {
		return 0, io.EOF
	}
	n := copy(p, c.in[:min(len(c.in), c.step)])
	c.in = c.in[n:]
	return n, nil
}

func (c *fedConn) Write(p []byte) (int, error) {
	if c.stall {
		<-c.closed
		return 0, net.ErrClosed
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.out = append(c.out, p...)
	return len(p), nil
}

func (c *fedConn) Close() error                    { c.once.Do(func() { close(c.closed) }); return nil }
func (c *fedConn) LocalAddr() net.Addr             { return &net.TCPAddr{} }
func (c *fedConn) RemoteAddr() net.Addr            { return &net.TCPAddr{} }
func (c *fedConn) SetDeadline(time.Time) error     { return nil }
func (c *fedConn) SetReadDeadline(time.Time) error { return nil }

// SetWriteDeadline lets a near deadline pass at once.
func (c *fedConn) SetWriteDeadline(t time.Time) error {
	if !t.IsZero() && time.Until(t) < writeStall/2 {
		return c.Close()
	}
	return nil
}

// An echo sends back what comes on a stream.
type echo struct{ s *Stream }

func (e *echo) Fields(_ []http2.Field, end bool) error {
	if end {
		e.s.Data(nil, true)
	}
	return nil
}

func (e *echo) Data(p []byte, end bool) {
	if e.s.Data(p, end) != nil {
		e.s.Credit(len(p))
	}
}

func (e *echo) Reset(error) {}

// run lets a connection take all that comes, and checks what it leaves.
func run(t *testing.T, c *Conn, f *fedConn, size int, server bool) {
	_ = c.Run(nil) // whatever it says of such a peer
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.streams) != 0 {
		t.Errorf("%d streams are left", len(c.streams))
	}
	// A peer that reads nothing makes us keep what it has sent, in as far as its
	// windows and the limits on answers allow, and not a multiple.
	if most := 1<<20 + 8*size; cap(c.out) > most {
		t.Errorf("%d bytes are queued for a peer that has sent %d and reads nothing", cap(c.out), size)
	}
	if f.stall {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	p := http2.NewParser(http2.ParserConfig{Preface: !server, MaxFrame: http2.MinFrameSize, MaxBlock: 1 << 20})
	fields := http2.NewFieldReader(1 << 20)
	for in := f.out; len(in) > 0; {
		var fr http2.Frame
		var ok bool
		var err error
		fr, in, ok, err = p.Next(in)
		if err == nil && ok && fr.Type == http2.Headers {
			_, err = fields.Read(fr.Payload)
		}
		if err != nil {
			t.Fatalf("what is sent is no HTTP/2: %v", err)
		}
	}
}

// frames are what seeds are made of.
func frames(preface bool) []byte {
	var b []byte
	if preface {
		b = append(b, http2.Preface...)
	}
	b = http2.AppendSettings(b, http2.Setting{ID: http2.InitialWindowSize, Value: 70_000}, http2.Setting{ID: http2.HeaderTableSize, Value: 100})
	return http2.AppendWindowUpdate(b, 0, 1<<20)
}

func data(b []byte, id uint32, text string, flags http2.Flags) []byte {
	b = http2.AppendHeader(b, http2.Header{Type: http2.Data, Length: uint32(len(text)), StreamID: id, Flags: flags})
	return append(b, text...)
}

// get is the block of a GET of "/" of "a".
var get = []byte{0x82, 0x86, 0x84, 0x41, 1, 'a'}

// FuzzServer feeds the server's side, which echoes, with whatever a client may
// send.
func FuzzServer(f *testing.F) {
	request := http2.AppendHeaders(frames(true), 1, get, true, http2.MinFrameSize)
	post := http2.AppendHeaders(frames(true), 1, get, false, http2.MinFrameSize)
	f.Add(request, uint8(255), false)
	f.Add(data(data(post, 1, "hello", 0), 1, "", http2.EndStream), uint8(3), false)
	f.Add(data(post, 1, "\x03hello...", http2.Padded|http2.EndStream), uint8(1), true)
	f.Add(http2.AppendHeaders(data(post, 1, "hello", 0), 1, []byte{0x40, 1, 'x', 1, 'y'}, true, http2.MinFrameSize), uint8(9), false)
	f.Add(http2.AppendHeaders(frames(true), 1, bytes.Repeat(get, 9), false, 7), uint8(50), false)
	f.Add(http2.AppendRSTStream(post, 1, http2.Cancel), uint8(200), true)
	f.Add(http2.AppendGoAway(http2.AppendPing(request, false, [8]byte{1}), 0, http2.NoError, "bye"), uint8(100), false)
	f.Add(http2.AppendWindowUpdate(data(post, 1, "x", 0), 1, 1<<31-1), uint8(100), false)
	f.Add(bytes.Repeat(http2.AppendPing(nil, false, [8]byte{}), 100), uint8(17), true)
	f.Fuzz(func(t *testing.T, in []byte, step uint8, stall bool) {
		conn := &fedConn{in: in, step: max(1, int(step)), stall: stall, closed: make(chan struct{})}
		c := New(conn, Config{Server: true, Streams: 8, StreamWindow: 1 << 10, ConnWindow: 1 << 16, List: 4 << 10, Accept: func(s *Stream, fields []http2.Field, end, tooLarge bool) (Sink, error) {
			defer s.Release()
			var h msg.Head
			if !tooLarge {
				if _, err := ReadRequest(&h, nil, fields, end); err != nil {
					return nil, err
				}
			}
			if h.Length >= 0 {
				s.Expect(h.Length)
			}
			h.Reset()
			h.Status = 200
			_ = s.Head(&h, end) // the stream may be over
			return &echo{s: s}, nil
		}})
		run(t, c, conn, len(in), true)
	})
}

// FuzzClient feeds the client's side, which has asked three times, with whatever
// a server may send.
func FuzzClient(f *testing.F) {
	answer := http2.AppendHeaders(frames(false), 1, []byte{0x88}, false, http2.MinFrameSize)
	f.Add(data(answer, 1, "hello", http2.EndStream), uint8(255), false)
	f.Add(http2.AppendHeaders(data(answer, 1, "hello", 0), 1, []byte{0x40, 1, 'x', 1, 'y'}, true, http2.MinFrameSize), uint8(5), true)
	f.Add(http2.AppendHeaders(http2.AppendHeaders(frames(false), 3, []byte{0x08, 3, '1', '0', '3'}, false, http2.MinFrameSize), 3, []byte{0x89}, true, http2.MinFrameSize), uint8(99), false)
	f.Add(http2.AppendRSTStream(http2.AppendGoAway(answer, 3, http2.NoError, ""), 3, http2.RefusedStream), uint8(40), false)
	f.Add(data(answer, 3, "before its head", 0), uint8(40), true)
	f.Add(data(answer, 1, "\xffx", http2.Padded), uint8(40), false)
	f.Fuzz(func(t *testing.T, in []byte, step uint8, stall bool) {
		conn := &fedConn{in: in, step: max(1, int(step)), stall: stall, closed: make(chan struct{})}
		c := New(conn, Config{StreamWindow: 1 << 10, ConnWindow: 1 << 16, List: 4 << 10})
		for i := range 3 {
			a := &asked{}
			s, err := c.Open(a, 100, 100)
			if err != nil {
				t.Fatal(err)
			}
			a.s = s
			var h msg.Head
			h.Reset()
			h.Method, h.Scheme, h.Authority, h.Path = []byte("POST"), []byte("http"), []byte("a"), []byte("/")
			if err := s.Head(&h, i == 0); err != nil {
				t.Fatal(err)
			}
			if i == 1 {
				s.Data(make([]byte, 100_000), true)
			}
		}
		run(t, c, conn, len(in), false)
	})
}

// asked reads an answer.
type asked struct{ s *Stream }

func (a *asked) Fields(fields []http2.Field, end bool) error {
	var h msg.Head
	if _, err := ReadResponse(&h, nil, fields, end, false); err == nil && h.Status >= 200 {
		a.s.Answered()
		a.s.Expect(h.Length)
	} else if err == nil && h.Status == 0 {
		ReadTrailers(&h, nil, fields)
	}
	return nil
}

func (a *asked) Data(p []byte, _ bool) { a.s.Credit(len(p)) }
func (a *asked) Reset(error)           {}
