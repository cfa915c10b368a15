package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// pressServer answers what it is asked; a path that holds "cut" is cut the
// first time, one with "teapot" is refused. After thirty requests it calls
// enough.
func pressServer(t *testing.T, enough func()) (addr string, conns, requests *atomic.Int64) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	conns, requests = new(atomic.Int64), new(atomic.Int64)
	var cut atomic.Bool
	s := http.Server{
		ConnState: func(_ net.Conn, s http.ConnState) {
			if s == http.StateNew {
				conns.Add(1)
			}
		},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			n := requests.Add(1)
			if n == 30 {
				enough()
			}
			w.Header().Set("X-Generation", "7")
			if strings.Contains(r.URL.Path, "cut") && cut.CompareAndSwap(false, true) {
				panic(http.ErrAbortHandler)
			}
			if strings.Contains(r.URL.Path, "teapot") {
				w.WriteHeader(http.StatusTeapot)
			}
			text := "early"
			if n > 10 {
				text = "late"
			}
			json.NewEncoder(w).Encode(answer{Text: text})
		}),
	}
	done := make(chan struct{})
	go func() { defer close(done); s.Serve(l) }()
	t.Cleanup(func() { s.Close(); <-done })
	return l.Addr().String(), conns, requests
}

func TestPress(t *testing.T) {
	for _, r := range []struct {
		name, method, path    string
		changes               bool
		cut, failed, answered bool
	}{
		{name: "all is well", method: "GET", path: "/", answered: true},
		{name: "a GET that is cut is asked again", method: "GET", path: "/cut", cut: true, answered: true},
		{name: "a POST is not", method: "POST", path: "/cut", failed: true, answered: true},
		{name: "an error is a failure", method: "GET", path: "/teapot", failed: true},
		{name: "or is told", method: "GET", path: "/teapot", changes: true, answered: true},
	} {
		t.Run(r.name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			addr, conns, requests := pressServer(t, cancel)
			var out bytes.Buffer
			p := &press{
				to: addr, method: r.method, request: pressRequest(r.method, r.path, addr), rate: 500, conns: 2, per: 5,
				retries: 2, timeout: 10 * time.Second, changes: r.changes, tell: "X-Generation", out: json.NewEncoder(&out),
			}
			if r.method == "POST" {
				p.retries = 0
			}
			p.run(ctx)
			count := map[string]int{}
			answered := 0
			seen := map[string]bool{}
			for d := json.NewDecoder(bufio.NewReader(&out)); ; {
				var e pressed
				if err := d.Decode(&e); err == io.EOF {
					break
				} else if err != nil {
					t.Fatal(err)
				}
				count[e.Load]++
				answered += e.N
				seen[e.Text] = true
			}
			if (count["cut"] > 0) != r.cut || (count["failed"] > 0) != r.failed || (answered > 0) != r.answered {
				t.Errorf("told %v, %d answered; want cut=%v failed=%v answered=%v", count, answered, r.cut, r.failed, r.answered)
			}
			if got, want := answered+count["cut"]+count["failed"], int(requests.Load()); got != want {
				t.Errorf("told of %d tries, the server saw %d", got, want)
			}
			if n := int(conns.Load()); n < int(requests.Load())/5 || n > int(requests.Load()) {
				t.Errorf("%d connections for %d requests, want five on each", n, requests.Load())
			}
			if r.changes && (!seen["418 7 early"] || !seen["418 7 late"]) {
				t.Errorf("seen %v, want early and late answers", seen)
			}
			if ready := count["ready"] == 1; ready != r.answered {
				t.Errorf("ready: %v", ready)
			}
		})
	}
}
