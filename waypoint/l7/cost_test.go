package l7

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A memoryConn is a connection that costs nothing: each Read gives text again,
// until left is used up, and what is written is forgotten.
type memoryConn struct {
	net.Conn // nil: only what follows is called
	text     string
	left     int
}

func (c *memoryConn) Read(p []byte) (int, error) {
	if c.left == 0 {
		return 0, io.EOF
	}
	c.left--
	return copy(p, c.text), nil
}

func (c *memoryConn) Write(p []byte) (int, error)      { return len(p), nil }
func (c *memoryConn) Close() error                     { return nil }
func (c *memoryConn) SetDeadline(time.Time) error      { return nil }
func (c *memoryConn) SetReadDeadline(time.Time) error  { return nil }
func (c *memoryConn) SetWriteDeadline(time.Time) error { return nil }

type memoryDialer struct{ answer string }

func (d memoryDialer) Dial(context.Context, Target) (net.Conn, error) {
	return &memoryConn{text: d.answer, left: -1}, nil
}

// BenchmarkExchange is a request without what the system does for it.
func BenchmarkExchange(b *testing.B) {
	answer := fmt.Sprintf("HTTP/1.1 200 OK\r\nDate: Sat, 21 Nov 2026 20:14:57 GMT\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: 1024\r\n\r\n%01024d", 0)
	e, err := benchEngine(netip.AddrPort{}, io.Discard)
	if err != nil {
		b.Fatal(err)
	}
	e.cfg.Dialer = memoryDialer{answer}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { e.Run(ctx); close(ended) }()
	b.ReportAllocs()
	cpu := func() (t unix.Timespec) {
		if err := unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &t); err != nil {
			b.Fatal(err)
		}
		return t
	}
	before := cpu()
	b.ResetTimer()
	c := &memoryConn{text: plainGet, left: b.N + 1}
	err = e.Serve(ctx, c, Facts{Service: cart, Port: 80, Source: netip.MustParseAddrPort("10.0.0.9:4711"), Destination: netip.MustParseAddrPort("10.96.0.1:80")})
	b.StopTimer()
	after := cpu()
	b.ReportMetric(float64(after.Nano()-before.Nano())/float64(b.N), "cpu-ns/op") // whatever else the machine does
	cancel()
	<-ended
	if err != nil || c.left != 0 {
		b.Fatalf("%d requests are left: %v", c.left, err)
	}
}
