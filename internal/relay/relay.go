// Package relay copies bytes between two connections, both ways, and keeps
// what TCP says besides: the end of one direction, and an abort.
package relay

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
)

const (
	// bufLen is how much is copied at once between connections that the kernel
	// cannot join.
	bufLen = 64 << 10
	// spliceLen is how much the kernel moves between two TCP connections
	// before it is counted.
	spliceLen = 1 << 20
)

// Stats counts what Copy moves, while it does. Bytes that the kernel moves
// between two TCP connections are counted by the MiB, and at the end.
type Stats struct {
	Sent     atomic.Int64 // from a to b
	Received atomic.Int64 // from b to a
}

// halfCloser is a connection that can end one direction.
type halfCloser interface{ CloseWrite() error }

// resetter is a connection that can end so that the peer sees an error.
type resetter interface{ Reset() }

// buffers caches memory between calls. It holds nothing anyone depends on.
var buffers = sync.Pool{New: func() any { return new([bufLen]byte) }}

// Copy moves bytes from a to b and from b to a until both directions have
// ended. The end of one is passed on with CloseWrite, and the other goes on.
// If a direction fails, or ctx ends, both connections are aborted, with an RST
// where they can, so that neither application takes a part for the whole.
//
// Copy owns both connections and closes them. stats may be nil. The error is
// nil if both directions ended in order, the cause of ctx if it ended, and
// else that of the first direction that failed.
func Copy(ctx context.Context, a, b net.Conn, stats *Stats) error {
	return CopyUntil(ctx, a, b, stats, nil)
}

// CopyUntil is Copy that h, if it is not nil, can stop.
func CopyUntil(ctx context.Context, a, b net.Conn, stats *Stats, h *Halter) error {
	if stats == nil {
		stats = &Stats{}
	}
	first, second := h.begin(a, b)
	cutAtDeath(a)
	cutAtDeath(b)
	var once sync.Once
	var failure error
	abort := func(err error) {
		once.Do(func() {
			failure = err
			if err == ErrLeft {
				return // both directions are told
			}
			abortConn(a)
			abortConn(b)
		})
	}
	var watch sync.WaitGroup
	watch.Add(1)
	stop := context.AfterFunc(ctx, func() {
		defer watch.Done()
		abort(context.Cause(ctx))
	})
	var wg sync.WaitGroup
	run := func(i int, dst, src net.Conn, n *atomic.Int64) {
		err := direction(dst, src, n, h, i)
		h.finish(i, err)
		if err != nil {
			abort(err)
		}
	}
	if first {
		wg.Go(func() { run(0, b, a, &stats.Sent) })
	}
	if second {
		run(1, a, b, &stats.Received)
	}
	wg.Wait()
	if stop() {
		watch.Done()
	}
	watch.Wait()
	if failure == ErrLeft {
		_, _ = a.Close(), b.Close() // which says nothing as long as there are copies
		return failure
	}
	// Both ends are ended or aborted: closing frees them, and has nothing new
	// to say.
	closeEnded(a)
	closeEnded(b)
	return failure
}

// direction moves bytes until src ends, and passes the end on. It is the i-th
// of those that h can halt.
func direction(dst, src net.Conn, n *atomic.Int64, h *Halter, i int) error {
	for err := move(dst, src, n); err != nil; err = move(dst, src, n) {
		if err = h.park(i, err); err != nil {
			return err
		}
	}
	hc, ok := dst.(halfCloser)
	if !ok {
		return nil
	}
	if err := hc.CloseWrite(); err != nil && !errors.Is(err, syscall.ENOTCONN) {
		return err
	}
	return nil
}

// move copies all of src to dst in the cheapest way they allow.
func move(dst, src net.Conn, n *atomic.Int64) error {
	st, srcTCP := src.(*net.TCPConn)
	if dt, ok := dst.(*net.TCPConn); ok && srcTCP {
		return splice(dt, st, n)
	}
	if wt, ok := src.(io.WriterTo); ok && !srcTCP {
		_, err := wt.WriteTo(counter{dst, n})
		return err
	}
	if srcTCP {
		return copyTCP(counter{dst, n}, st)
	}
	buf := buffers.Get().(*[bufLen]byte)
	defer buffers.Put(buf)
	for {
		k, err := src.Read(buf[:])
		if k > 0 {
			if _, werr := (counter{dst, n}).Write(buf[:k]); werr != nil {
				return werr
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// splice lets the kernel move the bytes.
func splice(dst, src *net.TCPConn, n *atomic.Int64) error {
	for {
		k, err := dst.ReadFrom(&io.LimitedReader{R: src, N: spliceLen})
		n.Add(k)
		if err != nil {
			return err
		}
		if k < spliceLen {
			return nil
		}
	}
}

// copyTCP copies from a socket, and holds a buffer only while there is
// something to read: most connections are idle most of the time.
func copyTCP(dst io.Writer, src *net.TCPConn) error {
	rc, err := src.SyscallConn()
	if err != nil {
		return err
	}
	for {
		var buf *[bufLen]byte
		var k int
		var rerr error
		err := rc.Read(func(fd uintptr) bool {
			buf = buffers.Get().(*[bufLen]byte)
			for {
				k, rerr = syscall.Read(int(fd), buf[:])
				if rerr != syscall.EINTR {
					break
				}
			}
			if rerr == syscall.EAGAIN {
				buffers.Put(buf)
				buf = nil
				return false
			}
			return true
		})
		if err == nil && rerr != nil {
			err = &net.OpError{Op: "read", Net: "tcp", Source: src.LocalAddr(), Addr: src.RemoteAddr(), Err: rerr}
		}
		if err == nil && k > 0 {
			_, err = dst.Write(buf[:k])
		}
		if buf != nil {
			buffers.Put(buf)
		}
		if err != nil || k == 0 {
			return err
		}
	}
}

// counter counts what is written.
type counter struct {
	w io.Writer
	n *atomic.Int64
}

// Write implements io.Writer.
func (c counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n.Add(int64(n))
	return n, err
}

// cutAtDeath makes the kernel reset c when its last descriptor is closed (tcp(7),
// SO_LINGER with nothing to linger for). That is also what happens when the
// process is killed: a stream that it cuts short must not look whole.
func cutAtDeath(c net.Conn) {
	if c, ok := c.(*net.TCPConn); ok {
		_ = c.SetLinger(0) // if it fails the socket is gone already
	}
}

// closeEnded closes c, whose directions have both ended or which was aborted.
func closeEnded(c net.Conn) {
	if c, ok := c.(*net.TCPConn); ok {
		_ = c.SetLinger(-1) // as above, or aborted and closed before
	}
	_ = c.Close()
}

// abortConn ends c so that its peer sees an error, if c knows how.
func abortConn(c net.Conn) {
	if c, ok := c.(resetter); ok {
		c.Reset()
		return
	}
	cutAtDeath(c)
	_ = c.Close() // an error says that it is closed
}
