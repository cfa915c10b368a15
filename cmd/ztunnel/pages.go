package main

import (
	"log/slog"
	"net/http"

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
	mux.HandleFunc("GET /config_dump", func(w http.ResponseWriter, _ *http.Request) { obs.WriteJSON(w, p.proxy.Dump()) })
	mux.HandleFunc("GET /debug/view", func(w http.ResponseWriter, _ *http.Request) { obs.WriteJSON(w, p.store.Load()) })
	return mux
}
