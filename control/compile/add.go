package compile

import (
	"fmt"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
)

// Add reads an object of any kind into in. It reports false for a kind that
// Compile does not read, and an error for an object of Kubernetes itself that
// is not of its kind's shape. Objects of the other APIs are always read: what
// is wrong with them ends in their Status.
func (in *Inputs) Add(u *unstructured.Unstructured) (bool, error) {
	var err error
	switch gk := u.GroupVersionKind().GroupKind().String(); gk {
	case "Pod":
		in.Pods, err = appendTyped[corev1.Pod](in.Pods, u)
	case "Node":
		in.Nodes, err = appendTyped[corev1.Node](in.Nodes, u)
	case "Service":
		in.Services, err = appendTyped[corev1.Service](in.Services, u)
	case "Namespace":
		in.Namespaces, err = appendTyped[corev1.Namespace](in.Namespaces, u)
	case "ConfigMap":
		in.ConfigMaps, err = appendTyped[corev1.ConfigMap](in.ConfigMaps, u)
	case "EndpointSlice.discovery.k8s.io":
		in.Slices, err = appendTyped[discoveryv1.EndpointSlice](in.Slices, u)
	case "AuthorizationPolicy.security.istio.io":
		in.AuthorizationPolicies = append(in.AuthorizationPolicies, ReadAuthorizationPolicy(u))
	case "PeerAuthentication.security.istio.io":
		in.PeerAuthentications = append(in.PeerAuthentications, ReadPeerAuthentication(u))
	case "VirtualService.networking.istio.io":
		in.VirtualServices = append(in.VirtualServices, ReadVirtualService(u))
	case "DestinationRule.networking.istio.io":
		in.DestinationRules = append(in.DestinationRules, ReadDestinationRule(u))
	case "ServiceEntry.networking.istio.io":
		in.ServiceEntries = append(in.ServiceEntries, ReadServiceEntry(u))
	case "WorkloadEntry.networking.istio.io":
		in.WorkloadEntries = append(in.WorkloadEntries, ReadWorkloadEntry(u))
	case "GatewayClass." + groupGateway:
		in.GatewayClasses = append(in.GatewayClasses, ReadGatewayClass(u))
	case "Gateway." + groupGateway:
		in.Gateways = append(in.Gateways, ReadGateway(u))
	case "HTTPRoute." + groupGateway:
		in.HTTPRoutes = append(in.HTTPRoutes, ReadHTTPRoute(u))
	case "GRPCRoute." + groupGateway:
		in.GRPCRoutes = append(in.GRPCRoutes, ReadGRPCRoute(u))
	case "TCPRoute." + groupGateway:
		in.TCPRoutes = append(in.TCPRoutes, ReadTCPRoute(u))
	case "TLSRoute." + groupGateway:
		in.TLSRoutes = append(in.TLSRoutes, ReadTLSRoute(u))
	case "ReferenceGrant." + groupGateway:
		in.ReferenceGrants = append(in.ReferenceGrants, ReadReferenceGrant(u))
	case "BackendTLSPolicy." + groupGateway:
		in.BackendTLSPolicies = append(in.BackendTLSPolicies, ReadBackendTLSPolicy(u))
	default:
		return false, nil
	}
	return true, err
}

func appendTyped[T any](to []*T, u *unstructured.Unstructured) ([]*T, error) {
	v := new(T)
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, v); err != nil {
		return to, fmt.Errorf("read as %s: %w", u.GetKind(), err)
	}
	return append(to, v), nil
}
