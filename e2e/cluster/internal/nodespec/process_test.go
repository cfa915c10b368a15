package nodespec

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

func TestProcess(t *testing.T) {
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p, err := Find(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "p")
	if err := p.Write(path); err != nil {
		t.Fatal(err)
	}
	read, err := ReadProcess(path)
	if err != nil || read != p || !read.Running() {
		t.Errorf("a running process read back: got %+v running=%v %v, want %+v running", read, read.Running(), err, p)
	}
	reused := Process{PID: p.PID, Start: p.Start - 1}
	if reused.Running() {
		t.Error("a process whose number another one has now is taken for running")
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	if p.Running() {
		t.Error("an ended process is taken for running")
	}
	if (Process{}).Running() {
		t.Error("the zero Process is taken for running")
	}
}

func TestReadProcess(t *testing.T) {
	dir := t.TempDir()
	if p, err := ReadProcess(filepath.Join(dir, "none")); err != nil || p != (Process{}) {
		t.Errorf("missing file: got %+v, %v; want the zero Process", p, err)
	}
	bad := filepath.Join(dir, "bad")
	if err := os.WriteFile(bad, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadProcess(bad); err == nil {
		t.Error("a broken file was accepted")
	}
}
