package compile

import (
	"bytes"
	"encoding/json"
	"flag"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"

	"github.com/weft-mesh/weft/mesh"
)

var update = flag.Bool("update", false, "rewrite the golden files; read the diff before you commit it")

// A state is what a story shows of the mesh.
type state struct {
	Workloads []mesh.Workload `json:"workloads,omitempty"`
	Services  []mesh.Service  `json:"services,omitempty"`
	Policies  []mesh.Policy   `json:"policies,omitempty"`

	Routes          []mesh.Route         `json:"routes,omitempty"`
	TrafficPolicies []mesh.TrafficPolicy `json:"trafficPolicies,omitempty"`
	Waypoints       []mesh.Waypoint      `json:"waypoints,omitempty"`

	Statuses []Status `json:"statuses,omitempty"`
}

// TestStories compiles the Kubernetes YAML of each story and compares the
// mesh that comes out.
func TestStories(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no stories in testdata: %v", err)
	}
	for _, path := range files {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".txtar"), func(t *testing.T) {
			story, err := txtar.ParseFile(path)
			if err != nil {
				t.Fatal(err)
			}
			objects := file(story, "objects.yaml")
			got := compileStory(t, readObjects(t, objects))
			if *update {
				story.Files = []txtar.File{{Name: "objects.yaml", Data: objects}, {Name: "mesh.json", Data: got}}
				if err := os.WriteFile(path, txtar.Format(story), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if diff := cmp.Diff(string(file(story, "mesh.json")), string(got)); diff != "" {
				t.Errorf("%s\nmesh.json (-want +got):\n%s", story.Comment, diff)
			}
		})
	}
}

// TestStoriesInAnyOrder compiles every story with its objects shuffled: what
// comes out must not depend on the order in which informers list objects.
func TestStoriesInAnyOrder(t *testing.T) {
	files, _ := filepath.Glob("testdata/*.txtar")
	rnd := rand.New(rand.NewPCG(1, 2))
	for _, path := range files {
		story, err := txtar.ParseFile(path)
		if err != nil {
			t.Fatal(err)
		}
		want := string(compileStory(t, readObjects(t, file(story, "objects.yaml"))))
		for range 10 {
			in := readObjects(t, file(story, "objects.yaml"))
			for _, list := range reflect.ValueOf(in).Fields() {
				if list.Kind() == reflect.Slice {
					rnd.Shuffle(list.Len(), reflect.Swapper(list.Interface()))
				}
			}
			if diff := cmp.Diff(want, string(compileStory(t, in))); diff != "" {
				t.Fatalf("%s: the order of the objects matters (-want +got):\n%s", path, diff)
			}
		}
	}
}

func file(a *txtar.Archive, name string) []byte {
	for _, f := range a.Files {
		if f.Name == name {
			return f.Data
		}
	}
	return nil
}

// compileStory compiles the objects, checks that each result is valid, and
// returns the dump.
func compileStory(t *testing.T, in Inputs) []byte {
	t.Helper()
	w := Compile(Settings{}, in)
	out := state{Services: w.Services, Policies: w.Policies, Statuses: w.Statuses,
		Routes: w.Routes, TrafficPolicies: w.TrafficPolicies, Waypoints: w.Waypoints}
	nodes := map[string]*corev1.Node{}
	for _, n := range in.Nodes {
		nodes[n.Name] = n
	}
	for _, p := range in.Pods {
		if wl, ok := w.Workload(p, nodes[p.Spec.NodeName]); ok {
			out.Workloads = append(out.Workloads, wl)
		}
	}
	out.Workloads = append(out.Workloads, w.Endpoints...)
	slices.SortFunc(out.Workloads, func(a, b mesh.Workload) int { return strings.Compare(string(a.UID), string(b.UID)) })
	for _, x := range out.Workloads {
		valid(t, x)
	}
	for _, x := range out.Services {
		valid(t, x)
	}
	for _, x := range out.Policies {
		valid(t, x)
	}
	// Every story has the static policy; showing it once, where it is used,
	// is enough.
	static := mesh.Name{Namespace: "weft-system", Name: staticStrict}
	used := slices.ContainsFunc(out.Workloads, func(w mesh.Workload) bool { return slices.Contains(w.Policies, static) })
	out.Policies = slices.DeleteFunc(out.Policies, func(p mesh.Policy) bool { return p.Name == static && !used })
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	if err := enc.Encode(out); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func valid(t *testing.T, x interface{ Validate() error }) {
	t.Helper()
	if err := x.Validate(); err != nil {
		t.Errorf("compiled something invalid: %v", err)
	}
}

// readObjects reads a stream of Kubernetes YAML documents.
func readObjects(t *testing.T, b []byte) Inputs {
	t.Helper()
	var in Inputs
	for doc := range bytes.SplitSeq(b, []byte("\n---\n")) {
		u := &unstructured.Unstructured{}
		b, err := yaml.YAMLToJSON(doc)
		if err == nil {
			err = u.UnmarshalJSON(b)
		}
		if err != nil {
			t.Fatalf("%v in\n%s", err, doc)
		}
		switch u.GetKind() {
		case "Pod":
			in.Pods = append(in.Pods, typed[corev1.Pod](t, doc))
		case "Node":
			in.Nodes = append(in.Nodes, typed[corev1.Node](t, doc))
		case "Service":
			in.Services = append(in.Services, typed[corev1.Service](t, doc))
		case "Namespace":
			in.Namespaces = append(in.Namespaces, typed[corev1.Namespace](t, doc))
		case "EndpointSlice":
			in.Slices = append(in.Slices, typed[discoveryv1.EndpointSlice](t, doc))
		case "AuthorizationPolicy":
			in.AuthorizationPolicies = append(in.AuthorizationPolicies, ReadAuthorizationPolicy(u))
		case "PeerAuthentication":
			in.PeerAuthentications = append(in.PeerAuthentications, ReadPeerAuthentication(u))
		case "VirtualService":
			in.VirtualServices = append(in.VirtualServices, ReadVirtualService(u))
		case "DestinationRule":
			in.DestinationRules = append(in.DestinationRules, ReadDestinationRule(u))
		case "ServiceEntry":
			in.ServiceEntries = append(in.ServiceEntries, ReadServiceEntry(u))
		case "WorkloadEntry":
			in.WorkloadEntries = append(in.WorkloadEntries, ReadWorkloadEntry(u))
		case "GatewayClass":
			in.GatewayClasses = append(in.GatewayClasses, ReadGatewayClass(u))
		case "Gateway":
			in.Gateways = append(in.Gateways, ReadGateway(u))
		case "HTTPRoute":
			in.HTTPRoutes = append(in.HTTPRoutes, ReadHTTPRoute(u))
		case "GRPCRoute":
			in.GRPCRoutes = append(in.GRPCRoutes, ReadGRPCRoute(u))
		case "TCPRoute":
			in.TCPRoutes = append(in.TCPRoutes, ReadTCPRoute(u))
		case "TLSRoute":
			in.TLSRoutes = append(in.TLSRoutes, ReadTLSRoute(u))
		case "ReferenceGrant":
			in.ReferenceGrants = append(in.ReferenceGrants, ReadReferenceGrant(u))
		case "BackendTLSPolicy":
			in.BackendTLSPolicies = append(in.BackendTLSPolicies, ReadBackendTLSPolicy(u))
		case "ConfigMap":
			in.ConfigMaps = append(in.ConfigMaps, typed[corev1.ConfigMap](t, doc))
		default:
			t.Fatalf("kind %q in\n%s", u.GetKind(), doc)
		}
	}
	return in
}

func typed[T any](t *testing.T, doc []byte) *T {
	t.Helper()
	var v T
	if err := yaml.UnmarshalStrict(doc, &v); err != nil {
		t.Fatalf("%v in\n%s", err, doc)
	}
	return &v
}

// TestClaims proves that an address of a slice is known to be one, whether or
// not a pod has it.
func TestClaims(t *testing.T) {
	story, err := txtar.ParseFile("testdata/service-without-selector.txtar")
	if err != nil {
		t.Fatal(err)
	}
	w := Compile(Settings{}, readObjects(t, file(story, "objects.yaml")))
	for addr, want := range map[string]bool{"192.0.2.10": true, "10.244.1.7": true, "10.244.1.8": true, "10.244.9.9": false} {
		if got := w.Claims(netip.MustParseAddr(addr)); got != want {
			t.Errorf("Claims(%s) = %v, want %v", addr, got, want)
		}
	}
}
