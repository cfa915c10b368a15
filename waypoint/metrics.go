package waypoint

import (
	"net/url"
	"strings"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/weft-mesh/weft/mesh"
)

// metrics are those of tunnels; the engine has those of requests.
type metrics struct {
	tunnels, connections prometheus.Gauge
	refused              prometheus.Counter
}

func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{
		tunnels:     prometheus.NewGauge(prometheus.GaugeOpts{Name: "weft_waypoint_tunnels", Help: "Tunnels from clients that are open."}),
		connections: prometheus.NewGauge(prometheus.GaugeOpts{Name: "weft_waypoint_connections", Help: "Connections of clients that are open."}),
		refused:     prometheus.NewCounter(prometheus.CounterOpts{Name: "weft_waypoint_refused_total", Help: "Connections that asked for what is not behind this waypoint."}),
	}
	if reg != nil {
		reg.MustRegister(m.tunnels, m.connections, m.refused)
	}
	return m
}

// baggage says which workload opened a connection, for the telemetry of the
// other end. It proves nothing. w may be nil.
func baggage(w *mesh.Workload, cluster string) string {
	if w == nil {
		return ""
	}
	kind, name := w.Owner.Kind, w.Owner.Name
	if kind == "" || name == "" {
		kind, name = "pod", w.Name.Name
	}
	if w.Cluster != "" {
		cluster = w.Cluster
	}
	var b strings.Builder
	for _, m := range [][2]string{
		{"k8s.cluster.name", cluster},
		{"k8s.namespace.name", w.Name.Namespace},
		{"k8s." + kind + ".name", name},
		{"service.name", w.CanonicalName},
		{"service.version", w.CanonicalRevision},
	} {
		if m[1] == "" {
			continue
		}
		if b.Len() > 0 {
			b.WriteByte(',')
		}
		b.WriteString(m[0] + "=" + url.PathEscape(m[1])) // W3C baggage 3.3.1.3: percent-encoded
	}
	return b.String()
}
