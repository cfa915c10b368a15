package provision

import (
	"maps"
	"strconv"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// containerName is the name that monitors select the containers of proxies by.
const containerName = "istio-proxy"

// The ports of a waypoint.
const (
	portHBONE      = 15008
	portStats      = 15020
	portReadiness  = 15021
	portPrometheus = 15090
)

// service is where the waypoint is reached.
func (b builder) service() *corev1.Service {
	return &corev1.Service{
		TypeMeta:   typeOf("v1", "Service"),
		ObjectMeta: b.meta(b.params.Service.Metadata),
		Spec: corev1.ServiceSpec{
			Type:                corev1.ServiceTypeClusterIP,
			Selector:            b.selector(),
			IPFamilyPolicy:      new(corev1.IPFamilyPolicyPreferDualStack),
			TrafficDistribution: b.params.Service.Spec.TrafficDistribution,
			Ports: []corev1.ServicePort{
				{Name: "mesh", Port: portHBONE, TargetPort: intstr.FromInt32(portHBONE), Protocol: corev1.ProtocolTCP, AppProtocol: new("hbone")},
				{Name: "status-port", Port: portReadiness, TargetPort: intstr.FromInt32(portReadiness), Protocol: corev1.ProtocolTCP, AppProtocol: new("http")},
			},
		},
	}
}

// deployment runs the waypoint. It says nothing of the number of replicas
// unless the parameters do, so that they can be scaled by hand.
func (b builder) deployment() *appsv1.Deployment {
	labels, annotations := b.podMeta()
	return &appsv1.Deployment{
		TypeMeta:   typeOf("apps/v1", "Deployment"),
		ObjectMeta: b.meta(b.params.Deployment.Metadata),
		Spec: appsv1.DeploymentSpec{
			Replicas: b.params.Deployment.Spec.Replicas,
			Selector: &metav1.LabelSelector{MatchLabels: b.selector()},
			// Never fewer than there were: a waypoint that is away stops the
			// traffic to everything behind it.
			Strategy: appsv1.DeploymentStrategy{
				Type: appsv1.RollingUpdateDeploymentStrategyType,
				RollingUpdate: &appsv1.RollingUpdateDeployment{
					MaxSurge: new(intstr.FromInt32(1)), MaxUnavailable: new(intstr.FromInt32(0)),
				},
			},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: labels, Annotations: annotations},
				Spec:       b.pod(),
			},
		},
	}
}

// podMeta returns the labels and annotations of the pods. They are not
// captured: they speak for themselves.
func (b builder) podMeta() (labels, annotations map[string]string) {
	labels, annotations = b.infrastructure(b.params.Deployment.Spec.Template.Metadata)
	if annotations == nil {
		annotations = map[string]string{}
	}
	maps.Copy(labels, map[string]string{
		labelManaged:                          managedValue,
		labelDataplane:                        "none",
		"sidecar.istio.io/inject":             "false",
		"service.istio.io/canonical-name":     b.gateway.Name.Name,
		"service.istio.io/canonical-revision": "latest",
		"ambient.istio.io/dns-capture":        "false",
	})
	maps.Copy(annotations, map[string]string{
		"prometheus.io/scrape": "true",
		"prometheus.io/port":   strconv.Itoa(portStats),
		"prometheus.io/path":   "/stats/prometheus",
	})
	return labels, annotations
}

func (b builder) pod() corev1.PodSpec {
	p := b.params.Deployment.Spec.Template.Spec
	spread := p.TopologySpreadConstraints
	if spread == nil {
		spread = []corev1.TopologySpreadConstraint{{
			MaxSkew: 1, TopologyKey: corev1.LabelHostname, WhenUnsatisfiable: corev1.ScheduleAnyway,
			LabelSelector: &metav1.LabelSelector{MatchLabels: b.selector()},
		}}
	}
	out := corev1.PodSpec{
		ServiceAccountName:           b.gateway.Name.Name,
		AutomountServiceAccountToken: new(false),
		// The pause before the drain, the drain, and some room.
		TerminationGracePeriodSeconds: new(int64((b.settings.Drain + 10*time.Second) / time.Second)),
		SecurityContext: &corev1.PodSecurityContext{
			RunAsNonRoot: new(true), RunAsUser: new(user), RunAsGroup: new(user), FSGroup: new(user),
			SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
		},
		Containers:                []corev1.Container{b.container()},
		Volumes:                   volumes(),
		NodeSelector:              p.NodeSelector,
		Tolerations:               p.Tolerations,
		Affinity:                  p.Affinity,
		TopologySpreadConstraints: spread,
	}
	for _, s := range b.settings.PullSecrets {
		out.ImagePullSecrets = append(out.ImagePullSecrets, corev1.LocalObjectReference{Name: s})
	}
	return out
}

func (b builder) container() corev1.Container {
	s := b.settings
	out := corev1.Container{
		Name:            containerName,
		Image:           s.Image,
		ImagePullPolicy: corev1.PullPolicy(s.PullPolicy),
		Args: []string{
			"--gateway=" + b.gateway.Name.Name,
			"--trust-domain=" + s.TrustDomain,
			"--cluster-id=" + s.Cluster,
			"--network=" + s.Network,
			"--control-address=" + s.ControlAddress,
			"--drain=" + s.Drain.String(),
			"--log-level=" + s.LogLevel,
		},
		Env: []corev1.EnvVar{
			field("POD_NAME", "metadata.name"),
			field("POD_NAMESPACE", "metadata.namespace"),
			field("INSTANCE_IP", "status.podIP"),
			field("NODE_NAME", "spec.nodeName"),
			field("SERVICE_ACCOUNT", "spec.serviceAccountName"),
		},
		Ports: []corev1.ContainerPort{
			{Name: "mesh", ContainerPort: portHBONE, Protocol: corev1.ProtocolTCP},
			{Name: "metrics", ContainerPort: portStats, Protocol: corev1.ProtocolTCP},
			{Name: "readiness", ContainerPort: portReadiness, Protocol: corev1.ProtocolTCP},
			{Name: "http-envoy-prom", ContainerPort: portPrometheus, Protocol: corev1.ProtocolTCP},
		},
		ReadinessProbe: &corev1.Probe{
			ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{
				Path: "/healthz/ready", Port: intstr.FromString("readiness"), Scheme: corev1.URISchemeHTTP,
			}},
			PeriodSeconds: 2, FailureThreshold: 3,
		},
		Resources: corev1.ResourceRequirements{Requests: corev1.ResourceList{
			corev1.ResourceCPU: resource.MustParse("100m"), corev1.ResourceMemory: resource.MustParse("64Mi"),
		}},
		SecurityContext: &corev1.SecurityContext{
			RunAsNonRoot: new(true), AllowPrivilegeEscalation: new(false), Privileged: new(false), ReadOnlyRootFilesystem: new(true),
			Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
		},
		VolumeMounts: []corev1.VolumeMount{
			{Name: "ca-token", MountPath: "/var/run/secrets/tokens", ReadOnly: true},
			{Name: "root", MountPath: "/var/run/secrets/istio", ReadOnly: true},
		},
	}
	for _, c := range b.params.Deployment.Spec.Template.Spec.Containers {
		out.Resources = c.Resources
	}
	return out
}

func field(name, path string) corev1.EnvVar {
	return corev1.EnvVar{Name: name, ValueFrom: &corev1.EnvVarSource{
		FieldRef: &corev1.ObjectFieldSelector{APIVersion: "v1", FieldPath: path}}}
}

// volumes hold the token by which the waypoint proves who it is, and the roots
// by which it knows the control service.
func volumes() []corev1.Volume {
	return []corev1.Volume{
		{Name: "ca-token", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{
			Sources: []corev1.VolumeProjection{{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{
				Path: "istio-token", Audience: "istio-ca", ExpirationSeconds: new(int64(43200)),
			}}},
		}}},
		{Name: "root", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{
			LocalObjectReference: corev1.LocalObjectReference{Name: "istio-ca-root-cert"},
		}}},
	}
}

func (b builder) autoscaler() *autoscalingv2.HorizontalPodAutoscaler {
	p := b.params.Autoscaler
	if p == nil {
		return nil
	}
	out := &autoscalingv2.HorizontalPodAutoscaler{
		TypeMeta:   typeOf("autoscaling/v2", "HorizontalPodAutoscaler"),
		ObjectMeta: b.meta(p.Metadata),
		Spec:       p.Spec,
	}
	out.Spec.ScaleTargetRef = autoscalingv2.CrossVersionObjectReference{APIVersion: "apps/v1", Kind: "Deployment", Name: b.gateway.Name.Name}
	return out
}

func (b builder) budget() *policyv1.PodDisruptionBudget {
	p := b.params.Budget
	if p == nil {
		return nil
	}
	out := &policyv1.PodDisruptionBudget{
		TypeMeta:   typeOf("policy/v1", "PodDisruptionBudget"),
		ObjectMeta: b.meta(p.Metadata),
		Spec:       p.Spec,
	}
	out.Spec.Selector = &metav1.LabelSelector{MatchLabels: b.selector()}
	return out
}
