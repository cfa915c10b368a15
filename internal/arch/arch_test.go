package arch

import (
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

func TestImports(t *testing.T) {
	edges, err := read("../..")
	if err != nil {
		t.Fatal(err)
	}
	if len(edges) < 100 {
		t.Fatalf("found %d imports: this is not the whole house", len(edges))
	}
	for _, s := range check(edges) {
		t.Error(s)
	}
}

// read returns the imports of every Go file below root, whatever its build
// tags.
func read(root string) ([]edge, error) {
	var edges []edge
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if name := d.Name(); d.IsDir() && path != root && (name[0] == '.' || name[0] == '_' || name == "testdata" || name == "out" || name == "bin") {
			return filepath.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(path, ".go") {
			return nil
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		dir, err := filepath.Rel(root, filepath.Dir(path))
		if err != nil {
			return err
		}
		for _, spec := range f.Imports {
			to, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return err
			}
			to = strings.TrimPrefix(to, module)
			if from := filepath.ToSlash(dir); to != from { // a test package imports its own
				edges = append(edges, edge{from, to, strings.HasSuffix(path, "_test.go")})
			}
		}
		return nil
	})
	return edges, err
}

func TestRules(t *testing.T) {
	const test = true
	for _, tc := range []struct {
		edge
		want string // part of the complaint; empty if it is allowed
	}{
		{edge{"ztunnel", "waypoint/l7", false}, "only waypoint itself and cmd may"},
		{edge{"ztunnel", "control/compile", false}, "only control itself and cmd may"},
		{edge{"mesh/route", "mesh/authz", false}, "floor 1 may not import from floor 1"},
		{edge{"waypoint/l7", "hbone", false}, "floor 3 may not import from floor 3"},
		{edge{"hbone", "waypoint/l7", false}, "only waypoint itself and cmd may"},
		{edge{"e2e", "mesh", false}, "from outside only"},
		{edge{"e2e/cluster", "mesh", test}, "from outside only"},
		{edge{"e2e", "e2e/cluster", false}, ""},

		{edge{"api/feed", "mesh/view", false}, ""},
		{edge{"mesh/view", "mesh", false}, ""},
		{edge{"mesh", "mesh/view", false}, "floor 0 may not"},
		{edge{"node", "node/capture", false}, ""},
		{edge{"control", "control/kube", false}, ""},
		{edge{"control/kube", "control", false}, "floor 4 may not import from floor 5"},
		{edge{"internal/obs", "internal/run", false}, "floor 0 may not"},
		{edge{"internal/relay", "node", test}, "only node itself and cmd may"},
		{edge{"ztunnel", "new/package", false}, ""}, // not ours
		{edge{"ztunnel", "internal/new", false}, "has no floor"},
		{edge{"internal/new", "mesh", false}, "has no floor"},
		{edge{"node", "ztunnel", test}, "only ztunnel itself and cmd may"},
		{edge{"ztunnel", "node/capture", test}, ""}, // a meeting
		{edge{"ztunnel", "node/capture", false}, "only node itself and cmd may"},
		{edge{"cmd/ztunnel", "ztunnel", false}, ""},
		{edge{"cmd/ztunnel", "cmd/weft", false}, "floor 6 may not"},
		{edge{"ztunnel", "cmd/ztunnel", false}, "floor 5 may not"},
		{edge{"hbone", "identity/ca", test}, ""}, // tests may look sideways

		{edge{"mesh", "net/netip", false}, ""},
		{edge{"mesh", "golang.org/x/net/idna", false}, "nothing but the standard library"},
		{edge{"mesh/authz", "google.golang.org/protobuf/proto", false}, "nothing but the standard library"},
		{edge{"mesh", "github.com/google/go-cmp/cmp", test}, ""},

		{edge{"bpf", "github.com/cilium/ebpf", false}, ""},
		{edge{"ztunnel", "github.com/cilium/ebpf/link", false}, "has its rooms"},
		{edge{"node/cni", "k8s.io/client-go/kubernetes", false}, "has its rooms"},
		{edge{"cmd/weft", "k8s.io/client-go/kubernetes", false}, ""},
		{edge{"cmd/weft-node", "k8s.io/client-go/rest", false}, "has its rooms"},
		{edge{"ztunnel", "google.golang.org/grpc", false}, "has its rooms"},
		{edge{"hbone", "github.com/spiffe/go-spiffe/v2/spiffeid", false}, "has its rooms"},
		{edge{"identity", "github.com/spiffe/go-spiffe/v2/spiffeid", false}, ""},
		{edge{"identity/issue", "istio.io/api/security/v1alpha1", false}, ""},
		{edge{"identity/issue", "istio.io/api/security/v1beta1", false}, "has its rooms"},
		{edge{"control/compile", "istio.io/api/security/v1beta1", false}, ""},
		{edge{"e2e/cluster", "k8s.io/client-go/kubernetes", false}, ""},
		{edge{"hbone", "github.com/cilium/ebpf", test}, ""},
	} {
		got := strings.Join(check([]edge{tc.edge}), "; ")
		if tc.want == "" && got != "" || !strings.Contains(got, tc.want) {
			t.Errorf("%s imports %s (test: %v): %q, want %q", tc.from, tc.to, tc.test, got, tc.want)
		}
	}
	two := check([]edge{{"cmd/weft", "control/compile", false}, {"cmd/weft", "node/cni", false}})
	if len(two) != 1 || !strings.Contains(two[0], "joins 2 components") {
		t.Errorf("a command that joins two components: %q", two)
	}
}
