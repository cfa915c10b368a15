package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/weft-mesh/weft/e2e/cluster/internal/nodespec"
)

// Of two launches of the same process the second must see the first and do
// nothing, and a stale record must not stop a new one.
func TestClaim(t *testing.T) {
	file := filepath.Join(t.TempDir(), "p")
	unlock, running, err := claim(file)
	if err != nil || running {
		t.Fatalf("nothing recorded: got running=%v, %v; want the claim", running, err)
	}
	self, err := nodespec.Find(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	second := make(chan bool, 1)
	go func() {
		_, running, err := claim(file) // waits for the first to record itself
		second <- running && err == nil
	}()
	if err := self.Write(file); err != nil {
		t.Fatal(err)
	}
	unlock()
	if !<-second {
		t.Error("a second launch did not see the process of the first")
	}
	if err := (nodespec.Process{PID: self.PID, Start: self.Start - 1}).Write(file); err != nil {
		t.Fatal(err)
	}
	unlock, running, err = claim(file)
	if err != nil || running {
		t.Fatalf("stale record: got running=%v, %v; want the claim", running, err)
	}
	unlock()
}
