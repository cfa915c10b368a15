package loop

import (
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"
)

// cpu is what the process has used of the processors so far.
func cpu() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u) // does not fail
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkBulk moves bytes from client to server through both ends. The
// processor time includes that of the two applications.
func BenchmarkBulk(b *testing.B) {
	for _, streams := range []int{1, 16} {
		b.Run(fmt.Sprintf("streams=%d", streams), func(b *testing.B) {
			w := newWorld(b, func(c *net.TCPConn) {
				buf := make([]byte, 256<<10)
				for {
					if _, err := c.Read(buf); err != nil {
						break
					}
				}
				_ = c.Close()
			})
			buf := make([]byte, 128<<10)
			b.SetBytes(int64(len(buf)))
			b.ResetTimer()
			before := cpu()
			var wg sync.WaitGroup
			for i := range streams {
				c := w.dial()
				n := b.N / streams
				if i == 0 {
					n += b.N % streams
				}
				wg.Go(func() {
					for range n {
						if _, err := c.Write(buf); err != nil {
							b.Error(err)
							return
						}
					}
					_ = c.CloseWrite()
					_, _ = io.Copy(io.Discard, c)
				})
			}
			wg.Wait()
			b.ReportMetric(float64(cpu()-before)/float64(b.N*len(buf)), "cpu-ns/B")
		})
	}
}

// BenchmarkRequests sends 128 bytes and waits for them to come back.
func BenchmarkRequests(b *testing.B) {
	for _, clients := range []int{1, 64} {
		b.Run(fmt.Sprintf("clients=%d", clients), func(b *testing.B) {
			w := newWorld(b, echo)
			conns := make([]*net.TCPConn, clients)
			msg := string(payload(128))
			for i := range conns {
				conns[i] = w.dial()
				roundTrip(b, conns[i], msg)
			}
			b.ReportAllocs()
			b.ResetTimer()
			before := cpu()
			var wg sync.WaitGroup
			for i, c := range conns {
				n := b.N / clients
				if i == 0 {
					n += b.N % clients
				}
				wg.Go(func() {
					p := make([]byte, 128)
					for range n {
						if _, err := io.WriteString(c, msg); err != nil {
							b.Error(err)
							return
						}
						if _, err := io.ReadFull(c, p); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			b.ReportMetric(float64(cpu()-before)/1e3/float64(b.N), "cpu-us/op")
		})
	}
}

// BenchmarkConnections opens connections over a warm tunnel, each for one
// round trip of a byte.
func BenchmarkConnections(b *testing.B) {
	w := newWorld(b, echo)
	roundTrip(b, w.dial(), "x")
	b.ReportAllocs()
	b.ResetTimer()
	before := cpu()
	var wg sync.WaitGroup
	for i := range 8 {
		n := b.N / 8
		if i == 0 {
			n += b.N % 8
		}
		wg.Go(func() {
			for range n {
				c, err := net.Dial("tcp", w.out)
				if err != nil {
					b.Error(err)
					return
				}
				if err := tryRoundTrip(c, "x"); err != nil {
					b.Error(err)
				}
				_ = c.Close()
			}
		})
	}
	wg.Wait()
	b.ReportMetric(float64(cpu()-before)/1e3/float64(b.N), "cpu-us/op")
}

// BenchmarkMove moves a tunnel with 100 idle connections at each end to another
// engine, and back.
func BenchmarkMove(b *testing.B) {
	w, s := movable(b, echo)
	for range 100 {
		roundTrip(b, w.dial(), "hello")
	}
	b.ReportAllocs()
	b.ResetTimer()
	before := cpu()
	for i := range b.N {
		if n := s.everything(i%2 == 1, false); n != 2 {
			b.Fatalf("%d tunnels moved, want one at each end", n)
		}
	}
	b.ReportMetric(float64(cpu()-before)/float64(2*b.N)/1e3, "cpu-us/tunnel")
}
