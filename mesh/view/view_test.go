package view

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/weft-mesh/weft/mesh"
)

var (
	addr   = netip.MustParseAddr
	prefix = netip.MustParsePrefix
)

// pod makes a workload of namespace shop.
func pod(name, ip string) mesh.Workload {
	return mesh.Workload{
		UID:       mesh.UID("c//Pod/shop/" + name),
		Name:      mesh.Name{Namespace: "shop", Name: name},
		Addresses: []netip.Addr{addr(ip)},
		Identity:  mesh.Identity{TrustDomain: "td", Namespace: "shop", ServiceAccount: name},
		Transport: mesh.HBONE,
		Healthy:   true,
	}
}

func service(name string, vips ...string) mesh.Service {
	s := mesh.Service{Name: mesh.ServiceName{Namespace: "shop", Host: mesh.Host(name)}, ShortName: name}
	for _, v := range vips {
		s.VIPs = append(s.VIPs, mesh.VIP{Prefix: prefix(v)})
	}
	return s
}

func with[T any](t T, edit func(*T)) T {
	edit(&t)
	return t
}

func TestZeroViewKnowsNothing(t *testing.T) {
	var v View
	if v.Synced() || v.Workload(addr("10.0.0.1")) != nil || v.Service(addr("10.0.0.1")) != nil ||
		v.ByUID("u") != nil || v.ByHost("h") != nil || v.Endpoints(mesh.ServiceName{}) != nil || v.Policy(mesh.Name{}) != nil {
		t.Error("the zero View knows something")
	}
	w := pod("a", "10.0.0.1")
	if _, missing := v.PoliciesFor(&w); len(missing) == 0 {
		t.Error("an unsynced View must miss policies, so that everything is denied")
	}
	if _, missing := New("1", nil, nil, nil).PoliciesFor(nil); len(missing) == 0 {
		t.Error("an unknown workload must miss policies, so that everything is denied")
	}
	if v.Workload(netip.Addr{}) != nil || New("1", nil, []mesh.Service{service("s", "0.0.0.0/0")}, nil).Service(netip.Addr{}) != nil {
		t.Error("the zero address was found")
	}
}

func TestWorkloadByAddress(t *testing.T) {
	host := func(name string) mesh.Workload {
		return with(pod(name, "10.0.0.9"), func(w *mesh.Workload) { w.HostNetwork, w.Transport = true, mesh.PlainTCP })
	}
	plain := func(name string) mesh.Workload {
		return with(pod(name, "10.0.0.8"), func(w *mesh.Workload) { w.Transport = mesh.PlainTCP })
	}
	for _, tc := range []struct {
		name string
		ws   []mesh.Workload
		ask  string
		want string
	}{
		{"by IPv4", []mesh.Workload{pod("a", "10.0.0.1"), pod("b", "10.0.0.2")}, "10.0.0.2", "b"},
		{"by IPv6", []mesh.Workload{pod("a", "fd00::1")}, "fd00::1", "a"},
		{"asked in mapped form", []mesh.Workload{pod("a", "10.0.0.1")}, "::ffff:10.0.0.1", "a"},
		{"given in mapped form", []mesh.Workload{pod("a", "::ffff:10.0.0.1")}, "10.0.0.1", "a"},
		{"a zone is ignored", []mesh.Workload{pod("a", "fe80::1")}, "fe80::1%eth0", "a"},
		{"unknown", []mesh.Workload{pod("a", "10.0.0.1")}, "10.0.0.2", ""},
		{"own address before host network", []mesh.Workload{host("a"), pod("b", "10.0.0.9")}, "10.0.0.9", "b"},
		{"own address before host network, other order", []mesh.Workload{pod("a", "10.0.0.9"), host("b")}, "10.0.0.9", "a"},
		{"of host network pods the first", []mesh.Workload{host("b"), host("a")}, "10.0.0.9", "a"},
		{"address used twice: never the plain one", []mesh.Workload{plain("a"), pod("b", "10.0.0.8")}, "10.0.0.8", "b"},
		{"address used twice: the healthy one", []mesh.Workload{with(pod("a", "10.0.0.8"), func(w *mesh.Workload) { w.Healthy = false }), pod("b", "10.0.0.8")}, "10.0.0.8", "b"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := ""
			if w := New("1", tc.ws, nil, nil).Workload(addr(tc.ask)); w != nil {
				got = w.Name.Name
			}
			if got != tc.want {
				t.Errorf("Workload(%s) = %q, want %q", tc.ask, got, tc.want)
			}
		})
	}
}

func TestWorkloadByName(t *testing.T) {
	entry := with(pod("x", "10.0.0.1"), func(w *mesh.Workload) { w.UID = "a//ServiceEntry/shop/x" })
	v := New("1", []mesh.Workload{entry, pod("x", "10.0.0.2")}, nil, nil)
	if got := v.ByName(mesh.Name{Namespace: "shop", Name: "x"}); got.UID != "c//Pod/shop/x" {
		t.Errorf("ByName = %s, want the pod", got.UID)
	}
	if got := v.ByUID("a//ServiceEntry/shop/x"); got == nil {
		t.Error("ByUID did not find the entry")
	}
}

func TestServiceByVIP(t *testing.T) {
	v := New("1", nil, []mesh.Service{
		service("all", "0.0.0.0/0"),
		service("wide", "10.96.0.0/12", "fd00::/16"),
		service("narrow", "10.96.1.0/24"),
		service("one", "10.96.1.1/32", "fd00::1/128"),
		service("zwei", "10.96.1.1/32"),
	}, nil)
	for ask, want := range map[string]mesh.Host{
		"10.96.1.1": "one", "::ffff:10.96.1.1": "one", "10.96.1.2": "narrow", "10.97.0.1": "wide", "8.8.8.8": "all",
		"fd00::1": "one", "fd00::2": "wide",
	} {
		if got := v.Service(addr(ask)); got == nil || got.Name.Host != want {
			t.Errorf("Service(%s) = %v, want %s", ask, got, want)
		}
	}
	if got := v.Service(addr("fe80::1")); got != nil {
		t.Errorf("Service(fe80::1) = %v, want none", got.Name)
	}
	if got := v.ByHost("wide"); got == nil || got != v.ServiceByName(mesh.ServiceName{Namespace: "shop", Host: "wide"}) {
		t.Errorf("ByHost(wide) = %v", got)
	}
}

func TestExternal(t *testing.T) {
	on := func(name string, port uint16, addrs ...string) mesh.Service {
		return with(service(name), func(s *mesh.Service) {
			s.Ports = []mesh.Port{{Service: port}}
			for _, a := range addrs {
				s.ExternalAddresses = append(s.ExternalAddresses, addr(a))
			}
		})
	}
	v := New("1", nil, []mesh.Service{on("a", 80, "198.51.100.1"), on("b", 443, "198.51.100.1", "2001:db8::1"), on("c", 80, "198.51.100.1")}, nil)
	for ask, want := range map[string]mesh.Host{
		"198.51.100.1:80": "a", "[::ffff:198.51.100.1]:443": "b", "[2001:db8::1]:443": "b", "198.51.100.1:22": "", "198.51.100.2:80": "",
	} {
		var got mesh.Host
		if s := v.External(netip.MustParseAddrPort(ask)); s != nil {
			got = s.Name.Host
		}
		if got != want {
			t.Errorf("External(%s) = %q, want %q", ask, got, want)
		}
	}
	if v.Service(addr("198.51.100.1")) != nil {
		t.Error("an external address counts as a virtual one, at every port")
	}
}

func TestResolve(t *testing.T) {
	in := func(ns, host string, edit func(*mesh.Service)) mesh.Service {
		s := mesh.Service{Name: mesh.ServiceName{Namespace: ns, Host: mesh.Host(host)}}
		if edit != nil {
			edit(&s)
		}
		return s
	}
	canonical := func(s *mesh.Service) { s.Canonical = true }
	private := func(s *mesh.Service) { s.Private = true }
	v := New("1", nil, []mesh.Service{
		in("a", "api.example.com", nil), in("b", "api.example.com", canonical), in("c", "api.example.com", nil), in("aa", "api.example.com", private),
		in("a", "only.example.com", nil), in("b", "only.example.com", nil),
		in("a", "hidden.example.com", private),
		in("a", "*.example.com", nil), in("a", "*.deep.example.com", private), in("a", "*.org", nil),
	}, nil)
	for _, tc := range []struct{ name, from, ask, want string }{
		{"the own one first", "c", "api.example.com", "c/api.example.com"},
		{"also a private one", "aa", "api.example.com", "aa/api.example.com"},
		{"else the canonical one", "z", "api.example.com", "b/api.example.com"},
		{"else the first by namespace", "z", "only.example.com", "a/only.example.com"},
		{"not a private one of another namespace, but a wildcard", "z", "hidden.example.com", "a/*.example.com"},
		{"a name below a wildcard", "z", "x.example.com", "a/*.example.com"},
		{"deep below it", "z", "y.x.example.com", "a/*.example.com"},
		{"the closest wildcard", "a", "x.deep.example.com", "a/*.deep.example.com"},
		{"the closest that is not private", "z", "x.deep.example.com", "a/*.example.com"},
		{"a wildcard is not its own parent", "z", "example.com", ""},
		{"nor a label that ends like it", "z", "myexample.com", ""},
		{"a wildcard below the top", "z", "x.org", "a/*.org"},
		{"unknown", "z", "example.net", ""},
		{"no name", "z", "", ""},
		{"dots", "z", "...", ""},
	} {
		got := ""
		if s := v.Resolve(tc.from, mesh.Host(tc.ask)); s != nil {
			got = s.Name.String()
		}
		if got != tc.want {
			t.Errorf("%s: Resolve(%s, %s) = %q, want %q", tc.name, tc.from, tc.ask, got, tc.want)
		}
	}
	if (&View{}).Resolve("a", "api.example.com") != nil {
		t.Error("the zero View resolves a name")
	}
}

func TestEndpoints(t *testing.T) {
	s := service("s", "10.96.0.1/32")
	join := func(w *mesh.Workload) {
		w.Services = []mesh.Membership{{Service: s.Name, Ports: []mesh.Port{{Service: 80, Target: 8080}}}}
	}
	v := New("1", []mesh.Workload{with(pod("b", "10.0.0.2"), join), with(pod("a", "10.0.0.1"), join), pod("c", "10.0.0.3")}, []mesh.Service{s}, nil)
	var got []string
	for _, e := range v.Endpoints(s.Name) {
		got = append(got, fmt.Sprint(e.Workload.Name.Name, e.Ports[0].Target))
	}
	if want := []string{"a8080", "b8080"}; !slices.Equal(got, want) {
		t.Errorf("Endpoints = %v, want %v", got, want)
	}
}

func TestPoliciesFor(t *testing.T) {
	policy := func(ns, name string, scope mesh.Scope) mesh.Policy {
		return mesh.Policy{Name: mesh.Name{Namespace: ns, Name: name}, Scope: scope, Action: mesh.Deny}
	}
	v := New("1", nil, nil, []mesh.Policy{
		policy("root", "global", mesh.ScopeGlobal), policy("shop", "wide", mesh.ScopeNamespace), policy("pay", "wide", mesh.ScopeNamespace),
		policy("shop", "one", mesh.ScopeSelector), policy("shop", "other", mesh.ScopeSelector),
	})
	name := func(s string) mesh.Name { n, _ := mesh.ParseName(s); return n }
	for _, tc := range []struct {
		name    string
		listed  []mesh.Name
		want    string
		missing string
	}{
		{"global and namespace", nil, "[root/global shop/wide]", "[]"},
		{"and listed", []mesh.Name{name("shop/one")}, "[root/global shop/wide shop/one]", "[]"},
		{"listed twice over", []mesh.Name{name("shop/wide"), name("root/global")}, "[root/global shop/wide]", "[]"},
		{"listed but not here", []mesh.Name{name("shop/gone"), name("shop/one")}, "[root/global shop/wide shop/one]", "[shop/gone]"},
		{"of another namespace", []mesh.Name{name("pay/wide")}, "[root/global shop/wide pay/wide]", "[]"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := pod("a", "10.0.0.1")
			w.Policies = tc.listed
			ps, missing := v.PoliciesFor(&w)
			names := []mesh.Name{}
			for _, p := range ps {
				names = append(names, p.Name)
			}
			if fmt.Sprint(names) != tc.want || fmt.Sprint(missing) != tc.missing {
				t.Errorf("PoliciesFor = %v, missing %v; want %v, missing %v", names, missing, tc.want, tc.missing)
			}
		})
	}
	w := pod("a", "10.0.0.1")
	w.Name.Namespace = "elsewhere"
	if ps, _ := v.PoliciesFor(&w); len(ps) != 1 {
		t.Errorf("a namespace without policies has %d, want the global one", len(ps))
	}
	ps, _ := v.PoliciesFor(&w)
	_ = append(ps, nil)
	if again, _ := v.PoliciesFor(&w); len(again) != 1 || again[0] == nil {
		t.Error("a caller's append changed the View")
	}
}

func TestDumpReplays(t *testing.T) {
	w := with(pod("b", "10.0.0.2"), func(w *mesh.Workload) { w.Policies = []mesh.Name{{Namespace: "shop", Name: "p"}} })
	odd := mesh.Policy{Name: mesh.Name{Namespace: "shop", Name: "p"}} // held by a proxy that did not understand it
	v := New("v7", []mesh.Workload{w, pod("a", "fd00::1")}, []mesh.Service{service("s", "10.96.0.1/32")}, []mesh.Policy{odd})
	first, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	again, err := FromJSON(first)
	if err != nil {
		t.Fatal(err)
	}
	second, err := json.Marshal(again)
	if err != nil {
		t.Fatal(err)
	}
	if string(first) != string(second) {
		t.Errorf("the dump changed:\n%s\n%s", first, second)
	}
	if again.Version() != "v7" || again.Workload(addr("fd00::1")) == nil || again.Service(addr("10.96.0.1")) == nil {
		t.Error("the replayed View does not answer")
	}
	if _, err := FromJSON([]byte(`{"version":`)); err == nil {
		t.Error("half a dump was accepted")
	}
}

func TestLastOfEqualKeysCounts(t *testing.T) {
	v := New("1", []mesh.Workload{pod("a", "10.0.0.1"), pod("a", "10.0.0.2")}, nil, nil)
	if v.Workload(addr("10.0.0.1")) != nil || v.Workload(addr("10.0.0.2")) == nil {
		t.Error("a replaced workload still answers")
	}
}

func TestStore(t *testing.T) {
	var s Store
	if s.Load() == nil || s.Load().Synced() {
		t.Fatal("a zero Store does not hold the zero View")
	}
	changed := s.Changed()
	select {
	case <-changed:
		t.Fatal("changed before the first Set")
	default:
	}
	s.Set(New("1", nil, nil, nil))
	<-changed
	if s.Load().Version() != "1" {
		t.Error("Load does not return what was Set")
	}
	s.Set(nil)
	if s.Load() == nil || s.Load().Synced() {
		t.Error("Set(nil) is not the zero View")
	}
}

// mesh10k is a mesh of 10000 pods behind 500 services.
func mesh10k() ([]mesh.Workload, []mesh.Service) {
	ws, ss := make([]mesh.Workload, 10_000), make([]mesh.Service, 500)
	for i := range ss {
		a := netip.AddrFrom4([4]byte{10, 96, byte(i >> 8), byte(i)})
		ss[i] = service(fmt.Sprintf("s%d.shop.svc.cluster.local", i), a.String()+"/32")
	}
	for i := range ws {
		ws[i] = pod(fmt.Sprintf("web-%d", i), netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}).String())
		ws[i].Services = []mesh.Membership{{Service: ss[i%500].Name, Ports: []mesh.Port{{Service: 80, Target: 8080}}}}
	}
	return ws, ss
}

func BenchmarkNew10k(b *testing.B) {
	ws, ss := mesh10k()
	b.ReportAllocs()
	for b.Loop() {
		New("1", ws, ss, nil)
	}
}

func BenchmarkLookup(b *testing.B) {
	ws, ss := mesh10k()
	v := New("1", ws, ss, nil)
	a, vip := addr("10.1.7.7"), addr("10.96.1.1")
	b.ReportAllocs()
	for b.Loop() {
		if w := v.Workload(a); w == nil || v.Service(vip) == nil {
			b.Fatal("not found")
		}
	}
}
