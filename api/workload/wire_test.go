package workload

import (
	"fmt"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// numbers is what stands on the wire: fields of messages and values of enums.
// It is written by hand; whoever changes it breaks with every proxy and
// control plane that is out there.
const numbers = `
istio.workload.Address: workload 1 message, service 2 message
istio.workload.Workload: name 1 string, namespace 2 string, addresses 3 bytes*, network 4 string, tunnel_protocol 5 enum, trust_domain 6 string, service_account 7 string, waypoint 8 message, node 9 string, canonical_name 10 string, canonical_revision 11 string, workload_type 12 enum, workload_name 13 string, native_tunnel 14 bool, authorization_policies 16 string*, status 17 enum, cluster_id 18 string, network_gateway 19 message, uid 20 string, hostname 21 string, services 22 message*, application_tunnel 23 message, locality 24 message, network_mode 25 enum, extensions 26 message*, capacity 27 message, direct 7701 bool, labels 50000 message*
istio.workload.ApplicationTunnel: protocol 1 enum, port 2 uint32
istio.workload.ApplicationTunnel.Protocol: NONE 0, PROXY 1
istio.workload.Locality: region 1 string, zone 2 string, subzone 3 string
istio.workload.PortList: ports 1 message*
istio.workload.Port: service_port 1 uint32, target_port 2 uint32, app_protocol 3 enum
istio.workload.Service: name 1 string, namespace 2 string, hostname 3 string, addresses 4 message*, ports 5 message*, subject_alt_names 6 string*, waypoint 7 message, load_balancing 8 message, ip_families 9 enum, extensions 10 message*, canonical 11 bool, ingress_use_waypoint 12 bool, weighted_waypoints 13 message*, visibility 14 enum, external_addresses 7701 bytes*
istio.workload.WeightedWaypoint: destination 1 message, weight 2 uint32
istio.workload.LoadBalancing: routing_preference 1 enum*, mode 2 enum, health_policy 3 enum
istio.workload.LoadBalancing.Scope: UNSPECIFIED_SCOPE 0, REGION 1, ZONE 2, SUBZONE 3, NODE 4, CLUSTER 5, NETWORK 6
istio.workload.LoadBalancing.Mode: UNSPECIFIED_MODE 0, STRICT 1, FAILOVER 2, PASSTHROUGH 3
istio.workload.LoadBalancing.HealthPolicy: ONLY_HEALTHY 0, ALLOW_ALL 1
istio.workload.NetworkAddress: network 1 string, address 2 bytes, length 3 uint32
istio.workload.NamespacedHostname: namespace 1 string, hostname 2 string
istio.workload.GatewayAddress: hostname 1 message, address 2 message, hbone_mtls_port 3 uint32
istio.workload.Extension: name 1 string, config 2 message
istio.workload.TunnelProtocol: NONE 0, HBONE 1, LEGACY_ISTIO_MTLS 2
istio.workload.WorkloadType: DEPLOYMENT 0, CRONJOB 1, POD 2, JOB 3
istio.workload.WorkloadStatus: HEALTHY 0, UNHEALTHY 1
istio.workload.NetworkMode: STANDARD 0, HOST_NETWORK 1
istio.workload.AppProtocol: UNKNOWN 0, HTTP11 1, HTTP2 2, GRPC 3, TCP 4, TLS 5
istio.workload.IPFamilies: AUTOMATIC 0, IPV4_ONLY 1, IPV6_ONLY 2, DUAL 3
istio.workload.ServiceVisibility: PUBLIC 0, NAMESPACE 1
istio.security.Authorization: name 1 string, namespace 2 string, scope 3 enum, action 4 enum, groups 5 message*, dry_run 6 bool, extensions 7 message*
istio.security.Group: rules 1 message*
istio.security.Rules: matches 2 message*
istio.security.Match: namespaces 1 message*, not_namespaces 2 message*, principals 3 message*, not_principals 4 message*, source_ips 5 message*, not_source_ips 6 message*, destination_ips 7 message*, not_destination_ips 8 message*, destination_ports 9 uint32*, not_destination_ports 10 uint32*, service_accounts 11 message*, not_service_accounts 12 message*, extensions 13 message*
istio.security.AddressRange: address 1 bytes, length 2 uint32
istio.security.StringMatch: exact 1 string, prefix 2 string, suffix 3 string, presence 4 message
istio.security.ServiceAccountMatch: namespace 1 string, serviceAccount 2 string
istio.security.Scope: GLOBAL 0, NAMESPACE 1, WORKLOAD_SELECTOR 2
istio.security.Action: ALLOW 0, DENY 1
`

func TestNumbers(t *testing.T) {
	got := map[string]string{}
	for _, f := range []protoreflect.FileDescriptor{File_api_workload_workload_proto, File_api_workload_authorization_proto} {
		messages(got, f.Messages())
		enums(got, f.Enums())
	}
	for line := range strings.Lines(strings.TrimSpace(numbers)) {
		name, want, _ := strings.Cut(strings.TrimSpace(line), ": ")
		if got[name] != want {
			t.Errorf("%s\n got  %s\n want %s", name, got[name], want)
		}
		delete(got, name)
	}
	for name := range got {
		t.Errorf("%s is not in the list", name)
	}
}

func messages(out map[string]string, ms protoreflect.MessageDescriptors) {
	for i := range ms.Len() {
		m := ms.Get(i)
		if m.IsMapEntry() {
			continue
		}
		byNumber := map[protowire.Number]string{}
		for j := range m.Fields().Len() {
			f := m.Fields().Get(j)
			s := fmt.Sprintf("%s %d %s", f.Name(), f.Number(), f.Kind())
			if f.Cardinality() == protoreflect.Repeated {
				s += "*"
			}
			byNumber[f.Number()] = s
		}
		var list []string
		for n := protowire.Number(0); len(list) < len(byNumber); n++ {
			if s, ok := byNumber[n]; ok {
				list = append(list, s)
			}
		}
		out[string(m.FullName())] = strings.Join(list, ", ")
		messages(out, m.Messages())
		enums(out, m.Enums())
	}
}

func enums(out map[string]string, es protoreflect.EnumDescriptors) {
	for i := range es.Len() {
		var list []string
		for j := range es.Get(i).Values().Len() {
			v := es.Get(i).Values().Get(j)
			list = append(list, fmt.Sprintf("%s %d", v.Name(), v.Number()))
		}
		out[string(es.Get(i).FullName())] = strings.Join(list, ", ")
	}
}

// TestBytes reads messages that were put together by hand.
func TestBytes(t *testing.T) {
	ports := "\x0a\x07\x08\x50\x10\x90\x3f\x18\x01" // ports[0]: 80 to 8080, HTTP11
	workload := "\xa2\x01\x03uid" + "\x0a\x01n" + "\x12\x02ns" + "\x1a\x04\x0a\x00\x00\x01" + "\x28\x01" +
		"\xb2\x01\x11" + "\x0a\x04ns/h" + "\x12\x09" + ports +
		"\x82\x01\x04ns/p" + "\x88\x01\x01" + "\xc2\x01\x04\x0a\x02eu" + "\xc8\x01\x01" + "\xda\x01\x02\x08\x07"
	address := "\x0a" + string(protowire.AppendVarint(nil, uint64(len(workload)))) + workload
	var a Address
	if err := proto.Unmarshal([]byte(address), &a); err != nil {
		t.Fatal(err)
	}
	w := a.GetWorkload()
	p := w.GetServices()["ns/h"].GetPorts()
	if w.GetUid() != "uid" || w.GetName() != "n" || w.GetNamespace() != "ns" || string(w.GetAddresses()[0]) != "\x0a\x00\x00\x01" ||
		w.GetTunnelProtocol() != TunnelProtocol_HBONE || len(p) != 1 || p[0].GetServicePort() != 80 || p[0].GetTargetPort() != 8080 ||
		p[0].GetAppProtocol() != AppProtocol_HTTP11 || w.GetAuthorizationPolicies()[0] != "ns/p" || w.GetStatus() != WorkloadStatus_UNHEALTHY ||
		w.GetLocality().GetRegion() != "eu" || w.GetNetworkMode() != NetworkMode_HOST_NETWORK || w.GetCapacity().GetValue() != 7 {
		t.Errorf("workload was read as %v", w)
	}

	var auth Authorization
	deny := "\x0a\x01p" + "\x12\x02ns" + "\x18\x01" + "\x20\x01" +
		"\x2a\x08" + "\x0a\x06" + "\x12\x04" + "\x22\x02\x22\x00" + // not_principals: presence
		"\x30\x01"
	if err := proto.Unmarshal([]byte(deny), &auth); err != nil {
		t.Fatal(err)
	}
	not := auth.GetGroups()[0].GetRules()[0].GetMatches()[0].GetNotPrincipals()
	if auth.GetName() != "p" || auth.GetNamespace() != "ns" || auth.GetScope() != Scope_NAMESPACE || auth.GetAction() != Action_DENY ||
		!auth.GetDryRun() || len(not) != 1 || not[0].GetPresence() == nil {
		t.Errorf("policy was read as %v", &auth)
	}
}
