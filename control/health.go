package control

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
)

// Health answers the kubelet's probes. The service lives as long as it
// answers at all: one that waits for the API server is not made better by
// killing it. It is ready when every part is.
type Health struct {
	mu      sync.Mutex
	waiting []string
}

// NewHealth returns a Health that waits for the named parts.
func NewHealth(parts ...string) *Health { return &Health{waiting: parts} }

// Ready says that a part is ready.
func (h *Health) Ready(part string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.waiting = slices.DeleteFunc(slices.Clone(h.waiting), func(p string) bool { return p == part })
}

// Handler serves /healthz/live and /healthz/ready.
func (h *Health) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz/live", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /healthz/ready", func(w http.ResponseWriter, _ *http.Request) {
		h.mu.Lock()
		waiting := h.waiting
		h.mu.Unlock()
		if len(waiting) > 0 {
			http.Error(w, "waiting for "+strings.Join(waiting, ", "), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	return mux
}
