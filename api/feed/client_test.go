package feed

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/types/known/anypb"

	pb "github.com/weft-mesh/weft/api/workload"
	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/authz"
	"github.com/weft-mesh/weft/mesh/view"
)

func has(i int) func(*view.View) bool {
	return func(v *view.View) bool { return v.ByUID(pod(i).UID) != nil }
}

func TestClientFollowsServer(t *testing.T) {
	w := newWorld(t)
	wl, s, p := full()
	w.server.Update(Resources{Workloads: []mesh.Workload{wl}, Services: []mesh.Service{s}, Policies: []mesh.Policy{p}})
	c := w.proxy(nil)
	if c.store.Load().Synced() {
		t.Fatal("synced before the server was")
	}
	w.server.SetSynced()
	<-c.Synced()
	v := c.store.Load()
	if !v.Synced() {
		t.Fatal("Synced is closed, but the View is not synced")
	}
	same(t, v.ByUID(wl.UID), &wl)
	same(t, v.ServiceByName(s.Name), &s)
	same(t, v.Policy(p.Name), &p)

	w.server.UpdateWorkloads([]mesh.Workload{pod(1)}, nil, time.Now())
	c.until(t, "a new workload", has(1))
	w.server.UpdateWorkloads(nil, []mesh.UID{pod(1).UID}, time.Now())
	c.until(t, "a removed workload", func(v *view.View) bool { return !has(1)(v) })
	w.server.SetPolicies(nil)
	c.until(t, "a removed policy", func(v *view.View) bool { return v.Policy(p.Name) == nil })
	w.server.UpdateWorld(Resources{}, nil, time.Now())
	c.until(t, "a removed service", func(v *view.View) bool { return v.ServiceByName(s.Name) == nil })
	if n := count(c.metrics.messages.WithLabelValues(TypeAddress)); n < 3 {
		t.Errorf("%v messages counted, want at least 3", n)
	}
}

func TestHalfAnAnswerIsNoView(t *testing.T) {
	c := newCache("")
	if err := c.apply(&discovery.DeltaDiscoveryResponse{TypeUrl: TypeAddress}); err != nil {
		t.Fatal(err)
	}
	if c.complete() {
		t.Error("complete without the policies")
	}
	if err := c.apply(&discovery.DeltaDiscoveryResponse{TypeUrl: TypeAuthorization}); err != nil || !c.complete() {
		t.Errorf("not complete after both types were answered (%v)", err)
	}
}

func TestReconnectSendsOnlyDifferences(t *testing.T) {
	w := newWorld(t)
	var ws []mesh.Workload
	for i := range 500 {
		ws = append(ws, pod(i))
	}
	w.server.Update(Resources{Workloads: ws, Policies: []mesh.Policy{deny("a")}})
	w.server.SetSynced()
	c := w.proxy(nil)
	c.until(t, "the mesh", has(499))
	bytes := count(c.metrics.bytes.WithLabelValues(TypeAddress))

	w.stop() // another control service, which knows the same and a little more
	w.start()
	if !has(499)(c.store.Load()) {
		t.Error("the View was dropped with the connection")
	}
	w.server.Update(Resources{Workloads: append(ws[1:], pod(1000)), Policies: []mesh.Policy{deny("a")}})
	w.server.SetSynced()
	c.until(t, "the difference", func(v *view.View) bool { return has(1000)(v) && !has(0)(v) && has(499)(v) })
	more := count(c.metrics.bytes.WithLabelValues(TypeAddress)) - bytes
	if one := bytes / 500; more > 2*one {
		t.Errorf("%v bytes came after the restart, want about %v: one workload", more, one)
	}
	if n := count(c.metrics.terminations); n < 1 {
		t.Errorf("%v terminations counted", n)
	}
}

func TestViewIsKeptWhileTheServerIsNotSynced(t *testing.T) {
	w := newWorld(t)
	w.server.Update(Resources{Workloads: []mesh.Workload{pod(1)}})
	w.server.SetSynced()
	c := w.proxy(nil)
	c.until(t, "the mesh", has(1))
	w.stop()
	w.start() // knows nothing yet
	eventually(t, "the client is back", func() bool {
		w.server.mu.Lock()
		defer w.server.mu.Unlock()
		for st := range w.server.streams {
			return len(st.subs) == 2
		}
		return false
	})
	w.server.UpdateWorkloads([]mesh.Workload{pod(2)}, nil, time.Now())
	if !has(1)(c.store.Load()) {
		t.Fatal("a control service that knows nothing yet emptied the View")
	}
	w.server.UpdateWorkloads([]mesh.Workload{pod(1)}, nil, time.Now())
	w.server.SetSynced()
	c.until(t, "the rest", func(v *view.View) bool { return has(1)(v) && has(2)(v) })
}

func TestClientNacksWhatItCannotRead(t *testing.T) {
	w := newWorld(t)
	bad := func(url, name, content string) *resource {
		return &resource{message: &discovery.Resource{Name: name, Version: "bad", Resource: &anypb.Any{TypeUrl: url, Value: []byte(content)}}}
	}
	w.server.Update(Resources{Workloads: []mesh.Workload{pod(1)}, Policies: []mesh.Policy{deny("a")}})
	w.server.SetSynced()
	c := w.proxy(nil)
	c.until(t, "the mesh", has(1))
	w.server.edit(time.Now(), func() {
		w.server.tables[TypeAuthorization].set(bad(TypeAuthorization, "shop/a", "\xff\xff"))
		w.server.tables[TypeAuthorization].set(bad(TypeAuthorization, "shop/new", "\xff\xff"))
		w.server.tables[TypeAddress].set(bad(TypeAddress, string(pod(1).UID), "\xff\xff"))
		w.server.tables[TypeAddress].set(must(encodeWorkload(pod(2))))
	})
	c.until(t, "the good among the bad", has(2))
	eventually(t, "the rejections are counted", func() bool {
		return count(w.server.metrics.rejects.WithLabelValues("address")) == 1 &&
			count(w.server.metrics.rejects.WithLabelValues("authorization")) == 1
	})
	v := c.store.Load()
	if !has(1)(v) {
		t.Error("a workload that could not be read replaced the one that was known")
	}
	known := deny("a")
	same(t, v.Policy(known.Name), &known)
	p := v.Policy(mesh.Name{Namespace: "shop", Name: "new"})
	if p == nil || p.Scope != mesh.ScopeNamespace || authz.Decide([]*mesh.Policy{p}, nil, authz.Facts{}).Allowed {
		t.Errorf("a policy that could not be read, and was not known, became %+v: want one that denies", p)
	}
	for _, name := range []string{"shop/a", "shop/new"} {
		if !strings.Contains(w.log.String(), name) {
			t.Errorf("the control service's log does not name %s: %s", name, w.log)
		}
	}
	w.server.SetPolicies(nil)
	c.until(t, "the stand-in goes with its resource", func(v *view.View) bool { return v.Policy(p.Name) == nil })
}

func TestRefusedResourcesAreAskedForAgain(t *testing.T) {
	c := newCache("")
	r := &discovery.DeltaDiscoveryResponse{TypeUrl: TypeAuthorization, Resources: []*discovery.Resource{
		{Name: "shop/bad", Version: "1", Resource: &anypb.Any{TypeUrl: TypeAuthorization, Value: []byte{0xff}}},
		must(encodePolicy(deny("good"))).message,
	}}
	if err := c.apply(r); err == nil || !strings.Contains(err.Error(), "shop/bad") || strings.Contains(err.Error(), "shop/good") {
		t.Errorf("error %v, want one that names shop/bad only", err)
	}
	if got := c.versions[TypeAuthorization]; len(got) != 1 || got["shop/good"] == "" {
		t.Errorf("versions are %v, want only that of shop/good", got)
	}
}

func TestResourcesThatAreNotWhatTheyAreCalled(t *testing.T) {
	policy, workload := must(encodePolicy(deny("x"))), must(encodeWorkload(pod(1)))
	for name, x := range map[string]struct {
		url string
		res *discovery.Resource
	}{
		"policy under another name":    {TypeAuthorization, &discovery.Resource{Name: "shop/y", Resource: policy.message.Resource}},
		"workload under another name":  {TypeAddress, &discovery.Resource{Name: "c//Pod/shop/p2", Resource: workload.message.Resource}},
		"workload among policies":      {TypeAuthorization, &discovery.Resource{Name: "shop/y", Resource: workload.message.Resource}},
		"no content":                   {TypeAuthorization, &discovery.Resource{Name: "shop/y"}},
		"neither workload nor service": {TypeAddress, &discovery.Resource{Name: "u", Resource: &anypb.Any{TypeUrl: TypeAddress}}},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCache("")
			if err := c.apply(&discovery.DeltaDiscoveryResponse{TypeUrl: x.url, Resources: []*discovery.Resource{x.res}}); err == nil {
				t.Error("no error")
			}
			if len(c.workloads) != 0 || len(c.services) != 0 || c.policies["shop/x"] != nil {
				t.Error("it was taken all the same")
			}
		})
	}
	if err := newCache("").apply(&discovery.DeltaDiscoveryResponse{TypeUrl: "other"}); err == nil {
		t.Error("a type that was not asked for was accepted")
	}
}

func TestWorkloadStandIn(t *testing.T) {
	m := FromWorkload(pod(1))
	m.Waypoint = &pb.GatewayAddress{}
	x := must(encode(TypeAddress, m.Uid, nil, &pb.Address{Type: &pb.Address_Workload{Workload: m}}))
	r := &discovery.DeltaDiscoveryResponse{TypeUrl: TypeAddress, Resources: []*discovery.Resource{x.message}}
	c := newCache("")
	if err := c.apply(r); err == nil {
		t.Fatal("no error")
	}
	refuses(t, *c.workloads[m.Uid])
	c = newCache("")
	c.setAddress(m.Uid, must(encodeWorkload(pod(1))).message.Resource.Value)
	if err := c.apply(r); err == nil || c.workloads[m.Uid].Transport != mesh.HBONE {
		t.Error("a workload that could not be read replaced the one that was known")
	}
}

func TestClientRefusesAForeignServer(t *testing.T) {
	w := newWorld(t)
	w.server.SetSynced()
	var asked atomic.Int32
	c := w.proxy(func(cfg *ClientConfig) {
		cfg.TLS = func() (*tls.Config, error) {
			return &tls.Config{RootCAs: x509.NewCertPool(), ServerName: "control"}, nil
		}
		cfg.Token = func() (string, error) { asked.Add(1); return token, nil }
	})
	eventually(t, "the refusal is in the log", func() bool { return strings.Contains(c.log.String(), "certificate") })
	if c.store.Load().Synced() || asked.Load() != 0 {
		t.Error("a server that is not verified was given the token or believed")
	}
}

func TestClientGetsThroughTrouble(t *testing.T) {
	w := newWorld(t)
	w.server.SetSynced()
	var tokens, configs atomic.Int32
	c := w.proxy(func(cfg *ClientConfig) {
		cfg.Token = func() (string, error) {
			switch tokens.Add(1) {
			case 1:
				return "", errNoToken
			case 2:
				return "expired", nil
			}
			return token, nil
		}
		good := cfg.TLS
		cfg.TLS = func() (*tls.Config, error) {
			switch configs.Add(1) {
			case 1:
				return nil, fmt.Errorf("no root certificate yet")
			case 2:
				return nil, nil
			}
			return good()
		}
	})
	<-c.Synced()
	for _, want := range []string{"no root certificate yet", "no tls config", errNoToken.Error(), "is not good"} {
		if !strings.Contains(c.log.String(), want) {
			t.Errorf("the log does not say %q:\n%s", want, c.log)
		}
	}
}

func TestComplaints(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out lines
		c := &complaint{to: slog.New(slog.NewTextHandler(&out, nil))} // from info on
		refused, expired := errors.New("refused"), errors.New("expired")
		count := func() int { return strings.Count(out.String(), "\n") }
		for i, tc := range []struct {
			wait, lasted time.Duration
			err          error
			lines        int
			level        string
		}{
			{0, 0, refused, 1, "WARN"},
			{0, 0, refused, 1, "WARN"}, // the same: quiet
			{0, 0, expired, 2, "WARN"},
			{30 * time.Second, 0, expired, 2, "WARN"},
			{30 * time.Second, 0, expired, 3, "WARN"}, // still: say so again
			{0, time.Hour, refused, 4, "INFO"},        // it had worked
		} {
			time.Sleep(tc.wait)
			c.log(tc.lasted, "control:15012", tc.err)
			if n := count(); n != tc.lines || !strings.Contains(out.String()[strings.LastIndex(strings.TrimSpace(out.String()), "\n")+1:], tc.level) {
				t.Errorf("%d: %d lines, want %d, the last one %s:\n%s", i, n, tc.lines, tc.level, out.String())
			}
		}
	})
}

func TestClientStops(t *testing.T) {
	w := newWorld(t)
	w.server.SetSynced()
	c := w.proxy(nil)
	<-c.Synced()
	c.stop()
	hanging := w.proxy(func(cfg *ClientConfig) {
		cfg.dial = func(ctx context.Context, _ string) (net.Conn, error) { <-ctx.Done(); return nil, ctx.Err() }
	})
	hanging.stop()
}

// A control service that vanished without a word must not hold up the way to
// its successor: nobody answers a SYN to an address that is gone.
func TestOneAttemptToConnectIsShort(t *testing.T) {
	w := newWorld(t)
	limits := make(chan time.Duration, 1)
	w.proxy(func(cfg *ClientConfig) {
		cfg.dial = func(ctx context.Context, _ string) (net.Conn, error) {
			deadline, ok := ctx.Deadline()
			if !ok {
				deadline = time.Now().Add(time.Hour)
			}
			select {
			case limits <- time.Until(deadline):
			default:
			}
			return nil, errors.New("gone")
		}
	})
	if limit := <-limits; limit > 5*time.Second {
		t.Errorf("an attempt to connect may last %v, want a few seconds", limit)
	}
}

func TestNodeID(t *testing.T) {
	n := NodeMeta{PodName: "ztunnel-1", Namespace: "weft-system", IP: addr("10.0.0.5"), NodeName: "node1", Cluster: "c"}.proto()
	if want := "ztunnel~10.0.0.5~ztunnel-1.weft-system~weft-system.svc.cluster.local"; n.Id != want {
		t.Errorf("node id is %q, want %q", n.Id, want)
	}
	if got := n.Metadata.AsMap(); got["NODE_NAME"] != "node1" || got["CLUSTER_ID"] != "c" || got["INSTANCE_IPS"] != "10.0.0.5" {
		t.Errorf("metadata is %v", got)
	}
}

func TestClientConfigComplaints(t *testing.T) {
	_, err := NewClient(ClientConfig{})
	for _, want := range []string{"address", "tls", "token", "store", "log"} {
		if err == nil || !strings.Contains(err.Error(), want+" is not set") {
			t.Errorf("error %v does not say that %s is missing", err, want)
		}
	}
}

func TestManyProxies(t *testing.T) {
	w := newWorld(t)
	w.server.SetSynced()
	proxies := make([]*proxy, 10)
	for i := range proxies {
		proxies[i] = w.proxy(nil)
	}
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := range 50 {
				w.server.UpdateWorkloads([]mesh.Workload{pod(g*1000 + i)}, nil, time.Now())
			}
		})
	}
	wg.Wait()
	for _, p := range proxies {
		p.until(t, "every workload", func(v *view.View) bool {
			n := 0
			for range v.Workloads() {
				n++
			}
			return n == 200
		})
	}
}

func mesh5k() Resources {
	var r Resources
	for i := range 250 {
		r.Services = append(r.Services, svc(fmt.Sprintf("s%d.shop.svc.cluster.local", i), fmt.Sprintf("10.96.%d.%d/32", i>>8, i&255)))
	}
	for i := range 5000 {
		r.Workloads = append(r.Workloads, in(pod(i), r.Services[i%250]))
	}
	return r
}

// BenchmarkFirstSync5k is a proxy that comes new to a mesh of 5000 workloads,
// until its View is there.
func BenchmarkFirstSync5k(b *testing.B) {
	w := newWorld(b)
	w.server.Update(mesh5k())
	w.server.SetSynced()
	for b.Loop() {
		c := w.proxy(nil)
		<-c.Synced()
		c.stop()
	}
}

// BenchmarkOneChange5k is one workload that changes in a mesh of 5000, until
// it is in the View of a proxy.
func BenchmarkOneChange5k(b *testing.B) {
	w := newWorld(b)
	w.server.Update(mesh5k())
	w.server.SetSynced()
	c := w.proxy(nil)
	<-c.Synced()
	i := 0
	for b.Loop() {
		i++
		p := pod(7)
		p.CanonicalRevision = fmt.Sprint(i)
		w.server.UpdateWorkloads([]mesh.Workload{p}, nil, time.Now())
		c.until(b, "the change", func(v *view.View) bool { return v.ByUID(p.UID).CanonicalRevision == p.CanonicalRevision })
	}
}

// BenchmarkUpdateUnchanged5k is a whole update in which nothing is new.
func BenchmarkUpdateUnchanged5k(b *testing.B) {
	s := NewServer(slog.New(slog.DiscardHandler), prometheus.NewRegistry(), nil)
	r := mesh5k()
	for b.Loop() {
		s.Update(r)
	}
}
