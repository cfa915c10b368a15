package compile

import (
	"bytes"
	"encoding/json"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/txtar"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"

	"github.com/weft-mesh/weft/mesh"
)

// notOwn are reasons for which a status can be bad although nothing is wrong
// with the object itself, as far as it can be told without the cluster.
var notOwn = []string{"NoMatchingParent", "TargetNotFound", reasonConflicted, "NotAllowedByListeners", reasonNoWaypoint}

// clashes are objects that other objects make invalid.
var clashes = []string{
	"backendtlspolicy.txtar BackendTLSPolicy no-roots", "serviceentry-addresses.txtar ServiceEntry claims", "serviceentry-addresses.txtar ServiceEntry claims-too",
	"serviceentry-invalid.txtar ServiceEntry same", "waypoint-invalid.txtar Gateway parameters",
}

// TestReviewSaysWhatStatusesSay reviews every object of the stories, as the
// webhook and "weft check" do, and proves that what it calls an error is in the
// object's status, and that an object whose status calls it invalid is told so
// before.
func TestReviewSaysWhatStatusesSay(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no stories in testdata: %v", err)
	}
	reviewed := 0
	for _, path := range files {
		story, err := txtar.ParseFile(path)
		if err != nil {
			t.Fatal(err)
		}
		w := Compile(Settings{}, readObjects(t, file(story, "objects.yaml")))
		statuses := map[string]Status{}
		for _, s := range w.Statuses {
			statuses[s.Kind+" "+s.Name.String()] = s
		}
		for doc := range bytes.SplitSeq(file(story, "objects.yaml"), []byte("\n---\n")) {
			u := &unstructured.Unstructured{}
			if err := yaml.Unmarshal(doc, &u.Object); err != nil {
				t.Fatal(err)
			}
			found, known := Review(u)
			status, told := statuses[u.GetKind()+" "+mesh.Name{Namespace: u.GetNamespace(), Name: u.GetName()}.String()]
			if !known || !told {
				continue
			}
			reviewed++
			sameErrors(t, filepath.Base(path)+" "+u.GetKind()+" "+u.GetName(), findings(found).of(SeverityError), status)
		}
	}
	if reviewed < 100 {
		t.Errorf("reviewed %d objects only", reviewed)
	}
}

// sameErrors compares the errors in an object with its status, in which some
// are counted only ("and 7 more").
func sameErrors(t *testing.T, what string, errors []string, s Status) {
	t.Helper()
	conditions := slices.Clone(s.Conditions)
	for _, p := range s.Parents {
		conditions = append(conditions, p.Conditions...)
	}
	var text strings.Builder
	invalid := false
	for _, c := range conditions {
		text.WriteString(c.Message + "\n")
		bad := c.Type == PartiallyInvalid && c.OK || (c.Type == Accepted || c.Type == ZtunnelAccepted || c.Type == WaypointAccepted) && !c.OK
		invalid = invalid || bad && c.Reason != reasonUnsupported && !slices.Contains(notOwn, c.Reason)
	}
	missing := 0
	for _, e := range errors {
		if !strings.Contains(text.String(), e) {
			missing++
		}
	}
	if missing > 0 && !strings.Contains(text.String(), "more") {
		t.Errorf("%s: review says\n\t%s\nand the status\n\t%s", what, strings.Join(errors, "\n\t"), text.String())
	}
	if invalid && len(errors) == 0 && !slices.Contains(clashes, what) {
		b, _ := json.Marshal(s)
		t.Errorf("%s: review finds no error, and the status says %s", what, b)
	}
}
