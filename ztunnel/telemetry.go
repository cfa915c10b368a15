package ztunnel

import (
	"errors"
	"fmt"
	"sync"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/weft-mesh/weft/mesh"
)

// The response flags of a connection.
const (
	flagNone    = "-"
	flagDeny    = "DENY"    // by policy
	flagConnect = "CONNECT" // the upstream could not be reached
)

// labelNames are the labels of every metric of a connection, in the order of
// labels.
func labelNames() []string {
	return []string{
		"reporter",
		"source_workload", "source_canonical_service", "source_canonical_revision", "source_workload_namespace",
		"source_principal", "source_app", "source_version", "source_cluster",
		"destination_service", "destination_service_namespace", "destination_service_name",
		"destination_workload", "destination_canonical_service", "destination_canonical_revision", "destination_workload_namespace",
		"destination_principal", "destination_app", "destination_version", "destination_cluster",
		"request_protocol", "response_flags", "connection_security_policy",
	}
}

type labels [23]string

const (
	sourceLabel      = 5  // the place of source_principal
	destinationLabel = 16 // and of destination_principal
	flagLabel        = 21 // and of response_flags
	unknown          = "unknown"
)

// A tuple stands for labels: it is comparable, and costs no memory to make.
type tuple struct {
	labels              // without the principals, and with nothing for what is not known
	source, destination mesh.Identity
}

// tupleOf returns what stands for the labels of f.
func tupleOf(f *flow) tuple {
	l := labels{0: "source", 20: "tcp", flagLabel: flagNone, 22: unknown}
	if f.direction == inbound {
		l[0] = "destination"
	}
	if f.mutualTLS {
		l[22] = "mutual_tls"
	}
	p := f.who.Value()
	workloadLabels(l[1:9], p.source, p.sourceID)
	if s := p.service; s != nil {
		l[9], l[10], l[11] = string(s.Name.Host), s.Name.Namespace, s.ShortName
	}
	destination := proved(f.destinationID)
	if destination.IsZero() && p.destination != nil {
		destination = p.destination.Identity
	}
	workloadLabels(l[12:20], p.destination, destination)
	return tuple{l, p.sourceID, destination}
}

// text returns the labels that t stands for.
func (t tuple) text() labels {
	l := t.labels
	l[sourceLabel], l[destinationLabel] = t.source.String(), t.destination.String()
	for i := range l {
		if l[i] == "" {
			l[i] = unknown
		}
	}
	return l
}

// workloadLabels fills the eight labels of one end, but for the principal.
func workloadLabels(l []string, w *mesh.Workload, id mesh.Identity) {
	if w == nil {
		l[3] = id.Namespace
		return
	}
	owner := w.Owner.Name
	if owner == "" {
		owner = w.Name.Name
	}
	l[0], l[1], l[2], l[3] = owner, w.CanonicalName, w.CanonicalRevision, w.Name.Namespace
	l[5], l[6], l[7] = w.CanonicalName, w.CanonicalRevision, w.Cluster
}

// counters are the metrics of one tuple of labels.
type counters struct {
	labels                 labels
	opened, sent, received prometheus.Counter
	closed                 prometheus.Counter // of those that end in order
	open                   prometheus.Gauge

	flows int    // that are open; guarded by telemetry.mu
	last  uint64 // telemetry.looks when one ended; guarded by telemetry.mu
}

// Owners come and go: each batch job may be one of its own. So what nobody has
// used for a while is forgotten, but only when there is much, because a series
// that comes back begins at zero.
const (
	maxTuples     = 1000 // that are kept in any case
	looksToForget = 120  // that find a tuple unused: ten minutes of them
	forgetAtOnce  = 20   // tuples: connections wait meanwhile
)

// telemetry counts connections.
type telemetry struct {
	opened, closed, failed, sent, received *prometheus.CounterVec

	open  *prometheus.GaugeVec
	pods  podCount
	log   *accessLog
	names *names

	counting sync.Mutex // of bytes: one for all flows, each of which is counted every few seconds

	mu    sync.Mutex
	cache map[tuple]*counters
	looks uint64 // calls of forget
}

func newTelemetry(reg prometheus.Registerer, log *accessLog) *telemetry {
	vec := func(name, help string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labelNames())
	}
	t := &telemetry{
		opened: vec("istio_tcp_connections_opened_total", "The number of TCP connections opened."),
		closed: vec("istio_tcp_connections_closed_total", "The number of TCP connections closed."),
		failed: vec("istio_tcp_connections_failed_total", "The number of TCP connections that were refused, or could not be carried on."),
		open: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "istio_tcp_sockets_open", Help: "The number of TCP connections that are open.",
		}, labelNames()),
		// Both reporters count as the server sees it, as dashboards expect.
		sent:     vec("istio_tcp_sent_bytes_total", "The number of bytes that servers sent to clients."),
		received: vec("istio_tcp_received_bytes_total", "The number of bytes that servers received from clients."),
		pods:     newPodCount(),
		log:      log,
		names:    newNames(reg),
		cache:    make(map[tuple]*counters),
	}
	if reg != nil {
		reg.MustRegister(t.opened, t.closed, t.failed, t.sent, t.received, t.open, t.pods.serving, t.pods.started, t.pods.stopped)
	}
	return t
}

// begin counts f as opened. Set what is known of f before.
func (t *telemetry) begin(f *flow) {
	t.resume(f)
	f.counters.opened.Inc()
}

// resume is begin for a flow that another process has counted as opened.
func (t *telemetry) resume(f *flow) {
	k := tupleOf(f)
	t.mu.Lock()
	c := t.cache[k]
	if c == nil {
		l := k.text()
		c = &counters{
			labels:   l,
			opened:   t.opened.WithLabelValues(l[:]...),
			sent:     t.sent.WithLabelValues(l[:]...),
			received: t.received.WithLabelValues(l[:]...),
			closed:   t.closed.WithLabelValues(l[:]...), // l has no flag
			open:     t.open.WithLabelValues(l[:]...),
		}
		t.cache[k] = c
	}
	c.flows++
	t.mu.Unlock()
	f.counters = c
	c.open.Inc()
}

// progress counts the bytes of f since the last call.
func (t *telemetry) progress(f *flow) {
	t.counting.Lock()
	defer t.counting.Unlock()
	sent, received := f.moved()
	f.counters.received.Add(float64(sent - f.reported.sent))
	f.counters.sent.Add(float64(received - f.reported.received))
	f.reported.sent, f.reported.received = sent, received
}

// end counts f as closed and logs it.
func (t *telemetry) end(f *flow, err error) {
	f.counters.open.Dec()
	if flag := flagOf(err); flag == flagNone {
		f.counters.closed.Inc()
	} else {
		l := f.counters.labels // as it was opened
		l[flagLabel] = flag
		t.closed.WithLabelValues(l[:]...).Inc()
		t.failed.WithLabelValues(l[:]...).Inc()
	}
	t.mu.Lock()
	f.counters.flows--
	f.counters.last = t.looks
	t.mu.Unlock()
	t.log.write(f, err)
}

// forget drops some of the metrics that no connection has used for long, if
// there are many. It is called every few seconds.
func (t *telemetry) forget() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.looks++
	dropped := 0
	for k, c := range t.cache {
		if len(t.cache) <= maxTuples || dropped == forgetAtOnce {
			return
		}
		if c.flows == 0 && t.looks-c.last >= looksToForget {
			delete(t.cache, k)
			t.drop(c.labels)
			dropped++
		}
	}
}

// drop takes the metrics with these labels, and any flag, off the page.
func (t *telemetry) drop(l labels) {
	for _, v := range []*prometheus.CounterVec{t.opened, t.sent, t.received} {
		v.DeleteLabelValues(l[:]...)
	}
	t.open.DeleteLabelValues(l[:]...)
	for _, flag := range []string{flagNone, flagDeny, flagConnect} {
		l[flagLabel] = flag
		t.closed.DeleteLabelValues(l[:]...)
		t.failed.DeleteLabelValues(l[:]...)
	}
}

// podCount counts the pods that are served.
type podCount struct {
	serving          prometheus.Gauge
	started, stopped prometheus.Counter
	last             *float64 // one caller of Set at a time
}

func newPodCount() podCount {
	return podCount{
		serving: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "workload_manager_active_proxy_count", Help: "The number of pods that this proxy serves.",
		}),
		started: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "workload_manager_proxies_started_total", Help: "The number of pods that this proxy has begun to serve.",
		}),
		stopped: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "workload_manager_proxies_stopped_total", Help: "The number of pods that this proxy has ceased to serve.",
		}),
		last: new(float64),
	}
}

// Set notes how many pods are served now. It is called at every change.
func (c podCount) Set(n float64) {
	c.serving.Set(n)
	c.started.Add(max(n-*c.last, 0))
	c.stopped.Add(max(*c.last-n, 0))
	*c.last = n
}

// A flowError says at which step a connection failed.
type flowError struct {
	flag string
	err  error
}

// Error says why, without the step.
func (e *flowError) Error() string { return e.err.Error() }

// Unwrap returns why.
func (e *flowError) Unwrap() error { return e.err }

func denyf(format string, args ...any) error {
	return &flowError{flagDeny, fmt.Errorf(format, args...)}
}

func connectError(err error) error { return &flowError{flagConnect, err} }

func flagOf(err error) string {
	if e, ok := errors.AsType[*flowError](err); ok {
		return e.flag
	}
	return flagNone
}
