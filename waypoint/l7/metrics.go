package l7

import (
	"net/netip"
	"strconv"
	"sync"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/view"
)

// maxSeries bounds how many combinations of labels are counted apart. What
// comes after that is counted without the names of workloads.
const maxSeries = 10_000

// metrics counts exchanges, with the names and labels that dashboards of meshes
// read. The reporter is "waypoint": a proxy between client and server that is
// neither. There are no series of a reporter "destination" besides, which would
// count each request twice where both are added up.
type metrics struct {
	Pass
	requests, requestMessages, responseMessages *prometheus.CounterVec
	duration, requestBytes, responseBytes       *prometheus.HistogramVec

	opened, closed, sent, received *prometheus.CounterVec

	mu     sync.RWMutex
	quick  map[metricKey]*counted // guarded by mu
	byText map[labels]*series     // guarded by mu
	limit  int
}

// A metricKey says by which labels an exchange is counted, without their texts.
// Objects of the mesh go by their pointers, which are others after a change.
type metricKey struct {
	source, destination *mesh.Workload
	service             *mesh.Service
	peer                mesh.Identity
	flags               Flags
	status              int16
	grpc                int8 // -1: none
	protocol            byte
}

// A counted is where exchanges of that key are counted.
type counted struct {
	key    metricKey
	series *series
}

// labels are the texts: those of labelNames, in their order.
type labels [25]string

// Where some labels are.
const (
	labelProtocol = 20 + iota
	labelCode
	labelGRPC
	labelFlags
	labelSecurity
)

const unknown = "unknown"

// labelNames returns the labels of requests.
func labelNames() []string {
	return []string{
		"reporter",
		"source_workload", "source_canonical_service", "source_canonical_revision", "source_workload_namespace",
		"source_principal", "source_app", "source_version", "source_cluster",
		"destination_workload", "destination_canonical_service", "destination_canonical_revision", "destination_workload_namespace",
		"destination_principal", "destination_app", "destination_version", "destination_cluster",
		"destination_service", "destination_service_namespace", "destination_service_name",
		"request_protocol",
		"response_code", "grpc_response_status", "response_flags", "connection_security_policy",
	}
}

// connectionLabels returns those of connections: there are no answers.
func connectionLabels(l []string) []string {
	return append(append([]string(nil), l[:labelCode]...), l[labelFlags:]...)
}

// A series holds the metrics of one combination of labels.
type series struct {
	requests, requestMessages, responseMessages prometheus.Counter
	duration, requestBytes, responseBytes       prometheus.Observer

	opened, closed, sent, received prometheus.Counter
}

// newMetrics makes the metrics and registers them; nil registers none, and
// then nothing is counted.
func newMetrics(reg prometheus.Registerer) *metrics {
	if reg == nil {
		return nil
	}
	names := labelNames()
	count := func(name, help string, labels []string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
	}
	observe := func(name, help string) *prometheus.HistogramVec {
		return prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: name, Help: help, Buckets: buckets()}, names)
	}
	m := &metrics{
		requests:         count("istio_requests_total", "The number of requests.", names),
		requestMessages:  count("istio_request_messages_total", "The number of gRPC messages from clients.", names),
		responseMessages: count("istio_response_messages_total", "The number of gRPC messages from servers.", names),
		duration:         observe("istio_request_duration_milliseconds", "How long requests took, in milliseconds."),
		requestBytes:     observe("istio_request_bytes", "The size of requests, heads included."),
		responseBytes:    observe("istio_response_bytes", "The size of responses, heads included."),
		quick:            map[metricKey]*counted{},
		byText:           map[labels]*series{},
		limit:            maxSeries,
	}
	names = connectionLabels(names)
	m.opened = count("istio_tcp_connections_opened_total", "The number of TCP connections opened.", names)
	m.closed = count("istio_tcp_connections_closed_total", "The number of TCP connections closed.", names)
	m.sent = count("istio_tcp_sent_bytes_total", "The number of bytes that servers sent to clients.", names)
	m.received = count("istio_tcp_received_bytes_total", "The number of bytes that servers received from clients.", names)
	reg.MustRegister(m.requests, m.requestMessages, m.responseMessages, m.duration, m.requestBytes, m.responseBytes,
		m.opened, m.closed, m.sent, m.received)
	return m
}

// buckets returns the bounds that dashboards expect, for milliseconds and bytes
// alike.
func buckets() []float64 {
	return []float64{0.5, 1, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000, 30000, 60000, 300000, 600000, 1800000, 3600000}
}

// open counts a connection that is to be passed through. It may be long until
// its end.
func (m *metrics) open(x *Exchange) {
	if m == nil {
		return
	}
	x.marks.opened = true
	m.series(x).opened.Inc()
}

// OnEnd counts an exchange.
func (m *metrics) OnEnd(x *Exchange) {
	s := m.series(x)
	if x.Version == NotHTTP {
		if !x.marks.opened {
			s.opened.Inc()
		}
		s.closed.Inc()
		s.received.Add(float64(x.RequestBytes))
		s.sent.Add(float64(x.ResponseBytes))
		return
	}
	s.requests.Inc()
	s.duration.Observe(float64(x.End.Sub(x.Start).Microseconds()) / 1000)
	s.requestBytes.Observe(float64(x.RequestHeadBytes + x.RequestBytes))
	s.responseBytes.Observe(float64(x.ResponseHeadBytes + x.ResponseBytes))
	if x.GRPC {
		s.requestMessages.Add(float64(x.RequestMessages))
		s.responseMessages.Add(float64(x.ResponseMessages))
	}
}

// series returns the metrics for x: most often those of the exchange before on
// its connection.
func (m *metrics) series(x *Exchange) *series {
	k := keyOf(x)
	if x.memory == nil {
		return m.count(&k).series
	}
	c := x.memory.counted.Load()
	if c == nil || c.key != k {
		c = m.count(&k)
		x.memory.counted.Store(c)
	}
	return c.series
}

// count returns where exchanges of key k are counted. It makes texts of labels
// only the first time.
func (m *metrics) count(k *metricKey) *counted {
	m.mu.RLock()
	c := m.quick[*k]
	m.mu.RUnlock()
	if c != nil {
		return c
	}
	l := labelsOf(k)
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.byText) >= m.limit && m.byText[l] == nil {
		l = anonymous(l)
	}
	s := m.byText[l]
	if s == nil {
		s = m.make(&l, k.protocol == 't')
		m.byText[l] = s
	}
	if len(m.quick) >= 2*m.limit {
		clear(m.quick) // most are of Views that have gone
	}
	c = &counted{*k, s}
	m.quick[*k] = c
	return c
}

// make makes the metrics for one combination of labels.
func (m *metrics) make(l *labels, connection bool) *series {
	if connection {
		v := connectionLabels(l[:])
		return &series{opened: m.opened.WithLabelValues(v...), closed: m.closed.WithLabelValues(v...),
			sent: m.sent.WithLabelValues(v...), received: m.received.WithLabelValues(v...)}
	}
	v := l[:]
	s := &series{requests: m.requests.WithLabelValues(v...), duration: m.duration.WithLabelValues(v...),
		requestBytes: m.requestBytes.WithLabelValues(v...), responseBytes: m.responseBytes.WithLabelValues(v...)}
	if l[labelProtocol] == "grpc" {
		s.requestMessages, s.responseMessages = m.requestMessages.WithLabelValues(v...), m.responseMessages.WithLabelValues(v...)
	}
	return s
}

// keyOf finds out by what x is counted.
func keyOf(x *Exchange) metricKey {
	k := metricKey{source: x.known.source, service: x.BackendService, peer: x.Facts.Peer, flags: x.Flags,
		status: int16(x.Response.Status), grpc: -1, protocol: 'h'}
	if k.service == nil {
		k.service = x.Service
	}
	if x.Endpoint != nil {
		k.destination = x.Endpoint.Workload
	}
	switch {
	case x.Version == NotHTTP:
		k.protocol, k.status = 't', 0
	case x.GRPC:
		k.protocol, k.grpc = 'g', grpcStatusOf(x)
	}
	return k
}

// sourceOf returns the workload at the address that the connection came from,
// if it is the one that has proved who it is: addresses alone prove nothing.
func sourceOf(v *view.View, f *Facts) *mesh.Workload {
	a := f.Source.Addr()
	if a == (netip.Addr{}) {
		return nil
	}
	w := v.Workload(a)
	if w == nil || !f.Peer.IsZero() && w.Identity != f.Peer {
		return nil
	}
	return w
}

// labelsOf returns the texts of k.
func labelsOf(k *metricKey) labels {
	l := labels{0: "waypoint", labelProtocol: "http", labelFlags: k.flags.String(), labelSecurity: "none"}
	if !k.peer.IsZero() {
		l[labelSecurity] = "mutual_tls"
	}
	workloadLabels(l[1:9], k.source, k.peer)
	destination := mesh.Identity{}
	if k.destination != nil {
		destination = k.destination.Identity
	}
	workloadLabels(l[9:17], k.destination, destination)
	if s := k.service; s != nil {
		l[17], l[18], l[19] = string(s.Name.Host), s.Name.Namespace, s.ShortName
	}
	for i := range l[:labelCode] {
		if l[i] == "" {
			l[i] = unknown
		}
	}
	switch k.protocol {
	case 't':
		l[labelProtocol] = "tcp"
		return l
	case 'g':
		l[labelProtocol] = "grpc"
		if l[labelGRPC] = unknown; k.grpc >= 0 {
			l[labelGRPC] = strconv.Itoa(int(k.grpc))
		}
	}
	l[labelCode] = strconv.Itoa(int(k.status))
	return l
}

// workloadLabels fills the eight labels of one end.
func workloadLabels(l []string, w *mesh.Workload, id mesh.Identity) {
	l[4] = id.String()
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

// anonymous returns l without the names of workloads.
func anonymous(l labels) labels {
	for i := 1; i < 17; i++ {
		l[i] = unknown
	}
	return l
}
