package compile

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/weft-mesh/weft/mesh"
)

// ControllerName is who writes the statuses of routes, policies and Gateways,
// and the controller of the GatewayClass weft-waypoint.
const ControllerName = "weft.dev/waypoint"

// groupGateway is the API group of the Gateway API.
const groupGateway = "gateway.networking.k8s.io"

// groupNetworking is the API group of ServiceEntries, and of the kind Hostname,
// by which routes of the Gateway API name hosts.
const groupNetworking = "networking.istio.io"

// An Object is an object of the Gateway API whose spec is an S, read.
type Object[S any] struct {
	Meta
	UID    string // of the Kubernetes object
	Labels map[string]string
	// Spec is filled as far as it can be read even when Err is set.
	Spec S
	// RuleErrs says, by their place in spec.rules, why rules could not be
	// read. When Err is set and no rule has an error, the fault is beside them.
	RuleErrs map[int]error
	// Blind are those of them whose matches could not be read.
	Blind map[int]bool
}

// The objects of the Gateway API. All versions of a kind have one shape.
type (
	GatewayClass     = Object[gatewayv1.GatewayClassSpec]
	Gateway          = Object[gatewayv1.GatewaySpec]
	HTTPRoute        = Object[gatewayv1.HTTPRouteSpec]
	GRPCRoute        = Object[gatewayv1.GRPCRouteSpec]
	TCPRoute         = Object[gatewayv1.TCPRouteSpec]
	TLSRoute         = Object[gatewayv1.TLSRouteSpec]
	ReferenceGrant   = Object[gatewayv1.ReferenceGrantSpec]
	BackendTLSPolicy = Object[gatewayv1.BackendTLSPolicySpec]
)

// ReadGatewayClass reads an object of kind GatewayClass.
func ReadGatewayClass(u *unstructured.Unstructured) GatewayClass {
	return readObject[gatewayv1.GatewayClassSpec](u)
}

// ReadGateway reads an object of kind Gateway of the group
// gateway.networking.k8s.io.
func ReadGateway(u *unstructured.Unstructured) Gateway { return readObject[gatewayv1.GatewaySpec](u) }

// ReadHTTPRoute reads an object of kind HTTPRoute.
func ReadHTTPRoute(u *unstructured.Unstructured) HTTPRoute {
	return readRoute[gatewayv1.HTTPRouteSpec, gatewayv1.HTTPRouteRule](u)
}

// ReadGRPCRoute reads an object of kind GRPCRoute.
func ReadGRPCRoute(u *unstructured.Unstructured) GRPCRoute {
	return readRoute[gatewayv1.GRPCRouteSpec, gatewayv1.GRPCRouteRule](u)
}

// ReadTCPRoute reads an object of kind TCPRoute.
func ReadTCPRoute(u *unstructured.Unstructured) TCPRoute {
	return readRoute[gatewayv1.TCPRouteSpec, gatewayv1.TCPRouteRule](u)
}

// ReadTLSRoute reads an object of kind TLSRoute.
func ReadTLSRoute(u *unstructured.Unstructured) TLSRoute {
	return readRoute[gatewayv1.TLSRouteSpec, gatewayv1.TLSRouteRule](u)
}

// ReadReferenceGrant reads an object of kind ReferenceGrant.
func ReadReferenceGrant(u *unstructured.Unstructured) ReferenceGrant {
	return readObject[gatewayv1.ReferenceGrantSpec](u)
}

// ReadBackendTLSPolicy reads an object of kind BackendTLSPolicy.
func ReadBackendTLSPolicy(u *unstructured.Unstructured) BackendTLSPolicy {
	return readObject[gatewayv1.BackendTLSPolicySpec](u)
}

// readObject reads an object whose spec is an S. A field that S does not know
// is an error: what is skipped would not be done.
func readObject[S any](u *unstructured.Unstructured) Object[S] {
	out := Object[S]{Meta: readName(u), UID: string(u.GetUID()), Labels: u.GetLabels()}
	spec, ok := u.Object["spec"]
	if !ok || spec == nil {
		return out
	}
	b, err := json.Marshal(spec)
	if err == nil {
		err = readStrict(b, &out.Spec)
	}
	if err != nil {
		out.Err = fmt.Errorf("spec: %v", err)
		_ = json.Unmarshal(b, &out.Spec) // what can be read says where it applies
	}
	return out
}

// readRoute reads a route whose rules are Rs, and tells which of them are at
// fault.
func readRoute[S, R any](u *unstructured.Unstructured) Object[S] {
	out := readObject[S](u)
	if out.Err == nil {
		return out
	}
	rules, _, _ := unstructured.NestedSlice(u.Object, "spec", "rules")
	for i, r := range rules {
		var into R
		b, err := json.Marshal(r)
		if err == nil {
			err = readStrict(b, &into)
		}
		if err == nil {
			continue
		}
		if out.RuleErrs == nil {
			out.RuleErrs, out.Blind = map[int]error{}, map[int]bool{}
		}
		out.RuleErrs[i] = err
		rule, _ := r.(map[string]any)
		if b, err = json.Marshal(map[string]any{"matches": rule["matches"]}); err == nil && rule["matches"] != nil {
			err = readStrict(b, new(R))
		}
		out.Blind[i] = rule == nil || err != nil
	}
	return out
}

// readStrict reads JSON into v, and refuses fields that v does not have.
func readStrict(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	err := d.Decode(v)
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s", strings.TrimPrefix(err.Error(), "json: "))
}

// oldestFirst orders objects as the Gateway API breaks ties: by age, then by
// name.
func oldestFirst[S any](in []Object[S]) []Object[S] {
	out := slices.Clone(in)
	slices.SortStableFunc(out, func(a, b Object[S]) int {
		return cmp.Or(a.Created.Compare(b.Created), a.Name.Compare(b.Name))
	})
	return out
}

// A grants knows which references across namespaces are permitted.
type grants map[grantKey]bool

// A grantKey is one permission: from a kind in a namespace to a kind in
// another. An empty name permits all of that kind.
type grantKey struct {
	fromGroup, fromKind, fromNamespace    string
	toGroup, toKind, toNamespace, objName string
}

// readGrants indexes ReferenceGrants. One that cannot be read permits nothing.
func readGrants(in []ReferenceGrant) grants {
	out := grants{}
	for _, g := range in {
		if g.Err != nil {
			continue
		}
		for _, from := range g.Spec.From {
			for _, to := range g.Spec.To {
				out[grantKey{
					string(from.Group), string(from.Kind), string(from.Namespace),
					string(to.Group), string(to.Kind), g.Name.Namespace, string(deref(to.Name)),
				}] = true
			}
		}
	}
	return out
}

// permit reports whether an object of a kind of the Gateway API in one
// namespace may refer to a Service in another.
func (g grants) permit(kind, from string, to mesh.Name) bool {
	if from == to.Namespace {
		return true
	}
	k := grantKey{groupGateway, kind, from, "", "Service", to.Namespace, ""}
	if g[k] {
		return true
	}
	k.objName = to.Name
	return g[k]
}

// kubeServices indexes services that something can be sent to.
func kubeServices(in []*corev1.Service) map[mesh.Name]*corev1.Service {
	out := map[mesh.Name]*corev1.Service{}
	for _, s := range in {
		if s.Spec.Type != corev1.ServiceTypeExternalName {
			out[mesh.Name{Namespace: s.Namespace, Name: s.Name}] = s
		}
	}
	return out
}
