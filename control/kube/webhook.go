package kube

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/weft-mesh/weft/internal/run"
)

// webhookEvery is how often the trust in the webhook is looked after.
const webhookEvery = 30 * time.Second

// A WebhookWriter keeps the roots by which the API server trusts the webhook in
// its configuration, which the chart makes. Run it under leader election.
type WebhookWriter struct {
	Client  kubernetes.Interface
	Watcher *Watcher
	Name    string        // of the ValidatingWebhookConfiguration
	Roots   func() []byte // the trust bundle, PEM; called at every look
	Log     *slog.Logger
}

// Run looks after the configuration until ctx ends.
func (w *WebhookWriter) Run(ctx context.Context) error {
	tick := time.NewTicker(webhookEvery)
	defer tick.Stop()
	for {
		_ = run.Retry(ctx, run.Backoff{Min: time.Second, Max: webhookEvery}, func(ctx context.Context) error {
			err := w.write(ctx)
			w.Watcher.outage.report("keeping the roots of the webhook", err)
			return err
		})
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// write puts the roots in where others are. A configuration that is not there
// is not wanted.
func (w *WebhookWriter) write(ctx context.Context) error {
	client := w.Client.AdmissionregistrationV1().ValidatingWebhookConfigurations()
	conf, err := client.Get(ctx, w.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read the webhook configuration %s: %w", w.Name, err)
	}
	roots, differ := w.Roots(), false
	for i := range conf.Webhooks {
		c := &conf.Webhooks[i].ClientConfig
		differ = differ || !bytes.Equal(c.CABundle, roots)
		c.CABundle = roots
	}
	if !differ {
		return nil
	}
	if _, err := client.Update(ctx, conf, metav1.UpdateOptions{FieldManager: fieldManager}); err != nil {
		return fmt.Errorf("write the webhook configuration %s: %w", w.Name, err)
	}
	w.Log.Info("the API server may trust the webhook now", "configuration", w.Name)
	return nil
}
