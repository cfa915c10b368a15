package ztunnel

import (
	"bytes"
	"encoding/json"
	"errors"
	"log/slog"
	"net/netip"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/weft-mesh/weft/internal/relay"
	"github.com/weft-mesh/weft/mesh"
)

func at(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

func TestAccessLine(t *testing.T) {
	start := time.Date(2026, 11, 21, 7, 42, 19, 0, time.UTC)
	client, server := workload("client", "10.0.0.2"), workload("server", "10.0.0.4")
	s := service("server", "10.96.0.1")
	stats := new(relay.Stats)
	stats.Sent.Store(100)
	stats.Received.Store(2000)
	full := newFlow(outbound, at("10.0.0.2:40000"), parties{
		source: &client, destination: &server, service: &s, sourceID: client.Identity,
		dst: at("10.0.0.4:15008"), target: at("10.0.0.4:8080"),
	})
	full.destinationID = &server.Identity
	plain := newFlow(inbound, at("[fd00::9%eth0]:1234"), parties{destination: &server, dst: at("[fd00::4]:8080")})
	for _, f := range []*flow{full, plain} {
		f.start, f.plain = start.UnixNano(), &plainFlow{stats: stats}
	}
	tests := []struct {
		name string
		f    *flow
		why  string
		err  error
		want string
		json string
	}{
		{"a tunnel", full, "", nil,
			"2026-11-21T07:42:20.500000Z\tinfo\taccess\tconnection complete\t" +
				`src.addr=10.0.0.2:40000 src.workload="client" src.namespace="shop" src.identity="spiffe://cluster.local/ns/shop/sa/client" src.cluster="Kubernetes" ` +
				`dst.addr=10.0.0.4:15008 dst.hbone_addr=10.0.0.4:8080 dst.service="server.shop.svc.cluster.local" dst.workload="server" dst.namespace="shop" dst.identity="spiffe://cluster.local/ns/shop/sa/server" dst.cluster="Kubernetes" ` +
				`direction="outbound" bytes_sent=100 bytes_recv=2000 duration="1500ms"` + "\n",
			`{"time":"2026-11-21T07:42:20.500000Z","level":"info","msg":"connection complete","scope":"access",` +
				`"src.addr":"10.0.0.2:40000","src.workload":"client","src.namespace":"shop","src.identity":"spiffe://cluster.local/ns/shop/sa/client","src.cluster":"Kubernetes",` +
				`"dst.addr":"10.0.0.4:15008","dst.hbone_addr":"10.0.0.4:8080","dst.service":"server.shop.svc.cluster.local","dst.workload":"server","dst.namespace":"shop","dst.identity":"spiffe://cluster.local/ns/shop/sa/server","dst.cluster":"Kubernetes",` +
				`"direction":"outbound","bytes_sent":100,"bytes_recv":2000,"duration":"1500ms"}` + "\n"},
		{"a plain one that was let in and failed, with a line break in the reason", plain, "allowed by policy shop/web", errors.New("no\nway \"out\"\x00"),
			"2026-11-21T07:42:20.500000Z\terror\taccess\tconnection complete\t" +
				`src.addr=[fd00::9]:1234 dst.addr=[fd00::4]:8080 dst.workload="server" dst.namespace="shop" dst.cluster="Kubernetes" ` +
				`direction="inbound" bytes_sent=2000 bytes_recv=100 duration="1500ms" policy="allowed by policy shop/web" error="no\nway \"out\"\x00"` + "\n",
			`{"time":"2026-11-21T07:42:20.500000Z","level":"error","msg":"connection complete","scope":"access",` +
				`"src.addr":"[fd00::9]:1234","dst.addr":"[fd00::4]:8080","dst.workload":"server","dst.namespace":"shop","dst.cluster":"Kubernetes",` +
				`"direction":"inbound","bytes_sent":2000,"bytes_recv":100,"duration":"1500ms","policy":"allowed by policy shop/web","error":"no\nway \"out\"\u0000"}` + "\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for json, want := range map[bool]string{false: tt.want, true: tt.json} {
				a := newAccessLog(nil, json, nil)
				a.now = func() time.Time { return start.Add(1500 * time.Millisecond) }
				if diff := cmp.Diff(want, string(a.appendLine(nil, tt.f, tt.why, tt.err))); diff != "" {
					t.Error(diff)
				}
			}
		})
	}
}

// The level of the log counts for connections too, also when it changes.
func TestAccessLevel(t *testing.T) {
	f := newFlow(outbound, netip.AddrPort{}, parties{})
	f.plain = &plainFlow{stats: new(relay.Stats)}
	level := new(slog.LevelVar)
	var out bytes.Buffer
	a := newAccessLog(&out, false, level)
	for _, l := range []slog.Level{slog.LevelDebug, slog.LevelInfo, slog.LevelWarn, slog.LevelError} {
		level.Set(l)
		a.write(f, nil)
		a.write(f, errors.New("failed"))
	}
	a.flush(nil)
	if ok, failed := strings.Count(out.String(), "\tinfo\t"), strings.Count(out.String(), "\terror\t"); ok != 2 || failed != 4 {
		t.Errorf("%d lines of connections that went well, want 2; %d of others, want 4\n%s", ok, failed, &out)
	}
}

// Lines that find no room are counted, in the form of all lines.
func TestAccessLinesLost(t *testing.T) {
	f := newFlow(outbound, netip.AddrPort{}, parties{})
	f.plain = &plainFlow{stats: new(relay.Stats)}
	for json, want := range map[bool]string{
		false: "\terror\taccess\tlines lost: the log was not read fast enough\tlines=2\n",
		true:  `"level":"error","msg":"lines lost: the log was not read fast enough","scope":"access","lines":2}` + "\n",
	} {
		var out bytes.Buffer
		a := newAccessLog(&out, json, nil)
		a.buf = make([]byte, maxLog+1)
		a.write(f, nil)
		a.write(f, nil)
		a.flush(nil)
		if !strings.HasSuffix(out.String(), want) {
			t.Errorf("ends with %.200q, want %q", out.String()[maxLog:], want)
		}
	}
}

// Dashboards name these labels; their number is the size of labels.
func TestLabels(t *testing.T) {
	if got, want := len(labelNames()), len(labels{}); got != want {
		t.Fatalf("%d names for %d labels", got, want)
	}
	if labelNames()[flagLabel] != "response_flags" {
		t.Errorf("label %d is %s, want response_flags", flagLabel, labelNames()[flagLabel])
	}
	client := with(workload("client", "10.0.0.2"), func(w *mesh.Workload) {
		w.Owner, w.CanonicalName, w.CanonicalRevision = mesh.Owner{Kind: "deployment", Name: "web"}, "web-app", "v2"
	})
	server := workload("server", "10.0.0.4")
	s := service("server", "10.96.0.1")
	got := map[string]string{}
	f := newFlow(inbound, at("10.0.0.2:40000"), parties{source: &client, sourceID: client.Identity, destination: &server, service: &s})
	f.mutualTLS = true
	l := tupleOf(f).text()
	for i, n := range labelNames() {
		got[n] = l[i]
	}
	want := map[string]string{
		"reporter":        "destination",
		"source_workload": "web", "source_canonical_service": "web-app", "source_canonical_revision": "v2", "source_workload_namespace": "shop",
		"source_principal": "spiffe://cluster.local/ns/shop/sa/client", "source_app": "web-app", "source_version": "v2", "source_cluster": "Kubernetes",
		"destination_service": "server.shop.svc.cluster.local", "destination_service_namespace": "shop", "destination_service_name": "server",
		"destination_workload": "server", "destination_canonical_service": "unknown", "destination_canonical_revision": "unknown", "destination_workload_namespace": "shop",
		"destination_principal": "spiffe://cluster.local/ns/shop/sa/server", "destination_app": "unknown", "destination_version": "unknown", "destination_cluster": "Kubernetes",
		"request_protocol": "tcp", "response_flags": "-", "connection_security_policy": "mutual_tls",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// Bytes are counted while a connection is open, and none twice.
func TestProgress(t *testing.T) {
	reg := prometheus.NewRegistry()
	tel := newTelemetry(reg, &accessLog{})
	f := newFlow(outbound, netip.AddrPort{}, parties{})
	f.plain = &plainFlow{stats: new(relay.Stats)}
	tel.begin(f)
	for _, n := range []int64{5, 12, 12, 40} {
		f.plain.stats.Sent.Store(n)
		tel.progress(f)
	}
	fs, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range fs {
		if m.GetName() == "istio_tcp_received_bytes_total" {
			if got := m.GetMetric()[0].GetCounter().GetValue(); got != 40 {
				t.Errorf("%v bytes counted, want 40", got)
			}
			return
		}
	}
	t.Error("nothing was counted")
}

func TestHeaders(t *testing.T) {
	if got, want := forwarded(netip.MustParseAddrPort("[fd00::1]:80")), `for="[fd00::1]:80"`; got != want {
		t.Errorf("forwarded %s, want %s", got, want)
	}
	w := workload("web-1", "10.0.0.2")
	w.Owner, w.CanonicalName, w.CanonicalRevision = mesh.Owner{Kind: "deployment", Name: "web"}, "web, the app", "v=1"
	w.Locality = mesh.Locality{Region: "r1", Zone: "z1"}
	want := "k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.deployment.name=web,service.name=web%2C%20the%20app,service.version=v=1,cloud.region=r1,cloud.availability_zone=z1"
	if got := baggage(&w, "else"); got != want {
		t.Errorf("baggage\n%s, want\n%s", got, want)
	}
	if got := baggage(nil, "c"); got != "" {
		t.Errorf("baggage of nobody: %q", got)
	}
	a, b := traceparent(), traceparent()
	if !regexp.MustCompile(`^00-[0-9a-f]{32}-[0-9a-f]{16}-00$`).MatchString(a) || a == b {
		t.Errorf("traceparents %s and %s", a, b)
	}
}

func TestDumpShape(t *testing.T) {
	p := newPair(t, echo)
	p.setPolicies(allowOnly("allow-client", "client"))
	c := p.client.dial(p.service)
	if err := roundTrip(c, "open"); err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(p.serverNode.Dump())
	if err != nil {
		t.Fatal(err)
	}
	var d struct {
		Workloads []struct {
			UID, Name, Protocol, Status, ServiceAccount string
			WorkloadIps                                 []string
		}
		Services []struct {
			Hostname  string
			Vips      []string
			Endpoints map[string]struct{ WorkloadUID string }
		}
		Policies []struct {
			Name, Scope, Action string
			Rules               [][][]map[string]any
		}
		Certificates []struct {
			Identity, State string
			CertChain       []map[string]any
		}
		WorkloadState map[string]struct {
			State       string
			Connections struct {
				Inbound []struct{ Src, OriginalDst, ActualDst, Protocol string }
			}
			Info struct{ Name, Namespace, TrustDomain, ServiceAccount string }
		}
	}
	if err := json.Unmarshal(b, &d); err != nil {
		t.Fatal(err)
	}
	if len(d.Workloads) != 2 || d.Workloads[1].Protocol != "HBONE" || d.Workloads[1].Status != "Healthy" || len(d.Workloads[1].WorkloadIps) != 1 {
		t.Errorf("workloads: %+v", d.Workloads)
	}
	if len(d.Services) != 1 || len(d.Services[0].Endpoints) != 1 || !strings.HasPrefix(d.Services[0].Vips[0], "/127.") {
		t.Errorf("services: %+v", d.Services)
	}
	if len(d.Policies) != 1 || d.Policies[0].Scope != "Namespace" || d.Policies[0].Action != "Allow" || len(d.Policies[0].Rules[0][0]) != 1 {
		t.Errorf("policies: %+v", d.Policies)
	}
	if len(d.Certificates) != 1 || d.Certificates[0].Identity != "spiffe://cluster.local/ns/shop/sa/server" || d.Certificates[0].State != "Available" {
		t.Errorf("certificates: %+v", d.Certificates)
	}
	state := d.WorkloadState[p.server.uid]
	if state.State != "Up" || state.Info.ServiceAccount != "server" || len(state.Connections.Inbound) != 1 {
		t.Fatalf("state: %+v", state)
	}
	in := state.Connections.Inbound[0]
	if in.Protocol != "HBONE" || in.OriginalDst != p.app.String() || !strings.HasPrefix(in.Src, p.client.addr.String()+":") {
		t.Errorf("connection: %+v", in)
	}
	if strings.Contains(string(b), "PRIVATE") {
		t.Error("there is a key in the dump")
	}
}
