// Package provision says which Kubernetes objects run the proxies of a Gateway.
// It is pure: what applies them is elsewhere.
package provision

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/weft-mesh/weft/control/compile"
)

// Settings are what all proxies of a mesh have in common. Image must be set;
// the other fields have defaults.
type Settings struct {
	Image          string // of the program waypoint, with its tag
	PullPolicy     string // default IfNotPresent
	PullSecrets    []string
	ControlAddress string        // host:port; default weft-control.weft-system.svc:15012
	TrustDomain    string        // default cluster.local
	Cluster        string        // default Kubernetes
	Network        string        // default ""
	LogLevel       string        // default info
	Drain          time.Duration // how long open connections may last at the end; default 20 s
}

// withDefaults returns s with every empty field that has a default filled in.
func (s Settings) withDefaults() Settings {
	s.PullPolicy = cmp.Or(s.PullPolicy, string(corev1.PullIfNotPresent))
	s.ControlAddress = cmp.Or(s.ControlAddress, "weft-control.weft-system.svc:15012")
	s.TrustDomain = cmp.Or(s.TrustDomain, "cluster.local")
	s.Cluster = cmp.Or(s.Cluster, "Kubernetes")
	s.LogLevel = cmp.Or(s.LogLevel, "info")
	s.Drain = cmp.Or(s.Drain, 20*time.Second)
	return s
}

// Labels that other programs know the objects of a Gateway by.
const (
	labelGatewayName  = "gateway.networking.k8s.io/gateway-name"
	labelGatewayClass = "gateway.networking.k8s.io/gateway-class-name"
	// labelManaged with this value is how Kiali finds waypoints.
	labelManaged   = "gateway.istio.io/managed"
	managedValue   = "istio.io-mesh-controller"
	labelDataplane = "istio.io/dataplane-mode"
)

// user is the account that proxies run as: that of Istio's, which network
// policies and admission rules know.
const user = int64(1337)

// Objects run the proxies of one Gateway. All have its name and namespace, and
// it as their owner.
type Objects struct {
	ServiceAccount *corev1.ServiceAccount
	Service        *corev1.Service
	Deployment     *appsv1.Deployment
	// Autoscaler and Budget are nil unless the Gateway's parameters ask for
	// them.
	Autoscaler *autoscalingv2.HorizontalPodAutoscaler
	Budget     *policyv1.PodDisruptionBudget
}

// Waypoint returns the objects that run a waypoint. It fails when the
// Gateway's parameters cannot be followed, or s has no image.
func Waypoint(s Settings, m compile.Managed) (Objects, error) {
	if s.Image == "" {
		return Objects{}, errors.New("provision waypoint: no image is set")
	}
	p, err := readParameters(m.Parameters)
	if err != nil {
		return Objects{}, fmt.Errorf("spec.infrastructure.parametersRef: %w", err)
	}
	b := builder{s.withDefaults(), m.Gateway, p}
	return Objects{
		ServiceAccount: &corev1.ServiceAccount{TypeMeta: typeOf("v1", "ServiceAccount"), ObjectMeta: b.meta(p.ServiceAccount.Metadata)},
		Service:        b.service(),
		Deployment:     b.deployment(),
		Autoscaler:     b.autoscaler(),
		Budget:         b.budget(),
	}, nil
}

// A builder makes the objects of one Gateway.
type builder struct {
	settings Settings
	gateway  compile.Gateway
	params   parameters
}

func typeOf(version, kind string) metav1.TypeMeta {
	return metav1.TypeMeta{APIVersion: version, Kind: kind}
}

// meta returns the metadata of an object: what the Gateway's infrastructure
// and the parameters add, and over it what is ours.
func (b builder) meta(extra metadata) metav1.ObjectMeta {
	labels, annotations := b.infrastructure(extra)
	labels[labelManaged] = managedValue
	return metav1.ObjectMeta{
		Name: b.gateway.Name.Name, Namespace: b.gateway.Name.Namespace,
		Labels: labels, Annotations: annotations,
		OwnerReferences: []metav1.OwnerReference{{
			APIVersion: gatewayv1.GroupVersion.String(), Kind: "Gateway",
			Name: b.gateway.Name.Name, UID: types.UID(b.gateway.UID), Controller: new(true),
		}},
	}
}

// infrastructure returns the labels and annotations that users want on
// everything, and the labels by which the Gateway is found.
func (b builder) infrastructure(extra metadata) (labels, annotations map[string]string) {
	labels, annotations = map[string]string{}, map[string]string{}
	if infra := b.gateway.Spec.Infrastructure; infra != nil {
		for k, v := range infra.Labels {
			labels[string(k)] = string(v)
		}
		for k, v := range infra.Annotations {
			annotations[string(k)] = string(v)
		}
	}
	maps.Copy(labels, extra.Labels)
	maps.Copy(annotations, extra.Annotations)
	labels[labelGatewayName] = b.gateway.Name.Name
	labels[labelGatewayClass] = string(b.gateway.Spec.GatewayClassName)
	if len(annotations) == 0 {
		annotations = nil
	}
	return labels, annotations
}

// selector selects the pods of the Gateway.
func (b builder) selector() map[string]string {
	return map[string]string{labelGatewayName: b.gateway.Name.Name}
}

// List returns the objects as they are applied: without a status, and with
// nothing that is not meant.
func (o Objects) List() ([]*unstructured.Unstructured, error) {
	all := []any{o.ServiceAccount, o.Service, o.Deployment}
	if o.Autoscaler != nil {
		all = append(all, o.Autoscaler)
	}
	if o.Budget != nil {
		all = append(all, o.Budget)
	}
	var out []*unstructured.Unstructured
	for _, obj := range all {
		m, err := runtime.DefaultUnstructuredConverter.ToUnstructured(obj)
		if err != nil {
			return nil, fmt.Errorf("convert %T: %w", obj, err)
		}
		delete(m, "status")
		unstructured.RemoveNestedField(m, "metadata", "creationTimestamp")
		unstructured.RemoveNestedField(m, "spec", "template", "metadata", "creationTimestamp")
		out = append(out, &unstructured.Unstructured{Object: m})
	}
	return out, nil
}

// Kinds are the kinds that List may return, for whoever takes back those that
// it no longer does.
func Kinds() []schema.GroupVersionResource {
	return []schema.GroupVersionResource{
		{Version: "v1", Resource: "serviceaccounts"},
		{Version: "v1", Resource: "services"},
		{Group: "apps", Version: "v1", Resource: "deployments"},
		{Group: "autoscaling", Version: "v2", Resource: "horizontalpodautoscalers"},
		{Group: "policy", Version: "v1", Resource: "poddisruptionbudgets"},
	}
}
