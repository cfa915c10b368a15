package hbone

import (
	"context"
	"io"
	"net"
	"sync"
	"testing"

	"github.com/weft-mesh/weft/internal/relay"
)

// benchWorld is a world on real sockets, with every stream relayed to a TCP
// server behind it as ztunnel does.
func benchWorld(b *testing.B, serve func(net.Conn)) (w *world, dial func() net.Conn) {
	b.Helper()
	var wg sync.WaitGroup
	b.Cleanup(wg.Wait)
	listen := func(handle func(net.Conn)) string {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = ln.Close() })
		wg.Go(func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				wg.Go(func() { handle(c) })
			}
		})
		return ln.Addr().String()
	}
	app := listen(serve)
	w = newWorld(b, func(ctx context.Context, r *Request) {
		up, err := net.Dial("tcp", app)
		if err != nil {
			_ = r.Reject(503)
			return
		}
		down, err := r.Accept(Header{})
		if err != nil {
			_ = up.Close()
			return
		}
		_ = relay.Copy(ctx, down, up, nil)
	}, overSockets)
	outbound := listen(func(c net.Conn) {
		s, err := w.pool.Connect(context.Background(), w.target(), target, Header{})
		if err != nil {
			_ = c.Close()
			return
		}
		_ = relay.Copy(context.Background(), c, s, nil)
	})
	return w, func() net.Conn {
		c, err := net.Dial("tcp", outbound)
		if err != nil {
			b.Fatal(err)
		}
		return c
	}
}

// BenchmarkBulk moves bytes from client to server through both ends.
func BenchmarkBulk(b *testing.B) {
	for _, bm := range []struct {
		name    string
		streams int
	}{{"streams=1", 1}, {"streams=16", 16}} {
		b.Run(bm.name, func(b *testing.B) {
			_, dial := benchWorld(b, func(c net.Conn) {
				_, _ = io.Copy(io.Discard, c)
				_ = c.Close()
			})
			buf := make([]byte, 128<<10)
			b.SetBytes(int64(len(buf)))
			b.ResetTimer()
			var wg sync.WaitGroup
			for i := range bm.streams {
				n := b.N / bm.streams
				if i == 0 {
					n += b.N % bm.streams
				}
				wg.Go(func() {
					c := dial()
					defer c.Close()
					for range n {
						if _, err := c.Write(buf); err != nil {
							b.Error(err)
							return
						}
					}
					_ = c.(*net.TCPConn).CloseWrite()
					_, _ = c.Read(buf[:1]) // until the server has all
				})
			}
			wg.Wait()
		})
	}
}

// BenchmarkRequest sends 128 bytes and waits for them to come back.
func BenchmarkRequest(b *testing.B) {
	for _, bm := range []struct {
		name    string
		streams int
	}{{"streams=1", 1}, {"streams=64", 64}} {
		b.Run(bm.name, func(b *testing.B) {
			_, dial := benchWorld(b, echoConn)
			conns := make([]net.Conn, bm.streams)
			for i := range conns {
				conns[i] = dial()
				defer conns[i].Close()
				request(b, conns[i], make([]byte, 128))
			}
			b.ResetTimer()
			b.ReportAllocs()
			var wg sync.WaitGroup
			for i, c := range conns {
				n := b.N / bm.streams
				if i == 0 {
					n += b.N % bm.streams
				}
				wg.Go(func() {
					buf := make([]byte, 128)
					for range n {
						request(b, c, buf)
					}
				})
			}
			wg.Wait()
		})
	}
}

// BenchmarkConnect opens a connection through a warm tunnel, sends a byte both
// ways and closes.
func BenchmarkConnect(b *testing.B) {
	_, dial := benchWorld(b, echoConn)
	request(b, dial(), []byte("x"))
	b.ResetTimer()
	b.ReportAllocs()
	for range b.N {
		c := dial()
		request(b, c, []byte("x"))
		_ = c.Close()
	}
}

// BenchmarkHandshake makes a tunnel, both ends.
func BenchmarkHandshake(b *testing.B) {
	w := newWorld(b, echo, overSockets)
	b.ReportAllocs()
	for range b.N {
		w.connect().Reset()
		w.pool.CloseOwner("pod-1")
	}
}

func echoConn(c net.Conn) {
	buf := make([]byte, 4096)
	for {
		n, err := c.Read(buf)
		if err != nil {
			_ = c.Close()
			return
		}
		if _, err := c.Write(buf[:n]); err != nil {
			_ = c.Close()
			return
		}
	}
}

func request(b *testing.B, c net.Conn, buf []byte) {
	if _, err := c.Write(buf); err != nil {
		b.Error(err)
	}
	if _, err := io.ReadFull(c, buf); err != nil {
		b.Error(err)
	}
}
