package control

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"net/http"

	"github.com/weft-mesh/weft/control/admit"
	"github.com/weft-mesh/weft/identity/ca"
	"github.com/weft-mesh/weft/internal/obs"
)

// A Webhook tells authors of objects what is wrong with them: the API server
// asks it before it stores one. Nothing depends on it, so that it may be away:
// what is invalid is found when it is compiled, too.
type Webhook struct {
	addr string
	tls  *tls.Config
	log  *slog.Logger
}

// NewWebhook returns a Webhook; Run starts it. Its certificate is the CA's, for
// the names of the control service.
func NewWebhook(cfg Config, a *ca.Authority, log *slog.Logger) *Webhook {
	conf := NewServing(a, cfg.ServerNames(), log).TLS()
	conf.NextProtos = []string{"http/1.1"}
	return &Webhook{addr: cfg.Webhook, tls: conf, log: log}
}

// Run serves until ctx ends.
func (w *Webhook) Run(ctx context.Context) error {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", w.addr)
	if err != nil {
		return fmt.Errorf("serve the webhook: %w", err)
	}
	w.log.Info("serving the webhook", "address", l.Addr().String())
	return w.serve(ctx, l)
}

// serve serves on l, which it closes, until ctx ends.
func (w *Webhook) serve(ctx context.Context, l net.Listener) error {
	mux := http.NewServeMux()
	mux.Handle("POST /validate", admit.Handler())
	return obs.ServeListener(ctx, tls.NewListener(l, w.tls), mux)
}
