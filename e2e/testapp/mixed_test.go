package main

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"os"
	"strings"
	"testing"
	"time"
)

// TestMixedHoldsEveryKind holds connections of all kinds, and ends them in good
// order.
func TestMixedHoldsEveryKind(t *testing.T) {
	addr := "127.43.0.9"
	for port, serve := range map[string]func(*net.TCPConn){"9000": echo, "9002": bulk} {
		l, err := net.Listen("tcp", net.JoinHostPort(addr, port))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() { defer c.Close(); serve(c.(*net.TCPConn)) }()
			}
		}()
	}
	in, stop, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	stdin := os.Stdin
	os.Stdin = in
	t.Cleanup(func() { os.Stdin = stdin })
	out := whenReady{do: func() { time.AfterFunc(2*time.Second, func() { stop.Close() }) }}
	if err := mixed(context.Background(), []string{"-to", addr, "-n", "80"}, &out); err != nil {
		t.Fatal(err)
	}
	kinds := map[string]int{}
	for line := range strings.Lines(out.String()) {
		var e event
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatal(err)
		}
		if e.Error != "" {
			t.Errorf("%s: %s", e.Load, e.Error)
		}
		kinds[e.Load]++
	}
	for kind, want := range map[string]int{"ready": 1, "half": 20, "source": 2, "sink": 2, "echo": 12, "idle": 44} {
		if kinds[kind] != want {
			t.Errorf("%d of %s, want %d: %v", kinds[kind], kind, want, kinds)
		}
	}
}

// whenReady does something when all connections are open.
type whenReady struct {
	bytes.Buffer
	do func()
}

func (w *whenReady) Write(b []byte) (int, error) {
	if bytes.Contains(b, []byte(`"ready"`)) {
		w.do()
	}
	return w.Buffer.Write(b)
}
