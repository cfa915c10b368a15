package compile

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"
)

const examples = "../../examples/routing"

// TestExamples compiles each file of examples/routing, together with the
// services and subsets that it is about, and compares the mesh that comes out.
func TestExamples(t *testing.T) {
	files, err := filepath.Glob(examples + "/*.yaml")
	if err != nil || len(files) < 10 {
		t.Fatalf("found %d examples: %v", len(files), err)
	}
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".yaml")
		if name == "bookinfo" || name == "subsets" {
			continue
		}
		t.Run(name, func(t *testing.T) {
			var in Inputs
			class := "apiVersion: gateway.networking.k8s.io/v1\nkind: GatewayClass\nmetadata: {name: weft-waypoint}\nspec: {controllerName: " + ControllerName + "}\n"
			addExample(t, &in, []byte(class))
			for _, f := range []string{examples + "/bookinfo.yaml", file, examples + "/subsets.yaml"} {
				b, err := os.ReadFile(f)
				if err != nil {
					t.Fatal(err)
				}
				addExample(t, &in, b)
			}
			// An example takes the place of an object of its kind and name.
			in.DestinationRules = slices.CompactFunc(sortedByName(in.DestinationRules), func(a, b DestinationRule) bool { return a.Name == b.Name })
			got := compileStory(t, in)
			golden := filepath.Join("testdata", "examples", name+".json")
			if *update {
				if err := os.WriteFile(golden, got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), string(got)); diff != "" {
				t.Errorf("%s (-want +got):\n%s", golden, diff)
			}
		})
	}
}

func sortedByName(in []DestinationRule) []DestinationRule {
	slices.SortStableFunc(in, func(a, b DestinationRule) int { return a.Name.Compare(b.Name) })
	return in
}

// addExample adds the objects of a file as kubectl apply -n bookinfo would.
// None may have an error.
func addExample(t *testing.T, in *Inputs, b []byte) {
	t.Helper()
	for doc := range bytes.SplitSeq(b, []byte("\n---\n")) {
		u := &unstructured.Unstructured{}
		if err := yaml.UnmarshalStrict(doc, &u.Object); err != nil {
			t.Fatal(err)
		}
		u.SetNamespace("bookinfo")
		found, _ := Review(u)
		for _, f := range found {
			if f.Severity == SeverityError {
				t.Errorf("%s %s: %s", u.GetKind(), u.GetName(), f)
			}
		}
		if known, err := in.Add(u); !known || err != nil {
			t.Fatalf("%s %s: known %v, %v", u.GetKind(), u.GetName(), known, err)
		}
	}
}
