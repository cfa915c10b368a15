package ztunnel

import (
	"encoding/json"
	"net/netip"
	"reflect"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/view"
)

// Tools read these names, and not those of our own dumps.
func TestPolicyDump(t *testing.T) {
	kinds := []mesh.StringMatch{
		{Kind: mesh.MatchExact, Value: "a"}, {Kind: mesh.MatchPrefix, Value: "b"}, {Kind: mesh.MatchSuffix, Value: "c"},
		{Kind: mesh.MatchPresence}, {Kind: 99, Value: "d"},
	}
	one := []mesh.StringMatch{{Kind: mesh.MatchExact, Value: "x"}}
	account := []mesh.ServiceAccountMatch{{Namespace: "shop", ServiceAccount: "web"}}
	nets := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
	p := &mesh.Policy{
		Name: mesh.Name{Namespace: "shop", Name: "web"}, Scope: mesh.ScopeSelector, Action: mesh.Deny, DryRun: true,
		Groups: []mesh.Group{{Clauses: []mesh.Clause{{Matches: []mesh.Match{
			{
				Namespaces: one, NotNamespaces: one, Principals: kinds, NotPrincipals: one,
				ServiceAccounts: account, NotServiceAccounts: account, SourceIPs: nets, NotSourceIPs: nets,
				DestinationIPs: nets, NotDestinationIPs: nets, DestinationPorts: []uint16{80}, NotDestPorts: []uint16{443},
			},
			{Unknown: true},
		}}}}, {}},
	}
	const want = `{"name":"web","namespace":"shop","scope":"WorkloadSelector","action":"Deny","dryRun":true,"rules":[[[{` +
		`"namespaces":[{"Exact":"x"}],"notNamespaces":[{"Exact":"x"}],` +
		`"serviceAccounts":[{"namespace":"shop","serviceAccount":"web"}],"notServiceAccounts":[{"namespace":"shop","serviceAccount":"web"}],` +
		`"principals":[{"Exact":"a"},{"Prefix":"b"},{"Suffix":"c"},{"Presence":[]},{"Unknown":"d"}],"notPrincipals":[{"Exact":"x"}],` +
		`"sourceIps":["10.0.0.0/8"],"notSourceIps":["10.0.0.0/8"],"destinationIps":["10.0.0.0/8"],"notDestinationIps":["10.0.0.0/8"],` +
		`"destinationPorts":[80],"notDestinationPorts":[443]},{"unknown":true}]],[]]}`
	got, err := json.Marshal(policyDump(p))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Error(diff)
	}
	for i := range reflect.TypeFor[dumpMatch]().NumField() {
		if f := reflect.ValueOf(policyDump(p).Rules[0][0][0]).Field(i); f.IsZero() && reflect.TypeFor[dumpMatch]().Field(i).Name != "Unknown" {
			t.Errorf("%s is not dumped", reflect.TypeFor[dumpMatch]().Field(i).Name)
		}
	}
}

func TestServiceDump(t *testing.T) {
	s := service("server", "10.96.0.1")
	s.Mode, s.Preferences = mesh.BalanceFailover, []mesh.Preference{mesh.PreferNetwork, mesh.PreferRegion, mesh.PreferZone, mesh.PreferSubzone, mesh.PreferNode, mesh.PreferCluster}
	s.IPFamilies, s.Private, s.Canonical = "dual", true, true
	d := serviceDump(new(view.View), &s)
	want := &dumpBalance{Mode: "Failover", Preferences: []string{"Network", "Region", "Zone", "Subzone", "Node", "Cluster"}, HealthPolicy: "OnlyHealthy"}
	if diff := cmp.Diff(want, d.LoadBalancer); diff != "" {
		t.Error(diff)
	}
	if d.IPFamilies != "Dual" || d.Visibility != "Namespace" || !d.Canonical {
		t.Errorf("%+v", d)
	}
	s = service("server", "10.96.0.1")
	s.AllowUnhealthy = true
	if diff := cmp.Diff(&dumpBalance{Mode: "Standard", Preferences: []string{}, HealthPolicy: "AllowAll"}, serviceDump(new(view.View), &s).LoadBalancer); diff != "" {
		t.Error(diff)
	}
}

func TestWorkloadDump(t *testing.T) {
	w := workload("server", "10.0.0.4")
	w.Services = []mesh.Membership{{Service: mesh.ServiceName{Namespace: "shop", Host: "server.shop.svc.cluster.local"}}}
	d := workloadDump(&w)
	if d.NetworkMode != "Standard" || !cmp.Equal(d.Services, []string{"shop/server.shop.svc.cluster.local"}) {
		t.Errorf("%+v", d)
	}
	w.HostNetwork = true
	if d := workloadDump(&w); d.NetworkMode != "HostNetwork" {
		t.Errorf("%+v", d)
	}
}
