// Package score collects what the tests of a real cluster prove about
// reliability, and knows what is promised.
//
// Rows are files below out/reliability at the root of the checkout, one for
// each test; the tests of the main module write theirs beside them. Merge
// makes one list of them, and Judge says what of it breaks a promise.
package score

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A Row is one thing that was tried. A nil field does not apply.
type Row struct {
	// Name is dotted and stable, for example "fault.ztunnel.kill.requests".
	Name string `json:"name"`
	// Attempted is how many things were tried: attacks, requests, connections,
	// pods.
	Attempted *int `json:"attempted,omitempty"`
	// Blocked is how many of the attempts were stopped. The goal is all.
	Blocked *int `json:"blocked,omitempty"`
	// Refused is how many connections were refused. The goal is 0.
	Refused *int `json:"refused,omitempty"`
	// Broken is how many connections were cut, or things did not work that
	// should have. The goal is 0 where that is promised.
	Broken *int `json:"broken,omitempty"`
	// RecoveredMS is the longest time from a fault until a new request was
	// answered, in milliseconds.
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
	// variable that the test has read is another one now.
	os.Getenv("WEFT_SCORE_RUN")
	if err := record(t.Name(), rows); err != nil {
		t.Errorf("record what the test has shown: %v", err)
	}
}

func record(test string, rows []Row) error {
	root, err := Root()
	if err != nil {
		return err
	}
	pkg, err := os.Getwd() // the go command runs tests in the folder of their package
	if err != nil {
		return err
	}
	var lines bytes.Buffer
	for _, r := range rows {
		if r.Name == "" {
			return errors.New("a row has no name")
		}
		line, err := json.Marshal(r)
		if err != nil {
			return err
		}
		lines.Write(append(line, '\n'))
	}
	dir := filepath.Join(root, "out", "reliability")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	name := filepath.Base(pkg) + "-" + strings.ReplaceAll(test, "/", "_") + ".jsonl"
	return replace(filepath.Join(dir, name), lines.Bytes())
}

// Root returns the top folder of the checkout around the working directory.
func Root() (string, error) {
	wd, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for dir := wd; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "e2e", "go.mod")); err == nil {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", fmt.Errorf("%s is not in a checkout of Weft: no e2e/go.mod above it", wd)
		}
	}
}

// replace puts a file in the place of another in one step: nobody reads half.
func replace(path string, content []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err := errors.Join(err, f.Chmod(0o644), f.Close()); err != nil {
		os.Remove(f.Name())
		return err
	}
	return os.Rename(f.Name(), path)
}
