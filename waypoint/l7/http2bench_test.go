package l7

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"

	"golang.org/x/net/http2/hpack"

	"github.com/weft-mesh/weft/internal/http2"
)

// blocks makes header blocks of one direction.
type blocks struct {
	out []byte
	enc *hpack.Encoder
}

func newBlocks() *blocks {
	b := &blocks{}
	b.enc = hpack.NewEncoder(b)
	return b
}

func (b *blocks) Write(p []byte) (int, error) {
	b.out = append(b.out, p...)
	return len(p), nil
}

func (b *blocks) block(fields ...string) []byte {
	b.out = nil
	for i := 0; i+1 < len(fields); i += 2 {
		b.enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	return b.out
}

var callMessage = "\x00\x00\x00\x00\x64" + strings.Repeat("m", 100)

// answerCalls is an endpoint that answers each call with a message. It looks at
// nothing but what it needs for that.
func answerCalls(c net.Conn) error {
	enc := newBlocks()
	head := enc.block(":status", "200", "content-type", "application/grpc")
	trailer := enc.block("grpc-status", "0")
	headAgain, trailerAgain := enc.block(":status", "200", "content-type", "application/grpc"), enc.block("grpc-status", "0")
	in := bufio.NewReaderSize(c, 64<<10)
	if _, err := in.Discard(len(http2.Preface)); err != nil {
		return err
	}
	out := http2.AppendSettings(nil, http2.Setting{ID: http2.InitialWindowSize, Value: 1 << 30})
	out = http2.AppendWindowUpdate(out, 0, 1<<30)
	for {
		if in.Buffered() < http2.HeaderLen && len(out) > 0 {
			if _, err := c.Write(out); err != nil {
				return err
			}
			out = out[:0]
		}
		h, err := skipFrame(in)
		if err != nil {
			return err
		}
		if h.Type == http2.Settings && !h.Flags.Has(http2.Ack) {
			out = http2.AppendSettingsAck(out)
		}
		if h.Type != http2.Data || !h.Flags.Has(http2.EndStream) {
			continue
		}
		out = http2.AppendHeaders(out, h.StreamID, head, false, http2.MinFrameSize)
		out = append(http2.AppendHeader(out, http2.Header{Type: http2.Data, Length: uint32(len(callMessage)), StreamID: h.StreamID}), callMessage...)
		out = http2.AppendHeaders(out, h.StreamID, trailer, true, http2.MinFrameSize)
		head, trailer = headAgain, trailerAgain
	}
}

// skipFrame reads a frame, and returns its header.
func skipFrame(in *bufio.Reader) (http2.Header, error) {
	b, err := in.Peek(http2.HeaderLen)
	if err != nil {
		return http2.Header{}, err
	}
	h := http2.ParseHeader(b)
	_, err = in.Discard(http2.HeaderLen + int(h.Length))
	return h, err
}

// calls serves one client of HTTP/2 over TCP, and returns what makes n calls at
// once and waits for the answers.
func calls(t testing.TB, n int) func() {
	t.Helper()
	backend, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			c, err := backend.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				answerCalls(c)
			}()
		}
	}()
	e, err := benchEngine(backend.Addr().(*net.TCPAddr).AddrPort(), io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	front, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{}, 2)
	go func() { e.Run(ctx); ended <- struct{}{} }()
	go func() {
		defer func() { ended <- struct{}{} }()
		c, err := front.Accept()
		if err == nil {
			e.Serve(ctx, c, Facts{Service: cart, Port: 81, Source: c.RemoteAddr().(*net.TCPAddr).AddrPort()})
		}
	}()
	c, err := net.Dial("tcp", front.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Close()
		front.Close()
		cancel()
		<-ended
		<-ended
		backend.Close()
	})
	enc := newBlocks()
	fields := []string{":method", "POST", ":scheme", "http", ":path", "/shop.Cart/Get", ":authority", "cart",
		"content-type", "application/grpc", "te", "trailers", "user-agent", "grpc-go/1.80.0", "grpc-timeout", "1S"}
	block, again := enc.block(fields...), enc.block(fields...)
	out := append([]byte(http2.Preface), http2.AppendSettings(nil, http2.Setting{ID: http2.InitialWindowSize, Value: 1 << 30})...)
	out = http2.AppendWindowUpdate(out, 0, 1<<30)
	in := bufio.NewReaderSize(c, 64<<10)
	id := uint32(1)
	return func() {
		for range n {
			out = http2.AppendHeaders(out, id, block, false, http2.MinFrameSize)
			block = again
			out = append(http2.AppendHeader(out, http2.Header{Type: http2.Data, Flags: http2.EndStream, Length: uint32(len(callMessage)), StreamID: id}), callMessage...)
			id += 2
		}
		if _, err := c.Write(out); err != nil {
			t.Fatal(err)
		}
		out = out[:0]
		if err := answersTo(in, n); err != nil {
			t.Fatal(err)
		}
	}
}

// answersTo reads until n streams have ended.
func answersTo(in *bufio.Reader, n int) error {
	for n > 0 {
		h, err := skipFrame(in)
		if err != nil {
			return err
		}
		switch {
		case h.Type == http2.RSTStream, h.Type == http2.GoAway:
			return errors.New("a call was not answered")
		case h.Type == http2.Headers && h.Flags.Has(http2.EndStream):
			n--
		}
	}
	return nil
}

// A call must cost little memory, with routes, metrics and access log.
func TestHTTP2Allocations(t *testing.T) {
	if raceDetector {
		t.Skip("the race detector makes sync.Pool forget")
	}
	const streams = 16
	all := calls(t, streams)
	for range 100 {
		all()
	}
	if n := testing.AllocsPerRun(200, all) / streams; n > 5 {
		t.Errorf("%.1f allocations for a call", n)
	}
}

func BenchmarkUnary(b *testing.B) {
	const streams = 64
	all := calls(b, streams)
	b.ReportAllocs()
	for b.Loop() {
		all()
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/streams, "ns/call")
}
