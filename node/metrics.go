package node

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are the agent's numbers.
type metrics struct {
	failures *prometheus.CounterVec
	waits    prometheus.Counter
	escapes  *prometheus.CounterVec
	duration *prometheus.HistogramVec
}

// newMetrics registers the counters. What is read from state is registered by
// the agent.
func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "weft_node_enrol_failures_total",
			Help: "Attempts to bring a pod into the mesh or out of it that failed, by reason.",
		}, []string{"reason"}),
		waits: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "weft_node_sandbox_waits_total",
			Help: "Times that a pod had an address and its sandbox was not found yet.",
		}),
		escapes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "weft_node_uncaptured_pods_total",
			Help: "Pods that were found running outside the mesh though they belong to it, by what is done about them: capture, report or restart.",
		}, []string{"action"}),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "weft_node_enrol_duration_seconds",
			Help:    "Time to capture a pod, by way: cni is a pod that starts, running one that runs.",
			Buckets: []float64{.005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10},
		}, []string{"way"}),
	}
	reg.MustRegister(m.failures, m.waits, m.duration, m.escapes)
	return m
}

// enrolled counts a pod that was captured.
func (m *metrics) enrolled(began time.Time, way string) {
	m.duration.WithLabelValues(way).Observe(time.Since(began).Seconds())
}
