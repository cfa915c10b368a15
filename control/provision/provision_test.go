package provision

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"

	"github.com/weft-mesh/weft/control/compile"
)

var update = flag.Bool("update", false, "rewrite the golden files; read the diff before you commit it")

// TestStories provisions the Gateway of each story, with the parameters that
// its ConfigMap holds, and compares the objects or the error.
func TestStories(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no stories in testdata: %v", err)
	}
	for _, path := range files {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".txtar"), func(t *testing.T) {
			story, err := txtar.ParseFile(path)
			if err != nil {
				t.Fatal(err)
			}
			got := provisionStory(t, story.Files[0].Data)
			if *update {
				story.Files = []txtar.File{story.Files[0], {Name: "applied.yaml", Data: got}}
				if err := os.WriteFile(path, txtar.Format(story), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if len(story.Files) < 2 {
				t.Fatal("the story has no applied.yaml; run with -update")
			}
			if diff := cmp.Diff(string(story.Files[1].Data), string(got)); diff != "" {
				t.Errorf("%s\napplied.yaml (-want +got):\n%s", story.Comment, diff)
			}
		})
	}
}

func provisionStory(t *testing.T, objects []byte) []byte {
	t.Helper()
	var m compile.Managed
	for doc := range bytes.SplitSeq(objects, []byte("\n---\n")) {
		u := &unstructured.Unstructured{}
		if err := yaml.UnmarshalStrict(doc, &u.Object); err != nil {
			t.Fatal(err)
		}
		switch u.GetKind() {
		case "Gateway":
			m.Gateway = compile.ReadGateway(u)
		case "ConfigMap":
			m.Parameters, _, _ = unstructured.NestedStringMap(u.Object, "data")
		default:
			t.Fatalf("kind %q", u.GetKind())
		}
	}
	got, err := Waypoint(Settings{Image: "registry.example.com/weft/waypoint:v1", PullSecrets: []string{"pull"}}, m)
	if err != nil {
		return []byte("error: " + err.Error() + "\n")
	}
	list, err := got.List()
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	for i, u := range list {
		if i > 0 {
			out.WriteString("---\n")
		}
		b, err := yaml.Marshal(u.Object)
		if err != nil {
			t.Fatal(err)
		}
		out.Write(b)
	}
	return out.Bytes()
}

// TestNoImage proves that nothing is made that could not start.
func TestNoImage(t *testing.T) {
	if _, err := Waypoint(Settings{}, compile.Managed{}); err == nil {
		t.Error("no error without an image")
	}
}
