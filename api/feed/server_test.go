package feed

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"

	"github.com/weft-mesh/weft/mesh"
)

func everything(url string) *discovery.DeltaDiscoveryRequest {
	return &discovery.DeltaDiscoveryRequest{TypeUrl: url, ResourceNamesSubscribe: []string{"*"}}
}

func TestWildcard(t *testing.T) {
	w := newWorld(t)
	s := svc("cart", "10.96.0.1/32")
	w.server.Update(Resources{Workloads: []mesh.Workload{in(pod(1), s), pod(2)}, Services: []mesh.Service{s}, Policies: []mesh.Policy{deny("a")}})
	w.server.SetSynced()
	r := w.raw(token)
	r.send(&discovery.DeltaDiscoveryRequest{TypeUrl: TypeAddress}) // naming nothing is a wildcard
	m := r.want("c//Pod/shop/p1 c//Pod/shop/p2 shop/cart", "")
	if a := m.Resources[0].Aliases; len(a) != 1 || a[0] != "/10.1.0.1" {
		t.Errorf("aliases are %q", a)
	}
	r.send(everything(TypeAuthorization))
	r.want("shop/a", "")

	w.server.UpdateWorkloads([]mesh.Workload{pod(3)}, []mesh.UID{pod(2).UID}, time.Now())
	r.want("c//Pod/shop/p3", "c//Pod/shop/p2")
	w.server.UpdateWorld(Resources{Services: []mesh.Service{s, svc("pay")}, Policies: []mesh.Policy{deny("a")}}, nil, time.Now())
	r.want("shop/pay", "")
	w.server.UpdateWorld(Resources{Policies: []mesh.Policy{deny("a")}}, nil, time.Now())
	r.want("", "shop/cart shop/pay")
	w.server.SetPolicies([]mesh.Policy{deny("b")})
	r.want("shop/b", "")
	r.want("", "shop/a") // in a response of its own, behind the addresses
	w.server.UpdateWorkloads([]mesh.Workload{pod(3)}, nil, time.Now())
	w.server.SetPolicies([]mesh.Policy{deny("b")})
	r.quiet() // nothing has changed
}

func TestEmptyMeshIsAnswered(t *testing.T) {
	w := newWorld(t)
	w.server.SetSynced()
	r := w.raw(token)
	r.send(everything(TypeAddress))
	r.want("", "")
	r.send(everything(TypeAuthorization))
	r.want("", "")
}

func TestNobodyIsAnsweredBeforeSynced(t *testing.T) {
	w := newWorld(t)
	w.server.UpdateWorkloads([]mesh.Workload{pod(1)}, nil, time.Now())
	r := w.raw(token)
	r.send(everything(TypeAddress))
	eventually(t, "the request arrives", func() bool {
		w.server.mu.Lock()
		defer w.server.mu.Unlock()
		for st := range w.server.streams {
			return st.subs[TypeAddress] != nil
		}
		return false
	})
	select {
	case m := <-r.in:
		t.Fatalf("half a mesh was sent: %v", m)
	default:
	}
	w.server.UpdateWorkloads([]mesh.Workload{pod(2)}, nil, time.Now())
	w.server.SetSynced()
	r.want("c//Pod/shop/p1 c//Pod/shop/p2", "") // all in one: the first answer is never half
}

func TestUnauthenticated(t *testing.T) {
	w := newWorld(t)
	w.server.SetSynced()
	r := w.raw("stolen")
	if err := <-r.end; grpcstatus.Code(err) != codes.Unauthenticated {
		t.Errorf("a bad token ends with %v", err)
	}
	if _, err := NewServer(w.server.log, prometheus.NewRegistry(), nil).auth(t.Context()); err == nil {
		t.Error("without an auth function everybody may subscribe")
	}
}

func TestRefusalKeepsItsCode(t *testing.T) {
	for _, tc := range []struct {
		err  error
		want codes.Code
	}{
		{errors.New("no token"), codes.Unauthenticated},
		{grpcstatus.Error(codes.PermissionDenied, "not a node"), codes.PermissionDenied},
		{grpcstatus.Error(codes.Unavailable, "the API server is away"), codes.Unavailable},
		{fmt.Errorf("review: %w", grpcstatus.Error(codes.Unavailable, "away")), codes.Unavailable},
		{okError{}, codes.Unauthenticated},
	} {
		w := newWorld(t)
		w.server.auth = func(context.Context) (Subscriber, error) { return Subscriber{}, tc.err }
		w.server.SetSynced()
		if err := <-w.raw(token).end; grpcstatus.Code(err) != tc.want {
			t.Errorf("auth failed with %v, the subscriber sees %v; want %v", tc.err, err, tc.want)
		}
	}
}

// okError is an error that claims to be none.
type okError struct{}

func (okError) Error() string                  { return "not so" }
func (okError) GRPCStatus() *grpcstatus.Status { return grpcstatus.New(codes.OK, "") }

func TestSlowSubscriberGetsTheNewestState(t *testing.T) {
	w := newWorld(t)
	w.server.SetSynced()
	r := w.raw(token)
	r.send(everything(TypeAddress))
	first := r.next() // not acknowledged
	for i := range 1000 {
		p := pod(1)
		p.CanonicalRevision = fmt.Sprint(i)
		w.server.UpdateWorkloads([]mesh.Workload{p, pod(i + 2)}, []mesh.UID{pod(i + 1).UID}, time.Now())
	}
	last := pod(1)
	last.CanonicalRevision = "last"
	w.server.UpdateWorkloads([]mesh.Workload{last}, nil, time.Now())
	r.ack(first)
	m := r.next()
	if len(m.Resources) != 2 {
		t.Fatalf("got %d resources after 1000 changes of 2, want 2", len(m.Resources))
	}
	want := must(encodeWorkload(last))
	for _, x := range m.Resources {
		if x.Name == want.name() && x.Version != want.version() {
			t.Error("the state sent is not the newest")
		}
	}
	r.ack(m)
	r.quiet()
}

func TestResume(t *testing.T) {
	w := newWorld(t)
	w.server.UpdateWorkloads([]mesh.Workload{pod(1), pod(2), pod(3)}, nil, time.Now())
	w.server.SetSynced()
	req := everything(TypeAddress)
	req.InitialResourceVersions = map[string]string{
		string(pod(1).UID): must(encodeWorkload(pod(1))).version(), // the same
		string(pod(2).UID): "old",
		string(pod(9).UID): "gone",
	}
	r := w.raw(token)
	r.send(req)
	r.want("c//Pod/shop/p2 c//Pod/shop/p3", "c//Pod/shop/p9")
	r.quiet()
}

func TestNack(t *testing.T) {
	w := newWorld(t)
	w.server.UpdateWorkloads([]mesh.Workload{pod(1)}, nil, time.Now())
	w.server.SetSynced()
	r := w.raw(token)
	r.send(everything(TypeAddress))
	m := r.next()
	r.send(&discovery.DeltaDiscoveryRequest{TypeUrl: TypeAddress, ResponseNonce: m.Nonce, ErrorDetail: &status.Status{Message: "pod p1 is odd"}})
	w.server.UpdateWorkloads([]mesh.Workload{pod(2)}, nil, time.Now())
	r.want("c//Pod/shop/p2", "") // not p1 again and again
	if n := count(w.server.metrics.rejects.WithLabelValues("address")); n != 1 {
		t.Errorf("%v rejects counted, want 1", n)
	}
	if !strings.Contains(w.log.String(), "pod p1 is odd") {
		t.Errorf("the rejection is not in the log: %s", w.log)
	}
}

func TestOnDemand(t *testing.T) {
	w := newWorld(t)
	cart := svc("cart", "10.96.0.1/32")
	wide := svc("wide", "10.97.0.0/16")
	narrow := svc("narrow", "10.97.1.0/24")
	w.server.Update(Resources{
		Workloads: []mesh.Workload{in(pod(1), cart), in(pod(2), cart), pod(3), pod(4)},
		Services:  []mesh.Service{cart, wide, narrow}, Policies: []mesh.Policy{deny("a")},
	})
	w.server.SetSynced()
	r := w.raw(token)
	r.send(&discovery.DeltaDiscoveryRequest{TypeUrl: TypeAddress, ResourceNamesSubscribe: []string{"*"}, ResourceNamesUnsubscribe: []string{"*"}})
	r.want("", "")
	r.send(everything(TypeAuthorization))
	r.want("shop/a", "")
	ask := func(keys ...string) {
		r.send(&discovery.DeltaDiscoveryRequest{TypeUrl: TypeAddress, ResourceNamesSubscribe: keys})
	}
	ask("/10.1.0.3")
	m := r.want("c//Pod/shop/p3", "")
	if a := m.Resources[0].Aliases; len(a) != 1 || a[0] != "/10.1.0.3" {
		t.Errorf("the alias that was asked for is not in %q", a)
	}
	ask("/10.96.0.1")
	r.want("c//Pod/shop/p1 c//Pod/shop/p2 shop/cart", "")
	ask("/10.97.1.1")
	r.want("shop/narrow", "")
	ask("/10.97.2.1")
	r.want("shop/wide", "")
	ask("/8.8.8.8", "other/10.1.0.3")
	r.want("", "/8.8.8.8 other/10.1.0.3")
	ask("c//Pod/shop/p3")
	r.want("c//Pod/shop/p3", "") // asked again: answered again

	w.server.UpdateWorkloads([]mesh.Workload{in(pod(5), cart), pod(6)}, []mesh.UID{pod(1).UID, pod(4).UID}, time.Now())
	r.want("c//Pod/shop/p5", "c//Pod/shop/p1") // what the service needs; not p4 and p6
	r.send(&discovery.DeltaDiscoveryRequest{TypeUrl: TypeAddress, ResourceNamesUnsubscribe: []string{"/10.97.1.1"}})
	r.want("", "shop/narrow")
	eight := pod(8)
	eight.Addresses[0] = addr("8.8.8.8")
	w.server.UpdateWorkloads([]mesh.Workload{eight}, nil, time.Now())
	r.want("c//Pod/shop/p8", "") // was asked for before it was there
	r.quiet()
}

func TestByNameBesideWildcard(t *testing.T) {
	w := newWorld(t)
	w.server.UpdateWorkloads([]mesh.Workload{pod(1), pod(2)}, nil, time.Now())
	w.server.SetSynced()
	r := w.raw(token)
	r.send(everything(TypeAddress))
	r.want("c//Pod/shop/p1 c//Pod/shop/p2", "")
	r.send(&discovery.DeltaDiscoveryRequest{TypeUrl: TypeAddress, ResourceNamesSubscribe: []string{"/10.1.0.2"}})
	r.want("c//Pod/shop/p2", "")
	r.quiet()
}

func TestPoliciesGoBeforeTheWorkloadsThatListThem(t *testing.T) {
	w := newWorld(t)
	w.server.Update(Resources{Workloads: []mesh.Workload{pod(1)}, Policies: []mesh.Policy{deny("a")}})
	w.server.SetSynced()
	r := w.raw(token)
	r.send(everything(TypeAddress))
	r.want("c//Pod/shop/p1", "")
	r.send(everything(TypeAuthorization))
	r.want("shop/a", "")
	lists := pod(1)
	lists.Policies = []mesh.Name{{Namespace: "shop", Name: "b"}}
	w.server.Update(Resources{Workloads: []mesh.Workload{lists}, Policies: []mesh.Policy{deny("b")}})
	r.want("shop/b", "")
	r.want("c//Pod/shop/p1", "")
	r.want("", "shop/a")
}

func TestLargeUpdatesAreCut(t *testing.T) {
	w := newWorld(t)
	w.server.SetSynced()
	r := w.raw(token)
	r.send(everything(TypeAddress))
	r.want("", "")
	var ws []mesh.Workload
	for i := range 400 {
		p := pod(i)
		p.CanonicalName = strings.Repeat("x", 20_000)
		ws = append(ws, p)
	}
	w.server.UpdateWorkloads(ws, nil, time.Now())
	n, responses := 0, 0
	for n < len(ws) {
		m := r.next()
		size := 0
		for _, x := range m.Resources {
			size += len(x.Resource.Value)
		}
		if size > maxResponse {
			t.Errorf("a response carries %d bytes, want at most %d", size, maxResponse)
		}
		n += len(m.Resources)
		responses++
		r.ack(m)
	}
	if n != len(ws) || responses != 3 {
		t.Errorf("%d resources in %d responses, want %d in 3", n, responses, len(ws))
	}
	second := w.raw(token)
	second.send(everything(TypeAddress))
	if m := second.next(); len(m.Resources) != len(ws) {
		t.Errorf("the first answer has %d resources, want all %d: a proxy takes it for the whole mesh", len(m.Resources), len(ws))
	}
}

func TestUnknownTypeIsIgnored(t *testing.T) {
	w := newWorld(t)
	w.server.SetSynced()
	r := w.raw(token)
	r.send(everything("type.googleapis.com/envoy.config.cluster.v3.Cluster"))
	r.send(everything(TypeAddress))
	r.want("", "")
}

func TestStreamsAreForgotten(t *testing.T) {
	w := newWorld(t)
	w.server.SetSynced()
	r := w.raw(token)
	r.send(everything(TypeAddress))
	r.want("", "")
	if n := count(w.server.metrics.connected); n != 1 {
		t.Errorf("%v connected, want 1", n)
	}
	r.rpc.CloseSend()
	eventually(t, "the stream is forgotten", func() bool {
		return count(w.server.metrics.connected) == 0
	})
	w.server.mu.Lock()
	defer w.server.mu.Unlock()
	if len(w.server.streams) != 0 {
		t.Errorf("%d streams are left", len(w.server.streams))
	}
}

func TestJournalStaysSmall(t *testing.T) {
	w := newWorld(t)
	for i := range 50_000 {
		w.server.UpdateWorkloads([]mesh.Workload{pod(i % 60_000)}, []mesh.UID{pod(i - 1).UID}, time.Now())
	}
	if tb := w.server.tables[TypeAddress]; len(tb.journal) > 4096 || len(tb.changed) > 4096 {
		t.Errorf("with one workload the journal has %d entries, and %d names are remembered", len(tb.journal), len(tb.changed))
	}
}
