package main

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/txtar"
)

var update = flag.Bool("update", false, "rewrite what the stories print; read the diff before you commit it")

// TestCheck runs the stories of testdata/check-*.txtar: the comment is the
// command line, stdout and code are what it must print and return.
func TestCheck(t *testing.T) {
	stories, err := filepath.Glob("testdata/check-*.txtar")
	if err != nil || len(stories) == 0 {
		t.Fatalf("no stories: %v", err)
	}
	for _, path := range stories {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".txtar"), func(t *testing.T) {
			story, err := txtar.ParseFile(path)
			if err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			var want []byte
			for _, f := range story.Files {
				if f.Name == "stdout" {
					want = f.Data
					continue
				}
				name := filepath.Join(dir, f.Name)
				if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(name, f.Data, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if path, err = filepath.Abs(path); err != nil {
				t.Fatal(err)
			}
			t.Chdir(dir)
			var out bytes.Buffer
			args := strings.Fields(strings.SplitN(string(story.Comment), "\n", 2)[0])
			code := run(t.Context(), args, &out, &out)
			if code != 0 {
				out.WriteString("exit 1\n")
			}
			if *update {
				story.Files[len(story.Files)-1].Data = []byte(trimmed(out.String()))
				if err := os.WriteFile(path, txtar.Format(story), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if got := trimmed(out.String()); got != trimmed(string(want)) {
				t.Errorf("weft %s printed\n%s\nwant\n%s", strings.Join(args, " "), got, want)
			}
		})
	}
}

// trimmed takes the padding of a table's last column away.
func trimmed(s string) string {
	lines := strings.Split(s, "\n")
	for i := range lines {
		lines[i] = strings.TrimRight(lines[i], " ")
	}
	return strings.Join(lines, "\n")
}
