package ztunnel

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/view"
)

func identityOf(ns, sa string) mesh.Identity {
	return mesh.Identity{TrustDomain: "cluster.local", Namespace: ns, ServiceAccount: sa}
}

func addrs(s ...string) []netip.Addr {
	var out []netip.Addr
	for _, a := range s {
		out = append(out, netip.MustParseAddr(a))
	}
	return out
}

// workload returns a healthy HBONE workload of namespace shop.
func workload(name string, as ...string) mesh.Workload {
	return mesh.Workload{
		UID: mesh.UID("Kubernetes//Pod/shop/" + name), Name: mesh.Name{Namespace: "shop", Name: name},
		Addresses: addrs(as...), Cluster: "Kubernetes", Identity: identityOf("shop", name), Transport: mesh.HBONE, Healthy: true,
	}
}

func serviceName(name string) mesh.ServiceName {
	return mesh.ServiceName{Namespace: "shop", Host: mesh.Host(name + ".shop.svc.cluster.local")}
}

// service returns a service with port 80 and virtual addresses vips.
func service(name string, vips ...string) mesh.Service {
	s := mesh.Service{Name: serviceName(name), ShortName: name, Ports: []mesh.Port{{Service: 80}}}
	for _, v := range vips {
		a := netip.MustParseAddr(v)
		s.VIPs = append(s.VIPs, mesh.VIP{Prefix: netip.PrefixFrom(a, a.BitLen())})
	}
	return s
}

// in makes w an endpoint of service name, whose port 80 is target.
func in(w mesh.Workload, name string, target uint16) mesh.Workload {
	w.Services = append(slices.Clone(w.Services), mesh.Membership{
		Service: serviceName(name), Ports: []mesh.Port{{Service: 80, Target: target}},
	})
	return w
}

func with[T any](v T, change func(*T)) T {
	change(&v)
	return v
}

func planView() *view.View {
	waypoint := mesh.GatewayRef{Service: serviceName("waypoint")}
	ws := []mesh.Workload{
		in(workload("cart", "10.0.0.4", "fd00::4"), "cart", 8080),
		in(with(workload("cart-sick", "10.0.0.5"), func(w *mesh.Workload) { w.Healthy = false }), "cart", 8080),
		in(with(workload("cart-far", "10.0.0.6"), func(w *mesh.Workload) { w.Network = "far" }), "cart", 8080),
		in(with(workload("cart-sick2", "10.0.0.7"), func(w *mesh.Workload) { w.Healthy = false }), "sick", 8080),
		with(workload("outside", "10.0.0.10"), func(w *mesh.Workload) { w.Transport = mesh.PlainTCP }),
		in(with(workload("plain-endpoint", "10.0.0.11"), func(w *mesh.Workload) { w.Transport = mesh.PlainTCP }), "plain", 9090),
		with(workload("unset", "10.0.0.12"), func(w *mesh.Workload) { w.Transport = mesh.TransportUnset }),
		with(workload("later", "10.0.0.13"), func(w *mesh.Workload) { w.Transport = mesh.HBONE + 1 }),
		with(workload("nobody", "10.0.0.14"), func(w *mesh.Workload) { w.Identity = mesh.Identity{} }),
		with(workload("behind", "10.0.0.15"), func(w *mesh.Workload) { w.Waypoint = waypoint }),
		with(workload("behind-address", "10.0.0.16"), func(w *mesh.Workload) {
			w.Waypoint = mesh.GatewayRef{Address: netip.MustParseAddr("10.0.0.9"), Port: 15009}
		}),
		with(workload("behind-vip", "10.0.0.17"), func(w *mesh.Workload) {
			w.Waypoint = mesh.GatewayRef{Address: netip.MustParseAddr("10.96.0.9")}
		}),
		with(workload("behind-nothing", "10.0.0.18"), func(w *mesh.Workload) {
			w.Waypoint = mesh.GatewayRef{Service: serviceName("gone")}
		}),
		with(workload("behind-plain", "10.0.0.19"), func(w *mesh.Workload) {
			w.Waypoint = mesh.GatewayRef{Address: netip.MustParseAddr("10.0.0.11")}
		}),
		with(workload("no-address"), func(w *mesh.Workload) { *w = in(*w, "nowhere", 8080) }),
		func() mesh.Workload {
			w := workload("waypoint", "10.0.0.9", "fd00::9")
			w.Services = []mesh.Membership{{Service: serviceName("waypoint"), Ports: []mesh.Port{{Service: 80, Target: 80}}}}
			return w
		}(),
		in(workload("client", "10.0.0.2"), "mine", 7070),
		in(workload("only6", "fd00::6"), "v6", 8080),
		in(workload("sans", "10.0.0.21"), "sans", 8080),
		with(workload("node-pod", "10.0.0.30"), func(w *mesh.Workload) { w.HostNetwork, w.Transport = true, mesh.PlainTCP }),
	}
	ss := []mesh.Service{
		with(service("cart", "10.96.0.1", "fd96::1"), func(s *mesh.Service) {
			// Of its load balancer; of a node; and two that are not its to have.
			s.ExternalAddresses = addrs("198.51.100.1", "10.0.0.30", "10.0.0.10", "10.96.0.5")
		}),
		with(service("guarded", "10.96.0.2"), func(s *mesh.Service) { s.Waypoint = waypoint }),
		with(service("guarded-by-nothing", "10.96.0.3"), func(s *mesh.Service) {
			s.Waypoint = mesh.GatewayRef{Service: serviceName("gone")}
		}),
		service("sick", "10.96.0.4"),
		service("plain", "10.96.0.5"),
		service("empty", "10.96.0.6"),
		service("nowhere", "10.96.0.7"),
		service("waypoint", "10.96.0.9"),
		service("mine", "10.96.0.10"),
		service("v6", "10.96.0.11"),
		with(service("direct", "10.0.0.10"), func(s *mesh.Service) { s.Mode = mesh.BalancePassthrough }),
		with(service("direct-mesh", "10.0.0.21"), func(s *mesh.Service) { s.Mode = mesh.BalancePassthrough }),
		with(service("direct-out", "192.0.2.7"), func(s *mesh.Service) { s.Mode = mesh.BalancePassthrough }),
		with(service("strange", "10.96.0.12"), func(s *mesh.Service) { s.Mode = "wild" }),
		with(service("sans", "10.96.0.13"), func(s *mesh.Service) {
			s.SubjectAltNames = []string{"spiffe://cluster.local/ns/shop/sa/backup", "not-an-identity", "spiffe://cluster.local/ns/shop/sa/sans"}
		}),
	}
	return view.New("1", ws, ss, nil)
}

func TestPlanOutbound(t *testing.T) {
	v := planView()
	me := client{workload: *v.ByName(mesh.Name{Namespace: "shop", Name: "client"}), addresses: addrs("10.0.0.2")}
	tests := []struct {
		name string
		dst  string
		hop  hop
		dial string // "" for a rejected plan
		peer string // service account of the only peer; "" without a tunnel
		why  string
	}{
		{"unknown address is outside", "192.0.2.1:443", passthrough, "192.0.2.1:443", "", ""},
		{"plain workload", "10.0.0.10:80", passthrough, "10.0.0.10:80", "", ""},
		{"mesh workload", "10.0.0.4:8080", toPeer, "10.0.0.4:15008", "cart", ""},
		{"mesh workload over IPv6", "[fd00::4]:8080", toPeer, "[fd00::4]:15008", "cart", ""},
		{"an unhealthy workload asked for itself is dialed", "10.0.0.5:8080", toPeer, "10.0.0.5:15008", "cart-sick", ""},
		{"transport unset", "10.0.0.12:80", reject, "", "", "transport is unset"},
		{"transport of a later version", "10.0.0.13:80", reject, "", "", "transport is"},
		{"workload without identity", "10.0.0.14:80", reject, "", "", "no identity"},
		{"workload on another network", "10.0.0.6:80", reject, "", "", `network "far"`},
		{"workload with waypoint", "10.0.0.15:80", toWaypoint, "10.0.0.9:15008", "waypoint", ""},
		{"workload with waypoint by address", "10.0.0.16:80", toWaypoint, "10.0.0.9:15009", "waypoint", ""},
		{"workload with waypoint by virtual address", "10.0.0.17:80", toWaypoint, "10.0.0.9:15008", "waypoint", ""},
		{"waypoint not there", "10.0.0.18:80", reject, "", "", "gone"},
		{"waypoint that is plain", "10.0.0.19:80", reject, "", "", "does not speak HBONE"},
		{"service", "10.96.0.1:80", toPeer, "10.0.0.4:15008", "cart", ""},
		{"service over IPv6 takes the endpoint's IPv6 address", "[fd96::1]:80", toPeer, "[fd00::4]:15008", "cart", ""},
		{"service whose endpoint has the other family", "10.96.0.11:80", toPeer, "[fd00::6]:15008", "only6", ""},
		{"service without that port", "10.96.0.1:81", reject, "", "", "has no port 81"},
		{"service with waypoint", "10.96.0.2:80", toWaypoint, "10.0.0.9:15008", "waypoint", ""},
		{"service with waypoint, which judges ports", "10.96.0.2:81", toWaypoint, "10.0.0.9:15008", "waypoint", ""},
		{"service with waypoint not there", "10.96.0.3:80", reject, "", "", "gone"},
		{"service without healthy endpoint", "10.96.0.4:80", reject, "", "", "no healthy endpoint"},
		{"service without endpoint", "10.96.0.6:80", reject, "", "", "no healthy endpoint"},
		{"service with endpoint without address", "10.96.0.7:80", reject, "", "", "has no address"},
		{"service with plain endpoint", "10.96.0.5:80", passthrough, "10.0.0.11:9090", "", ""},
		{"service that chose the client itself", "10.96.0.10:80", passthrough, "10.0.0.2:7070", "", ""},
		{"passthrough service on a plain workload", "10.0.0.10:80", passthrough, "10.0.0.10:80", "", ""},
		{"passthrough service is no way around the tunnel", "10.0.0.21:80", toPeer, "10.0.0.21:15008", "sans", ""},
		{"passthrough service outside", "192.0.2.7:80", passthrough, "192.0.2.7:80", "", ""},
		{"external address of a service", "198.51.100.1:80", toPeer, "10.0.0.4:15008", "cart", ""},
		{"external address, another port", "198.51.100.1:22", passthrough, "198.51.100.1:22", "", ""},
		{"external address that is a node's", "10.0.0.30:80", toPeer, "10.0.0.4:15008", "cart", ""},
		{"external address that is a node's, another port", "10.0.0.30:6443", passthrough, "10.0.0.30:6443", "", ""},
		{"nobody takes a pod's address as an external one", "10.0.0.10:80", passthrough, "10.0.0.10:80", "", ""},
		{"nobody takes a service's address as an external one", "10.96.0.5:80", passthrough, "10.0.0.11:9090", "", ""},
		{"balance mode of a later version", "10.96.0.12:80", reject, "", "", "no healthy endpoint"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dst := netip.MustParseAddrPort(tt.dst)
			p := planOutbound(v, me, dst, 7)
			if p.hop != tt.hop {
				t.Fatalf("hop %d (%s), want %d", p.hop, p.why, tt.hop)
			}
			if tt.hop == reject {
				if !strings.Contains(p.why, tt.why) || p.why == "" {
					t.Errorf("why %q, want %q in it", p.why, tt.why)
				}
				if p.dial.IsValid() || p.authority.IsValid() || len(p.peers) > 0 {
					t.Errorf("a rejected plan has a target: %+v", p)
				}
				return
			}
			if p.dial.String() != tt.dial {
				t.Errorf("dials %v, want %v", p.dial, tt.dial)
			}
			if tt.peer == "" {
				if len(p.peers) > 0 || p.authority.IsValid() {
					t.Errorf("a plain plan has a tunnel: %+v", p)
				}
				return
			}
			if tt.hop == toWaypoint && p.authority != dst {
				t.Errorf("asks the waypoint for %v, want %v", p.authority, dst)
			}
			if !slices.Contains(p.peers, identityOf("shop", tt.peer)) {
				t.Errorf("peers %v, want %s", p.peers, tt.peer)
			}
			if p.dial.Port() == 0 || p.authority.Port() == 0 {
				t.Errorf("port 0: %+v", p)
			}
		})
	}
}

func TestPlanPeersOfAService(t *testing.T) {
	v := planView()
	p := planOutbound(v, client{}, netip.MustParseAddrPort("10.96.0.13:80"), 0)
	want := []mesh.Identity{identityOf("shop", "backup"), identityOf("shop", "sans")}
	if p.hop != toPeer || !slices.Equal(p.peers, want) {
		t.Errorf("hop %d, peers %v, want %v once each, sorted", p.hop, p.peers, want)
	}
	if got := p.authority.String(); got != "10.0.0.21:8080" {
		t.Errorf("asks for %v, want the endpoint's own port", got)
	}
}

func TestPlanBeforeTheFirstSync(t *testing.T) {
	full := planView()
	var ws []mesh.Workload
	for w := range full.Workloads() {
		ws = append(ws, *w)
	}
	for name, v := range map[string]*view.View{"zero view": {}, "filled but not synced": view.New("", ws, nil, nil)} {
		for _, dst := range []string{"192.0.2.1:443", "10.0.0.10:80", "10.0.0.4:80"} {
			if p := planOutbound(v, client{}, netip.MustParseAddrPort(dst), 0); p.hop != reject {
				t.Errorf("%s, %s: hop %d, want reject: what is unknown is not outside", name, dst, p.hop)
			}
		}
	}
}

// A tunnel may be left out only if both ends' namespaces want that.
func TestPlanIsDirectWhereBothWantIt(t *testing.T) {
	direct := func(w *mesh.Workload) { w.Direct = true }
	v := view.New("1", []mesh.Workload{
		in(with(workload("yes", "10.0.0.4"), direct), "yes", 8080), workload("no", "10.0.0.5"),
		with(workload("plain", "10.0.0.6"), func(w *mesh.Workload) { w.Direct, w.Transport = true, mesh.PlainTCP }),
	}, []mesh.Service{service("yes", "10.96.0.1")}, nil)
	wants, wantsNot := client{workload: with(workload("c", "10.0.0.2"), direct)}, client{workload: workload("c", "10.0.0.2")}
	for _, tc := range []struct {
		name string
		from client
		dst  string
		want bool
	}{
		{"both", wants, "10.0.0.4:80", true},
		{"both, through a service", wants, "10.96.0.1:80", true},
		{"the client only", wants, "10.0.0.5:80", false},
		{"the server only", wantsNot, "10.0.0.4:80", false},
		{"a client that is not known", client{}, "10.0.0.4:80", false},
		{"a server outside the mesh", wants, "10.0.0.6:80", false},
	} {
		p := planOutbound(v, tc.from, netip.MustParseAddrPort(tc.dst), 0)
		if p.direct != tc.want || p.hop == reject {
			t.Errorf("%s: direct %v (hop %d %s), want %v", tc.name, p.direct, p.hop, p.why, tc.want)
		}
	}
}

func TestZeroPlanMovesNothing(t *testing.T) {
	if (plan{}).hop != reject {
		t.Error("the zero plan is not a rejection")
	}
}

// The choice of the endpoint must follow rnd, so that load is spread.
func TestPlanSpreadsOverEndpoints(t *testing.T) {
	v := view.New("1", []mesh.Workload{
		in(workload("a", "10.0.0.4"), "cart", 8080),
		in(workload("b", "10.0.0.5"), "cart", 8080),
	}, []mesh.Service{service("cart", "10.96.0.1")}, nil)
	seen := map[netip.AddrPort]bool{}
	for rnd := range uint64(8) {
		seen[planOutbound(v, client{}, netip.MustParseAddrPort("10.96.0.1:80"), rnd).dial] = true
	}
	if len(seen) != 2 {
		t.Errorf("dialed only %v", seen)
	}
}
