package capture

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

func TestProbeOfThisKernel(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to load programs")
	}
	f, err := Probe()
	if err != nil {
		t.Fatal(err)
	}
	if !f.Keep {
		t.Error("this kernel can keep connections, the probe says that it cannot")
	}
}

func TestProbeSaysWhatToDo(t *testing.T) {
	fail := func(err error) func() error { return func() error { return err } }
	tests := []struct {
		name string
		have error
		want string
	}{
		{"kernel too old", ebpf.ErrNotSupported, "the kernel has no tcx links; run a kernel of version 6.6 or later"},
		{"wrapped", fmt.Errorf("probe: %w", ebpf.ErrNotSupported), "the kernel has no tcx links; run a kernel"},
		{"not allowed", unix.EPERM, "capabilities SYS_ADMIN and NET_ADMIN"},
		{"odd", errors.New("boom"), "find out whether the kernel has tcx links: boom"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			err := probe([]need{{"tcx links", newerKernel, fail(tt.have)}, {"socket maps", newerKernel, fail(nil)}})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want it to say %q", err, tt.want)
			}
		})
	}
	t.Run("everything that is missing is named", func(t *testing.T) {
		err := probe([]need{{"tcx links", newerKernel, fail(ebpf.ErrNotSupported)}, {"socket maps", newerKernel, fail(ebpf.ErrNotSupported)}})
		for _, want := range []string{"tcx links", "socket maps"} {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("got %v, want it to name %s", err, want)
			}
		}
	})
}
