package e2e

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

// nobody is the address of a name server that is not there.
const nobody = "192.0.2.53"

// lookupIn resolves a name in a pod and returns what it got, one address a line.
func lookupIn(t *testing.T, ns, pod string, args ...string) (string, error) {
	t.Helper()
	return world.c.Kubectl(t.Context(), append([]string{"exec", "-n", ns, pod, "--", "/bin/testapp", "lookup"}, args...)...)
}

// Pods resolve names of the mesh whatever their name server does, and all
// others through it; a pod can be left out.
func TestNames(t *testing.T) {
	const ns = "names"
	apart := podYAML(ns, "apart", "node1", "args: [sleep]", `annotations: {ambient.istio.io/dns-capture: "false"}`)
	apply(t, namespaceYAML(ns, "ambient")+podYAML(ns, "asks", "node1", "args: [sleep]")+apart)
	ready(t, ns)
	wantCaptured(t, ns, "asks", true)
	wantCaptured(t, ns, "apart", true)
	near4, _ := addresses(t, meshed, "near")
	vips := strings.Fields(kubectl(t, "get", "service", "-n", meshed, "near", "-o", "jsonpath={.spec.clusterIPs[*]}"))
	vip4 := vips[0]
	if a, err := netip.ParseAddr(vip4); err != nil || !a.Is4() {
		vip4 = vips[1]
	}
	const full = "near." + meshed + ".svc.cluster.local."
	// Only CoreDNS knows a pod by such a name.
	byAddress := strings.ReplaceAll(near4.String(), ".", "-") + "." + meshed + ".pod.cluster.local."

	for _, tc := range []struct {
		name string
		args []string
		want string // empty: it fails
	}{
		{"short name, by the search path", []string{"-network", "ip4", "near." + meshed}, vip4},
		{"full name", []string{"-network", "ip4", full}, vip4},
		{"headless service", []string{"-network", "ip4", "near-headless." + meshed}, near4.String()},
		{"a name that only CoreDNS knows", []string{"-network", "ip4", byAddress}, near4.String()},
		{"a name that does not exist", []string{"-timeout", "10s", "nothing." + meshed + ".svc.cluster.local."}, ""},
		{"over TCP", []string{"-tcp", "-server", "10.96.0.10", "-network", "ip4", full}, vip4},
		{"over TCP, through CoreDNS", []string{"-tcp", "-server", "10.96.0.10", "-network", "ip4", byAddress}, near4.String()},
		{"of a server that is not there", []string{"-server", nobody, "-network", "ip4", full}, vip4},
		{"of a server that is not there, what the mesh does not know", []string{"-server", nobody, "-timeout", "2s", byAddress}, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			out, err := lookupIn(t, ns, "asks", tc.args...)
			if got := strings.TrimSpace(out); (err == nil) != (tc.want != "") || err == nil && got != tc.want {
				t.Errorf("got %q, %v; want %q", got, err, tc.want)
			}
			if strings.Contains(tc.name, "does not exist") && !strings.Contains(fmt.Sprint(out, err), "no such host") {
				t.Errorf("got %q, %v; want that the name does not exist", out, err)
			}
		})
	}

	t.Run("a pod that is left out", func(t *testing.T) {
		eventually(t, patience, func() error {
			if out, err := lookupIn(t, ns, "apart", "-network", "ip4", full); err != nil || strings.TrimSpace(out) != vip4 {
				return fmt.Errorf("through CoreDNS: got %q, %v; want %s", out, err, vip4)
			}
			return nil
		})
		if out, err := lookupIn(t, ns, "apart", "-server", nobody, "-timeout", "2s", "-network", "ip4", full); err == nil {
			t.Errorf("a server that is not there answered %q: the queries were captured", out)
		}
	})
}
