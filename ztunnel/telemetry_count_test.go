package ztunnel

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/weft-mesh/weft/internal/relay"
)

// sums adds up each metric over its labels.
func sums(t *testing.T, reg *prometheus.Registry) map[string]float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			got[f.GetName()] += m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	return got
}

func TestConnectionsAreCounted(t *testing.T) {
	reg := prometheus.NewRegistry()
	tel := newTelemetry(reg, newAccessLog(nil, false, nil))
	var open []*flow
	for range 4 {
		f := newFlow(outbound, netip.AddrPort{}, parties{})
		f.plain = &plainFlow{stats: new(relay.Stats)}
		tel.begin(f)
		open = append(open, f)
	}
	tel.end(open[0], nil)
	tel.end(open[1], denyf("no"))
	tel.end(open[2], connectError(errors.New("nobody there")))
	for _, n := range []float64{1, 3, 2} {
		tel.pods.Set(n)
	}
	got := sums(t, reg)
	for name, want := range map[string]float64{
		"istio_tcp_connections_opened_total": 4, "istio_tcp_connections_closed_total": 3,
		"istio_tcp_connections_failed_total": 2, "istio_tcp_sockets_open": 1,
		"workload_manager_active_proxy_count": 2, "workload_manager_proxies_started_total": 3, "workload_manager_proxies_stopped_total": 1,
	} {
		if got[name] != want {
			t.Errorf("%s is %v, want %v", name, got[name], want)
		}
	}
}
