// Package compile turns Kubernetes objects into the nouns of the mesh. It is
// pure: the same objects give the same output, in the same order, and nothing
// is read or written besides its arguments.
//
// What cannot be understood never widens access: an authorization policy that
// is invalid denies, a PeerAuthentication that is invalid is STRICT, and each
// gets a Status that says why.
package compile

import (
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/weft-mesh/weft/mesh"
)

// Settings are the facts about the mesh that no Kubernetes object holds. An
// empty field means its default.
type Settings struct {
	Cluster       string // id of this cluster, the first part of every UID; default Kubernetes
	TrustDomain   string // SPIFFE trust domain of every pod; default cluster.local
	Domain        string // DNS domain of the cluster's services; default cluster.local
	Network       string // network of pods without the label topology.istio.io/network; default ""
	RootNamespace string // policies here apply to the whole mesh; default weft-system
	// IstioWaypoints also serves the GatewayClass istio-waypoint where its
	// controller is istio.io/mesh-controller. Only for clusters in which Istio
	// does not: two controllers would write over each other.
	IstioWaypoints bool
}

// withDefaults returns s with every empty field that has a default filled in.
func (s Settings) withDefaults() Settings {
	fill := func(f *string, def string) {
		if *f == "" {
			*f = def
		}
	}
	fill(&s.Cluster, "Kubernetes")
	fill(&s.TrustDomain, "cluster.local")
	fill(&s.Domain, "cluster.local")
	fill(&s.RootNamespace, "weft-system")
	return s
}

// Inputs are the objects that Compile reads. Their order does not matter, and
// none of them is changed or kept beyond the World.
type Inputs struct {
	// Pods are read to tell an endpoint that is a pod from one that is not, to
	// count the replicas of waypoints, and to guard what is behind waypoints.
	Pods     []*corev1.Pod
	Nodes    []*corev1.Node
	Services []*corev1.Service
	// Namespaces are read for their labels only.
	Namespaces []*corev1.Namespace
	// Slices are the EndpointSlices that Kubernetes does not derive from a
	// service's selector. Those it does derive are passed over: the selector
	// and the pod say the same, one hop earlier.
	Slices                []*discoveryv1.EndpointSlice
	AuthorizationPolicies []AuthorizationPolicy
	PeerAuthentications   []PeerAuthentication
	VirtualServices       []VirtualService
	DestinationRules      []DestinationRule
	ServiceEntries        []ServiceEntry
	WorkloadEntries       []WorkloadEntry

	GatewayClasses     []GatewayClass
	Gateways           []Gateway
	HTTPRoutes         []HTTPRoute
	GRPCRoutes         []GRPCRoute
	TCPRoutes          []TCPRoute
	TLSRoutes          []TLSRoute
	ReferenceGrants    []ReferenceGrant
	BackendTLSPolicies []BackendTLSPolicy
	ConfigMaps         []*corev1.ConfigMap // at least those that Gateways and BackendTLSPolicies name

	// Moving are services that were bound to a waypoint so lately that some
	// proxies may not know of it. Their pods may still be called directly. Nil
	// is none.
	Moving map[mesh.ServiceName]bool
}

// A World is everything that is compiled as a whole, and the index by which
// one pod is compiled. It is immutable.
type World struct {
	Services []mesh.Service // sorted by name
	Policies []mesh.Policy  // sorted by name
	// Endpoints are the workloads that no pod stands behind: addresses that
	// only an EndpointSlice, a ServiceEntry or a WorkloadEntry names. Sorted by
	// UID.
	Endpoints []mesh.Workload
	Statuses  []Status // sorted by kind, then name
	// Routes are for services and their ports; every service has those that
	// apply to it, whether or not a waypoint is there to follow them. Sorted by
	// service, port and protocol.
	Routes []mesh.Route
	// TrafficPolicies are sorted by service, subset and port.
	TrafficPolicies []mesh.TrafficPolicy
	Waypoints       []mesh.Waypoint // sorted by name
	Managed         []Managed       // the Gateways whose proxies are to be run, sorted by name

	settings  Settings
	selecting map[labelPair][]selectingService // services with a selector, by one of its pairs
	fromAddr  map[netip.Addr][]mesh.Membership
	fromPod   map[mesh.Name][]mesh.Membership
	claimed   map[netip.Addr]bool
	ranges    []netip.Prefix              // that ServiceEntries claim
	selectors map[string][]policySelector // policies with a selector, by namespace of the pods they may select; "" is all
	peers     peerAuths
	drafts    map[mesh.RouteKey]*routeDraft // while compiling
	subsets   map[subsetKey]bool            // that some DestinationRule in force has
	labelKeys map[string]bool               // of pods, that TrafficPolicies ask for
	direct    map[string]bool               // namespaces whose pods may be reached without a tunnel within a node

	origins        map[mesh.ServiceName]origin
	entries        map[mesh.Name]*serviceEntry
	entryHosts     map[mesh.Host][]mesh.ServiceName // of ServiceEntries, by namespace
	endpointLabels map[mesh.UID]map[string]string   // of endpoints that have labels of their own

	namespaces map[string]labels.Set // their labels
	waypoints  map[mesh.Name]*waypoint
	bound      map[mesh.ServiceName]binding
	moving     map[mesh.ServiceName]bool
	virtual    map[mesh.ServiceName]bool // services with an address of their own
	guards     map[mesh.Name]bool        // the policies that guard makes of the pods of now
	known      map[*corev1.Pod]podFacts  // of the pods of now
}

// A policySelector selects the pods that list a policy.
type policySelector struct {
	labels labels.Selector
	name   mesh.Name
}

// Compile compiles the cold half of the cluster: services, endpoints and
// policies. Pods are compiled one by one with World.Workload.
func Compile(s Settings, in Inputs) *World {
	w := &World{settings: s.withDefaults(), selectors: map[string][]policySelector{},
		drafts: map[mesh.RouteKey]*routeDraft{}, labelKeys: map[string]bool{}, subsets: map[subsetKey]bool{},
		origins: map[mesh.ServiceName]origin{}}
	w.direct = directNamespaces(in.Namespaces)
	w.compileServices(in.Services)
	w.compileSlices(in)
	w.compileWaypoints(in)
	w.compileGuards(in.Pods)
	w.compileAuthorizationPolicies(in.AuthorizationPolicies)
	w.compilePeerAuthentications(in.PeerAuthentications)
	w.compileDestinationRules(in.DestinationRules)
	w.labelEndpoints()
	w.compileVirtualServices(in.VirtualServices)
	w.compileGatewayRoutes(in)
	w.finishRoutes()
	w.compileBackendTLS(in)
	slices.SortFunc(w.Policies, func(a, b mesh.Policy) int { return a.Name.Compare(b.Name) })
	slices.SortFunc(w.Statuses, compareStatus)
	return w
}

// Claims reports whether an EndpointSlice, a ServiceEntry or a WorkloadEntry
// names the address a. When a pod with such an address comes or goes, the World
// has to be compiled anew: the address turns from an endpoint of its own into
// one of the pod's, or back.
func (w *World) Claims(a netip.Addr) bool {
	return w.claimed[a] || slices.ContainsFunc(w.ranges, func(p netip.Prefix) bool { return p.Contains(a) })
}

// policiesFor returns the policies that select a pod with the given labels,
// sorted by name.
func (w *World) policiesFor(namespace string, set labels.Set) []mesh.Name {
	var names []mesh.Name
	for _, ns := range []string{"", namespace} {
		for _, p := range w.selectors[ns] {
			if p.labels.Matches(set) {
				names = append(names, p.name)
			}
		}
	}
	if name, ok := w.peers.policyFor(namespace, set); ok {
		names = append(names, name)
	}
	slices.SortFunc(names, mesh.Name.Compare)
	return slices.Compact(names)
}
