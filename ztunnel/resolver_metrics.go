package ztunnel

import (
	"cmp"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/weft-mesh/weft/mesh/view"
)

// A nameLabel is what metrics say of a name query.
type nameLabel struct {
	kind, protocol, service, revision string
}

func (l nameLabel) values() []string { return []string{l.kind, l.protocol, l.service, l.revision} }

// labels returns what is known of the pod's queries.
func (r *resolver) labels(v *view.View, protocol string) nameLabel {
	l := nameLabel{protocol: protocol, service: unknown, revision: unknown}
	if w := ownWorkload(v, *r.pod.info.Load(), r.pod.id); w != nil {
		l.service, l.revision = cmp.Or(w.CanonicalName, unknown), cmp.Or(w.CanonicalRevision, unknown)
	}
	return l
}

// names is what the resolvers of all pods share: what they count, and a place
// for each query at a name server.
type names struct {
	places                        chan struct{}
	requests, upstreams, failures *prometheus.CounterVec
	duration                      *prometheus.HistogramVec
}

func newNames(reg prometheus.Registerer) *names {
	labels := []string{"request_query_type", "request_protocol", "source_canonical_service", "source_canonical_revision"}
	counter := func(name, help string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
	}
	n := &names{
		places:    make(chan struct{}, maxUpstreamNode),
		requests:  counter("istio_dns_requests_total", "The number of name queries of pods."),
		upstreams: counter("istio_dns_upstream_requests_total", "The number of name queries that were sent on to name servers."),
		failures:  counter("istio_dns_upstream_failures_total", "The number of name queries that no name server answered."),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "istio_dns_upstream_request_duration_seconds", Help: "How long name servers took to answer.",
			Buckets: []float64{0.001, 0.005, 0.01, 0.1, 1, 5},
		}, labels),
	}
	if reg != nil {
		reg.MustRegister(n.requests, n.upstreams, n.failures, n.duration)
	}
	return n
}

// request counts a query.
func (n *names) request(l nameLabel) { n.requests.WithLabelValues(l.values()...).Inc() }

// upstream counts a query that was sent on.
func (n *names) upstream(l nameLabel, took time.Duration, err error) {
	n.upstreams.WithLabelValues(l.values()...).Inc()
	if err != nil {
		n.failed(l)
		return
	}
	n.duration.WithLabelValues(l.values()...).Observe(took.Seconds())
}

// failed counts a query that should have been sent on.
func (n *names) failed(l nameLabel) { n.failures.WithLabelValues(l.values()...).Inc() }
