package main

import (
	"bytes"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

func TestCommandLine(t *testing.T) {
	nowhere := filepath.Join(t.TempDir(), "none")
	t.Setenv("KUBECONFIG", nowhere)
	rows := []struct {
		name string
		args []string
		code int
		want string // in what is printed
	}{
		{"help names the commands", []string{"--help"}, 0, "uninstall"},
		{"version of the command alone", []string{"version", "--client", "-o", "json"}, 0, `"client": "dev"`},
		{"unknown output", []string{"version", "--client", "-o", "xml"}, 1, "want json or yaml"},
		{"unknown command", []string{"instal"}, 1, "unknown command"},
		{"a release without a node", []string{"release"}, 1, "accepts 1 arg"},
		{"no kubeconfig", []string{"status"}, 1, "--kubeconfig"},
		{"no registry", []string{"install", "--dry-run"}, 1, "image.registry is not set"},
		{"a value that is not one of the allowed", []string{"install", "--dry-run", "--image-registry", "r", "--set", "ztunnel.sameNode=teleport"}, 1, "'tunnel', 'direct'"},
		{"a value that does not exist", []string{"install", "--dry-run", "--image-registry", "r", "--set", "ztunel.sameNode=direct"}, 1, "ztunel"},
		{"a set without a value", []string{"install", "--dry-run", "--image-registry", "r", "--set", "x"}, 1, "want key=value"},
		{"a values file that is not there", []string{"install", "--dry-run", "-f", "no/such.yaml"}, 1, "no/such.yaml"},
		{"dry run prints objects", []string{"install", "--dry-run", "--image-registry", "reg.example/weft", "--image-tag", "v9"}, 0, "image: reg.example/weft/ztunnel:v9"},
		{"a tag that looks like a number", []string{"install", "--dry-run", "--image-registry", "reg", "--image-tag", "20261121"}, 0, "image: reg/ztunnel:20261121"},
		{"the dry run makes the namespace", []string{"install", "--dry-run", "--image-registry", "reg", "-n", "mesh"}, 0, "kind: Namespace\nmetadata:\n  labels:\n    app.kubernetes.io/managed-by: weft\n    pod-security.kubernetes.io/enforce: privileged\n  name: mesh\n"},
		{"the dry run is for a new Kubernetes", []string{"install", "--dry-run", "--image-registry", "reg"}, 0, "appArmorProfile"},
		{"the dry run for an older Kubernetes", []string{"install", "--dry-run", "--image-registry", "reg", "--kube-version", "1.29"}, 0, "container.apparmor.security.beta.kubernetes.io/weft-node: unconfined"},
		{"the dry run for one that is too old", []string{"install", "--dry-run", "--image-registry", "reg", "--kube-version", "1.20"}, 1, "upgrade the cluster"},
		{"completion", []string{"completion", "bash"}, 0, "weft"},
	}
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			var out bytes.Buffer
			code := run(t.Context(), r.args, &out, &out)
			if code != r.code || !strings.Contains(out.String(), r.want) {
				t.Errorf("code %d, want %d, and %q in:\n%s", code, r.code, r.want, out.String())
			}
		})
	}
}

func rendered(t *testing.T, sets ...string) rendering {
	t.Helper()
	r, err := render("weft-system", "v1.36.3", settings{registry: "r", sets: sets})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// No container may have more rights than it needs, whatever values are set.
func TestLeastPrivilege(t *testing.T) {
	allowed := map[string][]string{
		"weft-control": nil,
		"istio-proxy":  {"NET_ADMIN", "NET_RAW", "SYS_ADMIN"},
		"weft-node":    {"NET_ADMIN", "SYS_ADMIN", "SYS_PTRACE"},

		"istio-proxy-standby": {"NET_ADMIN", "NET_RAW", "SYS_ADMIN"},
	}
	seen := map[string]bool{}
	for _, o := range rendered(t).objects {
		spec, ok, _ := unstructured.NestedMap(o.Object, "spec", "template", "spec")
		if !ok {
			continue
		}
		for _, key := range []string{"hostNetwork", "hostPID", "hostIPC"} {
			if _, set := spec[key]; set {
				t.Errorf("%s sets %s", describe(o), key)
			}
		}
		containers, _, _ := unstructured.NestedSlice(spec, "containers")
		for _, c := range containers {
			c := c.(map[string]any)
			name := c["name"].(string)
			seen[name] = true
			sc := c["securityContext"].(map[string]any)
			if sc["privileged"] != nil || sc["readOnlyRootFilesystem"] != true || sc["allowPrivilegeEscalation"] != false {
				t.Errorf("container %s: %v", name, sc)
			}
			drop, _, _ := unstructured.NestedStringSlice(sc, "capabilities", "drop")
			add, _, _ := unstructured.NestedStringSlice(sc, "capabilities", "add")
			slices.Sort(add)
			if !slices.Equal(drop, []string{"ALL"}) || !slices.Equal(add, allowed[name]) {
				t.Errorf("container %s drops %v and adds %v, want ALL and %v", name, drop, add, allowed[name])
			}
			ports, _, _ := unstructured.NestedSlice(c, "ports")
			for _, p := range ports {
				if p.(map[string]any)["hostPort"] != nil {
					t.Errorf("container %s has a host port: two could not run beside each other in an update", name)
				}
			}
		}
	}
	for name := range allowed {
		if !seen[name] {
			t.Errorf("no container %s in the chart", name)
		}
	}
}

// The container that parses bytes from the network gets no token for the
// Kubernetes API.
func TestZtunnelHasNoKubernetesToken(t *testing.T) {
	for _, o := range rendered(t).objects {
		if o.GetKind() != "DaemonSet" {
			continue
		}
		spec, _, _ := unstructured.NestedMap(o.Object, "spec", "template", "spec")
		if spec["automountServiceAccountToken"] != false {
			t.Error("a token would be mounted into every container")
		}
		containers, _, _ := unstructured.NestedSlice(spec, "containers")
		for _, c := range containers {
			c := c.(map[string]any)
			mounts, _, _ := unstructured.NestedSlice(c, "volumeMounts")
			for _, m := range mounts {
				if c["name"] != "weft-node" && m.(map[string]any)["name"] == "api-token" {
					t.Errorf("%s mounts the token of the Kubernetes API", c["name"])
				}
			}
		}
		return
	}
	t.Error("no DaemonSet in the chart")
}

// RBAC never grants everything, and Secrets only in Weft's own namespace.
func TestNarrowRBAC(t *testing.T) {
	for _, o := range rendered(t).objects {
		rules, ok, _ := unstructured.NestedSlice(o.Object, "rules")
		if !ok {
			continue
		}
		for _, r := range rules {
			r := r.(map[string]any)
			for _, key := range []string{"apiGroups", "resources", "verbs"} {
				values, _, _ := unstructured.NestedStringSlice(r, key)
				if slices.Contains(values, "*") {
					t.Errorf("%s grants every one of %s", describe(o), key)
				}
				if key == "resources" && o.GetKind() == "ClusterRole" && slices.Contains(values, "secrets") {
					t.Errorf("%s grants Secrets of every namespace", describe(o))
				}
			}
		}
	}
}

func TestNotes(t *testing.T) {
	s := status{Nodes: []nodeStatus{{Node: "a", Agent: agentStatus{Released: true, Uncaptured: []agentUncaptured{{"shop/x", "captured"}, {"shop/y", "restarted"}, {"shop/z", "reported"}}}}}}
	got := strings.Join(s.notes(), "\n")
	for _, want := range []string{"node a was let go", "shop/x ran outside", "shop/y ran outside"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in %q", want, got)
		}
	}
	if strings.Contains(got, "shop/z") {
		t.Errorf("a problem among the notes: %q", got)
	}
	if got := some([]string{"1", "2", "3", "4", "5", "6", "7"}); got != "1, 2, 3, 4, 5 and 2 more" {
		t.Errorf("some: %q", got)
	}
}

func TestProblems(t *testing.T) {
	well := status{Namespace: "weft-system", Control: controlStatus{Installed: true, Ready: 1, Wanted: 1},
		Nodes: []nodeStatus{{Node: "a", Pod: "p", Ztunnel: true, Agent: agentStatus{Ready: true}}}}
	rows := []struct {
		name   string
		change func(*status)
		want   string // in the only problem; empty: none
	}{
		{"all is well", func(*status) {}, ""},
		{"not installed", func(s *status) { s.Control.Installed = false }, "weft install"},
		{"control is not ready", func(s *status) { s.Control.Ready = 0 }, "0 of 1 ready"},
		{"control is scaled to nothing", func(s *status) { s.Control.Ready, s.Control.Wanted = 0, 0 }, "scaled to 0"},
		{"the agent is not ready and does not say why", func(s *status) { s.Nodes[0].Agent.Ready = false }, "agent is not ready"},
		{"the agent is not ready and says why", func(s *status) {
			s.Nodes[0].Agent.Ready = false
			s.Nodes[0].Agent.Problems = []string{"no BTF"}
		}, "node a: no BTF"},
		{"a node without a pod", func(s *status) { s.Nodes[0].Pod = "" }, "not captured"},
		{"ztunnel is not ready", func(s *status) { s.Nodes[0].Ztunnel = false }, "ztunnel is not ready"},
		{"the agent says why", func(s *status) { s.Nodes[0].Agent.Problems = []string{"no BTF"} }, "node a: no BTF"},
		{"a pod that could not be captured", func(s *status) {
			s.Nodes[0].Agent.Failures = []agentFailure{{Pod: "shop/cart", Error: "gone"}}
		}, "shop/cart: gone"},
		{"a pod that runs outside the mesh", func(s *status) {
			s.Nodes[0].Agent.Uncaptured = []agentUncaptured{{Pod: "shop/cart", Done: "reported"}}
		}, "shop/cart belongs to the mesh and runs outside it"},
		{"a pod that was captured late is no problem", func(s *status) {
			s.Nodes[0].Agent.Uncaptured = []agentUncaptured{{Pod: "shop/cart", Done: "captured"}}
		}, ""},
		{"nobody stands by", func(s *status) { s.Nodes[0].Meant, s.Nodes[0].StandsBy = true, false }, "no ztunnel stands by"},
		{"nobody is meant to stand by", func(s *status) { s.Nodes[0].Meant, s.Nodes[0].StandsBy = false, false }, ""},
		{"a node that was dropped", func(s *status) {
			s.Nodes[0] = nodeStatus{Node: "a", Dropped: true, Stranded: []string{"shop/cart", "shop/db"}}
		}, "left 2 captured pods behind, whose traffic is blocked (shop/cart, shop/db)"},
		{"a node without a pod and with captured ones", func(s *status) {
			s.Nodes[0] = nodeStatus{Node: "a", Stranded: []string{"shop/cart"}}
		}, "the traffic of 1 captured pods is blocked"},
	}
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			s := well
			s.Nodes = slices.Clone(well.Nodes)
			r.change(&s)
			got := strings.Join(s.problems(), "\n")
			if (r.want == "") != (got == "") || !strings.Contains(got, r.want) {
				t.Errorf("problems %q, want %q", got, r.want)
			}
		})
	}
}
