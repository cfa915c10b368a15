package arch

import (
	"fmt"
	"slices"
	"strings"
)

// module is the prefix of our own packages; inside this package they go
// without it.
const module = "github.com/weft-mesh/weft/"

// floors says on which floor each package stands. A package imports only from
// floors below its own, so this order has no cycles and no short cuts. A new
// package needs a line here; all of cmd stands on the top floor.
var floors = [][]string{
	0: {"mesh", "waypoint/l7/msg", "bpf", "deploy", "api/workload", "api/meshv1", "ui", "internal/run", "internal/netns", "internal/relay", "internal/obs", "internal/pack", "internal/arch", "internal/score"},
	1: {"mesh/view", "mesh/authz", "mesh/route", "mesh/balance", "internal/http2", "internal/handoff", "internal/handover", "internal/testca", "internal/testnet", "internal/bench"},
	2: {"identity", "hbone/record", "api/feed", "ztunnel/dns", "waypoint/l7/h1", "waypoint/l7/h2", "node/capture", "node/cni", "control/compile"},
	3: {"hbone", "hbone/conformance", "identity/ca", "identity/issue", "waypoint/l7", "control/provision", "control/admit", "control/admin"},
	4: {"hbone/loop", "waypoint", "waypoint/gateway", "waypoint/wasm", "node", "control/kube"},
	5: {"ztunnel", "control"},
	6: {}, // cmd/...
}

// components never meet: each is imported by its own packages and by cmd, and
// by nobody else. What two of them need moves below both.
var components = []string{"node", "ztunnel", "waypoint", "control"}

// meetings are the tests in which two components are proved against each
// other. They need a reason each.
var meetings = []edge{
	{"ztunnel", "node/capture", true}, // captured pods, a real kernel, and the proxy that serves them
}

// rooms says where a dependency may be imported directly. The longest prefix
// that fits counts. Tests may import what they like, and e2e is a module of its
// own.
var rooms = map[string][]string{
	"github.com/cilium/ebpf":         {"bpf", "node/capture"},
	"github.com/vishvananda/netlink": {"internal/netns", "node/capture", "internal/testnet"},
	"k8s.io/client-go":               {"control/kube", "node", "cmd/weft"},
	"sigs.k8s.io/gateway-api":        {"control/compile", "control/kube", "control/provision"},
	"istio.io/client-go":             {"control/compile", "control/kube", "control/provision"},
	"istio.io/api":                   {"control/compile", "control/kube", "control/provision"},
	"istio.io/api/security/v1alpha1": {"identity/issue", "control"}, // the certificate service, not a type of the API server
	"google.golang.org/grpc":         {"api/meshv1", "api/feed", "identity/issue", "control"},
	"github.com/spiffe/go-spiffe":    {"identity", "identity/ca"},
	"github.com/tetratelabs/wazero":  {"waypoint/wasm"},
	"golang.org/x/crypto/x509roots":  {"cmd/waypoint"}, // it changes what the whole program trusts
}

// An edge is one import. Our own packages go without the module's prefix.
type edge struct {
	from, to string
	test     bool // in a _test.go file
}

// check returns everything that is wrong with a set of imports.
func check(edges []edge) []string {
	var wrong []string
	joined := map[string]map[string]bool{} // cmd -> components
	for _, e := range edges {
		for _, rule := range []func(edge) string{floorRule, componentRule, e2eRule, stdRule, roomRule} {
			if s := rule(e); s != "" {
				wrong = append(wrong, fmt.Sprintf("%s imports %s: %s", e.from, e.to, s))
			}
		}
		if c := component(e.to); c != "" && strings.HasPrefix(e.from, "cmd/") && !e.test {
			if joined[e.from] == nil {
				joined[e.from] = map[string]bool{}
			}
			joined[e.from][c] = true
		}
	}
	for cmd, cs := range joined {
		if len(cs) > 1 {
			wrong = append(wrong, fmt.Sprintf("%s joins %d components: a command joins one", cmd, len(cs)))
		}
	}
	slices.Sort(wrong)
	return slices.Compact(wrong)
}

// ours reports whether a package is of this module, by the name it has here.
func ours(pkg string) bool {
	first, _, _ := strings.Cut(pkg, "/")
	return slices.Contains([]string{"api", "bpf", "cmd", "control", "deploy", "e2e", "hbone", "identity", "internal", "mesh", "node", "ui", "waypoint", "ztunnel"}, first)
}

// under reports whether pkg is dir or below it.
func under(pkg, dir string) bool { return pkg == dir || strings.HasPrefix(pkg, dir+"/") }

// floor returns where a package stands, and -1 if nobody said.
func floor(pkg string) int {
	if under(pkg, "cmd") {
		return len(floors) - 1
	}
	return slices.IndexFunc(floors, func(f []string) bool { return slices.Contains(f, pkg) })
}

func component(pkg string) string {
	i := slices.IndexFunc(components, func(c string) bool { return under(pkg, c) })
	if i < 0 {
		return ""
	}
	return components[i]
}

func floorRule(e edge) string {
	if e.test || !ours(e.to) || under(e.from, "e2e") {
		return ""
	}
	from, to := floor(e.from), floor(e.to)
	switch {
	case from < 0 || to < 0:
		return "one of them has no floor; give it one in internal/arch"
	case to >= from:
		return fmt.Sprintf("floor %d may not import from floor %d", from, to)
	}
	return ""
}

func componentRule(e edge) string {
	c := component(e.to)
	if c == "" || component(e.from) == c || under(e.from, "cmd") || slices.Contains(meetings, e) {
		return ""
	}
	return fmt.Sprintf("only %s itself and cmd may", c)
}

func e2eRule(e edge) string {
	if under(e.from, "e2e") && ours(e.to) && !under(e.to, "e2e") {
		return "e2e sees the product from outside only"
	}
	return ""
}

func stdRule(e edge) string {
	first, _, _ := strings.Cut(e.to, "/")
	switch std := !strings.Contains(first, ".") && !ours(e.to); {
	case e.test || std || !under(e.from, "mesh"):
		return ""
	case e.from != "mesh" && e.to == "mesh":
		return ""
	}
	return "mesh has nothing but the standard library"
}

func roomRule(e edge) string {
	if e.test || under(e.from, "e2e") {
		return ""
	}
	guest := ""
	for g := range rooms {
		if (under(e.to, g) || strings.HasPrefix(e.to, g+"/v")) && len(g) > len(guest) {
			guest = g
		}
	}
	if guest == "" {
		return ""
	}
	if slices.Contains(rooms[guest], e.from) {
		return ""
	}
	return fmt.Sprintf("%s has its rooms: %s", guest, strings.Join(rooms[guest], ", "))
}
