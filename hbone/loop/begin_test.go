package loop

import (
	"errors"
	"net"
	"sync/atomic"
	"testing"

	"github.com/weft-mesh/weft/hbone"
)

// What Begin answers at once never sees another goroutine, what it returns does
// the rest, and a request that it leaves alone is reset.
func TestBegin(t *testing.T) {
	var began, rest, handled atomic.Int64
	w := newWorld(t, echo, func(w *world, sc *ServerConfig, _ *PoolConfig) {
		handle := sc.Handle
		sc.Handle = func(*Request) { handled.Add(1) }
		sc.Begin = func(r *Request) func() {
			switch began.Add(1) {
			case 1:
				return func() { rest.Add(1); handle(r) }
			case 2:
				_ = r.Reject(503)
				return nil
			case 3:
				return nil
			}
			c, err := net.Dial("tcp", w.app) // of a test it may take a moment
			if err != nil {
				t.Error(err)
				return nil
			}
			accept(r, newEnd(), c)
			return nil
		}
	})
	roundTrip(t, w.dial(), "in a goroutine")
	end := func(n int) error {
		if c, err := net.Dial("tcp", w.out); err == nil { // else the reset was faster than connect
			defer c.Close()
		}
		return w.over(w.theOut(n))
	}
	var status *hbone.StatusError
	if err := end(1); !errors.As(err, &status) || status.Code != 503 {
		t.Errorf("got %v, want a status of 503", err)
	}
	if err := end(2); err == nil || errors.As(err, &status) {
		t.Errorf("got %v, want a reset", err)
	}
	exchange(t, w.dial(), []byte("on the loop"))
	if rest.Load() != 1 || handled.Load() != 0 {
		t.Errorf("%d requests were finished and %d handled, want 1 and 0", rest.Load(), handled.Load())
	}
}
