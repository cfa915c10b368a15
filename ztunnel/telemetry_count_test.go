package ztunnel

import (
	"errors"
	"fmt"
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

// A node that runs one batch job after another does not remember them all.
func TestMetricsOfTheLongGoneAreForgotten(t *testing.T) {
	reg := prometheus.NewRegistry()
	tel := newTelemetry(reg, newAccessLog(nil, false, nil))
	begin := func(i int) *flow {
		w := workload(fmt.Sprint("job-", i), "10.0.0.2")
		f := newFlow(outbound, at("10.0.0.2:40000"), parties{source: &w})
		f.plain = &plainFlow{stats: new(relay.Stats)}
		tel.begin(f)
		return f
	}
	const more, all = 50, maxTuples + 50
	var held []*flow
	for i := range all {
		f := begin(i)
		switch {
		case i < more/2:
			held = append(held, f)
		case i%2 == 0:
			tel.end(f, denyf("no"))
		default:
			tel.end(f, nil)
		}
	}
	series := func() map[string]int {
		families, err := reg.Gather()
		if err != nil {
			t.Fatal(err)
		}
		n := map[string]int{}
		for _, f := range families {
			n[f.GetName()] = len(f.GetMetric())
		}
		return n
	}
	for range looksToForget - 1 {
		tel.forget()
	}
	if n := series()["istio_tcp_connections_opened_total"]; n != all {
		t.Fatalf("%d series, want all %d: they were just used", n, all)
	}
	tel.forget()
	if n := series()["istio_tcp_connections_opened_total"]; n != all-forgetAtOnce {
		t.Errorf("%d series were dropped at once, want %d", all-n, forgetAtOnce)
	}
	for range more {
		tel.forget()
	}
	n := series()
	for _, name := range []string{"istio_tcp_connections_opened_total", "istio_tcp_sent_bytes_total", "istio_tcp_received_bytes_total", "istio_tcp_sockets_open"} {
		if n[name] != maxTuples {
			t.Errorf("%d series of %s, want %d", n[name], name, maxTuples)
		}
	}
	// Each tuple that failed has one more, with its flag.
	if closed, failed := n["istio_tcp_connections_closed_total"], n["istio_tcp_connections_failed_total"]; closed != maxTuples+failed || failed == 0 {
		t.Errorf("%d series of closed connections and %d of failed ones", closed, failed)
	}
	if got := len(tel.cache); got != maxTuples {
		t.Errorf("%d are remembered, want %d", got, maxTuples)
	}
	// What is open is never forgotten, and who comes back counts from zero.
	if got := sums(t, reg)["istio_tcp_sockets_open"]; got != float64(len(held)) {
		t.Errorf("%v connections are open, want %d", got, len(held))
	}
	for _, f := range held {
		tel.end(f, nil)
	}
	if got := sums(t, reg); got["istio_tcp_sockets_open"] != 0 || got["istio_tcp_connections_opened_total"] != maxTuples {
		t.Errorf("%v", got)
	}
	for i := range all {
		tel.end(begin(i), nil)
	}
	if got := sums(t, reg)["istio_tcp_connections_opened_total"]; got != maxTuples+all {
		t.Errorf("%v opened, want %d", got, maxTuples+all)
	}
}
