// Package score collects what tests prove about reliability: how many attacks
// were tried and blocked, how many faults were made and what they broke.
//
// Rows are files below out/reliability at the root of the repository. The
// target test of the Makefile merges them into one table.
package score

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// A Row is one thing that was proved. A nil field does not apply.
type Row struct {
	// Name is dotted and stable, for example "attack.so_mark".
	Name string `json:"name"`
	// Attempted is how often something was tried that should not work, or a
	// fault was made.
	Attempted *int `json:"attempted,omitempty"`
	// Blocked is how many of the attempts were stopped. The goal is all.
	Blocked *int `json:"blocked,omitempty"`
	// Refused is how many connections were refused that should not have
	// been. The goal is 0.
	Refused *int `json:"refused,omitempty"`
	// Broken is how many connections were cut, or things did not work that
	// should have. The goal is 0.
	Broken *int `json:"broken,omitempty"`
	// RecoveredMS is how long it took until all worked again, in
	// milliseconds: the slowest time that was seen.
	RecoveredMS *int `json:"recovered_ms,omitempty"`
}

// N returns a pointer to n, for the fields of a Row.
func N(n int) *int { return &n }

// Record writes the rows of a test, in place of those of its last run. Call it
// once in a test, also in one that has failed: the row then tells by how much.
// It fails the test if it cannot write.
func Record(t testing.TB, rows ...Row) {
	t.Helper()
	// The go command does not take the result of a test from its cache if a
	// variable that the test read has changed.
	os.Getenv("WEFT_SCORE_RUN")
	if err := record(t.Name(), rows); err != nil {
		t.Errorf("record what the test has shown: %v", err)
	}
}

func record(test string, rows []Row) error {
	root, err := root()
	if err != nil {
		return err
	}
	pkg, err := os.Getwd() // the go command runs tests in their package's directory
	if err != nil {
		return err
	}
	dir := filepath.Join(root, "out", "reliability")
	for _, d := range []string{filepath.Dir(dir), dir} {
		// Not os.MkdirAll, which looks at the directory, and the go command
		// would then run the test again whenever another one has written.
		if err := syscall.Mkdir(d, 0o755); err != nil && !errors.Is(err, syscall.EEXIST) {
			return &os.PathError{Op: "mkdir", Path: d, Err: err}
		}
	}
	lines, err := encode(rows)
	if err != nil {
		return err
	}
	name := filepath.Base(pkg) + "-" + strings.ReplaceAll(test, "/", "_") + ".jsonl"
	return replace(dir, name, lines)
}

// root returns the directory of the module.
func root() (string, error) {
	wd, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for dir := wd; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", fmt.Errorf("no go.mod in %s or above it", wd)
		}
	}
}

// encode returns the rows, each as JSON in a line.
func encode(rows []Row) ([]byte, error) {
	var b bytes.Buffer
	for _, r := range rows {
		if r.Name == "" {
			return nil, errors.New("a row has no name")
		}
		line, err := json.Marshal(r)
		if err != nil {
			return nil, err
		}
		b.Write(append(line, '\n'))
	}
	return b.Bytes(), nil
}

// replace puts a file in the place of another in one step: nobody reads half.
func replace(dir, name string, content []byte) error {
	f, err := os.CreateTemp(dir, ".new-*")
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err := errors.Join(err, f.Chmod(0o644), f.Close()); err != nil {
		os.Remove(f.Name())
		return err
	}
	return os.Rename(f.Name(), filepath.Join(dir, name))
}
