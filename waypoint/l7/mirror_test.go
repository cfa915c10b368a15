package l7

import (
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/weft-mesh/weft/mesh"
)

func TestMirrors(t *testing.T) {
	rule := func(ms ...mesh.Mirror) mesh.Rule { return mesh.Rule{Backends: onlyCart(), Mirrors: ms} }
	toV2 := mesh.Mirror{Backend: mesh.Backend{Service: v2}, PerMillion: 1e6}
	plain := toV2
	plain.PlainHost = true
	half := toV2
	half.PerMillion = 500_000
	copies := func(w *world) chan string {
		got := make(chan string, 5000)
		w.backend("10.0.0.3:8080", func(rw http.ResponseWriter, r *http.Request) {
			b, _ := io.ReadAll(r.Body)
			got <- r.Method + " " + r.Host + " " + r.URL.RequestURI() + " " + r.Header.Get("X-Mine") + " " + string(b)
			rw.WriteHeader(500)
		})
		return got
	}
	expect := func(t *testing.T, got chan string, want ...string) {
		t.Helper()
		synctest.Wait()
		for _, text := range want {
			select {
			case s := <-got:
				if s != text {
					t.Errorf("copy is %q, want %q", s, text)
				}
			default:
				t.Errorf("no copy, want %q", text)
			}
		}
		if len(got) > 0 {
			t.Errorf("%d copies too many: %q", len(got), <-got)
		}
	}
	inWorld(t, "a copy of the whole request", func(t *testing.T, w *world) {
		got, c := copies(w), w.client(80)
		if r, _ := c.get("/a?b", "X-Mine: 1"); r.StatusCode != 200 {
			t.Errorf("got %d", r.StatusCode)
		}
		expect(t, got, "GET cart-shadow /a?b 1 ")
		c.say("POST / HTTP/1.1\r\nHost: cart:80\r\nContent-Length: 5\r\n\r\nhello")
		c.answer("POST")
		expect(t, got, "POST cart-shadow:80 /  hello")
	}, rule(toV2))
	inWorld(t, "a body that comes in pieces", func(t *testing.T, w *world) {
		got, c := copies(w), w.client(80)
		c.say("POST / HTTP/1.1\r\nHost: cart\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
		synctest.Wait()
		c.say("2\r\nde\r\n0\r\n\r\n")
		if r, _ := c.answer("POST"); r.StatusCode != 200 {
			t.Errorf("got %d", r.StatusCode)
		}
		expect(t, got, "POST cart-shadow /  abcde")
	}, rule(toV2))
	inWorld(t, "a body that is too long", func(t *testing.T, w *world) {
		got, c := copies(w), w.client(80)
		c.say("POST / HTTP/1.1\r\nHost: cart\r\nContent-Length: 100000\r\n\r\n" + strings.Repeat("x", 100000))
		if r, _ := c.answer("POST"); r.StatusCode != 200 {
			t.Errorf("got %d", r.StatusCode)
		}
		expect(t, got)
	}, rule(toV2))
	inWorld(t, "several, and the same host", func(t *testing.T, w *world) {
		got := copies(w)
		w.client(80).get("/")
		expect(t, got, "GET cart /  ", "GET cart /  ")
	}, rule(plain, plain))
	inWorld(t, "a share", func(t *testing.T, w *world) {
		got, c := copies(w), w.client(80)
		for range 2000 {
			c.get("/")
			synctest.Wait() // so that none finds no room
		}
		if n := len(got); n < 900 || n > 1100 {
			t.Errorf("%d copies of 2000, want about 1000", n)
		}
	}, rule(half))
	inWorld(t, "one that does not answer", func(t *testing.T, w *world) {
		w.backend("10.0.0.3:8080", func(rw http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
		from := time.Now()
		if r, _ := w.client(80).get("/"); r.StatusCode != 200 || time.Since(from) > time.Second {
			t.Errorf("got %d after %v", r.StatusCode, time.Since(from))
		}
		time.Sleep(2 * mirrorTime)
		synctest.Wait()
		if n := len(w.e.mirrors.room); n != 0 {
			t.Errorf("%d copies still wait", n)
		}
	}, rule(toV2))
	inWorld(t, "one that does not exist", func(t *testing.T, w *world) {
		if r, _ := w.client(80).get("/"); r.StatusCode != 200 {
			t.Errorf("got %d", r.StatusCode)
		}
	}, rule(mesh.Mirror{Backend: mesh.Backend{Service: mesh.ServiceName{Namespace: "x", Host: "y"}}, PerMillion: 1e6}))
}
