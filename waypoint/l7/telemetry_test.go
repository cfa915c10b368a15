package l7

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/route"
	"github.com/weft-mesh/weft/mesh/view"
	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

// served is an exchange that is over.
func served() *Exchange {
	front := &mesh.Workload{UID: "f", Name: mesh.Name{Namespace: "web", Name: "front-1"}, Owner: mesh.Owner{Kind: "deployment", Name: "front"},
		Addresses: []netip.Addr{netip.MustParseAddr("10.0.9.9")}, Identity: mesh.Identity{TrustDomain: "td", Namespace: "web", ServiceAccount: "front"},
		CanonicalName: "front", CanonicalRevision: "v1", Cluster: "k"}
	pod := &mesh.Workload{UID: "c", Name: mesh.Name{Namespace: "shop", Name: "cart-1"}, Identity: mesh.Identity{TrustDomain: "td", Namespace: "shop", ServiceAccount: "cart"},
		CanonicalName: "cart", CanonicalRevision: "v2", Cluster: "k"}
	start := time.Date(2026, 1, 2, 3, 4, 5, 6e6, time.UTC)
	x := &Exchange{
		Facts:   &Facts{Peer: front.Identity, Source: netip.MustParseAddrPort("10.0.9.9:4000"), Destination: netip.MustParseAddrPort("10.96.0.1:80"), Service: cart, Port: 80},
		View:    view.Of("1", []*mesh.Workload{front, pod}, nil, nil),
		Version: HTTP11, OriginalPath: []byte(`/a?b="c`),
		Service: &mesh.Service{Name: cart, ShortName: "cart"}, BackendPort: 80,
		Matched: route.Result{Name: "rule.match"}, Endpoint: newEndpoint(pod, netip.MustParseAddrPort("10.0.0.1:8080")),
		Start: start, Sent: start.Add(time.Millisecond), Answered: start.Add(6 * time.Millisecond), End: start.Add(7500 * time.Microsecond),
		Details: "via_upstream", RequestBytes: 3, ResponseBytes: 1024, RequestHeadBytes: 100, ResponseHeadBytes: 50, RequestID: []byte("id-1"),
	}
	x.known = lookUp(x.View, x.Facts, mesh.Name{})
	x.BackendService = x.Service
	x.Request.Reset()
	x.Response.Reset()
	x.Request.Method, x.Request.Authority, x.Request.Path = []byte("GET"), []byte("cart"), []byte("/a")
	msg.Append(&x.Request, "user-agent", "curl/8")
	msg.Append(&x.Request, "x-forwarded-for", "10.0.9.9")
	x.Response.Status = 200
	return x
}

func TestTextLine(t *testing.T) {
	for _, tc := range []struct {
		name string
		edit func(x *Exchange)
		want string
	}{
		{"a request", func(*Exchange) {}, `[2026-01-02T03:04:05.006Z] "GET /a?b=\x22c HTTP/1.1" 200 - via_upstream - "-" 3 1024 7 5 "10.0.9.9" "curl/8" "id-1" "cart" "10.0.0.1:8080" inbound-vip|80|http|cart.shop.svc.cluster.local - 10.96.0.1:80 10.0.9.9:4000 - rule.match`},
		{"a refusal", func(x *Exchange) {
			x.Response.Status, x.Details, x.Failure, x.Endpoint, x.BackendService, x.Sent = 403, "rbac_access_denied_matched_policy[none]", `no "way"`, nil, nil, time.Time{}
			x.Matched.Name = ""
		}, `[2026-01-02T03:04:05.006Z] "GET /a?b=\x22c HTTP/1.1" 403 - rbac_access_denied_matched_policy[none] - "no \x22way\x22" 3 1024 7 - "10.0.9.9" "curl/8" "id-1" "cart" "-" - - 10.96.0.1:80 10.0.9.9:4000 - -`},
		{"a connection", func(x *Exchange) {
			*x = Exchange{Facts: x.Facts, View: x.View, known: x.known, Start: x.Start, End: x.End, Flags: FlagConnectFailed | FlagDownstreamClosed, Details: "a b", Endpoint: x.Endpoint, BackendService: x.Service, BackendPort: 80}
		}, `[2026-01-02T03:04:05.006Z] "- - -" 0 UF,DC - a_b "-" 0 0 7 - "-" "-" "-" "-" "10.0.0.1:8080" inbound-vip|80|tcp|cart.shop.svc.cluster.local - 10.96.0.1:80 10.0.9.9:4000 - -`},
	} {
		x := served()
		tc.edit(x)
		if got := string(appendTextLine(nil, x, new(stamp))); got != tc.want+"\n" {
			t.Errorf("%s:\n%swant\n%s", tc.name, got, tc.want)
		}
	}
}

func TestJSONLine(t *testing.T) {
	x := served()
	x.OriginalPath = []byte("/\"\\\x01\xff\u20ac")
	x.RequestID = nil
	line := appendJSONLine(nil, x, new(stamp))
	var got map[string]any
	if err := json.Unmarshal(line, &got); err != nil || line[len(line)-1] != '\n' {
		t.Fatalf("%s: %v", line, err)
	}
	for name, want := range map[string]any{
		"start_time": "2026-01-02T03:04:05.006Z", "method": "GET", "path": "/\"\\\x01\ufffd\u20ac", "protocol": "HTTP/1.1", "response_code": 200., "response_flags": "-",
		"response_code_details": "via_upstream", "connection_termination_details": nil, "bytes_received": 3., "bytes_sent": 1024., "duration": 7., "upstream_service_time": 5.,
		"request_id": nil, "authority": "cart", "upstream_host": "10.0.0.1:8080", "upstream_cluster": "inbound-vip|80|http|cart.shop.svc.cluster.local",
		"downstream_local_address": "10.96.0.1:80", "downstream_remote_address": "10.0.9.9:4000", "route_name": "rule.match", "downstream_peer": "spiffe://td/ns/web/sa/front",
	} {
		if v, ok := got[name]; !ok || v != want {
			t.Errorf("%s is %v, want %v", name, v, want)
		}
	}
}

func TestLinesDoNotAllocate(t *testing.T) {
	x, b, s := served(), make([]byte, 0, 4096), new(stamp)
	if n := testing.AllocsPerRun(100, func() { appendTextLine(b, x, s); appendJSONLine(b, x, s) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// slowLog takes nothing until it is told to.
type slowLog struct {
	bytes.Buffer
	writes int
	gate   chan struct{}
}

func (s *slowLog) Write(b []byte) (int, error) {
	<-s.gate
	s.writes++
	return s.Buffer.Write(b)
}

func TestAccessLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &slowLog{gate: make(chan struct{})}
		a := newAccessLog(w, mesh.Name{})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { a.run(ctx); close(done) }()
		x := served()
		for range 60_000 { // more than it holds
			a.OnEnd(x)
		}
		if n := len(a.buf); n > maxLog+4096 {
			t.Errorf("holds %d bytes", n)
		}
		close(w.gate)
		synctest.Wait()
		a.OnEnd(x)
		cancel()
		<-done
		lines, lost := strings.Count(w.String(), "via_upstream"), 0
		for _, told := range strings.Split(w.String(), "lines lost: the log was not read fast enough: ")[1:] { // once or twice, as the goroutines take turns
			var n int
			if _, err := fmt.Sscanf(told, "%d\n", &n); err != nil {
				t.Error(err)
			}
			lost += n
		}
		if lost == 0 || lines+lost != 60_001 {
			t.Errorf("%d lines came, and %d are told to be lost", lines, lost)
		}
		if w.writes > 3 {
			t.Errorf("%d writes for %d lines", w.writes, lines)
		}
	})
}

func TestAccessLogIsAsTheWaypointWantsIt(t *testing.T) {
	name := mesh.Name{Namespace: "shop", Name: "waypoint"}
	for form, want := range map[string]string{"": "", "text": "[", "json": "{"} {
		a, x := newAccessLog(&bytes.Buffer{}, name), served()
		x.View = view.WithL7("1", nil, nil, nil, view.L7{Waypoints: []*mesh.Waypoint{{Name: name, AccessLog: form}}})
		x.known = lookUp(x.View, x.Facts, name)
		a.OnEnd(x)
		if got := string(a.buf); !strings.HasPrefix(got, want) || want == "" && got != "" {
			t.Errorf("%q is written as %q", form, got)
		}
	}
}

func TestMetrics(t *testing.T) {
	const ends = `destination_app="cart",destination_canonical_revision="v2",destination_canonical_service="cart",destination_cluster="k",destination_principal="spiffe://td/ns/shop/sa/cart",` +
		`destination_service="cart.shop.svc.cluster.local",destination_service_name="cart",destination_service_namespace="shop",destination_version="v2",destination_workload="cart-1",destination_workload_namespace="shop",`
	const source = `source_app="front",source_canonical_revision="v1",source_canonical_service="front",source_cluster="k",source_principal="spiffe://td/ns/web/sa/front",source_version="v1",source_workload="front",source_workload_namespace="web"`
	reg := prometheus.NewRegistry()
	m := newMetrics(reg)
	var one memory // all are of one connection: where the last was counted the next may not be
	served := func() *Exchange {
		x := served()
		x.memory = &one
		return x
	}
	x := served()
	m.OnEnd(x)
	grpc := served()
	grpc.GRPC, grpc.RequestMessages, grpc.ResponseMessages, grpc.Flags = true, 2, 5, FlagRetriesExhausted
	grpc.Trailer = &msg.Head{}
	grpc.Trailer.Reset()
	msg.Append(grpc.Trailer, "grpc-status", "14")
	m.OnEnd(grpc)
	m.OnEnd(x)
	liar := served() // at the address of a pod that it is not
	liar.Facts = &Facts{Peer: mesh.Identity{TrustDomain: "td", Namespace: "evil", ServiceAccount: "e"}, Source: liar.Facts.Source}
	liar.known = lookUp(liar.View, liar.Facts, mesh.Name{})
	liar.Endpoint, liar.BackendService, liar.Service, liar.Response.Status = nil, nil, nil, 503
	m.OnEnd(liar)
	tcp := served()
	tcp.Version = NotHTTP
	m.open(tcp)
	m.OnEnd(tcp)
	unknownEnds := strings.NewReplacer(`"cart"`, `"unknown"`, `"v2"`, `"unknown"`, `"k"`, `"unknown"`, `"spiffe://td/ns/shop/sa/cart"`, `"unknown"`, `"cart.shop.svc.cluster.local"`, `"unknown"`, `"shop"`, `"unknown"`, `"cart-1"`, `"unknown"`).Replace(ends)
	want := `istio_requests_total{connection_security_policy="mutual_tls",` + ends + `grpc_response_status="",reporter="waypoint",request_protocol="http",response_code="200",response_flags="-",` + source + `} 2
istio_requests_total{connection_security_policy="mutual_tls",` + ends + `grpc_response_status="14",reporter="waypoint",request_protocol="grpc",response_code="200",response_flags="URX",` + source + `} 1
istio_requests_total{connection_security_policy="mutual_tls",` + unknownEnds + `grpc_response_status="",reporter="waypoint",request_protocol="http",response_code="503",response_flags="-",` +
		`source_app="unknown",source_canonical_revision="unknown",source_canonical_service="unknown",source_cluster="unknown",source_principal="spiffe://td/ns/evil/sa/e",source_version="unknown",source_workload="unknown",source_workload_namespace="evil"} 1
istio_response_messages_total{connection_security_policy="mutual_tls",` + ends + `grpc_response_status="14",reporter="waypoint",request_protocol="grpc",response_code="200",response_flags="URX",` + source + `} 5
istio_tcp_connections_opened_total{connection_security_policy="mutual_tls",` + ends + `reporter="waypoint",request_protocol="tcp",response_flags="-",` + source + `} 1
istio_tcp_sent_bytes_total{connection_security_policy="mutual_tls",` + ends + `reporter="waypoint",request_protocol="tcp",response_flags="-",` + source + `} 1024
`
	got := counters(t, reg, "istio_requests_total", "istio_response_messages_total", "istio_tcp_connections_opened_total", "istio_tcp_sent_bytes_total")
	if d := cmp.Diff(strings.Split(strings.TrimSpace(want), "\n"), got); d != "" {
		t.Errorf("metrics (-want +got):\n%s", d)
	}
	if n := testing.AllocsPerRun(100, func() { m.OnEnd(x) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// counters returns the series of counters as Prometheus writes them.
func counters(t *testing.T, reg *prometheus.Registry, names ...string) (lines []string) {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if !slices.Contains(names, f.GetName()) {
			continue
		}
		for _, m := range f.GetMetric() {
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, fmt.Sprintf("%s=%q", l.GetName(), l.GetValue()))
			}
			lines = append(lines, fmt.Sprintf("%s{%s} %v", f.GetName(), strings.Join(labels, ","), m.GetCounter().GetValue()))
		}
	}
	slices.Sort(lines)
	return lines
}

func TestSeriesAreBounded(t *testing.T) {
	reg := prometheus.NewRegistry()
	m := newMetrics(reg)
	m.limit = 3
	for i := range 50 {
		x := served()
		x.Facts.Peer = mesh.Identity{TrustDomain: "td", Namespace: fmt.Sprint("n", i), ServiceAccount: "a"}
		x.known = lookUp(x.View, x.Facts, mesh.Name{})
		m.OnEnd(x)
	}
	if n := len(counters(t, reg, "istio_requests_total")); n != 4 {
		t.Errorf("%d series, want three and one for the rest", n)
	}
	if len(m.quick) > 2*m.limit {
		t.Errorf("%d keys are kept", len(m.quick))
	}
}

func BenchmarkTextLine(b *testing.B) {
	x, buf, s := served(), make([]byte, 0, 4096), new(stamp)
	b.ReportAllocs()
	for b.Loop() {
		appendTextLine(buf, x, s)
	}
}

func BenchmarkJSONLine(b *testing.B) {
	x, buf, s := served(), make([]byte, 0, 4096), new(stamp)
	b.ReportAllocs()
	for b.Loop() {
		appendJSONLine(buf, x, s)
	}
}

func BenchmarkMetrics(b *testing.B) {
	x, m := served(), newMetrics(prometheus.NewRegistry())
	b.ReportAllocs()
	for b.Loop() {
		m.OnEnd(x)
	}
}
