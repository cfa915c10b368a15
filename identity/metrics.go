package identity

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are a Manager's. No series is per identity: their number must not
// grow with the cluster.
type metrics struct {
	attempts *prometheus.CounterVec
	duration prometheus.Histogram
}

func newMetrics(m *Manager, reg prometheus.Registerer) *metrics {
	x := &metrics{
		attempts: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "weft_identity_issue_total",
			Help: "Attempts to obtain a certificate, by result.",
		}, []string{"result"}),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "weft_identity_issue_duration_seconds",
			Help:    "How long attempts to obtain a certificate took.",
			Buckets: prometheus.ExponentialBuckets(0.005, 2, 12),
		}),
	}
	x.attempts.WithLabelValues("success")
	x.attempts.WithLabelValues("error")
	if reg == nil {
		return x
	}
	reg.MustRegister(x.attempts, x.duration,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "weft_identity_certificates",
			Help: "Identities with a valid certificate.",
		}, func() float64 { return float64(m.count().valid) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "weft_identity_certificates_missing",
			Help: "Identities that should have a valid certificate and have none.",
		}, func() float64 { return float64(m.count().missing) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "weft_identity_earliest_expiry_timestamp_seconds",
			Help: "When the first of the valid certificates expires, in Unix time; 0 without any.",
		}, func() float64 { return m.count().earliest }),
	)
	return x
}

func (x *metrics) observe(d time.Duration, err error) {
	result := "success"
	if err != nil {
		result = "error"
	}
	x.attempts.WithLabelValues(result).Inc()
	x.duration.Observe(d.Seconds())
}

type counts struct {
	valid, missing int
	earliest       float64
}

func (m *Manager) count() counts {
	m.mu.Lock()
	defer m.mu.Unlock()
	var c counts
	now := time.Now()
	for _, e := range m.entries {
		if !e.valid(now) {
			c.missing++
			continue
		}
		c.valid++
		if at := float64(e.cert.Leaf.NotAfter.Unix()); c.earliest == 0 || at < c.earliest {
			c.earliest = at
		}
	}
	return c
}
