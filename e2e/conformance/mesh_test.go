// Package conformance runs the mesh tests of the Gateway API's conformance
// suite against a cluster, with Weft in it or without; KUBECONFIG says which. It
// is a module of its own because of what the suite requires. `make conformance`
// makes the cluster.
package conformance

import (
	"context"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"sigs.k8s.io/controller-runtime/pkg/client"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	"sigs.k8s.io/gateway-api/conformance"
	confv1 "sigs.k8s.io/gateway-api/conformance/apis/v1"
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

// profiles are those of a mesh.
var profiles = []suite.ConformanceProfile{suite.MeshHTTPConformanceProfile, suite.MeshGRPCConformanceProfile}

// supported are the features beyond the core ones of the profiles: all that
// the mesh tests know, and the five that open tests which belong to no profile.
func supported() []features.FeatureName {
	mesh := features.SetsToNamesSet(features.MeshCoreFeatures, features.MeshExtendedFeatures)
	return mesh.Insert(
		features.SupportHTTPRoute303RedirectStatusCode,
		features.SupportHTTPRoute307RedirectStatusCode,
		features.SupportHTTPRoute308RedirectStatusCode,
		features.SupportHTTPRouteResponseHeaderModification,
		features.SupportHTTPRouteParentRefPort,
	).UnsortedList()
}

// levels says of which profiles a test is, and whether at their core.
func levels(test suite.ConformanceTest) string {
	var in []string
	for _, p := range profiles {
		level := "core"
		for _, f := range test.Features {
			if p.ExtendedFeatures.Has(f) && level == "core" {
				level = "extended"
			} else if !p.CoreFeatures.Has(f) && !p.ExtendedFeatures.Has(f) {
				level = ""
			}
		}
		if level != "" {
			in = append(in, string(p.Name)+":"+level)
		}
	}
	if in == nil {
		return "none"
	}
	return strings.Join(in, ",")
}

// tell prints what came of a mesh test, for the program that runs this one.
// The suite calls it for every test, also for those that it leaves out.
func tell(t *testing.T, test suite.ConformanceTest, s *suite.ConformanceTestSuite) {
	if !slices.Contains(test.Features, features.SupportMesh) || s.RunTest != "" && s.RunTest != test.ShortName {
		return
	}
	result := "pass"
	if t.Failed() {
		result = "fail"
	} else if t.Skipped() {
		result = "skip"
	}
	fmt.Printf("\nresult %s %s %s\n", test.ShortName, result, levels(test))
}

// TestMesh sets the suite up, puts its namespaces into the mesh and their
// services behind a waypoint, and runs it.
func TestMesh(t *testing.T) {
	opts := conformance.DefaultOptions(t)
	opts.SupportedFeatures = supported()
	for _, p := range profiles {
		opts.ConformanceProfiles = append(opts.ConformanceProfiles, p.Name)
	}
	opts.Implementation.Organization = "weft-mesh"
	opts.Implementation.Project = "weft"
	opts.Implementation.URL = "https://github.com/weft-mesh/weft"
	opts.Implementation.Version = *ver
	opts.Implementation.Contact = []string{"https://github.com/weft-mesh/weft/issues"}
	opts.Hook = tell
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
	if *report != "" {
		t.Cleanup(func() { writeReport(t, s) }) // when the suite has ended
	}
	if err := s.Run(t, tests.ConformanceTests); err != nil {
		t.Fatal(err)
	}
}

func writeReport(t *testing.T, s *suite.ConformanceTestSuite) {
	r, err := s.Report()
	if err != nil {
		t.Error(err)
		return
	}
	// The suite lists them in any order.
	slices.SortFunc(r.ProfileReports, func(a, b confv1.ProfileReport) int { return strings.Compare(a.Name, b.Name) })
	b, err := yaml.Marshal(r)
	if err == nil {
		err = os.WriteFile(*report, b, 0o644)
	}
	if err != nil {
		t.Error(err)
	}
}

// makeWaypoint makes a waypoint for the services of the tests and their pods,
// waits until it is programmed, and binds them to it. Pods need it too, because
// one test calls a pod by its address, and what is behind a waypoint may not be
// called around it.
func makeWaypoint(t *testing.T, c client.Client) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	gw := &gatewayv1.Gateway{}
	gw.Name, gw.Namespace = "waypoint", suite.MeshNamespace
	gw.Labels = map[string]string{"istio.io/waypoint-for": "all"}
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
	ns.Name = suite.MeshNamespace
	patch := client.RawPatch(types.MergePatchType, []byte(`{"metadata":{"labels":{"istio.io/use-waypoint":"waypoint"}}}`))
	if err := c.Patch(ctx, ns, patch); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"echo", "echo-v1", "echo-v2"} {
		svc := &corev1.Service{}
		err = wait.PollUntilContextCancel(ctx, time.Second, true, func(ctx context.Context) (bool, error) {
			err := c.Get(ctx, client.ObjectKey{Namespace: suite.MeshNamespace, Name: name}, svc)
			return meta.IsStatusConditionTrue(svc.Status.Conditions, "istio.io/WaypointBound"), err
		})
		if err != nil {
			t.Fatalf("the service %s is not bound to the waypoint: %v; its conditions are %+v", name, err, svc.Status.Conditions)
		}
	}
}
