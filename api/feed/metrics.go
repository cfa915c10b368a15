package feed

import (
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"
)

// shortType names a type in metrics and logs.
func shortType(url string) string {
	switch url {
	case TypeAddress:
		return "address"
	case TypeAuthorization:
		return "authorization"
	case TypeRoute:
		return "route"
	case TypeTrafficPolicy:
		return "trafficpolicy"
	case TypePolicy:
		return "policy"
	case TypeWaypoint:
		return "waypoint"
	}
	return "other"
}

// serverMetrics carry the names that dashboards of control planes read.
type serverMetrics struct {
	connected prometheus.Gauge
	pushes    *prometheus.CounterVec
	rejects   *prometheus.CounterVec
	took      *prometheus.HistogramVec
	size      *prometheus.HistogramVec
	converged prometheus.Histogram
}

func newServerMetrics(reg prometheus.Registerer) *serverMetrics {
	byType := []string{"type"}
	m := &serverMetrics{
		connected: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "pilot_xds", Help: "Proxies that are connected.",
		}),
		pushes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "pilot_xds_pushes", Help: "Responses sent to proxies.",
		}, byType),
		rejects: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "pilot_total_xds_rejects", Help: "Responses that proxies rejected.",
		}, byType),
		took: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "pilot_xds_push_time", Help: "Seconds it took to hand a response to the connection.",
			Buckets: []float64{.001, .01, .1, 1, 3, 5, 10, 20, 30},
		}, byType),
		size: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "pilot_xds_config_size_bytes", Help: "Size of the responses sent to proxies.",
			Buckets: []float64{1, 10_000, 1_000_000, 4_000_000, 10_000_000, 40_000_000},
		}, byType),
		converged: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "pilot_proxy_convergence_time",
			Help:    "Seconds from noticing a change until a proxy has it in force, by its acknowledgement; one for each proxy it concerns.",
			Buckets: []float64{.005, .01, .025, .05, .1, .2, .3, .5, 1, 3, 5, 10, 20, 30},
		}),
	}
	reg.MustRegister(m.connected, m.pushes, m.rejects, m.took, m.size, m.converged)
	return m
}

// pushed counts a response.
func (m *serverMetrics) pushed(r *discovery.DeltaDiscoveryResponse, took time.Duration) {
	t := shortType(r.GetTypeUrl())
	m.pushes.WithLabelValues(t).Inc()
	m.took.WithLabelValues(t).Observe(took.Seconds())
	m.size.WithLabelValues(t).Observe(float64(proto.Size(r)))
}

// clientMetrics carry the names that dashboards of ztunnels read.
type clientMetrics struct {
	messages     *prometheus.CounterVec
	bytes        *prometheus.CounterVec
	terminations *prometheus.CounterVec
}

func newClientMetrics(reg prometheus.Registerer) *clientMetrics {
	m := &clientMetrics{
		messages: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "istio_xds_message_total", Help: "Responses received from the control service.",
		}, []string{"url"}),
		bytes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "istio_xds_message_bytes_total", Help: "Bytes of resources received from the control service.",
		}, []string{"url"}),
		terminations: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "istio_xds_connection_terminations_total", Help: "Connections to the control service that ended, by reason.",
		}, []string{"reason"}),
	}
	reg.MustRegister(m.messages, m.bytes, m.terminations)
	return m
}

// received counts a response.
func (m *clientMetrics) received(r *discovery.DeltaDiscoveryResponse) {
	n := 0
	for _, x := range r.GetResources() {
		n += len(x.GetResource().GetValue())
	}
	m.messages.WithLabelValues(r.GetTypeUrl()).Inc()
	m.bytes.WithLabelValues(r.GetTypeUrl()).Add(float64(n))
}
