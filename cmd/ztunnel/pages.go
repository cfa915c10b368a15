package main

import (
	"encoding/json"
	"log/slog"
	"net/http"
	"runtime/debug"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/weft-mesh/weft/internal/obs"
	"github.com/weft-mesh/weft/mesh/view"
	"github.com/weft-mesh/weft/ztunnel"
)

// pages are what this process shows over HTTP.
type pages struct {
	proxy *ztunnel.Proxy
	store *view.Store
	level *slog.LevelVar
	ready func() error
}

// admin are the pages for debugging, for localhost only.
func (p pages) admin() http.Handler {
	mux := obs.Debug(p.level)
	mux.HandleFunc("GET /config_dump", func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, p.proxy.Dump()) })
	mux.HandleFunc("GET /debug/view", func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, p.store.Load()) })
	return mux
}

func writeJSON(w http.ResponseWriter, v any) {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Write(append(b, '\n'))
}

// health says whether the process lives and is ready.
func (p pages) health() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz/live", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("GET /healthz/ready", func(w http.ResponseWriter, _ *http.Request) {
		if err := p.ready(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
		}
	})
	return mux
}

// stats are the metrics, also where scrapers for sidecars look.
func stats(reg *prometheus.Registry) http.Handler {
	mux := http.NewServeMux()
	h := obs.MetricsHandler(reg)
	mux.Handle("GET /metrics", h)
	mux.Handle("GET /stats/prometheus", h)
	return mux
}

// build is the metric by which tools find the version.
func build() prometheus.Collector {
	tag := "unknown"
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		tag = info.Main.Version
	}
	g := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "istio_build", Help: "The version of this component."}, []string{"component", "tag"})
	g.WithLabelValues("ztunnel", tag).Set(1)
	return g
}
