package cluster

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Everything k8s.io is to be of one version: the programs report it, and what
// is compiled for one module serves the others.
func TestOneKubernetesVersion(t *testing.T) {
	client := " v0" + strings.TrimPrefix(kubernetesVersion, "v1")
	for file, want := range map[string]string{
		"hyper/go.mod":   "k8s.io/kubernetes " + kubernetesVersion,
		"coredns/go.mod": "k8s.io/client-go" + client,
		"../go.mod":      "k8s.io/client-go" + client,
	} {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(b), want) {
			t.Errorf("%s does not require %s", file, want)
		}
	}
}

func TestKeyFollowsSources(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("go.mod", "module m\n")
	write("go.sum", "")
	write("main.go", "package main\n")
	s := source{name: "m", module: dir, deps: []string{"."}}
	key := func() string {
		k, err := s.key(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	first := key()
	if again := key(); again != first {
		t.Errorf("unchanged sources: got keys %s and %s", first, again)
	}
	write("main_test.go", "package main\n")
	if got := key(); got != first {
		t.Error("a test file changed the key of the program")
	}
	write("main.go", "package main // changed\n")
	second := key()
	if second == first {
		t.Error("a changed source did not change the key")
	}
	write("go.sum", "x\n")
	if got := key(); got == second {
		t.Error("a changed go.sum did not change the key")
	}
}

func TestCopyFile(t *testing.T) {
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
	for _, text := range []string{"one", "two"} {
		os.Remove(src)
		if err := os.WriteFile(src, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := copyFile(src, dst); err != nil {
			t.Fatal(err)
		}
		if got, _ := os.ReadFile(dst); string(got) != text {
			t.Errorf("got %q, want %q", got, text)
		}
	}
	if err := copyFile(filepath.Join(dir, "none"), dst); err == nil {
		t.Error("a copy of a missing file succeeded")
	}
}
