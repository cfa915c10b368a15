package bpf

import (
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// The objects that are embedded were made from the sources that stand beside
// them. Who changes a source must generate again, and this test needs no
// compiler to see it.
func TestGeneratedFromTheseSources(t *testing.T) {
	sum, err := os.ReadFile("sources.sum")
	if err != nil {
		t.Fatal(err)
	}
	var files []string
	for _, pattern := range []string{"*.c", "*.h"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, found...)
	}
	slices.Sort(files)
	var now strings.Builder
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&now, "%x  %s\n", sha256.Sum256(b), f)
	}
	was := slices.Sorted(strings.Lines(string(sum)))
	if is := slices.Sorted(strings.Lines(now.String())); !slices.Equal(is, was) {
		t.Errorf("the sources differ from those that the objects were made of: run make generate, with the compiler that gen.go names")
	}
}
