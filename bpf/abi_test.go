package bpf

import (
	"strings"
	"testing"
	"unsafe"

	"github.com/cilium/ebpf"
)

// TestSizes pins the layout of what is pinned: agents of two versions share
// the maps of a running pod. A change needs a new root of pins, see doc.go.
func TestSizes(t *testing.T) {
	for name, sizes := range map[string][2]uintptr{
		"flow":      {unsafe.Sizeof(CaptureFlow{}), 36},
		"probe":     {unsafe.Sizeof(CaptureProbe{}), 40},
		"exemption": {unsafe.Sizeof(CaptureExemption{}), 40},
		"report":    {unsafe.Sizeof(SocketsReport{}), 20},
		"pod":       {unsafe.Sizeof(CapturePod{}), 172},
		"listener":  {unsafe.Sizeof(CaptureListener{}), 8},
		"counters":  {unsafe.Sizeof(CaptureCounters{}), 256},
	} {
		if sizes[0] != sizes[1] {
			t.Errorf("struct %s has %d bytes, want %d", name, sizes[0], sizes[1])
		}
	}
	want := map[string]ebpf.MapSpec{
		CaptureMapListeners: {Type: ebpf.SockHash, KeySize: 8, ValueSize: 8, MaxEntries: 32768},
		CaptureMapPods:      {Type: ebpf.Hash, KeySize: 4, ValueSize: 172, MaxEntries: 4096},
		CaptureMapPrograms:  {Type: ebpf.ProgramArray, KeySize: 4, ValueSize: 4, MaxEntries: 8},
		CaptureMapBlessed:   {Type: ebpf.SkStorage, KeySize: 4, ValueSize: 4},
		CaptureMapKept:      {Type: ebpf.SkStorage, KeySize: 4, ValueSize: 40},
		CaptureMapProbes:    {Type: ebpf.LRUHash, KeySize: 40, ValueSize: 4, MaxEntries: 8192},
		CaptureMapRenewals:  {Type: ebpf.LRUHash, KeySize: 40, ValueSize: 4, MaxEntries: 8192},
		CaptureMapStats:     {Type: ebpf.Hash, KeySize: 4, ValueSize: 256, MaxEntries: 4096},
	}
	for _, load := range []func() (*ebpf.CollectionSpec, error){LoadCapture, LoadLookup, LoadSockets} {
		spec, err := load()
		if err != nil {
			t.Fatal(err)
		}
		for name, w := range want {
			m := spec.Maps[name]
			if m == nil || m.Type != w.Type || m.KeySize != w.KeySize || m.ValueSize != w.ValueSize || m.MaxEntries != w.MaxEntries {
				t.Errorf("map %s is %v, want %v", name, m, w)
			}
		}
	}
}

func TestCountersHaveNames(t *testing.T) {
	all := Counters()
	if n := len(all); n == 0 || n > int(CaptureCounterCOUNTERS) {
		t.Fatalf("%d counters", n)
	}
	if last := all[len(all)-1]; last != CaptureCounterLOOP_DROP {
		t.Errorf("the last counter with a name is %d, want %d", last, CaptureCounterLOOP_DROP)
	}
	seen := map[string]bool{}
	for _, c := range all {
		if seen[c.String()] || strings.ToLower(c.String()) != c.String() {
			t.Errorf("counter %d has the name %q, which is taken or not lower case", c, c)
		}
		seen[c.String()] = true
	}
}
