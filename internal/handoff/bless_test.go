package handoff

import (
	"errors"
	"os"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A hash map of the same key and value sizes shows that the call is laid out
// as the kernel reads it.
func TestBlessWritesTheMap(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("not root: bpf(2) needs CAP_BPF")
	}
	create := struct{ kind, key, value, entries, flags uint32 }{kind: 1 /* BPF_MAP_TYPE_HASH */, key: 4, value: 4, entries: 2}
	fd, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_MAP_CREATE, uintptr(unsafe.Pointer(&create)), unsafe.Sizeof(create))
	if errno != 0 {
		t.Fatalf("create map: %v", errno)
	}
	defer unix.Close(int(fd))
	lookup := func(key int32) (value uint32, err error) {
		attr := mapUpdate{mapFD: uint32(fd), key: unsafe.Pointer(&key), value: unsafe.Pointer(&value)}
		if _, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_MAP_LOOKUP_ELEM, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr)); errno != 0 {
			return 0, errno
		}
		return value, nil
	}
	if v, err := lookup(7); !errors.Is(err, unix.ENOENT) {
		t.Fatalf("before: %d, %v, want ENOENT", v, err)
	}
	if err := Bless(int(fd), 7); err != nil {
		t.Fatal(err)
	}
	if v, err := lookup(7); err != nil || v != 1 {
		t.Errorf("after: %d, %v, want 1", v, err)
	}
	if err := Bless(0, 7); err == nil {
		t.Error("Bless with a file that is no map: no error")
	}
}
