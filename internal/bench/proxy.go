package bench

import (
	"io"
	"net"
	"sync"
)

// bufLen is what the copying proxies read at once.
const bufLen = 128 << 10

// Copy accepts connections at l and copies bytes between each and the one that
// dial makes for it, through memory, as a proxy does that has to look at them.
// It returns when accepting fails.
func Copy(l *net.TCPListener, dial func(*net.TCPConn) (*net.TCPConn, error)) error {
	for {
		c, err := l.AcceptTCP()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			up, err := dial(c)
			if err != nil {
				_ = c.SetLinger(0) // the client sees a reset
				return
			}
			defer up.Close()
			Join(c, up)
		}()
	}
}

// HalfCloser is a connection whose directions end one by one.
type HalfCloser interface {
	io.ReadWriter
	CloseWrite() error
}

// Join copies both ways until both directions have ended.
func Join(a, b HalfCloser) {
	var wg sync.WaitGroup
	wg.Go(func() { pass(a, b) })
	pass(b, a)
	wg.Wait()
}

// pass copies from src to dst, and the end with it. The structs hide what would
// make io.Copy splice.
func pass(dst, src HalfCloser) {
	_, _ = io.CopyBuffer(struct{ io.Writer }{dst}, struct{ io.Reader }{src}, make([]byte, bufLen)) // an error is an end
	_ = dst.CloseWrite()                                                                           // or it has ended
}
