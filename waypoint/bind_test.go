package waypoint

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/weft-mesh/weft/hbone"
	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/view"
	"github.com/weft-mesh/weft/waypoint/l7"
)

var (
	shopWaypoint = mesh.Name{Namespace: "shop", Name: "waypoint"}
	wpService    = mesh.ServiceName{Namespace: "shop", Host: "waypoint.shop.svc.cluster.local"}
	client       = mesh.Identity{TrustDomain: "cluster.local", Namespace: "web", ServiceAccount: "client"}
	cart         = mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "cart"}
	ours         = mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "waypoint"}
	ref          = mesh.GatewayRef{Service: wpService}
)

func svc(ns, host, vip string, ref mesh.GatewayRef) *mesh.Service {
	s := &mesh.Service{Name: mesh.ServiceName{Namespace: ns, Host: mesh.Host(host)}, Waypoint: ref, Ports: []mesh.Port{{Service: 80, Target: 8080}}}
	if vip != "" {
		s.VIPs = []mesh.VIP{{Prefix: netip.PrefixFrom(netip.MustParseAddr(vip), 32)}}
	}
	return s
}

func workload(uid, ip string, transport mesh.Transport, id mesh.Identity, ref mesh.GatewayRef) *mesh.Workload {
	return &mesh.Workload{
		UID: mesh.UID(uid), Name: mesh.Name{Namespace: "shop", Name: uid}, Addresses: []netip.Addr{netip.MustParseAddr(ip)},
		Transport: transport, Identity: id, Waypoint: ref, Healthy: true,
	}
}

func shop() *view.View {
	other := mesh.GatewayRef{Service: mesh.ServiceName{Namespace: "pay", Host: "waypoint.pay.svc.cluster.local"}}
	private := svc("shop", "private.example.com", "", ref)
	private.Private = true
	onNode := svc("shop", "external.shop", "", ref)
	onNode.ExternalAddresses = []netip.Addr{netip.MustParseAddr("192.0.2.1")}
	return view.WithL7("1",
		[]*mesh.Workload{
			workload("bound", "10.0.0.1", mesh.HBONE, cart, ref),
			workload("free", "10.0.0.2", mesh.HBONE, cart, mesh.GatewayRef{}),
			workload("elsewhere", "10.0.0.3", mesh.HBONE, cart, other),
			workload("byaddress", "10.0.0.4", mesh.HBONE, cart, mesh.GatewayRef{Address: netip.MustParseAddr("10.96.0.9")}),
		},
		[]*mesh.Service{
			svc("shop", "cart.shop.svc.cluster.local", "10.96.0.1", ref),
			svc("shop", "free.shop.svc.cluster.local", "10.96.0.2", mesh.GatewayRef{}),
			svc("pay", "pay.pay.svc.cluster.local", "10.96.0.3", other),
			svc("shop", "lately.shop.svc.cluster.local", "10.96.0.4", mesh.GatewayRef{}),
			svc("shop", "outside.example.com", "", ref),
			private, onNode,
			svc("shop", string(wpService.Host), "10.96.0.9", mesh.GatewayRef{}),
		}, nil,
		view.L7{Waypoints: []*mesh.Waypoint{{Name: shopWaypoint, Service: wpService, Identity: ours, For: "all"}}})
}

func TestBind(t *testing.T) {
	lately := func(n mesh.ServiceName) bool { return n.Host == "lately.shop.svc.cluster.local" }
	noWaypoint := view.New("1", nil, nil, nil)
	for _, tc := range []struct {
		name      string
		v         *view.View
		authority string
		service   mesh.Host
		workload  mesh.UID
		why       string
	}{
		{"a virtual address", shop(), "10.96.0.1:80", "cart.shop.svc.cluster.local", "", ""},
		{"a port that it has not", shop(), "10.96.0.1:81", "", "", "has no port 81"},
		{"a service without a waypoint", shop(), "10.96.0.2:80", "", "", "not bound to this waypoint"},
		{"a service of another waypoint", shop(), "10.96.0.3:80", "", "", "not bound to this waypoint"},
		{"a service that was bound lately", shop(), "10.96.0.4:80", "lately.shop.svc.cluster.local", "", ""},
		{"a name", shop(), "outside.example.com:80", "outside.example.com", "", ""},
		{"a name that is private to another namespace", shop(), "private.example.com:80", "", "", "there is no service"},
		{"a name that nobody has", shop(), "example.org:80", "", "", "there is no service"},
		{"an external address", shop(), "192.0.2.1:80", "external.shop", "", ""},
		{"a port of it that is another's", shop(), "192.0.2.1:22", "", "", "no service and no workload"},
		{"a workload", shop(), "10.0.0.1:8080", "", "bound", ""},
		{"a workload bound by the waypoint's address", shop(), "10.0.0.4:8080", "", "byaddress", ""},
		{"a workload without a waypoint", shop(), "10.0.0.2:8080", "", "", "not bound to this waypoint"},
		{"a workload of another waypoint", shop(), "10.0.0.3:8080", "", "", "not bound to this waypoint"},
		{"the waypoint itself", shop(), "10.96.0.9:80", "", "", "not bound to this waypoint"},
		{"an address of nobody", shop(), "203.0.113.1:80", "", "", "no service and no workload"},
		{"loopback", shop(), "127.0.0.1:15000", "", "", "no service and no workload"},
		{"nothing is known yet", new(view.View), "10.96.0.1:80", "", "", "not been reached"},
		{"the waypoint is not known", noWaypoint, "10.96.0.1:80", "", "", "is not known"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a, err := hbone.ParseAuthority(tc.authority)
			if err != nil {
				t.Fatal(err)
			}
			f, err := bind(tc.v, shopWaypoint, lately, client, a)
			if tc.why != "" {
				if err == nil || !strings.Contains(err.Error(), tc.why) || f != (l7.Facts{}) {
					t.Fatalf("bind = %+v, %v; want refused: %s", f, err, tc.why)
				}
				return
			}
			if err != nil || f.Service.Host != tc.service || f.Workload != tc.workload || f.Port != a.Port {
				t.Errorf("bind = %+v, %v; want service %q, workload %q", f, err, tc.service, tc.workload)
			}
			if a.Host == "" && f.Destination != a.AddrPort() || a.Host != "" && f.Destination.IsValid() {
				t.Errorf("destination %v of %v", f.Destination, a)
			}
		})
	}
}

func TestZeroWaypointFrontsNothing(t *testing.T) {
	w := &mesh.Waypoint{Name: shopWaypoint}
	if fronts(shop(), w, mesh.GatewayRef{}) || fronts(shop(), w, ref) || fronts(shop(), w, mesh.GatewayRef{Address: netip.MustParseAddr("203.0.113.1")}) {
		t.Error("a waypoint without a service fronts something")
	}
}

func TestRecent(t *testing.T) {
	a, b := mesh.ServiceName{Namespace: "shop", Host: "a"}, mesh.ServiceName{Namespace: "shop", Host: "b"}
	set := func(ns ...mesh.ServiceName) map[mesh.ServiceName]bool {
		m := map[mesh.ServiceName]bool{}
		for _, n := range ns {
			m[n] = true
		}
		return m
	}
	var r recent
	now := time.Now()
	r.update(set(a, b), now)
	if r.has(a) {
		t.Error("a bound service counts as unbound")
	}
	r.update(set(b), now)
	if !r.has(a) || r.has(b) {
		t.Error("a service that was just unbound is forgotten")
	}
	r.update(set(a, b), now)
	if r.has(a) {
		t.Error("a service that was bound again counts as unbound")
	}
	r.update(set(b), now.Add(-2*afterlife))
	if r.has(a) {
		t.Error("a service that was unbound long ago is remembered")
	}
	r.update(set(b), now)
	if len(r.until) != 0 {
		t.Errorf("%d are kept for ever", len(r.until))
	}
}

func TestClientAddress(t *testing.T) {
	v := shop()
	for _, tc := range []struct {
		name      string
		peer      mesh.Identity
		remote    string
		forwarded string
		want      string
	}{
		{"nothing is said", cart, "10.0.0.1:3333", "", "10.0.0.1:3333"},
		{"the port of the peer's own address", cart, "10.0.0.1:3333", `for="10.0.0.1:4444"`, "10.0.0.1:4444"},
		{"another address of the same identity", cart, "10.0.0.1:3333", `for="10.0.0.2:4444";host=x`, "10.0.0.2:4444"},
		{"forged: somebody else's address", client, "10.9.9.9:3333", `for="10.0.0.1:4444"`, "10.9.9.9:3333"},
		{"forged: an address of nobody", cart, "10.0.0.1:3333", `for="203.0.113.7:4444"`, "10.0.0.1:3333"},
		{"forged: loopback", cart, "10.0.0.1:3333", `for="127.0.0.1:4444"`, "10.0.0.1:3333"},
		{"forged: two, the first counts", cart, "10.0.0.1:3333", `for="203.0.113.7:1", for="10.0.0.1:4444"`, "10.0.0.1:3333"},
		{"by nobody", mesh.Identity{}, "10.9.9.9:3333", `for="10.0.0.1:4444"`, "10.9.9.9:3333"},
		{"no port", cart, "10.0.0.1:3333", `for=10.0.0.1`, "10.0.0.1:3333"},
		{"a name", cart, "10.0.0.1:3333", `for="_hidden"`, "10.0.0.1:3333"},
		{"a mapped address", cart, "10.0.0.1:3333", `For="[::ffff:10.0.0.1]:4444"`, "10.0.0.1:4444"},
		{"rubbish", cart, "10.0.0.1:3333", `for="`, "10.0.0.1:3333"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := clientAddress(v, tc.peer, netip.MustParseAddrPort(tc.remote), tc.forwarded)
			if got.String() != tc.want {
				t.Errorf("got %v, want %s", got, tc.want)
			}
		})
	}
}

func FuzzForwarded(f *testing.F) {
	f.Add(`for="10.0.0.1:80";host=x`)
	f.Add(`for=`)
	f.Fuzz(func(t *testing.T, s string) {
		if a, ok := forwardedFor(s); ok && (!a.IsValid() || a.Addr().Is4In6() || a.Addr().Zone() != "") {
			t.Errorf("%q is %v", s, a)
		}
	})
}

func TestPlanDial(t *testing.T) {
	id := cart
	w := func(edit func(*mesh.Workload)) *mesh.Workload {
		w := workload("cart", "10.0.0.1", mesh.HBONE, id, mesh.GatewayRef{})
		edit(w)
		return w
	}
	at := netip.MustParseAddrPort
	same := func(*mesh.Workload) {}
	for _, tc := range []struct {
		name   string
		now    *mesh.Workload // as the View has it; nil is gone
		target l7.Target
		want   hop
		why    string
	}{
		{"in the mesh", w(same), l7.Target{Address: at("10.0.0.1:8080")}, tunnel, ""},
		{"plain, and known to be", w(func(w *mesh.Workload) { w.Transport = mesh.PlainTCP }), l7.Target{Address: at("10.0.0.1:8080")}, inClear, ""},
		{"transport unset", w(func(w *mesh.Workload) { w.Transport = mesh.TransportUnset }), l7.Target{Address: at("10.0.0.1:8080")}, reject, "how to reach"},
		{"without an identity", w(func(w *mesh.Workload) { w.Identity = mesh.Identity{} }), l7.Target{Address: at("10.0.0.1:8080")}, reject, "no identity"},
		{"gone", nil, l7.Target{Address: at("10.0.0.1:8080")}, reject, "is gone"},
		{"on another network", w(func(w *mesh.Workload) { w.Network = "n2" }), l7.Target{Address: at("10.0.0.1:8080")}, reject, "network"},
		{"without a port", w(same), l7.Target{Address: at("10.0.0.1:0")}, reject, "no port"},
		{"the tunnel's own port", w(same), l7.Target{Address: at("10.0.0.1:15008")}, reject, "of its tunnel"},
		{"without an address", w(same), l7.Target{Address: netip.AddrPortFrom(netip.Addr{}, 80)}, reject, "no address"},
		{"by name", w(func(w *mesh.Workload) { w.Transport, w.Host = mesh.PlainTCP, "example.com" }), l7.Target{Address: netip.AddrPortFrom(netip.Addr{}, 80)}, inClear, ""},
		{"by name, in the mesh", w(func(w *mesh.Workload) { w.Host = "example.com" }), l7.Target{Address: netip.AddrPortFrom(netip.Addr{}, 80)}, reject, "no address"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var ws []*mesh.Workload
			if tc.now != nil {
				ws = append(ws, tc.now)
			}
			tc.target.Workload = w(func(w *mesh.Workload) { w.Transport = mesh.PlainTCP }) // as it was when it was chosen
			if tc.now != nil && tc.now.Transport == mesh.PlainTCP {
				tc.target.Workload = w(same)
			}
			p := planDial(view.Of("1", ws, nil, nil), "", tc.target)
			if p.hop != tc.want || !strings.Contains(p.why, tc.why) {
				t.Errorf("plan %+v, want %v %q", p, tc.want, tc.why)
			}
			if p.hop == tunnel && (len(p.peers) != 1 || p.peers[0] != id) {
				t.Errorf("peers %v", p.peers)
			}
		})
	}
	if p := planDial(new(view.View), "", l7.Target{Address: at("203.0.113.1:80")}); p.hop != reject {
		t.Errorf("before the first sync: %+v", p)
	}
	for address, want := range map[string]hop{"203.0.113.1:80": inClear, "10.0.0.1:80": tunnel, "10.96.0.1:80": reject} {
		if p := planDial(shop(), "", l7.Target{Address: at(address)}); p.hop != want {
			t.Errorf("an address alone, %s: %+v, want %v", address, p, want)
		}
	}
}
