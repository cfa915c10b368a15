package feed

import (
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	pb "github.com/weft-mesh/weft/api/workload"
	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/authz"
	"github.com/weft-mesh/weft/mesh/balance"
	"github.com/weft-mesh/weft/mesh/view"
)

var (
	addr   = netip.MustParseAddr
	prefix = netip.MustParsePrefix
)

// full returns objects in which every field is set.
func full() (mesh.Workload, mesh.Service, mesh.Policy) {
	cart := mesh.ServiceName{Namespace: "shop", Host: "cart.shop.svc.cluster.local"}
	text := func(k mesh.MatchKind, s string) []mesh.StringMatch { return []mesh.StringMatch{{Kind: k, Value: s}} }
	w := mesh.Workload{
		UID:               "Kubernetes//Pod/shop/cart-1",
		Name:              mesh.Name{Namespace: "shop", Name: "cart-1"},
		Addresses:         []netip.Addr{addr("10.0.0.1"), addr("fd00::1")},
		Host:              "cart.example",
		Network:           "net1",
		Cluster:           "Kubernetes",
		Node:              "node1",
		Locality:          mesh.Locality{Region: "eu", Zone: "eu-a", Subzone: "rack1"},
		Identity:          mesh.Identity{TrustDomain: "td", Namespace: "shop", ServiceAccount: "cart"},
		Transport:         mesh.HBONE,
		HostNetwork:       true,
		AppTunnel:         mesh.AppTunnel{Proxy: true, Port: 15088},
		Waypoint:          mesh.GatewayRef{Service: mesh.ServiceName{Namespace: "shop", Host: "waypoint"}, Port: 15008},
		Healthy:           true,
		CanonicalName:     "cart",
		CanonicalRevision: "v2",
		Owner:             mesh.Owner{Kind: "job", Name: "cart"},
		Services: []mesh.Membership{
			{Service: cart, Ports: []mesh.Port{{Service: 80, Target: 8080, AppProtocol: "http"}, {Service: 443, Target: 8443, AppProtocol: "tls"}}},
			{Service: mesh.ServiceName{Namespace: "shop", Host: "z"}, Ports: []mesh.Port{{Service: 1, Target: 2}}},
		},
		Policies: []mesh.Name{{Namespace: "shop", Name: "p"}, {Namespace: "root", Name: "q"}},
		Capacity: new(uint32(3)),
		Direct:   true,
		Labels:   map[string]string{"version": "v2"},
	}
	s := mesh.Service{
		Name:            cart,
		ShortName:       "cart",
		VIPs:            []mesh.VIP{{Network: "net1", Prefix: prefix("10.96.0.1/32")}, {Prefix: prefix("fd00:1::/64")}, {Prefix: prefix("fd00::2/128")}},
		Ports:           []mesh.Port{{Service: 80, Target: 8080, AppProtocol: "grpc"}, {Service: 81}},
		SubjectAltNames: []string{"spiffe://td/ns/a/sa/b"},
		Waypoint:        mesh.GatewayRef{Network: "net1", Address: addr("10.0.0.9"), Port: 15009},
		Preferences:     []mesh.Preference{mesh.PreferNetwork, mesh.PreferRegion, mesh.PreferZone, mesh.PreferSubzone, mesh.PreferNode, mesh.PreferCluster},
		Mode:            mesh.BalanceFailover,
		AllowUnhealthy:  true,
		IPFamilies:      "dual",

		ExternalAddresses: []netip.Addr{addr("198.51.100.1"), addr("2001:db8::1")},
		Canonical:         true,
		Private:           true,
	}
	p := mesh.Policy{
		Name: mesh.Name{Namespace: "shop", Name: "p"}, Scope: mesh.ScopeNamespace, Action: mesh.Deny, DryRun: true,
		Groups: []mesh.Group{{Clauses: []mesh.Clause{{Matches: []mesh.Match{{
			Namespaces:         text(mesh.MatchExact, "a"),
			NotNamespaces:      text(mesh.MatchPrefix, "b"),
			Principals:         text(mesh.MatchSuffix, "c"),
			NotPrincipals:      text(mesh.MatchPresence, ""),
			ServiceAccounts:    []mesh.ServiceAccountMatch{{Namespace: "d", ServiceAccount: "e"}},
			NotServiceAccounts: []mesh.ServiceAccountMatch{{Namespace: "f", ServiceAccount: "g"}},
			SourceIPs:          []netip.Prefix{prefix("10.0.0.0/8")},
			NotSourceIPs:       []netip.Prefix{prefix("fd00::/8")},
			DestinationIPs:     []netip.Prefix{prefix("0.0.0.0/0")},
			NotDestinationIPs:  []netip.Prefix{prefix("fd00::1/128")},
			DestinationPorts:   []uint16{80, 65535},
			NotDestPorts:       []uint16{22},
			Unknown:            true,
		}}}, {}}}, {}},
	}
	return w, s, p
}

// allSet fails if a field of v is zero: then a round trip would not prove that
// it travels. Those of but travel another way.
func allSet(t *testing.T, v any, but ...string) {
	t.Helper()
	rv := reflect.ValueOf(v)
	for i := range rv.NumField() {
		if rv.Field(i).IsZero() && !slices.Contains(but, rv.Type().Field(i).Name) {
			t.Errorf("%s.%s is not set in the test's object", rv.Type(), rv.Type().Field(i).Name)
		}
	}
}

// sent returns m as it arrives.
func sent[M proto.Message](t *testing.T, m, into M) M {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	if err := proto.Unmarshal(b, into); err != nil {
		t.Fatal(err)
	}
	return into
}

func same(t *testing.T, got, want any) {
	t.Helper()
	opts := cmp.Options{
		cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
		cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
	}
	if d := cmp.Diff(want, got, opts); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
}

func workloadTrip(t *testing.T, w mesh.Workload) mesh.Workload {
	t.Helper()
	got, err := ToWorkload(sent(t, FromWorkload(w), &pb.Workload{}))
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func serviceTrip(t *testing.T, s mesh.Service) mesh.Service {
	t.Helper()
	got, err := ToService(sent(t, FromService(s), &pb.Service{}))
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func policyTrip(t *testing.T, p mesh.Policy) mesh.Policy {
	t.Helper()
	got, err := ToPolicy(sent(t, FromPolicy(p), &pb.Authorization{}))
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func TestEveryFieldTravels(t *testing.T) {
	w, s, p := full()
	allSet(t, w)
	allSet(t, s)
	allSet(t, p, "Targets")
	allSet(t, p.Groups[0].Clauses[0].Matches[0], "Methods", "NotMethods", "Hosts", "NotHosts", "Paths", "NotPaths", "Headers", "RemoteIPs", "NotRemoteIPs")
	same(t, workloadTrip(t, w), w)
	same(t, serviceTrip(t, s), s)
	same(t, policyTrip(t, p), p)
}

func TestEveryValueTravels(t *testing.T) {
	for _, c := range []*uint32{nil, new(uint32)} {
		w, _, _ := full()
		w.Capacity = c
		same(t, workloadTrip(t, w), w)
	}
	w, s, p := full()
	for _, x := range []mesh.Transport{mesh.TransportUnset, mesh.PlainTCP, mesh.HBONE} {
		w.Transport = x
		same(t, workloadTrip(t, w), w)
	}
	for _, x := range []string{"deployment", "cronjob", "pod", "job"} {
		w.Owner.Kind = x
		same(t, workloadTrip(t, w), w)
	}
	w.Healthy, w.HostNetwork, w.Owner, w.Waypoint, w.Locality = false, false, mesh.Owner{}, mesh.GatewayRef{}, mesh.Locality{}
	w.Services, w.Policies, w.Addresses = nil, nil, nil
	same(t, workloadTrip(t, w), w)
	for _, x := range []string{"", "http", "http2", "grpc", "tcp", "tls"} {
		s.Ports[0].AppProtocol = x
		same(t, serviceTrip(t, s), s)
	}
	for _, x := range []string{"", "ipv4", "ipv6", "dual"} {
		s.IPFamilies = x
		same(t, serviceTrip(t, s), s)
	}
	for _, x := range []mesh.BalanceMode{mesh.BalanceAny, mesh.BalanceStrict, mesh.BalanceFailover, mesh.BalancePassthrough} {
		s.Mode = x
		same(t, serviceTrip(t, s), s)
	}
	s.Mode, s.Preferences, s.AllowUnhealthy = mesh.BalanceAny, nil, false
	same(t, serviceTrip(t, s), s)
	for _, x := range []mesh.Scope{mesh.ScopeGlobal, mesh.ScopeNamespace, mesh.ScopeSelector} {
		p.Scope = x
		same(t, policyTrip(t, p), p)
	}
	for _, x := range []mesh.Action{mesh.ActionUnset, mesh.Allow, mesh.Deny} {
		p.Action = x
		same(t, policyTrip(t, p), p)
	}
}

func TestWireDefaults(t *testing.T) {
	w, err := ToWorkload(&pb.Workload{Uid: "u", Name: "n", Namespace: "ns"})
	if err != nil {
		t.Fatal(err)
	}
	if want := (mesh.Identity{TrustDomain: "cluster.local", Namespace: "ns", ServiceAccount: "default"}); w.Identity != want {
		t.Errorf("identity is %v, want %v", w.Identity, want)
	}
	if w.Transport != mesh.PlainTCP || !w.Healthy {
		t.Errorf("transport %v, healthy %v; want plain and healthy", w.Transport, w.Healthy)
	}
	mapped := addr("::ffff:10.0.0.1").As16()
	w, err = ToWorkload(&pb.Workload{Uid: "u", Name: "n", Namespace: "ns", Addresses: [][]byte{mapped[:]}})
	if err != nil || w.Addresses[0] != addr("10.0.0.1") {
		t.Errorf("a mapped address was read as %v (%v)", w.Addresses, err)
	}
}

// refuses fails if anything could pass to or from w.
func refuses(t *testing.T, w mesh.Workload) {
	t.Helper()
	if w.Transport != mesh.TransportUnset {
		t.Errorf("transport is %v, want unset", w.Transport)
	}
	ps, missing := view.New("1", []mesh.Workload{w}, nil, nil).PoliciesFor(&w)
	if authz.Decide(ps, missing, authz.Facts{}).Allowed {
		t.Error("inbound connections are allowed")
	}
}

func TestWorkloadsThatCannotBeReadAreRefused(t *testing.T) {
	for name, edit := range map[string]func(*pb.Workload){
		"no uid":               func(m *pb.Workload) { m.Uid = "" },
		"no name":              func(m *pb.Workload) { m.Name = "" },
		"no namespace":         func(m *pb.Workload) { m.Namespace = "" },
		"address of 5 bytes":   func(m *pb.Workload) { m.Addresses = append(m.Addresses, []byte("12345")) },
		"empty address":        func(m *pb.Workload) { m.Addresses = append(m.Addresses, nil) },
		"service without host": func(m *pb.Workload) { m.Services = map[string]*pb.PortList{"shop": nil} },
		"port out of range": func(m *pb.Workload) {
			m.Services = map[string]*pb.PortList{"a/b": {Ports: []*pb.Port{{ServicePort: 65536}}}}
		},
		"waypoint without name":      func(m *pb.Workload) { m.Waypoint = &pb.GatewayAddress{HboneMtlsPort: 15008} },
		"waypoint with half a name":  func(m *pb.Workload) { m.Waypoint = fromGateway(mesh.GatewayRef{Service: mesh.ServiceName{Host: "w"}}) },
		"waypoint with bad address":  func(m *pb.Workload) { m.Waypoint = &pb.GatewayAddress{Destination: &pb.GatewayAddress_Address{}} },
		"waypoint port out of range": func(m *pb.Workload) { m.Waypoint.HboneMtlsPort = 1 << 20 },
		"application tunnel of a later version": func(m *pb.Workload) {
			m.ApplicationTunnel = &pb.ApplicationTunnel{Protocol: 2}
		},
		"application tunnel to no port": func(m *pb.Workload) {
			m.ApplicationTunnel = &pb.ApplicationTunnel{Protocol: pb.ApplicationTunnel_PROXY, Port: 65536}
		},
	} {
		t.Run(name, func(t *testing.T) {
			w, _, _ := full()
			m := FromWorkload(w)
			edit(m)
			got, err := ToWorkload(m)
			if err == nil {
				t.Fatal("no error")
			}
			refuses(t, got)
			if !slices.Contains(got.Addresses, w.Addresses[0]) {
				t.Error("the stand-in lost the addresses, so traffic to them would pass by it")
			}
		})
	}
}

func TestValuesOfALaterVersionFailClosed(t *testing.T) {
	w, s, p := full()
	m := FromWorkload(w)
	m.TunnelProtocol = 77
	if got, err := ToWorkload(m); err != nil || got.Transport != mesh.TransportUnset {
		t.Errorf("unknown transport: %v, %v; want unset", got.Transport, err)
	}
	m = FromWorkload(w)
	m.Status = 77
	if got, _ := ToWorkload(m); got.Healthy {
		t.Error("unknown status counts as healthy")
	}
	m = FromWorkload(w)
	m.AuthorizationPolicies = append(m.AuthorizationPolicies, "no-namespace")
	w2, _ := ToWorkload(m)
	if _, missing := view.New("1", nil, nil, nil).PoliciesFor(&w2); len(missing) != 3 {
		t.Errorf("a policy name that does not parse was lost: %v", missing)
	}

	near := []balance.Candidate{{Workload: &w, Port: 80}}
	ms := FromService(s)
	ms.LoadBalancing.Mode = 77
	if got, _ := ToService(ms); got.Mode == mesh.BalanceAny {
		t.Error("unknown balance mode takes any endpoint")
	} else if _, ok := balance.Choose(&got, w, near, 0); ok {
		t.Error("unknown balance mode chose an endpoint")
	}
	ms = FromService(s)
	ms.LoadBalancing.Mode = pb.LoadBalancing_STRICT
	ms.LoadBalancing.RoutingPreference = append(ms.LoadBalancing.RoutingPreference, 77)
	if got, _ := ToService(ms); len(got.Preferences) != len(s.Preferences)+1 {
		t.Error("a strict preference of a later version was dropped")
	} else if _, ok := balance.Choose(&got, w, near, 0); ok {
		t.Error("a strict preference of a later version was met")
	}

	ms = FromService(s)
	ms.Visibility = 77
	if got, _ := ToService(ms); !got.Private {
		t.Error("unknown visibility counts as public")
	}

	mp := FromPolicy(p)
	mp.Action = 77
	if got, _ := ToPolicy(mp); got.Action != mesh.ActionUnset {
		t.Errorf("unknown action became %v", got.Action)
	}
	mp = FromPolicy(p)
	mp.Scope = 77
	if got, _ := ToPolicy(mp); got.Action != mesh.ActionUnset || got.Scope != mesh.ScopeNamespace {
		t.Errorf("unknown scope became %v, %v; want a namespace that is denied", got.Scope, got.Action)
	}
}

func TestServicesThatCannotBeReadAreRefused(t *testing.T) {
	w, _, _ := full()
	for name, edit := range map[string]func(*pb.Service){
		"no namespace":                  func(m *pb.Service) { m.Namespace = "" },
		"no host":                       func(m *pb.Service) { m.Hostname = "" },
		"bad address":                   func(m *pb.Service) { m.Addresses = append(m.Addresses, &pb.NetworkAddress{Address: []byte("x")}) },
		"prefix too long":               func(m *pb.Service) { m.Addresses[0].Length = proto.Uint32(33) },
		"port out of range":             func(m *pb.Service) { m.Ports[0].TargetPort = 1 << 16 },
		"waypoint without name":         func(m *pb.Service) { m.Waypoint = &pb.GatewayAddress{} },
		"weighted waypoint without one": func(m *pb.Service) { m.Waypoint, m.WeightedWaypoints = nil, []*pb.WeightedWaypoint{{Weight: 1}} },
	} {
		t.Run(name, func(t *testing.T) {
			_, s, _ := full()
			m := FromService(s)
			edit(m)
			got, err := ToService(m)
			if err == nil {
				t.Fatal("no error")
			}
			if len(got.VIPs) < 2 {
				t.Error("the stand-in lost the addresses, so traffic to them would pass by it")
			}
			if _, ok := balance.Choose(&got, w, []balance.Candidate{{Workload: &w, Port: 80}}, 0); ok || got.Mode == mesh.BalancePassthrough {
				t.Error("the stand-in takes traffic")
			}
		})
	}
}

func TestWeightedWaypoints(t *testing.T) {
	_, s, _ := full()
	m := FromService(s)
	m.Waypoint = nil
	for i, host := range []string{"small", "large", "none"} {
		r := mesh.GatewayRef{Service: mesh.ServiceName{Namespace: "shop", Host: mesh.Host(host)}}
		m.WeightedWaypoints = append(m.WeightedWaypoints, &pb.WeightedWaypoint{Destination: fromGateway(r), Weight: []uint32{1, 3000000000, 0}[i]})
	}
	got, err := ToService(m)
	if err != nil || got.Waypoint.Service.Host != "large" {
		t.Errorf("waypoint is %v (%v), want the one with the largest weight: never none", got.Waypoint, err)
	}
}

// extra returns m with a field that this version does not know.
func extra[M proto.Message](m M) M {
	m.ProtoReflect().SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 99, protowire.VarintType), 1))
	return m
}

func TestConditionsOfALaterVersionNeverWidenAccess(t *testing.T) {
	peer := authz.Facts{
		Peer:   mesh.Identity{TrustDomain: "td", Namespace: "shop", ServiceAccount: "cart"},
		Source: netip.MustParseAddrPort("10.0.0.1:1"), Destination: netip.MustParseAddrPort("10.0.0.2:80"),
	}
	holds := func() *pb.Match {
		return fromMatch(mesh.Match{Namespaces: []mesh.StringMatch{{Kind: mesh.MatchExact, Value: "shop"}}})
	}
	rules := func(m *pb.Match) *pb.Authorization {
		return &pb.Authorization{Name: "p", Namespace: "shop", Scope: pb.Scope_WORKLOAD_SELECTOR, Groups: []*pb.Group{{Rules: []*pb.Rules{{Matches: []*pb.Match{m}}}}}}
	}
	for name, m := range map[string]*pb.Authorization{
		"field of the policy":     extra(rules(holds())),
		"extension of the policy": func() *pb.Authorization { a := rules(holds()); a.Extensions = []*pb.Extension{{Name: "x"}}; return a }(),
		"field of a group":        func() *pb.Authorization { a := rules(holds()); extra(a.Groups[0]); return a }(),
		"field of the rules":      func() *pb.Authorization { a := rules(holds()); extra(a.Groups[0].Rules[0]); return a }(),
		"rules with nothing else": func() *pb.Authorization { a := rules(holds()); a.Groups[0].Rules[0] = extra(&pb.Rules{}); return a }(),
		"field of a match":        rules(extra(holds())),
		"match with nothing else": rules(extra(&pb.Match{})),
		"extension of a match":    func() *pb.Authorization { m := holds(); m.Extensions = []*pb.Extension{{Name: "x"}}; return rules(m) }(),
		"string match of a later kind": func() *pb.Authorization {
			return rules(&pb.Match{NotPrincipals: []*pb.StringMatch{extra(&pb.StringMatch{})}})
		}(),
		"range that is none":     rules(&pb.Match{NotSourceIps: []*pb.AddressRange{{Address: []byte("abc")}}}),
		"range that is too long": rules(&pb.Match{NotSourceIps: []*pb.AddressRange{{Address: []byte{10, 0, 0, 0}, Length: 33}}}),
		"range of both families": rules(&pb.Match{NotSourceIps: []*pb.AddressRange{{Address: addr("::ffff:10.0.0.0").AsSlice(), Length: 95}}}),
		"port out of range":      rules(&pb.Match{NotDestinationPorts: []uint32{65536 + 22}}),
		"account without a name": rules(&pb.Match{NotServiceAccounts: []*pb.ServiceAccountMatch{{Namespace: "pay"}}}),
	} {
		t.Run(name, func(t *testing.T) {
			for _, action := range []pb.Action{pb.Action_ALLOW, pb.Action_DENY} {
				m.Action = action
				p, err := ToPolicy(sent(t, m, &pb.Authorization{}))
				if err != nil {
					t.Fatal(err)
				}
				if d := authz.Decide([]*mesh.Policy{&p}, nil, peer); d.Allowed {
					t.Errorf("%v: %s", action, d.Reason)
				}
			}
		})
	}
	understood := rules(holds())
	p, _ := ToPolicy(understood)
	if d := authz.Decide([]*mesh.Policy{&p}, nil, peer); !d.Allowed {
		t.Errorf("a policy that is understood denies: %s", d.Reason)
	}
}

func TestPolicyNeedsAName(t *testing.T) {
	for _, m := range []*pb.Authorization{{}, {Name: "p"}, {Namespace: "ns"}} {
		if _, err := ToPolicy(m); err == nil || !strings.Contains(err.Error(), "lacks a part") {
			t.Errorf("%v: error %v", m, err)
		}
	}
}

func FuzzAddress(f *testing.F) {
	w, s, _ := full()
	for _, m := range []*pb.Address{{Type: &pb.Address_Workload{Workload: FromWorkload(w)}}, {Type: &pb.Address_Service{Service: FromService(s)}}} {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var m pb.Address
		if proto.Unmarshal(b, &m) != nil {
			return
		}
		c := newCache("")
		w, werr := ToWorkload(m.GetWorkload())
		if werr != nil {
			refuses(t, w)
		} else {
			same(t, workloadTrip(t, w).Addresses, w.Addresses)
		}
		s, serr := ToService(m.GetService())
		if serr == nil {
			same(t, serviceTrip(t, s).VIPs, s.VIPs)
		}
		c.setAddress(m.GetWorkload().GetUid(), b)
		c.setAddress(s.Name.String(), b)
		c.view()
	})
}

func FuzzAuthorization(f *testing.F) {
	_, _, p := full()
	b, err := proto.Marshal(FromPolicy(p))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	facts := authz.Facts{Source: netip.MustParseAddrPort("10.0.0.1:1"), Destination: netip.MustParseAddrPort("10.0.0.2:80")}
	f.Fuzz(func(t *testing.T, b []byte) {
		c := newCache("")
		err := c.setPolicy("shop/p", b)
		got := c.policies["shop/p"]
		if err != nil {
			if authz.Decide([]*mesh.Policy{got}, nil, facts).Allowed {
				t.Fatal("what could not be read allows")
			}
			return
		}
		var m pb.Authorization
		if err := proto.Unmarshal(b, &m); err != nil {
			t.Fatal(err)
		}
		before := authz.Decide([]*mesh.Policy{got}, nil, facts)
		again := policyTrip(t, *got)
		if after := authz.Decide([]*mesh.Policy{&again}, nil, facts); after.Allowed != before.Allowed {
			t.Fatalf("%v before and %v after another trip", before, after)
		}
	})
}
