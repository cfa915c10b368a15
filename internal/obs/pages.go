package obs

import (
	"encoding/json"
	"net/http"
	"runtime/debug"

	"github.com/prometheus/client_golang/prometheus"
)

// Health says at /healthz/live that the process lives, and at /healthz/ready
// whether it is ready: the error of ready says why it is not.
func Health(ready func() error) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz/live", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("GET /healthz/ready", func(w http.ResponseWriter, _ *http.Request) {
		if err := ready(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
		}
	})
	return mux
}

// Stats are the metrics of reg, also where scrapers for sidecars look.
func Stats(reg *prometheus.Registry) http.Handler {
	mux := http.NewServeMux()
	h := MetricsHandler(reg)
	mux.Handle("GET /metrics", h)
	mux.Handle("GET /stats/prometheus", h)
	return mux
}

// WriteJSON answers a request with v, indented for people.
func WriteJSON(w http.ResponseWriter, v any) {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Write(append(b, '\n'))
}

// Build is the metric istio_build, by which tools find the version of a
// component.
func Build(component string) prometheus.Collector {
	tag := "unknown"
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		tag = info.Main.Version
	}
	g := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "istio_build", Help: "The version of this component."}, []string{"component", "tag"})
	g.WithLabelValues(component, tag).Set(1)
	return g
}
