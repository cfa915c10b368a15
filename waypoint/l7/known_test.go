package l7

import (
	"fmt"
	"net/http"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/view"
)

// views returns Views that differ in what they let through to cart.
func (w *world) views() (open, denied, without *view.View) {
	old := w.store.Load()
	var ws []*mesh.Workload
	var ss []*mesh.Service
	for x := range old.Workloads() {
		ws = append(ws, x)
	}
	for x := range old.Services() {
		ss = append(ss, x)
	}
	get := []mesh.StringMatch{{Kind: mesh.MatchExact, Value: "GET"}}
	deny := &mesh.Policy{Name: mesh.Name{Namespace: "shop", Name: "p"}, Scope: mesh.ScopeTarget, Action: mesh.Deny, Targets: []mesh.Target{{Service: cart}},
		Groups: []mesh.Group{{Clauses: []mesh.Clause{{Matches: []mesh.Match{{Methods: get}}}}}}}
	// The version is the same: it is the View that counts.
	return old, view.WithL7(old.Version(), ws, ss, []*mesh.Policy{deny}, view.L7{}), view.WithL7(old.Version(), ws, nil, nil, view.L7{})
}

// getter is one open connection of a client.
type getter func() (status int)

// getters connect clients of all kinds.
func (w *world) getters() map[string]getter {
	w.backend("10.0.0.1:8080", echo("a"))
	w.backend("10.0.0.2:8080", echo("b"))
	w.backend2("10.0.0.1:8081", echo("a"))
	w.backend2("10.0.0.2:8081", echo("b"))
	c := w.client(80)
	over2 := func(port uint16) getter {
		cc := w.client2(port)
		return func() int { r, _ := w.do(cc, "GET", "/", ""); return r.StatusCode }
	}
	return map[string]getter{
		"HTTP/1":           func() int { r, _ := c.get("/"); return r.StatusCode },
		"HTTP/2 to HTTP/1": over2(80),
		"HTTP/2 to HTTP/2": over2(81),
	}
}

// What is looked up once for a connection must not outlive the View: who has a
// connection open could go on after he is denied.
func TestTheNextRequestMeetsTheNewView(t *testing.T) {
	bothWays(t, func(t *testing.T) {
		w := newWorld(t)
		open, denied, without := w.views()
		for name, get := range w.getters() {
			for i, step := range []struct {
				view *view.View
				want int
			}{{open, 200}, {denied, 403}, {denied, 403}, {open, 200}, {without, 503}, {denied, 403}, {without, 503}, {open, 200}} {
				w.store.Set(step.view)
				if got := get(); got != step.want {
					t.Errorf("%s, step %d: got %d, want %d", name, i, got, step.want)
				}
			}
		}
	})
}

// A request that is pipelined behind one that met the old View meets the new one.
func TestAPipelinedRequestMeetsTheNewView(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		open, denied, _ := w.views()
		w.store.Set(open)
		h := func(rw http.ResponseWriter, r *http.Request) {
			w.store.Set(denied) // while the first is under way
			fmt.Fprint(rw, "in time")
		}
		w.backend("10.0.0.1:8080", h)
		w.backend("10.0.0.2:8080", h)
		c := w.client(80)
		c.say("GET /1 HTTP/1.1\r\nHost: cart\r\n\r\nGET /2 HTTP/1.1\r\nHost: cart\r\n\r\n")
		if r, b := c.answer("GET"); r.StatusCode != 200 || b != "in time" {
			t.Errorf("the first got %d %q", r.StatusCode, b)
		}
		if r, _ := c.answer("GET"); r.StatusCode != 403 {
			t.Errorf("the second got %d", r.StatusCode)
		}
	})
}

// Many streams of one connection look at once, and some of them at a View that
// has just gone: none may bring it back.
func TestViewsChangeUnderLoad(t *testing.T) {
	bothWays(t, func(t *testing.T) {
		w := newWorld(t)
		open, denied, _ := w.views()
		get := w.getters()["HTTP/2 to HTTP/2"]
		stop := make(chan struct{})
		var load sync.WaitGroup
		for range 8 {
			load.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
						get()
					}
				}
			})
		}
		for i := range 50 {
			for want, v := range map[int]*view.View{200: open, 403: denied} {
				w.store.Set(v)
				if got := get(); got != want {
					t.Errorf("round %d: got %d, want %d", i, got, want)
				}
			}
		}
		close(stop)
		load.Wait()
	})
}

// A connection on which nothing happens does not keep a View that has gone.
func TestIdleConnectionsForgetViews(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		open, denied, _ := w.views()
		for name, get := range w.getters() {
			if got := get(); got != 200 {
				t.Fatalf("%s: got %d", name, got)
			}
		}
		holding := func(v *view.View) (n int) {
			time.Sleep(2 * tick)
			synctest.Wait()
			w.e.clients.mu.Lock()
			defer w.e.clients.mu.Unlock()
			for c := range w.e.clients.all {
				if k := c.memory.last.Load(); k != nil && k.view == v {
					n++
				}
			}
			return n
		}
		if n := holding(open); n != 3 {
			t.Errorf("%d of 3 connections know what they knew", n)
		}
		w.store.Set(denied)
		if n := holding(open); n != 0 {
			t.Errorf("%d connections hold a View that has gone", n)
		}
	})
}

// What an exchange that outlives its View leaves behind is forgotten too.
func TestForget(t *testing.T) {
	old, next := view.Of("1", nil, nil, nil), view.Of("1", nil, nil, nil)
	var m memory
	m.last.Store(&known{view: old})
	m.counted.Store(&counted{})
	if m.forget(old); m.last.Load() == nil || m.counted.Load() == nil {
		t.Error("forgot the View that counts")
	}
	if m.forget(next); m.last.Load() != nil || m.counted.Load() != nil {
		t.Error("keeps a View that has gone")
	}
	m.counted.Store(&counted{})
	if m.forget(next); m.counted.Load() != nil {
		t.Error("keeps where an exchange was counted that ended after its View had gone")
	}
}
