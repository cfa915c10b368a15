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

	"golang.org/x/sys/unix"
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

// splice lets the kernel move the bytes. It is only asked for what is there: at
// urgent data (RFC 6093) splice(2) stops, and says that there is nothing, until a
// read goes past it.
func splice(dst, src *net.TCPConn, n *atomic.Int64) error {
	r, err := newReader(src, true)
	if err != nil {
		return err
	}
	var some io.LimitedReader
	for {
		err := r.next()
		if err == nil && r.there > 0 {
			some = io.LimitedReader{R: src, N: min(int64(r.there), spliceLen)}
			var k int64
			k, err = dst.ReadFrom(&some)
			n.Add(k)
		} else if err == nil {
			err = r.write(counter{dst, n})
		}
		if err != nil {
			return unlessEnd(err)
		}
	}
}

// copyTCP copies from a socket.
func copyTCP(dst io.Writer, src *net.TCPConn) error {
	r, err := newReader(src, false)
	if err != nil {
		return err
	}
	for {
		err := r.next()
		if err == nil {
			err = r.write(dst)
		}
		if err != nil {
			return unlessEnd(err)
		}
	}
}

func unlessEnd(err error) error {
	if err == io.EOF {
		return nil
	}
	return err
}

// A reader reads from a socket, and holds a buffer only while there is something
// to read: most connections are idle most of the time. What is urgent is left out.
type reader struct {
	src  *net.TCPConn
	rc   syscall.RawConn
	look bool // read only what the kernel cannot move
	try  func(fd uintptr) bool

	there int           // what the kernel can move
	buf   *[bufLen]byte // what was read and not yet written is at its beginning
	n     int
	err   error
}

func newReader(src *net.TCPConn, look bool) (*reader, error) {
	rc, err := src.SyscallConn()
	if err != nil {
		return nil, err
	}
	r := &reader{src: src, rc: rc, look: look}
	r.try = r.tryRead
	return r, nil
}

// next waits until there is something: what the kernel can move, or else what was
// read, for write. The error is io.EOF at the end.
func (r *reader) next() error {
	err := r.rc.Read(r.try)
	switch {
	case err != nil || r.there > 0:
		return err
	case r.err != nil:
		err = &net.OpError{Op: "read", Net: "tcp", Source: r.src.LocalAddr(), Addr: r.src.RemoteAddr(), Err: r.err}
	case r.n == 0:
		err = io.EOF
	default:
		return nil
	}
	r.release()
	return err
}

// tryRead reports whether there is something, or an end.
func (r *reader) tryRead(fd uintptr) bool {
	if r.look {
		// Up to what is urgent; 0 also for the end, and for errors.
		if r.there, _ = unix.IoctlGetInt(int(fd), unix.SIOCINQ); r.there > 0 {
			return true
		}
	}
	r.buf = buffers.Get().(*[bufLen]byte)
	for {
		if r.n, r.err = syscall.Read(int(fd), r.buf[:]); r.err != syscall.EINTR {
			break
		}
	}
	if r.err != syscall.EAGAIN {
		return true
	}
	r.release()
	return false
}

// write writes what was read.
func (r *reader) write(dst io.Writer) error {
	defer r.release()
	_, err := dst.Write(r.buf[:r.n])
	return err
}

func (r *reader) release() {
	buffers.Put(r.buf)
	r.buf = nil
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
