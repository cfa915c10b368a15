package testnet

import (
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// BPFFS returns the path of an empty bpf file system that is mounted nowhere:
// it belongs to a descriptor and ends with it, at the latest when the process
// does. It skips the test without root.
func BPFFS(t testing.TB) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make a bpf file system")
	}
	fs, err := unix.Fsopen("bpf", unix.FSOPEN_CLOEXEC)
	if err != nil {
		t.Fatalf("make a bpf file system: fsopen: %v", err)
	}
	defer unix.Close(fs)
	if err := unix.FsconfigCreate(fs); err != nil {
		t.Fatalf("make a bpf file system: fsconfig: %v", err)
	}
	mnt, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		t.Fatalf("make a bpf file system: fsmount: %v", err)
	}
	t.Cleanup(func() { unix.Close(mnt) })
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), mnt)
}
