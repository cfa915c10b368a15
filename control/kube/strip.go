package kube

import (
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// strip returns a copy of the object with what compile reads, and nothing
// else: most of a pod is of no use here, and there are many. A kind that it
// does not know is returned as it is. It may be called on its own result.
//
// The resource version stays: an informer takes two objects of one version
// for one and tells nobody.
func strip(o any) (any, error) {
	switch o := o.(type) {
	case *corev1.Pod:
		return stripPod(o), nil
	case *corev1.Node:
		return &corev1.Node{ObjectMeta: stripMeta(o.ObjectMeta)}, nil
	case *corev1.Namespace:
		return &corev1.Namespace{ObjectMeta: stripMeta(o.ObjectMeta), Status: corev1.NamespaceStatus{Phase: o.Status.Phase}}, nil
	case *corev1.Service:
		return stripService(o), nil
	case *discoveryv1.EndpointSlice:
		return &discoveryv1.EndpointSlice{ObjectMeta: stripMeta(o.ObjectMeta), AddressType: o.AddressType, Endpoints: o.Endpoints, Ports: o.Ports}, nil
	case *corev1.ConfigMap:
		return &corev1.ConfigMap{ObjectMeta: stripMeta(o.ObjectMeta), Data: o.Data, BinaryData: o.BinaryData}, nil
	case *unstructured.Unstructured:
		o.SetManagedFields(nil)
		return o, nil
	}
	return o, nil
}

// stripMeta keeps names, versions, labels and the end of life.
func stripMeta(m metav1.ObjectMeta) metav1.ObjectMeta {
	return metav1.ObjectMeta{
		Name: m.Name, Namespace: m.Namespace, UID: m.UID, ResourceVersion: m.ResourceVersion,
		Labels: m.Labels, Generation: m.Generation, DeletionTimestamp: m.DeletionTimestamp,
	}
}

// keep returns the annotations of the given keys.
func keep(annotations map[string]string, keys ...string) map[string]string {
	var out map[string]string
	for _, k := range keys {
		if v, ok := annotations[k]; ok {
			if out == nil {
				out = map[string]string{}
			}
			out[k] = v
		}
	}
	return out
}

func stripPod(p *corev1.Pod) *corev1.Pod {
	out := &corev1.Pod{ObjectMeta: stripMeta(p.ObjectMeta)}
	out.Annotations = keep(p.Annotations, "ambient.istio.io/redirection")
	if owner := metav1.GetControllerOf(p); owner != nil {
		out.OwnerReferences = []metav1.OwnerReference{*owner}
	}
	out.Spec = corev1.PodSpec{
		NodeName:           p.Spec.NodeName,
		ServiceAccountName: p.Spec.ServiceAccountName,
		HostNetwork:        p.Spec.HostNetwork,
		Containers:         stripContainers(p.Spec.Containers),
		InitContainers:     stripContainers(p.Spec.InitContainers),
	}
	out.Status = corev1.PodStatus{Phase: p.Status.Phase, PodIP: p.Status.PodIP, PodIPs: p.Status.PodIPs}
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady {
			out.Status.Conditions = []corev1.PodCondition{{Type: c.Type, Status: c.Status}}
		}
	}
	return out
}

// stripContainers keeps the named ports: nobody asks for the others by name.
func stripContainers(cs []corev1.Container) []corev1.Container {
	var out []corev1.Container
	for _, c := range cs {
		kept := corev1.Container{RestartPolicy: c.RestartPolicy}
		for _, p := range c.Ports {
			if p.Name != "" {
				kept.Ports = append(kept.Ports, corev1.ContainerPort{Name: p.Name, ContainerPort: p.ContainerPort, Protocol: p.Protocol})
			}
		}
		if len(kept.Ports) > 0 {
			out = append(out, kept)
		}
	}
	return out
}

func stripService(s *corev1.Service) *corev1.Service {
	out := &corev1.Service{ObjectMeta: stripMeta(s.ObjectMeta)}
	out.Annotations = keep(s.Annotations, "networking.istio.io/traffic-distribution")
	out.Status.Conditions = s.Status.Conditions // one of them is written here
	out.Spec = corev1.ServiceSpec{
		Type:                     s.Spec.Type,
		Selector:                 s.Spec.Selector,
		Ports:                    s.Spec.Ports,
		ClusterIP:                s.Spec.ClusterIP,
		ClusterIPs:               s.Spec.ClusterIPs,
		IPFamilies:               s.Spec.IPFamilies,
		PublishNotReadyAddresses: s.Spec.PublishNotReadyAddresses,
		InternalTrafficPolicy:    s.Spec.InternalTrafficPolicy,
		TrafficDistribution:      s.Spec.TrafficDistribution,
		ExternalIPs:              s.Spec.ExternalIPs,
	}
	for _, i := range s.Status.LoadBalancer.Ingress {
		if i.IP != "" {
			out.Status.LoadBalancer.Ingress = append(out.Status.LoadBalancer.Ingress, corev1.LoadBalancerIngress{IP: i.IP, IPMode: i.IPMode})
		}
	}
	return out
}
