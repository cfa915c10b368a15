package score

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
)

func TestRecordReplaces(t *testing.T) {
	root := t.TempDir()
	dir := filepath.Join(root, "e2e", "some")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "e2e", "go.mod"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	t.Run("part", func(t *testing.T) {
		Record(t, Row{Name: "fault.old", Attempted: N(1)})
		Record(t, Row{Name: "fault.a", Attempted: N(6), Broken: N(0)}, Row{Name: "fault.b", RecoveredMS: N(7)})
	})
	want := `{"name":"fault.a","attempted":6,"broken":0}
{"name":"fault.b","recovered_ms":7}
`
	out := filepath.Join(root, "out", "reliability")
	got, err := os.ReadFile(filepath.Join(out, "some-TestRecordReplaces_part.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if files, _ := os.ReadDir(out); len(files) != 1 {
		t.Errorf("got files %v, want one", files)
	}
	rows, err := Merge(os.DirFS(out))
	if err != nil || len(rows) != 2 || *rows[0].Attempted != 6 || rows[0].Refused != nil {
		t.Errorf("read back: %v, %+v", err, rows)
	}
}

func TestMergeRefuses(t *testing.T) {
	for name, files := range map[string]fstest.MapFS{
		"a name twice": {"a.jsonl": {Data: []byte(`{"name":"x"}`)}, "b.jsonl": {Data: []byte(`{"name":"x"}`)}},
		"no JSON":      {"a.jsonl": {Data: []byte(`x`)}},
		"no name":      {"a.jsonl": {Data: []byte(`{"attempted":1}`)}},
	} {
		if rows, err := Merge(files); err == nil {
			t.Errorf("%s: took %+v", name, rows)
		}
	}
}

func TestJudge(t *testing.T) {
	rows := []struct {
		name string
		row  Row
		good bool
	}{
		{"every attempt blocked", Row{Name: "attack.x", Attempted: N(3), Blocked: N(3)}, true},
		{"one was not", Row{Name: "attack.x", Attempted: N(3), Blocked: N(2)}, false},
		{"nobody said how many", Row{Name: "attack.x", Blocked: N(2)}, false},
		{"nothing was tried", Row{Name: "attack.x", Attempted: N(0), Blocked: N(0)}, false},
		{"it says nothing", Row{Name: "attack.x", Attempted: N(3)}, false},
		{"nothing refused or broken", Row{Name: "fault.agent.kill.bulk", Attempted: N(3), Refused: N(0), Broken: N(0)}, true},
		{"one refused", Row{Name: "fault.ztunnel.kill.requests", Attempted: N(3), Refused: N(1), Broken: N(0)}, false},
		{"one broken", Row{Name: "fault.agent.kill.bulk", Attempted: N(3), Refused: N(0), Broken: N(1)}, false},
		{"one broken where that is the design", Row{Name: "fault.ztunnel.kill.bulk", Attempted: N(3), Refused: N(0), Broken: N(1)}, true},
		{"only a time", Row{Name: "fault.x", RecoveredMS: N(9)}, true},
	}
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			wrong := Judge(r.row)
			if (len(wrong) == 0) != r.good {
				t.Errorf("got %q, want good=%v", wrong, r.good)
			}
			var table bytes.Buffer
			if err := Table(&table, []Row{r.row}); err != nil {
				t.Fatal(err)
			}
			if marked := strings.Contains(table.String(), " -- "); marked == r.good || !strings.Contains(table.String(), r.row.Name) {
				t.Errorf("the table says:\n%s", &table)
			}
		})
	}
}

func TestMissing(t *testing.T) {
	rows := []Row{{Name: "attack.x"}, {Name: "fault.a.kill.idle"}}
	if got := Missing(rows, "attack.", "fault.a.kill.", "fault.b.", "churn."); !slices.Equal(got, []string{"fault.b.", "churn."}) {
		t.Errorf("got %v", got)
	}
}
