package e2e

import (
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// The control service writes what runs waypoints, wherever they are, and nothing
// else of these kinds: not even with a token that was taken from it, and not
// with more rights than a waypoint has.
func TestControlChangesOnlyWaypoints(t *testing.T) {
	cfg := rest.AnonymousClientConfig(world.c.RESTConfig())
	cfg.BearerToken = token(t, "-n", "weft-system", "weft-control")
	control, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	yes := true
	meta := metav1.ObjectMeta{Name: "wp", Namespace: meshed,
		Labels: map[string]string{"gateway.networking.k8s.io/gateway-name": "wp"},
		OwnerReferences: []metav1.OwnerReference{{APIVersion: "gateway.networking.k8s.io/v1", Kind: "Gateway", Name: "wp",
			UID: "11111111-2222-3333-4444-555555555555", Controller: &yes}}}
	deployment := func(change func(*appsv1.Deployment, *corev1.PodSpec)) *appsv1.Deployment {
		no, audience := false, "istio-ca"
		d := &appsv1.Deployment{ObjectMeta: *meta.DeepCopy(), Spec: appsv1.DeploymentSpec{
			Selector: &metav1.LabelSelector{MatchLabels: meta.Labels},
			Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: meta.Labels}, Spec: corev1.PodSpec{
				ServiceAccountName: "wp", AutomountServiceAccountToken: &no,
				Containers: []corev1.Container{{Name: "istio-proxy", Image: "waypoint",
					SecurityContext: &corev1.SecurityContext{AllowPrivilegeEscalation: &no, RunAsNonRoot: &yes}}},
				Volumes: []corev1.Volume{{Name: "ca-token", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{
					Sources: []corev1.VolumeProjection{{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Path: "token", Audience: audience}}}}}}},
			}},
		}}
		change(d, &d.Spec.Template.Spec)
		return d
	}
	dry := []string{metav1.DryRunAll}
	create := func(change func(*appsv1.Deployment, *corev1.PodSpec)) func() error {
		return func() error {
			_, err := control.AppsV1().Deployments(meshed).Create(t.Context(), deployment(change), metav1.CreateOptions{DryRun: dry})
			return err
		}
	}
	patch := func(patch string, subresources ...string) func() error {
		return func() error {
			_, err := control.CoreV1().Services("default").Patch(t.Context(), "kubernetes", types.MergePatchType, []byte(patch), metav1.PatchOptions{DryRun: dry}, subresources...)
			return err
		}
	}
	for _, tt := range []struct {
		what    string
		refused string // "" if it is allowed
		do      func() error
	}{
		{"a waypoint's Deployment", "", create(func(*appsv1.Deployment, *corev1.PodSpec) {})},
		{"one without an owner", "belongs to no Gateway", create(func(d *appsv1.Deployment, _ *corev1.PodSpec) { d.OwnerReferences = nil })},
		{"one of another name", "belongs to no Gateway", create(func(d *appsv1.Deployment, _ *corev1.PodSpec) { d.Name = "other" })},
		{"one without the label", "without the label", create(func(d *appsv1.Deployment, _ *corev1.PodSpec) { d.Labels = nil })},
		{"one on the node's network", "more rights", create(func(_ *appsv1.Deployment, p *corev1.PodSpec) { p.HostNetwork = true })},
		{"a privileged one", "more rights", create(func(_ *appsv1.Deployment, p *corev1.PodSpec) {
			p.Containers[0].SecurityContext = &corev1.SecurityContext{Privileged: &yes, RunAsNonRoot: &yes}
		})},
		{"one as another account", "other credentials", create(func(_ *appsv1.Deployment, p *corev1.PodSpec) { p.ServiceAccountName = "default" })},
		{"one with a token for the Kubernetes API", "other credentials", create(func(_ *appsv1.Deployment, p *corev1.PodSpec) { p.AutomountServiceAccountToken = nil })},
		{"one with a Secret", "other credentials", create(func(_ *appsv1.Deployment, p *corev1.PodSpec) {
			p.Volumes = append(p.Volumes, corev1.Volume{Name: "s", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "s"}}})
		})},
		{"one with a file of the node", "other credentials", create(func(_ *appsv1.Deployment, p *corev1.PodSpec) {
			p.Volumes = append(p.Volumes, corev1.Volume{Name: "h", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/"}}})
		})},
		{"somebody's Service", "belongs to no Gateway", patch(`{"spec":{"selector":{"app":"mine"}}}`)},
		{"its deletion", "belongs to no Gateway", func() error {
			return control.CoreV1().Services("default").Delete(t.Context(), "kubernetes", metav1.DeleteOptions{DryRun: dry})
		}},
		{"somebody's service account", "belongs to no Gateway", func() error {
			_, err := control.CoreV1().ServiceAccounts(meshed).Patch(t.Context(), "default", types.MergePatchType, []byte(`{"metadata":{"labels":{"a":"b"}}}`), metav1.PatchOptions{DryRun: dry})
			return err
		}},
		{"a Service with an external address", "external addresses", func() error {
			_, err := control.CoreV1().Services(meshed).Create(t.Context(), &corev1.Service{ObjectMeta: *meta.DeepCopy(), Spec: corev1.ServiceSpec{
				Ports: []corev1.ServicePort{{Port: 80}}, ExternalIPs: []string{"192.0.2.1"}}}, metav1.CreateOptions{DryRun: dry})
			return err
		}},
		{"a Service's conditions", "", patch(`{"status":{"conditions":[{"type":"istio.io/WaypointBound","status":"True","reason":"R","message":"m","lastTransitionTime":"2026-01-01T00:00:00Z"}]}}`, "status")},
		{"a Service's annotations, by its status", "only conditions", patch(`{"metadata":{"annotations":{"weft.test/changed":"true"}}}`, "status")},
	} {
		err := tt.do()
		if tt.refused == "" && err != nil || tt.refused != "" && (err == nil || !strings.Contains(err.Error(), tt.refused)) {
			t.Errorf("%s: %v; want it refused: %q", tt.what, err, tt.refused)
		}
	}
}
