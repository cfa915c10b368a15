package kube

import (
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/weft-mesh/weft/control/compile"
)

// A kind is one that a custom resource definition must exist for. All versions
// of a kind have one shape, so it is read in the first that is served.
type kind struct {
	name            string // as compile calls it
	group, resource string
	versions        []string
	// vital kinds are never taken for missing while the cluster serves them in
	// a version that is not read here: nobody is answered as if there were no
	// policies.
	vital bool
	add   func(*compile.Inputs, *unstructured.Unstructured)
	shape statusShape
}

// in returns the resource in the given version.
func (k kind) in(version string) schema.GroupVersionResource {
	return schema.GroupVersionResource{Group: k.group, Version: version, Resource: k.resource}
}

// kinds are all that are read.
func kinds() []kind {
	security, networking, gateway := "security.istio.io", "networking.istio.io", "gateway.networking.k8s.io"
	v1 := []string{"v1"}
	return []kind{
		{compile.KindAuthorizationPolicy, security, "authorizationpolicies", v1, true, func(in *compile.Inputs, u *unstructured.Unstructured) {
			in.AuthorizationPolicies = append(in.AuthorizationPolicies, compile.ReadAuthorizationPolicy(u))
		}, shapeConditions},
		{compile.KindPeerAuthentication, security, "peerauthentications", v1, true, func(in *compile.Inputs, u *unstructured.Unstructured) {
			in.PeerAuthentications = append(in.PeerAuthentications, compile.ReadPeerAuthentication(u))
		}, shapeConditions},
		{compile.KindVirtualService, networking, "virtualservices", []string{"v1", "v1beta1", "v1alpha3"}, false, func(in *compile.Inputs, u *unstructured.Unstructured) {
			in.VirtualServices = append(in.VirtualServices, compile.ReadVirtualService(u))
		}, shapeConditions},
		{compile.KindDestinationRule, networking, "destinationrules", []string{"v1", "v1beta1", "v1alpha3"}, false, func(in *compile.Inputs, u *unstructured.Unstructured) {
			in.DestinationRules = append(in.DestinationRules, compile.ReadDestinationRule(u))
		}, shapeConditions},
		{compile.KindServiceEntry, networking, "serviceentries", []string{"v1", "v1beta1", "v1alpha3"}, false, func(in *compile.Inputs, u *unstructured.Unstructured) {
			in.ServiceEntries = append(in.ServiceEntries, compile.ReadServiceEntry(u))
		}, shapeServiceEntry},
		{compile.KindWorkloadEntry, networking, "workloadentries", []string{"v1", "v1beta1", "v1alpha3"}, false, func(in *compile.Inputs, u *unstructured.Unstructured) {
			in.WorkloadEntries = append(in.WorkloadEntries, compile.ReadWorkloadEntry(u))
		}, shapeConditions},
		{compile.KindGatewayClass, gateway, "gatewayclasses", []string{"v1", "v1beta1"}, false, func(in *compile.Inputs, u *unstructured.Unstructured) {
			in.GatewayClasses = append(in.GatewayClasses, compile.ReadGatewayClass(u))
		}, shapeConditions},
		{compile.KindGateway, gateway, "gateways", []string{"v1", "v1beta1"}, false, func(in *compile.Inputs, u *unstructured.Unstructured) {
			in.Gateways = append(in.Gateways, compile.ReadGateway(u))
		}, shapeGateway},
		{compile.KindHTTPRoute, gateway, "httproutes", []string{"v1", "v1beta1"}, false, func(in *compile.Inputs, u *unstructured.Unstructured) {
			in.HTTPRoutes = append(in.HTTPRoutes, compile.ReadHTTPRoute(u))
		}, shapeParents},
		{compile.KindGRPCRoute, gateway, "grpcroutes", []string{"v1", "v1alpha2"}, false, func(in *compile.Inputs, u *unstructured.Unstructured) {
			in.GRPCRoutes = append(in.GRPCRoutes, compile.ReadGRPCRoute(u))
		}, shapeParents},
		{compile.KindTCPRoute, gateway, "tcproutes", []string{"v1", "v1alpha2"}, false, func(in *compile.Inputs, u *unstructured.Unstructured) {
			in.TCPRoutes = append(in.TCPRoutes, compile.ReadTCPRoute(u))
		}, shapeParents},
		{compile.KindTLSRoute, gateway, "tlsroutes", []string{"v1", "v1alpha3", "v1alpha2"}, false, func(in *compile.Inputs, u *unstructured.Unstructured) {
			in.TLSRoutes = append(in.TLSRoutes, compile.ReadTLSRoute(u))
		}, shapeParents},
		{"ReferenceGrant", gateway, "referencegrants", []string{"v1", "v1beta1"}, false, func(in *compile.Inputs, u *unstructured.Unstructured) {
			in.ReferenceGrants = append(in.ReferenceGrants, compile.ReadReferenceGrant(u))
		}, shapeNone},
		{compile.KindBackendTLSPolicy, gateway, "backendtlspolicies", []string{"v1", "v1alpha3"}, false, func(in *compile.Inputs, u *unstructured.Unstructured) {
			in.BackendTLSPolicies = append(in.BackendTLSPolicies, compile.ReadBackendTLSPolicy(u))
		}, shapeAncestors},
	}
}
