package e2e

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

// vmPort is where the servers outside of the mesh take requests, on their
// nodes' own addresses.
const vmPort = "18081"

// vmYAML is the servers vm1 and vm2, one on each node, that are no workloads of
// the mesh: all that is known of them is their addresses.
func vmYAML() string {
	var y strings.Builder
	for node, name := range map[string]string{"node1": "vm1", "node2": "vm2"} {
		args := fmt.Sprintf(`args: [server, -text, %s, -http, "%s", -grpc, "", -echo, "", -banner, "", -bulk, ""]`, name, vmPort)
		y.WriteString(strings.Replace(podYAML(outside, name, node, args), "\n  containers:", "\n  hostNetwork: true\n  containers:", 1))
	}
	return y.String()
}

// entriesYAML names the servers three times: by addresses, by WorkloadEntries,
// and by a host name that has both addresses.
func entriesYAML(vm1, vm2 netip.Addr) string {
	return fmt.Sprintf(`---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: partner, namespace: %[1]s, labels: {istio.io/use-waypoint: waypoint}}
spec:
  hosts: [partner.example.com]
  location: MESH_EXTERNAL
  resolution: STATIC
  ports: [{number: 80, name: http, protocol: HTTP, targetPort: %[2]s}]
  endpoints: [{address: %[3]s, labels: {version: v1}}, {address: %[4]s, labels: {version: v2}}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: partner, namespace: %[1]s}
spec:
  host: partner.example.com
  subsets: [{name: v1, labels: {version: v1}}, {name: v2, labels: {version: v2}}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: partner, namespace: %[1]s}
spec:
  hosts: [partner.example.com]
  http:
  - match: [{uri: {prefix: /fault}}]
    fault: {abort: {percentage: {value: 100}, httpStatus: 418}}
    route: [{destination: {host: partner.example.com}}]
  - match: [{uri: {prefix: /slow}}]
    timeout: 500ms
    route: [{destination: {host: partner.example.com}}]
  - match: [{uri: {prefix: /v2/}}]
    rewrite: {uri: /}
    route: [{destination: {host: partner.example.com, subset: v2}}]
  - route: [{destination: {host: partner.example.com, subset: v1}}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: partner, namespace: %[1]s}
spec:
  targetRefs: [{group: networking.istio.io, kind: ServiceEntry, name: partner}]
  rules: [{from: [{source: {principals: [cluster.local/ns/%[1]s/sa/client]}}], to: [{operation: {methods: [GET]}}]}]
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: vm1, namespace: %[1]s}
spec: {address: %[3]s, labels: {app: vm}, ports: {http: %[2]s}}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: vm2, namespace: %[1]s}
spec: {address: %[4]s, labels: {app: vm}, ports: {http: %[2]s}}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: vms, namespace: %[1]s, labels: {istio.io/use-waypoint: waypoint}}
spec:
  hosts: [vms.internal]
  location: MESH_INTERNAL
  resolution: STATIC
  ports: [{number: 8000, name: http, protocol: HTTP}]
  workloadSelector: {labels: {app: vm}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: vms, namespace: %[1]s}
spec:
  parentRefs: [{group: networking.istio.io, kind: ServiceEntry, name: vms}]
  rules:
  - matches: [{path: {type: PathPrefix, value: /partner}}]
    filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /}}}]
    backendRefs: [{group: networking.istio.io, kind: Hostname, name: partner.example.com, port: 80}]
  - backendRefs: [{group: networking.istio.io, kind: Hostname, name: vms.internal, port: 8000}]
---
apiVersion: v1
kind: Service
metadata: {name: addresses, namespace: %[1]s}
spec: {clusterIP: None, ports: [{name: http, port: %[2]s}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: addresses, namespace: %[1]s, labels: {kubernetes.io/service-name: addresses}}
addressType: IPv4
ports: [{name: http, port: %[2]s}]
endpoints: [{addresses: [%[3]s]}, {addresses: [%[4]s]}]
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: by-name, namespace: %[1]s, labels: {istio.io/use-waypoint: waypoint}}
spec:
  hosts: [by-name.example.com]
  location: MESH_EXTERNAL
  resolution: DNS
  ports: [{number: 80, name: http, protocol: HTTP, targetPort: %[2]s}]
  endpoints: [{address: addresses.%[1]s.svc.cluster.local}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: by-name, namespace: %[1]s}
spec: {host: by-name.example.com, trafficPolicy: {connectionPool: {http: {maxRequestsPerConnection: 1}}}}
`, bookinfo, vmPort, vm1, vm2)
}

// servers: requests to servers outside of the mesh go through the waypoint, and
// follow the objects of users there.
func (s *examples) servers(t *testing.T) {
	apply(t, vmYAML())
	for _, name := range []string{"vm1", "vm2"} {
		kubectl(t, "wait", "-n", outside, "pod/"+name, "--for=condition=Ready", "--timeout=60s")
	}
	vm1, _ := addresses(t, outside, "vm1")
	vm2, _ := addresses(t, outside, "vm2")
	apply(t, entriesYAML(vm1, vm2))
	s.judge(t, "serviceentry.static", func(t *testing.T) (int, error) {
		const url = "http://partner.example.com"
		if a := askIn(t, bookinfo, url+"/headers")[0]; a.Status != 200 || a.Request.Get("X-Envoy-Attempt-Count") != "1" {
			return 0, fmt.Errorf("%+v, want an answer through the waypoint", a)
		}
		for path, want := range map[string]string{"/": "vm1", "/v2/": "vm2"} {
			if err := versions(t, want, url+path); err != nil {
				return 0, err
			}
		}
		if a := askIn(t, bookinfo, url+"/fault")[0]; a.Status != 418 || a.Text != "fault filter abort" {
			return 0, fmt.Errorf("a fault: %+v", a)
		}
		if a := askIn(t, bookinfo, url+"/slow/5s")[0]; a.Status != 504 || a.MS < 500 || a.MS > 1500 {
			return 0, fmt.Errorf("a timeout of 500 ms: %+v", a)
		}
		if a := askIn(t, bookinfo, "-method", "DELETE", url+"/")[0]; a.Status != 403 || a.Text != "RBAC: access denied" {
			return 0, fmt.Errorf("a method that no policy allows: %+v", a)
		}
		return 10, nil
	})
	s.judge(t, "serviceentry.selector", func(t *testing.T) (int, error) {
		const url = "http://vms.internal:8000"
		if err := versions(t, "vm1", url+"/partner/"); err != nil {
			return 0, err
		}
		return s.bothAnswer(t, url)
	})
	s.judge(t, "serviceentry.dns", func(t *testing.T) (int, error) { return s.bothAnswer(t, "http://by-name.example.com") })
}

// bothAnswer wants both servers to answer through the waypoint.
func (s *examples) bothAnswer(t *testing.T, url string) (int, error) {
	t.Helper()
	const n = 24
	seen := map[string]int{}
	for _, a := range askIn(t, bookinfo, "-n", "24", url+"/") {
		if a.Status != 200 || a.Header.Get("X-Envoy-Upstream-Service-Time") == "" {
			return 0, fmt.Errorf("%+v", a)
		}
		seen[a.Text]++
	}
	if seen["vm1"] == 0 || seen["vm2"] == 0 || seen["vm1"]+seen["vm2"] != n {
		return 0, fmt.Errorf("%s was answered by %v, want both servers", url, seen)
	}
	return n, nil
}

// queue is a limit of connections for requests: two are under way, three wait
// for them, and the others are refused.
func (s *examples) queue(t *testing.T) {
	apply(t, fmt.Sprintf(`---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: my-destination-rule, namespace: %s}
spec:
  host: my-svc
  subsets:
  - name: v2
    labels: {version: v2}
    trafficPolicy:
      connectionPool: {tcp: {maxConnections: 2}, http: {http1MaxPendingRequests: 3}}
`, bookinfo))
	s.judge(t, "connection-limit.http", func(t *testing.T) (int, error) {
		const n, pause = 10, 2000 // milliseconds
		turns := map[int]int{}
		refused := 0
		for _, a := range askIn(t, bookinfo, "-c", "10", "-n", "10", "http://my-svc/slow/2s") {
			switch {
			case a.Status == 200:
				turns[int(a.MS)/pause]++
			case a.Status == 503 && a.Header.Get("X-Envoy-Overloaded") == "true" && a.MS < pause/2 &&
				a.Text == "upstream connect error or disconnect/reset before headers. reset reason: overflow":
				refused++
			default:
				return 0, fmt.Errorf("%+v", a)
			}
		}
		if turns[1] != 2 || turns[2] != 2 || turns[3] != 1 || refused != 5 {
			return 0, fmt.Errorf("%v answered after as many times two seconds, and %d refused; want 2, 2 and 1, and 5", turns, refused)
		}
		return n, nil
	})
}
