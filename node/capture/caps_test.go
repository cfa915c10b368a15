package capture

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// TestCapabilities runs other tests of this package as root of a container
// would, with a few capabilities. SYS_ADMIN (to enter namespaces; it includes
// BPF and PERFMON) and NET_ADMIN are what capture needs. An agent that opens
// namespaces as /proc/PID/ns/net needs SYS_PTRACE too.
func TestCapabilities(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to have capabilities that can be dropped")
	}
	tests := []struct {
		name string
		keep []int
		run  string
		ok   bool
	}{
		{"enough", []int{unix.CAP_SYS_ADMIN, unix.CAP_NET_ADMIN}, "^TestRunningPodKeepsItsConnections$", true},
		{"enough for the probe", []int{unix.CAP_SYS_ADMIN, unix.CAP_NET_ADMIN}, "^TestProbeOfThisKernel$", true},
		{"without SYS_ADMIN", []int{unix.CAP_NET_ADMIN, unix.CAP_BPF, unix.CAP_PERFMON}, "^TestProbeOfThisKernel$", false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			out, err := confined(tt.keep, os.Args[0], "-test.run", tt.run)
			if _, exited := err.(*exec.ExitError); err != nil && !exited {
				t.Fatal(err)
			}
			if (err == nil) != tt.ok {
				t.Errorf("%s ended with %v, want success %v:\n%s", tt.run, err, tt.ok, out)
			}
		})
	}
}

// confined runs a command whose bounding set (capabilities(7)) holds only keep.
func confined(keep []int, name string, args ...string) (out []byte, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // for good: what is dropped does not come back
		for c := 0; c <= unix.CAP_LAST_CAP; c++ {
			if slices.Contains(keep, c) {
				continue
			}
			if e := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0); e != nil {
				err = fmt.Errorf("drop capability %d: %w", c, e)
				return
			}
		}
		out, err = exec.Command(name, args...).CombinedOutput()
	}()
	<-done
	return out, err
}
