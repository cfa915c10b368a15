package cluster

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
)

func TestOptions(t *testing.T) {
	for _, id := range []string{"A", "a_b", "-a", "a-", "abcdefghijklmnopqrstu", "a/b", ".."} {
		if _, err := (Options{ID: id}).complete(); err == nil {
			t.Errorf("id %q: accepted, want an error", id)
		}
	}
	o, err := Options{ID: "demo"}.complete()
	if err != nil {
		t.Fatal(err)
	}
	if want := filepath.Join(o.Repo, "out/cluster/demo"); o.State != want {
		t.Errorf("state: got %s, want %s", o.State, want)
	}
}

func TestFindNothing(t *testing.T) {
	if _, err := Find(Options{State: t.TempDir()}); !errors.Is(err, ErrNone) {
		t.Errorf("got %v, want %v", err, ErrNone)
	}
}

func TestStateOfOthersIsRefused(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "precious"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unused(dir); err == nil {
		t.Error("a directory with another's file was accepted: down would remove it")
	}
}

func TestLockExcludes(t *testing.T) {
	dir := t.TempDir()
	unlock, err := lock(t.Context(), dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	if _, err := lock(ctx, dir, cancel); !errors.Is(err, context.Canceled) {
		t.Fatalf("second lock while the first is held: got %v, want to wait until cancelled", err)
	}
	// A down that finishes removes the file under those who wait for it.
	waiting := make(chan struct{})
	type result struct {
		unlock func()
		err    error
	}
	got := make(chan result, 1)
	go func() {
		u, err := lock(t.Context(), dir, func() { close(waiting) })
		got <- result{u, err}
	}()
	<-waiting
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	unlock()
	r := <-got
	if r.err != nil {
		t.Fatal(r.err)
	}
	defer r.unlock()
	if _, err := os.Stat(filepath.Join(dir, lockFile)); err != nil {
		t.Errorf("the lock taken over from a removed directory is not the one others see: %v", err)
	}
}
