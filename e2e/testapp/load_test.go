package main

import (
	"context"
	"encoding/json"
	"io"
	"sync"
	"testing"
	"time"
)

// Every load of a server that works says so; when the server goes away, what
// it had open counts as broken, and what is new as refused.
func TestLoadAccountsForEverything(t *testing.T) {
	const host = "127.0.57.1" // an address of its own: the loads ask at fixed ports
	serving, stopServing := context.WithCancel(t.Context())
	var servers sync.WaitGroup
	servers.Go(func() {
		if err := server(serving, []string{"-host", host, "-grpc", "", "-banner", ""}, io.Discard); err != nil {
			t.Error(err)
		}
	})
	stop := func() { stopServing(); servers.Wait() }
	defer stop()
	c := verb(connectOnce)
	for c(t.Context(), []string{"-addr", host + ":9002"}, io.Discard) != nil {
		if t.Context().Err() != nil {
			t.Fatal("the server does not start")
		}
	}
	for _, r := range []struct {
		name  string
		ready func()
		good  bool
	}{{"all goes well", func() {}, true}, {"the server ends", stop, false}} {
		t.Run(r.name, func(t *testing.T) {
			ctx, end := context.WithCancel(t.Context())
			defer end()
			pr, pw := io.Pipe()
			l := &loader{
				rate: 50, port: "8080", idle: 2, long: 2, bytes: 1 << 20, pace: 8 << 20, timeout: 5 * time.Second,
				out: json.NewEncoder(pw), waiting: map[string]bool{},
			}
			var run sync.WaitGroup
			run.Go(func() { l.run(ctx, []string{host}); pw.Close() })
			defer run.Wait()
			good, bad, refused := map[string]int{}, map[string]int{}, 0
			for d := json.NewDecoder(pr); ; {
				var e event
				if err := d.Decode(&e); err != nil {
					break
				}
				switch {
				case e.Load == "ready":
					r.ready()
					if r.good {
						end()
					}
				case e.Error == "":
					good[e.Load]++
				default:
					bad[e.Load]++
					if e.Refused {
						refused++
					}
				}
				if !r.good && bad["idle"] == 2 && bad["long"] >= 2 && bad["bulk"] > 0 && refused > 0 {
					end()
				}
			}
			if r.good && (len(bad) > 0 || good["idle"] != 2 || good["long"] != 2 || good["bulk"] == 0 || good["requests"] == 0) {
				t.Errorf("got %v good and %v bad", good, bad)
			}
			if !r.good && (bad["idle"] != 2 || bad["requests"] == 0 || refused == 0) {
				t.Errorf("got %v good and %v bad, %d refused, want both idle connections broken and requests refused", good, bad, refused)
			}
		})
	}
}
