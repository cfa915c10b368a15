package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// The rights are those that the code uses, and no others: a call that is added
// needs a line here, and one that goes takes its line along.
func TestRBAC(t *testing.T) {
	want := map[string][]string{
		"ClusterRole weft-control-weft-system": {
			"authentication.k8s.io/tokenreviews create",
			"configmaps create",
			"configmaps[istio-ca-root-cert] list watch update",
			"discovery.k8s.io/endpointslices get list watch",
			"namespaces get list watch", "nodes get list watch", "pods get list watch", "services get list watch",
			"security.istio.io/authorizationpolicies get list watch",
			"security.istio.io/authorizationpolicies/status patch",
			"security.istio.io/peerauthentications get list watch",
			"security.istio.io/peerauthentications/status patch",
			"networking.istio.io/virtualservices get list watch", "networking.istio.io/virtualservices/status patch",
			"networking.istio.io/destinationrules get list watch", "networking.istio.io/destinationrules/status patch",
			"networking.istio.io/serviceentries get list watch", "networking.istio.io/serviceentries/status patch",
			"networking.istio.io/workloadentries get list watch", "networking.istio.io/workloadentries/status patch",
			"gateway.networking.k8s.io/gatewayclasses create",
			"gateway.networking.k8s.io/gatewayclasses get list watch", "gateway.networking.k8s.io/gatewayclasses/status patch",
			"gateway.networking.k8s.io/gateways get list watch", "gateway.networking.k8s.io/gateways/status patch",
			"gateway.networking.k8s.io/httproutes get list watch", "gateway.networking.k8s.io/httproutes/status patch",
			"gateway.networking.k8s.io/grpcroutes get list watch", "gateway.networking.k8s.io/grpcroutes/status patch",
			"gateway.networking.k8s.io/tcproutes get list watch", "gateway.networking.k8s.io/tcproutes/status patch",
			"gateway.networking.k8s.io/tlsroutes get list watch", "gateway.networking.k8s.io/tlsroutes/status patch",
			"gateway.networking.k8s.io/referencegrants get list watch",
			"gateway.networking.k8s.io/backendtlspolicies get list watch", "gateway.networking.k8s.io/backendtlspolicies/status patch",
			"services/status patch",
			"serviceaccounts get list watch create patch delete", "services create patch delete",
			"apps/deployments get list watch create patch delete",
			"autoscaling/horizontalpodautoscalers get list watch create patch delete",
			"policy/poddisruptionbudgets get list watch create patch delete",
			"configmaps get list watch",
			"admissionregistration.k8s.io/validatingwebhookconfigurations[weft-control-weft-system] get update",
		},
		"Role weft-system/weft-control": {
			"coordination.k8s.io/leases create",
			"coordination.k8s.io/leases[weft-control] get update",
			"secrets create",
			"secrets[weft-ca-secret,cacerts] get",
		},
		"ClusterRole weft-node-weft-system": {"events create", "namespaces get list watch", "pods get list watch patch"},
		"Role weft-system/weft-node":        {"apps/daemonsets[ztunnel] get list watch"},
	}
	got := map[string][]string{}
	for _, o := range rendered(t).objects {
		rules, ok, _ := unstructured.NestedSlice(o.Object, "rules")
		if !ok {
			continue
		}
		var lines []string
		for _, r := range rules {
			lines = append(lines, ruleLines(r.(map[string]any))...)
		}
		slices.Sort(lines)
		got[describe(o)] = lines
	}
	for _, lines := range want {
		slices.Sort(lines)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("rights (-want +got):\n%s", diff)
	}
}

// Rights that only some values need come with these values.
func TestRBACOfValues(t *testing.T) {
	rights := func(sets ...string) string {
		var lines []string
		for _, o := range rendered(t, sets...).objects {
			if describe(o) != "ClusterRole weft-node-weft-system" {
				continue
			}
			rules, _, _ := unstructured.NestedSlice(o.Object, "rules")
			for _, r := range rules {
				lines = append(lines, ruleLines(r.(map[string]any))...)
			}
		}
		slices.Sort(lines)
		return strings.Join(lines, ", ")
	}
	const base = "events create, namespaces get list watch, "
	const pods = "pods get list watch patch"
	for _, tc := range []struct{ set, want string }{
		{"node.startupTaint.enabled=true", base + "nodes get patch, " + pods},
		{"node.uncaptured=restart", base + pods + ", pods/eviction create"},
		{"node.uncaptured=report", base + pods},
	} {
		if got := rights(tc.set); got != tc.want {
			t.Errorf("%s: %s, want %s", tc.set, got, tc.want)
		}
	}
}

// ruleLines writes a rule as one line for each resource.
func ruleLines(rule map[string]any) []string {
	list := func(key string) []string { l, _, _ := unstructured.NestedStringSlice(rule, key); return l }
	var out []string
	for _, group := range list("apiGroups") {
		for _, resource := range list("resources") {
			line := resource
			if group != "" {
				line = group + "/" + resource
			}
			if names := list("resourceNames"); len(names) > 0 {
				line += "[" + strings.Join(names, ",") + "]"
			}
			out = append(out, line+" "+strings.Join(list("verbs"), " "))
		}
	}
	return out
}

// Values that a user may well set give objects that Kubernetes accepts.
func TestValues(t *testing.T) {
	daemonSet := func(t *testing.T, sets ...string) map[string]any {
		t.Helper()
		for _, o := range rendered(t, sets...).objects {
			if o.GetKind() == "DaemonSet" {
				return o.Object["spec"].(map[string]any)
			}
		}
		t.Fatal("no DaemonSet")
		return nil
	}
	field := func(spec map[string]any, path ...string) string {
		v, _, _ := unstructured.NestedFieldNoCopy(spec, path...)
		return fmt.Sprint(v)
	}
	for _, tc := range []struct {
		name string
		sets []string
		path []string
		want string
	}{
		{"an update starts the new pod first", nil, []string{"updateStrategy"}, "map[rollingUpdate:map[maxSurge:1 maxUnavailable:0] type:RollingUpdate]"},
		{"an update strategy replaces ours", []string{"updateStrategy.rollingUpdate.maxUnavailable=1"}, []string{"updateStrategy"}, "map[rollingUpdate:map[maxUnavailable:1]]"},
		{"features can be turned off", []string{"node.disableFeatures={tcx,iterator}"}, []string{"template", "spec", "containers"}, "--disable-features=tcx,iterator"},
		{"a line for each connection", nil, []string{"template", "spec", "containers"}, "--log-format=text --access-log=true"},
		{"objects, and none for connections", []string{"logFormat=json", "ztunnel.accessLog=false"}, []string{"template", "spec", "containers"}, "--log-format=json --access-log=false"},
		{"no node selector", []string{"nodeSelector=null"}, []string{"template", "spec", "nodeSelector"}, "map[]"},
		{"startup taints are tolerated, whatever else is", []string{"node.startupTaint.enabled=true", "node.startupTaint.keys={a/b}", "tolerations=null"}, []string{"template", "spec", "tolerations"}, "[map[key:a/b operator:Exists]]"},
		{"no tolerations", []string{"tolerations=null"}, []string{"template", "spec", "tolerations"}, "<nil>"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := field(daemonSet(t, tc.sets...), tc.path...); got != tc.want && (!strings.HasPrefix(tc.want, "--") || !strings.Contains(got, tc.want)) {
				t.Errorf("%s is %s, want %s", strings.Join(tc.path, "."), got, tc.want)
			}
		})
	}
	t.Run("no excluded namespaces but our own", func(t *testing.T) {
		text := fmt.Sprint(daemonSet(t, "node.excludeNamespaces=null"))
		if !strings.Contains(text, "--exclude-namespaces=weft-system ") {
			t.Errorf("no such argument in %s", text)
		}
	})
	t.Run("no ztunnel that stands by", func(t *testing.T) {
		if text := fmt.Sprint(daemonSet(t, "ztunnel.standby=false")); strings.Contains(text, "standby") {
			t.Errorf("there is one in %s", text)
		}
		if text := fmt.Sprint(daemonSet(t)); strings.Count(text, "--standby") != 1 {
			t.Errorf("not just one in %s", text)
		}
	})
	t.Run("every top value may be null", func(t *testing.T) {
		c, err := loadChart()
		if err != nil {
			t.Fatal(err)
		}
		for _, key := range slices.Sorted(maps.Keys(c.Values)) {
			if _, isMap := c.Values[key].(map[string]any); isMap && key != "nodeSelector" && key != "updateStrategy" {
				continue // a group of values
			}
			rendered(t, key+"=null")
		}
	})
}

// What limits the rights beyond what roles can say is there where Kubernetes
// has it.
func TestAdmissionPolicies(t *testing.T) {
	count := func(kubeVersion string) map[string]int {
		r, err := render("weft-system", kubeVersion, settings{registry: "r"})
		if err != nil {
			t.Fatal(err)
		}
		out := map[string]int{}
		for _, o := range r.objects {
			if o.GroupVersionKind().Group == "admissionregistration.k8s.io" && strings.HasPrefix(o.GetKind(), "ValidatingAdmissionPolicy") {
				name := o.GetName()
				if policy, bound, _ := unstructured.NestedString(o.Object, "spec", "policyName"); bound {
					name = policy
				}
				out[o.GetKind()+" "+name]++
			}
		}
		return out
	}
	want := map[string]int{}
	for _, name := range []string{"weft-control-weft-system", "weft-control-status-weft-system", "weft-node-weft-system"} {
		want["ValidatingAdmissionPolicy "+name], want["ValidatingAdmissionPolicyBinding "+name] = 1, 1
	}
	if diff := cmp.Diff(want, count("v1.30.0")); diff != "" {
		t.Errorf("policies (-want +got):\n%s", diff)
	}
	if got := count("v1.29.9"); len(got) != 0 {
		t.Errorf("an older Kubernetes gets %v, which it does not know", got)
	}
}
