package l7

import (
	"fmt"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/balance"
)

// slow answers after a second, and counts how many requests there are at once.
func slow(most *atomic.Int64) http.HandlerFunc {
	var now atomic.Int64
	return func(http.ResponseWriter, *http.Request) {
		if n := now.Add(1); n > most.Load() {
			most.Store(n)
		}
		time.Sleep(time.Second)
		now.Add(-1)
	}
}

// counted serves HTTP/1 slowly.
func (w *world) counted(most *atomic.Int64) {
	h := slow(most)
	w.everywhere(func(c net.Conn) { serveHTTP(c, h) })
}

// ask lets n clients of HTTP/1 ask at once, and returns how often each status
// was answered.
func (w *world) ask(n int) map[int]int {
	statuses := map[int]int{}
	var mu sync.Mutex
	var clients sync.WaitGroup
	for range n {
		c := w.client(80)
		clients.Go(func() {
			r, _ := c.get("/")
			mu.Lock()
			defer mu.Unlock()
			statuses[r.StatusCode]++
		})
	}
	clients.Wait()
	return statuses
}

// nobodyWaits checks that what waited is not counted any more.
func (w *world) nobodyWaits() {
	w.t.Helper()
	synctest.Wait()
	for _, c := range *w.e.clusters.Load() {
		if n := c.group.Breaker.Used(balance.Pending); n != 0 || c.line.waiting.Load() != 0 || len(c.line.places) != 0 {
			w.t.Errorf("%d requests are counted as waiting, %d stand in line", n, len(c.line.places))
		}
	}
}

func limited(c mesh.Connections) []*mesh.TrafficPolicy {
	return []*mesh.TrafficPolicy{{Service: cart, Connections: c}}
}

// Requests wait for a connection when there may be no more, whichever endpoint
// they are for.
func TestConnectionsAreWaitedFor(t *testing.T) {
	for _, limit := range []int{1, 2, 3} {
		t.Run(fmt.Sprint(limit), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorldWith(t, Config{}, nil, limited(mesh.Connections{Max: uint32(limit)}))
				var most atomic.Int64
				w.counted(&most)
				start := time.Now()
				if s := w.ask(12); s[200] != 12 {
					t.Errorf("answers: %v, want 12 of 200", s)
				}
				if took, want := time.Since(start).Round(time.Second), time.Duration(12/limit)*time.Second; took != want {
					t.Errorf("took %v, want %v", took, want)
				}
				if n := most.Load(); n != int64(limit) {
					t.Errorf("%d requests at once, want %d", n, limit)
				}
				w.nobodyWaits()
			})
		})
	}
	t.Run("only so many wait", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorldWith(t, Config{}, nil, limited(mesh.Connections{Max: 2, MaxPending: 3}))
			var most atomic.Int64
			w.counted(&most)
			if s := w.ask(12); s[200] != 5 || s[503] != 7 {
				t.Errorf("answers: %v, want 5 of 200 and 7 of 503", s)
			}
			w.nobodyWaits()
		})
	})
	t.Run("only so long", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			rule := mesh.Rule{Backends: onlyCart(), Timeout: mesh.Duration(2500 * time.Millisecond)}
			w := newWorldWith(t, Config{}, []mesh.Rule{rule}, limited(mesh.Connections{Max: 1}))
			var most atomic.Int64
			w.counted(&most)
			start := time.Now()
			// Two are answered, the third is cut off in the middle.
			if s := w.ask(9); s[200] != 2 || s[504] != 7 {
				t.Errorf("answers: %v, want 2 of 200 and 7 of 504", s)
			}
			if took := time.Since(start); took < 2500*time.Millisecond || took > 2600*time.Millisecond {
				t.Errorf("took %v", took)
			}
			w.nobodyWaits()
			if s := w.ask(2); s[200] != 2 {
				t.Errorf("answers afterwards: %v", s)
			}
		})
	})
	t.Run("an endpoint that hangs up", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorldWith(t, Config{}, nil, limited(mesh.Connections{Max: 1}))
			w.everywhere(script("HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"))
			if s := w.ask(9); s[200] != 9 {
				t.Errorf("answers: %v", s)
			}
			w.nobodyWaits()
		})
	})
	t.Run("an endpoint that is not there", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorldWith(t, Config{}, nil, limited(mesh.Connections{Max: 1}))
			if s := w.ask(9); s[503] != 9 {
				t.Errorf("answers: %v", s)
			}
			w.nobodyWaits()
		})
	})
}

// The same with HTTP/2, whose connections are shared.
func TestStreamsAreWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorldWith(t, Config{}, nil, limited(mesh.Connections{Max: 1, MaxConcurrentStream: 2}))
		var most atomic.Int64
		h := slow(&most)
		w.backend2("10.0.0.1:8081", h)
		w.backend2("10.0.0.2:8081", h)
		cc := w.client2(81)
		var clients sync.WaitGroup
		for range 12 {
			clients.Go(func() {
				if r, b := w.do(cc, "GET", "/", ""); r.StatusCode != 200 {
					t.Errorf("got %d %q", r.StatusCode, b)
				}
			})
		}
		clients.Wait() // each on a stream of the one connection
		if n := most.Load(); n != 2 {
			t.Errorf("%d streams at once, want 2", n)
		}
		w.nobodyWaits()
	})
}
