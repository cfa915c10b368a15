package identity

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/weft-mesh/weft/internal/testca"
)

func TestRootsFileFollowsTheFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "root-cert.pem")
	r := NewRootsFile(path, "cluster.local", slog.New(slog.DiscardHandler))
	if r.Loaded() {
		t.Error("roots without a file")
	}
	first := testca.New(t, "cluster.local")
	write := func(b []byte) {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		r.read()
	}
	write(first.PEM())
	if !r.Loaded() {
		t.Fatal("no roots after the file came")
	}
	write([]byte("not a certificate"))
	if !r.Loaded() {
		t.Error("a broken file took the roots away")
	}
	write(append(first.PEM(), testca.New(t, "cluster.local").PEM()...))
	if n := len(r.Certificates("cluster.local")); n != 2 {
		t.Errorf("%d roots, want 2", n)
	}
}

func TestTokenIsReadAnew(t *testing.T) {
	path := filepath.Join(t.TempDir(), "token")
	token := TokenFile(path)
	if _, err := token(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without a file: %v", err)
	}
	for i, text := range []string{"one\n", "two"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := token(); err != nil || got != strings.TrimSpace(text) {
			t.Errorf("token %d: %q, %v", i, got, err)
		}
	}
	if err := os.WriteFile(path, []byte(" \n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := token(); err == nil {
		t.Errorf("an empty file is token %q", got)
	}
}
