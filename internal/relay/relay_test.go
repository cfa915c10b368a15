package relay

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// tcp returns two ends of a TCP connection on loopback.
func tcp(t testing.TB) (*net.TCPConn, *net.TCPConn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	a, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a.(*net.TCPConn), b.(*net.TCPConn)
}

// plain hides what a TCP connection can do besides net.Conn and half-close.
type plain struct{ net.Conn }

func (p plain) CloseWrite() error { return p.Conn.(*net.TCPConn).CloseWrite() }
func (p plain) Reset() {
	_ = p.Conn.(*net.TCPConn).SetLinger(0)
	_ = p.Conn.Close()
}

// kinds are the pairs of connections that are copied in different ways.
var kinds = []struct {
	name string
	wrap func(a, b net.Conn) (net.Conn, net.Conn)
}{
	{"splice", func(a, b net.Conn) (net.Conn, net.Conn) { return a, b }},
	{"socket to stream", func(a, b net.Conn) (net.Conn, net.Conn) { return a, plain{b} }},
	{"stream to stream", func(a, b net.Conn) (net.Conn, net.Conn) { return plain{a}, plain{b} }},
}

// rig is two applications and a Copy between them.
type rig struct {
	client, server *net.TCPConn
	stats          Stats
	cancel         context.CancelCauseFunc
	done           chan error
}

func newRig(t *testing.T, wrap func(a, b net.Conn) (net.Conn, net.Conn)) *rig {
	r := &rig{done: make(chan error, 1)}
	client, left := tcp(t)
	right, server := tcp(t)
	r.client, r.server = client, server
	a, b := wrap(left, right)
	ctx, cancel := context.WithCancelCause(t.Context())
	r.cancel = cancel
	var wg sync.WaitGroup
	wg.Go(func() { r.done <- Copy(ctx, a, b, &r.stats) })
	t.Cleanup(func() {
		cancel(nil)
		wg.Wait()
	})
	return r
}

func TestCopyBothWaysWithHalfClose(t *testing.T) {
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			r := newRig(t, k.wrap)
			up, down := random(3<<20+7), random(2<<20+5)
			var wg sync.WaitGroup
			wg.Go(func() { send(t, r.client, up) })
			if got, err := io.ReadAll(r.server); err != nil || !bytes.Equal(got, up) {
				t.Errorf("server got %d of %d bytes, %v", len(got), len(up), err)
			}
			// The client has ended; the server has not begun.
			wg.Go(func() { send(t, r.server, down) })
			if got, err := io.ReadAll(r.client); err != nil || !bytes.Equal(got, down) {
				t.Errorf("client got %d of %d bytes, %v", len(got), len(down), err)
			}
			wg.Wait()
			if err := <-r.done; err != nil {
				t.Errorf("Copy: %v", err)
			}
			if s, n := r.stats.Sent.Load(), r.stats.Received.Load(); s != int64(len(up)) || n != int64(len(down)) {
				t.Errorf("counted %d and %d bytes, want %d and %d", s, n, len(up), len(down))
			}
		})
	}
}

func TestAbortIsPassedOn(t *testing.T) {
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			r := newRig(t, k.wrap)
			send1(t, r.client, "hello")
			if _, err := io.ReadFull(r.server, make([]byte, 5)); err != nil {
				t.Fatal(err)
			}
			_ = r.client.SetLinger(0)
			_ = r.client.Close()
			if _, err := r.server.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("server reads %v, want a reset", err)
			}
			if err := <-r.done; err == nil {
				t.Error("Copy: no error")
			}
		})
	}
}

func TestContextAborts(t *testing.T) {
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			r := newRig(t, k.wrap)
			send1(t, r.client, "hello")
			if _, err := io.ReadFull(r.server, make([]byte, 5)); err != nil {
				t.Fatal(err)
			}
			cause := errors.New("policy changed")
			r.cancel(cause)
			for _, c := range []net.Conn{r.client, r.server} {
				if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("reads %v, want a reset", err)
				}
			}
			if err := <-r.done; !errors.Is(err, cause) {
				t.Errorf("Copy: %v, want %v", err, cause)
			}
		})
	}
}

// TestKernelMovesBytes: between two TCP connections no byte passes through the
// memory of the process, also when one direction has ended. What a process
// moves with read and write the kernel counts (proc(5), /proc/pid/io), and
// splice is neither: what is left are the two applications.
func TestKernelMovesBytes(t *testing.T) {
	const size = 16 << 20
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			r := newRig(t, k.wrap)
			one := func(from, to *net.TCPConn) {
				var wg sync.WaitGroup
				wg.Go(func() { send(t, from, make([]byte, size)) })
				if n, err := io.Copy(struct{ io.Writer }{io.Discard}, to); n != size || err != nil {
					t.Errorf("%d of %d bytes came, %v", n, size, err)
				}
				wg.Wait()
			}
			before := ioCount(t)
			one(r.client, r.server)
			one(r.server, r.client) // the other direction has ended
			if err := <-r.done; err != nil {
				t.Errorf("Copy: %v", err)
			}
			moved := ioCount(t) - before
			apps := int64(4 * size) // two write, two read
			if byKernel := moved < apps+apps/4; byKernel != (k.name == "splice") {
				t.Errorf("%d bytes were read and written, of which the applications did %d", moved, apps)
			}
		})
	}
}

// ioCount returns how many bytes this process has read and written so far.
func ioCount(t *testing.T) int64 {
	t.Helper()
	text, err := os.ReadFile("/proc/self/io")
	if err != nil {
		t.Skipf("the kernel does not count what a process reads and writes: %v", err)
	}
	var r, w int64
	if _, err := fmt.Sscanf(string(text), "rchar: %d\nwchar: %d\n", &r, &w); err != nil {
		t.Fatalf("/proc/self/io: %v", err)
	}
	return r + w
}

func TestCountsWhileItCopies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, a := net.Pipe()
		b, server := net.Pipe()
		var s Stats
		done := make(chan error, 1)
		go func() { done <- Copy(t.Context(), a, b, &s) }()
		go client.Write([]byte("hello"))
		if _, err := io.ReadFull(server, make([]byte, 5)); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if n := s.Sent.Load(); n != 5 {
			t.Errorf("counted %d bytes", n)
		}
		client.Close()
		server.Close()
		<-done
	})
}

func TestWithoutStats(t *testing.T) {
	a, b := net.Pipe()
	c, d := net.Pipe()
	a.Close()
	d.Close()
	if err := Copy(t.Context(), b, c, nil); err != nil && !errors.Is(err, io.ErrClosedPipe) && !errors.Is(err, io.EOF) {
		t.Errorf("Copy: %v", err)
	}
}

func send(t *testing.T, c *net.TCPConn, p []byte) {
	_ = c.SetWriteDeadline(time.Now().Add(time.Minute))
	if _, err := c.Write(p); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error(err)
	}
	if err := c.CloseWrite(); err != nil {
		t.Error(err)
	}
}

func send1(t *testing.T, c net.Conn, s string) {
	t.Helper()
	if _, err := io.WriteString(c, s); err != nil {
		t.Fatal(err)
	}
}

func random(n int) []byte {
	r := rand.New(rand.NewPCG(uint64(n), 1))
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(r.Uint32())
	}
	return p
}

// Urgent data is not carried: what is around it is, and it is no end.
func TestUrgentData(t *testing.T) {
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			r := newRig(t, k.wrap)
			raw, err := r.client.SyscallConn()
			if err != nil {
				t.Fatal(err)
			}
			urgent := func() {
				t.Helper()
				var sendErr error
				err := raw.Write(func(fd uintptr) bool {
					sendErr = syscall.Sendto(int(fd), []byte("!"), syscall.MSG_OOB, nil)
					return sendErr != syscall.EAGAIN
				})
				if err := errors.Join(err, sendErr); err != nil {
					t.Fatal(err)
				}
			}
			receive := func(want string) {
				t.Helper()
				_ = r.server.SetReadDeadline(time.Now().Add(time.Minute))
				b := make([]byte, len(want))
				if n, err := io.ReadFull(r.server, b); err != nil || string(b) != want {
					t.Fatalf("server got %q, %v, want %q", b[:n], err, want)
				}
			}
			urgent() // with nothing before it
			send1(t, r.client, "one")
			receive("one")
			send1(t, r.client, "two")
			urgent()
			send1(t, r.client, "three")
			receive("twothree")
			urgent()
			_ = r.client.CloseWrite()
			if n, err := r.server.Read(make([]byte, 1)); err != io.EOF {
				t.Errorf("after the end: %d bytes, %v", n, err)
			}
			_ = r.server.CloseWrite()
			if err := <-r.done; err != nil {
				t.Errorf("Copy: %v", err)
			}
		})
	}
}
