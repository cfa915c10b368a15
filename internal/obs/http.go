package obs

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// drainTime is how long requests in flight may finish after the end of Serve's
// context.
const drainTime = 5 * time.Second

// Serve listens on the TCP address addr and serves h until ctx ends. Requests
// in flight then have a few seconds to finish. It returns nil after a clean
// stop.
func Serve(ctx context.Context, addr string, h http.Handler) error {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", addr)
	if err != nil {
		return fmt.Errorf("serve http: %w", err)
	}
	return ServeListener(ctx, l, h)
}

// ServeListener is Serve on a listener that is already open. It closes l.
func ServeListener(ctx context.Context, l net.Listener, h http.Handler) error {
	srv := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    64 << 10,
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	select {
	case err := <-served:
		return fmt.Errorf("serve http on %v: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTime)
	defer cancel()
	if srv.Shutdown(drain) != nil {
		srv.Close() // those that did not finish in time
	}
	<-served
	return nil
}

// MetricsHandler serves the metrics of reg in the formats Prometheus asks for.
// A collector that fails costs its own metrics, not the page.
func MetricsHandler(reg *prometheus.Registry) http.Handler {
	return promhttp.HandlerFor(reg, promhttp.HandlerOpts{
		Registry:          reg,
		ErrorHandling:     promhttp.ContinueOnError,
		EnableOpenMetrics: true,
	})
}

// Debug returns a mux with the Go profiles under /debug/pprof/ and the log
// level at /logging: GET shows it, POST with ?level=debug sets it. It reveals
// and changes the process: serve it on localhost only.
func Debug(level *slog.LevelVar) *http.ServeMux {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	show := func(w http.ResponseWriter) {
		fmt.Fprintf(w, "current log level is %s\n", LevelName(level.Level()))
	}
	mux.HandleFunc("GET /logging", func(w http.ResponseWriter, _ *http.Request) { show(w) })
	mux.HandleFunc("POST /logging", func(w http.ResponseWriter, r *http.Request) {
		if s := r.FormValue("level"); s != "" {
			l, err := ParseLevel(s)
			if err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
				return
			}
			level.Set(l)
		}
		show(w)
	})
	return mux
}
