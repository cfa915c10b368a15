package provision

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	autoscalingv2 "k8s.io/api/autoscaling/v2"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	"sigs.k8s.io/yaml"
)

// parameters are what a Gateway's ConfigMap may say: for each kind of object
// YAML of that kind. Only the fields that are here may be set. Whoever may
// write a Gateway and a ConfigMap need not be allowed to run pods, so nothing
// here says what runs, as whom, or with which rights.
type parameters struct {
	Deployment     deploymentParameters
	Service        serviceParameters
	ServiceAccount struct {
		Metadata metadata `json:"metadata"`
	}
	Autoscaler *struct {
		Metadata metadata                                  `json:"metadata"`
		Spec     autoscalingv2.HorizontalPodAutoscalerSpec `json:"spec"`
	}
	Budget *struct {
		Metadata metadata                         `json:"metadata"`
		Spec     policyv1.PodDisruptionBudgetSpec `json:"spec"`
	}
}

type metadata struct {
	Labels      map[string]string `json:"labels"`
	Annotations map[string]string `json:"annotations"`
}

type deploymentParameters struct {
	Metadata metadata `json:"metadata"`
	Spec     struct {
		Replicas *int32 `json:"replicas"`
		Template struct {
			Metadata metadata      `json:"metadata"`
			Spec     podParameters `json:"spec"`
		} `json:"template"`
	} `json:"spec"`
}

type podParameters struct {
	NodeSelector              map[string]string                 `json:"nodeSelector"`
	Tolerations               []corev1.Toleration               `json:"tolerations"`
	Affinity                  *corev1.Affinity                  `json:"affinity"`
	TopologySpreadConstraints []corev1.TopologySpreadConstraint `json:"topologySpreadConstraints"`
	Containers                []struct {
		Name      string                      `json:"name"`
		Resources corev1.ResourceRequirements `json:"resources"`
	} `json:"containers"`
}

type serviceParameters struct {
	Metadata metadata `json:"metadata"`
	Spec     struct {
		TrafficDistribution *string `json:"trafficDistribution"`
	} `json:"spec"`
}

// readParameters reads the data of a ConfigMap, and returns all that is wrong
// with it, joined.
func readParameters(data map[string]string) (parameters, error) {
	var p parameters
	var errs []error
	for _, key := range slices.Sorted(maps.Keys(data)) {
		var into any
		switch key {
		case "deployment":
			into = &p.Deployment
		case "service":
			into = &p.Service
		case "serviceAccount":
			into = &p.ServiceAccount
		case "horizontalPodAutoscaler":
			into = &p.Autoscaler
		case "podDisruptionBudget":
			into = &p.Budget
		default:
			errs = append(errs, fmt.Errorf("%s: want deployment, service, serviceAccount, horizontalPodAutoscaler or podDisruptionBudget", key))
			continue
		}
		if err := yaml.UnmarshalStrict([]byte(data[key]), into); err != nil {
			errs = append(errs, fmt.Errorf("%s: only fields of scheduling, scale, resources, labels and annotations may be set: %w", key, err))
		}
	}
	for _, c := range p.Deployment.Spec.Template.Spec.Containers {
		if c.Name != containerName {
			errs = append(errs, fmt.Errorf("deployment: container %q: the only one is %s", c.Name, containerName))
		}
	}
	return p, errors.Join(errs...)
}
