package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

// listening collects the lines "<name> on <address>" of a server.
type listening struct {
	mu    sync.Mutex
	lines bytes.Buffer
	grown chan struct{}
}

func (l *listening) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case l.grown <- struct{}{}:
	default:
	}
	return l.lines.Write(b)
}

// address waits for the line of one server.
func (l *listening) address(t *testing.T, name string) string {
	t.Helper()
	for {
		l.mu.Lock()
		for line := range strings.Lines(l.lines.String()) {
			if a, ok := strings.CutPrefix(strings.TrimSpace(line), name+" on "); ok {
				l.mu.Unlock()
				return a
			}
		}
		l.mu.Unlock()
		select {
		case <-l.grown:
		case <-t.Context().Done():
			t.Fatal(t.Context().Err())
		}
	}
}

// startServer runs the server on host until the test ends.
func startServer(t *testing.T, host string) *listening {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	out := &listening{grown: make(chan struct{}, 1)}
	ended := make(chan error, 1)
	go func() {
		ended <- server(ctx, []string{"-host", host, "-http", "0", "-grpc", "0", "-echo", "0", "-banner", "0", "-bulk", "0"}, out)
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("server: %v", err)
		}
	})
	return out
}

func TestServerAndTries(t *testing.T) {
	for _, host := range []string{"127.0.0.1", "::1"} {
		t.Run(host, func(t *testing.T) {
			s := startServer(t, host)
			web := "http://" + s.address(t, "HTTP") + "/"
			for _, r := range []struct {
				name string
				run  func(context.Context, []string, io.Writer) error
				args []string
			}{
				{"get", get, []string{"-n", "2", web}},
				{"echo", verb(echoOnce), []string{"-addr", s.address(t, "TCP echo"), "-bytes", "5000000"}},
				{"echo of nothing", verb(echoOnce), []string{"-addr", s.address(t, "TCP echo"), "-bytes", "0"}},
				{"source", verb(sourceOnce), []string{"-addr", s.address(t, "TCP bulk"), "-bytes", "5000000"}},
				{"sink", verb(sinkOnce), []string{"-addr", s.address(t, "TCP bulk"), "-bytes", "5000000"}},
				{"banner", verb(bannerOnce), []string{"-addr", s.address(t, "TCP banner")}},
				{"connect", verb(connectOnce), []string{"-addr", s.address(t, "TCP echo")}},
				{"hold", verb(holdOn), []string{"-addr", s.address(t, "TCP echo"), "-for", "120ms"}},
				{"client with a marker", client, []string{"-url", web, "-marker", "secret", "-rate", "1000", "-count", "3", "-listen", ""}},
				{"long-lived client", client, []string{"-url", s.address(t, "TCP echo"), "-long", "-rate", "1000", "-count", "3", "-listen", ""}},
			} {
				t.Run(r.name, func(t *testing.T) {
					var out bytes.Buffer
					if err := r.run(t.Context(), r.args, &out); err != nil {
						t.Errorf("%v\n%s", err, &out)
					}
				})
			}
			if err := probe(t.Context(), []string{web + "healthz"}, io.Discard); err != nil {
				t.Errorf("exec-probe: %v", err)
			}
			checkHealth(t, s.address(t, "gRPC health"))
		})
	}
}

func checkHealth(t *testing.T, address string) {
	t.Helper()
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	resp, err := healthpb.NewHealthClient(conn).Check(t.Context(), &healthpb.HealthCheckRequest{})
	if err != nil || resp.Status != healthpb.HealthCheckResponse_SERVING {
		t.Errorf("gRPC health: got %v, %v; want SERVING", resp, err)
	}
}

// tamper is a TCP server that answers wrongly in one way.
func tamper(t *testing.T, serve func(net.Conn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	all.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			serve(c)
			c.Close()
		}
	})
	t.Cleanup(func() { l.Close(); all.Wait() })
	return l.Addr().String()
}

func TestTriesNoticeDamage(t *testing.T) {
	short := tamper(t, func(c net.Conn) { io.CopyN(c, c, 100) })
	swapped := tamper(t, func(c net.Conn) {
		b, _ := io.ReadAll(c)
		b[0], b[1] = b[1], b[0]
		c.Write(b)
	})
	silent := tamper(t, func(c net.Conn) { io.Copy(io.Discard, c) })
	for _, r := range []struct {
		name string
		run  func(context.Context, []string, io.Writer) error
		args []string
	}{
		{"echo cut short", verb(echoOnce), []string{"-addr", short, "-bytes", "2000"}},
		{"echo with bytes swapped", verb(echoOnce), []string{"-addr", swapped, "-bytes", "2000"}},
		{"no banner", verb(bannerOnce), []string{"-addr", silent, "-timeout", "100ms"}},
		{"nobody listens", verb(connectOnce), []string{"-addr", "127.0.0.1:1"}},
		{"held connection breaks", verb(holdOn), []string{"-addr", short, "-for", "1h"}},
	} {
		t.Run(r.name, func(t *testing.T) {
			var out bytes.Buffer
			err := r.run(t.Context(), r.args, &out)
			var got result
			if jsonErr := json.Unmarshal(out.Bytes(), &got); err == nil || jsonErr != nil || got.OK || got.Error == "" {
				t.Errorf("got error %v and output %q, want both to tell of a failure", err, &out)
			}
		})
	}
}

func TestClientCountsEveryFailure(t *testing.T) {
	n := 0
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n++
		b, _ := io.ReadAll(r.Body)
		switch n {
		case 2:
			w.WriteHeader(http.StatusServiceUnavailable)
		case 3:
			panic(http.ErrAbortHandler) // the connection breaks
		case 4:
			json.NewEncoder(w).Encode(answer{Host: "h", Body: "another's"})
		default:
			json.NewEncoder(w).Encode(answer{Host: "h", Body: string(b)})
		}
	}))
	defer s.Close()
	var out bytes.Buffer
	err := client(t.Context(), []string{"-url", s.URL, "-marker", "mine", "-rate", "1000", "-count", "6", "-quiet", "-listen", ""}, &out)
	if err == nil {
		t.Error("a client with failed requests ended well")
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	var sum summary
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &sum); err != nil {
		t.Fatal(err)
	}
	if sum.OK != 3 || sum.Failed != 3 || sum.ByHost["h"] != 3 || len(lines) != 4 {
		t.Errorf("got %+v in %d lines, want 3 ok by h, 3 failed, a line for each failure and the summary", sum, len(lines))
	}
}

func TestStats(t *testing.T) {
	var s stats
	start := time.Now()
	for i := range 100 {
		s.add(start.Add(time.Duration(i)*time.Second), time.Duration(i+1)*time.Millisecond, "a", nil)
	}
	s.add(start, time.Second, "", errors.New("boom"))
	sum := s.summary()
	if sum.OK != 100 || sum.Failed != 1 || sum.LastError != "boom" || sum.P50 != 51 || sum.Max != 100 {
		t.Errorf("got %+v", sum)
	}
	if sum.LongestGap != 1001 {
		t.Errorf("longest gap: got %v ms, want 1001", sum.LongestGap)
	}
}
