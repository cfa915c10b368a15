// Package conformance runs the mesh tests of the Gateway API's conformance
// suite against a cluster with Weft in it; KUBECONFIG says which. It is a
// module of its own because of what the suite requires. `make conformance` makes
// the cluster.
package conformance

import (
	"context"
	"flag"
	"os"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"sigs.k8s.io/controller-runtime/pkg/client"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	"sigs.k8s.io/gateway-api/conformance"
	"sigs.k8s.io/gateway-api/conformance/tests"
	"sigs.k8s.io/gateway-api/conformance/utils/suite"
	"sigs.k8s.io/gateway-api/pkg/features"
	"sigs.k8s.io/yaml"
)

var (
	noMesh = flag.Bool("no-mesh", false, "leave the mesh out: what routing decides must fail then")
	report = flag.String("report", "", "file for the report, as the Gateway API's project takes them")
	ver    = flag.String("weft-version", "dev", "version in the report")
)

// The namespace of the services that the tests route to.
const namespace = "gateway-conformance-mesh"

// supported are the features beyond the core ones of the profiles: all that
// the mesh tests know, and the five that open tests which belong to no profile.
func supported() []features.FeatureName {
	out := []features.FeatureName{
		features.SupportHTTPRoute303RedirectStatusCode,
		features.SupportHTTPRoute307RedirectStatusCode,
		features.SupportHTTPRoute308RedirectStatusCode,
		features.SupportHTTPRouteResponseHeaderModification,
		features.SupportHTTPRouteParentRefPort,
	}
	for _, set := range []features.Features{features.MeshCoreFeatures, features.MeshExtendedFeatures} {
		for f := range set {
			out = append(out, f.Name)
		}
	}
	return out
}

// TestMesh sets the suite up, puts its namespaces into the mesh and their
// services behind a waypoint, and runs it.
func TestMesh(t *testing.T) {
	opts := conformance.DefaultOptions(t)
	opts.SupportedFeatures = supported()
	opts.ConformanceProfiles = []suite.ConformanceProfileName{suite.MeshHTTPConformanceProfileName, suite.MeshGRPCConformanceProfileName}
	opts.MeshName = ""
	opts.Implementation.Organization = "weft-mesh"
	opts.Implementation.Project = "weft"
	opts.Implementation.URL = "https://github.com/weft-mesh/weft"
	opts.Implementation.Version = *ver
	opts.Implementation.Contact = []string{"https://github.com/weft-mesh/weft/issues"}
	if !*noMesh {
		opts.NamespaceLabels = map[string]string{"istio.io/dataplane-mode": "ambient"}
	}
	s, err := suite.NewConformanceTestSuite(opts)
	if err != nil {
		t.Fatal(err)
	}
	s.Setup(t, tests.ConformanceTests)
	if !*noMesh {
		makeWaypoint(t, opts.Client)
	}
	if err := s.Run(t, tests.ConformanceTests); err != nil {
		t.Fatal(err)
	}
	if *report == "" {
		return
	}
	r, err := s.Report()
	if err != nil {
		t.Fatal(err)
	}
	b, err := yaml.Marshal(r)
	if err == nil {
		err = os.WriteFile(*report, b, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// makeWaypoint makes a waypoint for the services of the tests, waits until it
// is programmed, and binds them to it.
func makeWaypoint(t *testing.T, c client.Client) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	gw := &gatewayv1.Gateway{}
	gw.Name, gw.Namespace = "waypoint", namespace
	gw.Spec.GatewayClassName = "weft-waypoint"
	gw.Spec.Listeners = []gatewayv1.Listener{{Name: "mesh", Port: 15008, Protocol: "HBONE"}}
	if err := client.IgnoreAlreadyExists(c.Create(ctx, gw)); err != nil {
		t.Fatal(err)
	}
	err := wait.PollUntilContextCancel(ctx, time.Second, true, func(ctx context.Context) (bool, error) {
		err := c.Get(ctx, client.ObjectKeyFromObject(gw), gw)
		return meta.IsStatusConditionTrue(gw.Status.Conditions, string(gatewayv1.GatewayConditionProgrammed)), err
	})
	if err != nil {
		t.Fatalf("the waypoint is not programmed: %v; its conditions are %+v", err, gw.Status.Conditions)
	}
	ns := &corev1.Namespace{}
	ns.Name = namespace
	patch := client.RawPatch(types.MergePatchType, []byte(`{"metadata":{"labels":{"istio.io/use-waypoint":"waypoint"}}}`))
	if err := c.Patch(ctx, ns, patch); err != nil {
		t.Fatal(err)
	}
	svc := &corev1.Service{}
	err = wait.PollUntilContextCancel(ctx, time.Second, true, func(ctx context.Context) (bool, error) {
		err := c.Get(ctx, client.ObjectKey{Namespace: namespace, Name: "echo"}, svc)
		return meta.IsStatusConditionTrue(svc.Status.Conditions, "istio.io/WaypointBound"), err
	})
	if err != nil {
		t.Fatalf("the service echo is not bound to the waypoint: %v; its conditions are %+v", err, svc.Status.Conditions)
	}
}
