package score

import (
	"os"
	"path/filepath"
	"testing"
)

func TestRecordReplaces(t *testing.T) {
	root := t.TempDir()
	dir := filepath.Join(root, "some", "pkg")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "go.mod"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	t.Run("part", func(t *testing.T) {
		Record(t, Row{Name: "attack.old", Attempted: N(1)}, Row{Name: "attack.older"})
		Record(t, Row{Name: "attack.mark", Attempted: N(6), Blocked: N(0)}, Row{Name: "fault.kill", RecoveredMS: N(7)})
	})
	want := `{"name":"attack.mark","attempted":6,"blocked":0}
{"name":"fault.kill","recovered_ms":7}
`
	got, err := os.ReadFile(filepath.Join(root, "out", "reliability", "pkg-TestRecordReplaces_part.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if files, _ := os.ReadDir(filepath.Join(root, "out", "reliability")); len(files) != 1 {
		t.Errorf("got files %v, want one", files)
	}
}

func TestRowsHaveNames(t *testing.T) {
	if _, err := encode([]Row{{Attempted: N(1)}}); err == nil {
		t.Error("a row without a name was written")
	}
}
