package l7

import (
	"testing"
	"testing/synctest"
)

func TestGet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.backend("10.0.0.1:8080", echo("a"))
		w.backend("10.0.0.2:8080", echo("b"))
		c := w.client(80)
		for range 3 {
			r, body := c.get("/x?y=1")
			if r.StatusCode != 200 || body != "GET cart /x?y=1 0:" {
				t.Fatalf("got %d %q", r.StatusCode, body)
			}
		}
		if x := w.last(); x.Flags != 0 || x.Details != "via_upstream" || x.Attempts != 1 {
			t.Errorf("exchange ended with flags %v, %q", x.Flags, x.Details)
		}
	})
}
