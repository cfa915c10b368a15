package obs

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

func TestServe(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	reg := prometheus.NewRegistry()
	c := prometheus.NewCounter(prometheus.CounterOpts{Name: "weft_test_total"})
	reg.MustRegister(c)
	c.Inc()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	inHandler, release := make(chan struct{}), make(chan struct{})
	mux := http.NewServeMux()
	mux.Handle("/metrics", MetricsHandler(reg))
	mux.HandleFunc("/slow", func(w http.ResponseWriter, _ *http.Request) {
		close(inHandler)
		<-release
		io.WriteString(w, "finished")
	})
	go func() { done <- ServeListener(ctx, l, mux) }()

	body := func(path string) string {
		resp, err := http.Get("http://" + l.Addr().String() + path)
		if err != nil {
			return err.Error()
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		return string(b)
	}
	if s := body("/metrics"); !strings.Contains(s, "weft_test_total 1") {
		t.Errorf("metrics page: %s", s)
	}
	slow := make(chan string)
	go func() { slow <- body("/slow") }()
	<-inHandler
	cancel()
	close(release)
	if s := <-slow; s != "finished" {
		t.Errorf("request in flight at shutdown got %q", s)
	}
	if err := <-done; err != nil {
		t.Errorf("ServeListener = %v, want nil", err)
	}
}

func TestServeAddressInUse(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := Serve(t.Context(), l.Addr().String(), http.NotFoundHandler()); err == nil {
		t.Error("Serve on a used port returned nil")
	}
}

func TestDebug(t *testing.T) {
	level := new(slog.LevelVar)
	h := Debug(level)
	for _, tc := range []struct {
		method, path string
		status       int
		level        slog.Level
	}{
		{"GET", "/logging", 200, slog.LevelInfo},
		{"GET", "/logging?level=debug", 200, slog.LevelInfo}, // reading changes nothing
		{"POST", "/logging?level=debug", 200, slog.LevelDebug},
		{"POST", "/logging?level=loud", 400, slog.LevelDebug},
		{"GET", "/debug/pprof/", 200, slog.LevelDebug},
		{"GET", "/debug/pprof/heap", 200, slog.LevelDebug},
		{"GET", "/", 404, slog.LevelDebug},
	} {
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, httptest.NewRequest(tc.method, tc.path, nil))
		if rec.Code != tc.status || level.Level() != tc.level {
			t.Errorf("%s %s: status %d, level %v; want %d, %v", tc.method, tc.path, rec.Code, level.Level(), tc.status, tc.level)
		}
	}
}
