package ztunnel

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/weft-mesh/weft/hbone"
	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/authz"
	"github.com/weft-mesh/weft/mesh/view"
)

// A waypointPair is a client and a server behind a waypoint, which is not there
// yet.
func newWaypointPair(t *testing.T, hold time.Duration) *pair {
	t.Helper()
	w := newWorld(t)
	p := &pair{world: w, clientNode: w.node(func(c *Config) { c.HoldTimeout = hold }), serverNode: w.node(nil)}
	p.client = p.clientNode.add("client", nil)
	p.server = p.serverNode.add("server", nil)
	p.app = p.server.app(echo)
	p.service = w.publish("server", p.client, p.server, p.app.Port(), func(s *mesh.Service) {
		s.Waypoint = mesh.GatewayRef{Service: serviceName("waypoint")}
	})
	return p
}

// unbind takes the waypoint from every service.
func (w *world) unbind() {
	w.change(func(w *world) {
		ss := append([]mesh.Service(nil), w.ss...)
		for i := range ss {
			ss[i].Waypoint = mesh.GatewayRef{}
		}
		w.ss = ss
	})
}

// A connection whose waypoint is not there waits for it, and then is refused: it
// never goes to the server directly.
func TestHeldThenRefused(t *testing.T) {
	p := newWaypointPair(t, 300*time.Millisecond)
	start := time.Now()
	c := p.client.dial(p.service)
	if err := roundTrip(c, "hello"); err == nil {
		t.Fatal("served without the waypoint")
	}
	if held := time.Since(start); held < 300*time.Millisecond {
		t.Errorf("held for %v only", held)
	}
	if got := p.client.outlet.dialed(); len(got) != 0 {
		t.Errorf("dialed %v", got)
	}
	line := p.clientNode.logged(`direction="outbound"`, "error=")
	for _, want := range []string{"held for", "never goes around", "is not there"} {
		if !strings.Contains(line, want) {
			t.Errorf("no %q in %s", want, line)
		}
	}
}

// A held connection goes on as soon as the View says how.
func TestHeldUntilTheViewChanges(t *testing.T) {
	p := newWaypointPair(t, 20*time.Second)
	c := p.client.dial(p.service)
	done := make(chan error, 1)
	go func() { done <- roundTrip(c, "hello") }()
	eventually(t, "the connection", func() bool { return p.clientNode.arriving.Load() == 0 && p.heldConnections() == 1 })
	p.unbind()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func (p *pair) heldConnections() int64 {
	p.clientNode.mu.Lock()
	defer p.clientNode.mu.Unlock()
	var n int64
	for _, q := range p.clientNode.pods {
		n += q.open.Load()
	}
	return n
}

// Of two replicas one that cannot be reached is passed over.
func TestAnotherReplicaIsTried(t *testing.T) {
	p := newWaypointPair(t, 10*time.Second)
	replica := func(name string, n *node) *testPod {
		return n.add(name, func(w *mesh.Workload) {
			w.Identity.ServiceAccount = name
			w.Services = []mesh.Membership{{Service: serviceName("waypoint"), Ports: []mesh.Port{{Service: hbone.Port, Target: hbone.Port}}}}
		})
	}
	// A pod with a ztunnel stands for the waypoint: that it takes a tunnel, and
	// what it is asked for, is what counts here.
	up := replica("up", p.serverNode)
	gone := freshAddr()
	p.change(func(w *world) {
		dead := workload("gone", gone.String())
		dead.Services = []mesh.Membership{{Service: serviceName("waypoint"), Ports: []mesh.Port{{Service: hbone.Port, Target: hbone.Port}}}}
		w.ws = append(w.ws, dead)
		w.ss = append(w.ss, service("waypoint", freshAddr().String()))
	})
	for range 20 { // by chance each of the two comes first
		c := p.client.dial(p.service)
		_ = roundTrip(c, "hello") // the pod says that it is no waypoint
		c.Close()
	}
	eventually(t, "all connections at the replica that is up", func() bool {
		return strings.Count(strings.Join(p.serverNode.log.lines(), "\n"), "refused: the tunnel asks for") == 20
	})
	var dead, live bool
	for _, a := range p.client.outlet.dialed() {
		dead = dead || a.Addr() == gone
		live = live || a.Addr() == up.addr
	}
	if !dead || !live {
		t.Errorf("dialed %v: want both replicas tried", p.client.outlet.dialed())
	}
}

func TestPlanAvoidsReplicas(t *testing.T) {
	ref := mesh.GatewayRef{Service: serviceName("waypoint")}
	replica := func(name, ip string) mesh.Workload {
		w := workload(name, ip)
		w.Services = []mesh.Membership{{Service: serviceName("waypoint"), Ports: []mesh.Port{{Service: hbone.Port, Target: hbone.Port}}}}
		return w
	}
	guarded := service("guarded", "10.96.0.2")
	guarded.Waypoint = ref
	guarded.Ports = []mesh.Port{{Service: 80, Target: 8080}}
	server := workload("server", "10.0.0.3")
	server.Services = []mesh.Membership{{Service: guarded.Name, Ports: []mesh.Port{{Service: 80, Target: 8080}}}}
	v := view.New("1", []mesh.Workload{replica("a", "10.0.0.1"), replica("b", "10.0.0.2"), server}, []mesh.Service{guarded, service("waypoint", "10.96.0.9")}, nil)
	dst := netip.MustParseAddrPort("10.96.0.2:80")
	a, b := netip.MustParseAddrPort("10.0.0.1:15008"), netip.MustParseAddrPort("10.0.0.2:15008")
	seen := map[netip.AddrPort]bool{}
	for rnd := range uint64(4) {
		seen[planOutbound(v, client{}, dst, rnd).dial] = true
		if p := planOutbound(v, client{avoid: []netip.AddrPort{a}}, dst, rnd); p.dial != b {
			t.Errorf("avoiding %v: %+v", a, p)
		}
		if p := planOutbound(v, client{avoid: []netip.AddrPort{a, b}}, dst, rnd); p.hop != toWaypoint {
			t.Errorf("avoiding all: %+v", p)
		}
	}
	if !seen[a] || !seen[b] {
		t.Errorf("replicas chosen: %v, want both", seen)
	}
	own := *v.Workload(a.Addr())
	if p := planOutbound(v, client{workload: own}, dst, 0); p.hop != toPeer || p.dial.Addr() != server.Addresses[0] {
		t.Errorf("a replica's own connection: %+v", p)
	}
	if p := planOutbound(view.New("1", nil, []mesh.Service{guarded}, nil), client{}, dst, 0); p.hop != reject || !p.hold {
		t.Errorf("without the waypoint: %+v", p)
	}
}

// What was open before a pod moved behind a waypoint goes on; what comes after
// is refused.
func TestGuardsAreForNewConnections(t *testing.T) {
	p := newPair(t, echo)
	c := p.client.dial(p.service)
	if err := roundTrip(c, "before"); err != nil {
		t.Fatal(err)
	}
	guard := mesh.Policy{Name: mesh.Name{Namespace: "shop", Name: "weft_waypoint_server"}, Scope: mesh.ScopeNamespace, Action: mesh.Deny, Groups: []mesh.Group{{Clauses: []mesh.Clause{{Matches: []mesh.Match{{
		NotPrincipals: []mesh.StringMatch{{Kind: mesh.MatchExact, Value: "cluster.local/ns/shop/sa/waypoint"}},
	}}}}}}}
	p.setPolicies(guard)
	if a := p.admission(); a.verdict == admitted {
		t.Fatalf("the guard lets a new connection in: %+v", a)
	}
	p.serverNode.recheckAll(false)
	if err := roundTrip(c, "after"); err != nil {
		t.Errorf("what was open: %v", err)
	}
	if err := roundTrip(p.client.dial(p.service), "new"); err == nil {
		t.Error("a new connection went around the waypoint")
	}
	guard.Name.Name = "users-own"
	p.setPolicies(guard)
	p.serverNode.recheckAll(false)
	if err := roundTrip(c, "after"); err == nil {
		t.Error("a policy of the user's left the connection open")
	}
}

// admission decides on a new connection of the client.
func (p *pair) admission() admission {
	q := p.serverNode.podAt(p.server.addr)
	return admit(p.view.Load(), *q.info.Load(), q.id, authz.Facts{
		Peer:   mesh.Identity{TrustDomain: trustDomain, Namespace: "shop", ServiceAccount: "client"},
		Source: netip.AddrPortFrom(p.client.addr, 1), Destination: p.app,
	})
}
