package handoff

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// mapUpdate is the part of union bpf_attr that BPF_MAP_UPDATE_ELEM reads, as
// 64-bit kernels lay it out (uapi/linux/bpf.h).
type mapUpdate struct {
	mapFD uint32
	_     uint32
	key   unsafe.Pointer
	value unsafe.Pointer
	flags uint64 // 0 is BPF_ANY
}

// mapUpdate is right only where a pointer has the size of an __aligned_u64:
// this does not compile elsewhere.
var _ [unsafe.Sizeof(uintptr(0)) - 8]struct{}

// Bless writes sockFD into the sk_storage map mapFD, which tells the guards of
// the pod that the socket is ztunnel's own. Do it before connect(2): the guard
// judges the SYN. It needs CAP_BPF or CAP_SYS_ADMIN.
func Bless(mapFD, sockFD int) error {
	key, value := int32(sockFD), uint32(1)
	attr := mapUpdate{mapFD: uint32(mapFD), key: unsafe.Pointer(&key), value: unsafe.Pointer(&value)}
	_, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_MAP_UPDATE_ELEM,
		uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	if errno != 0 {
		return fmt.Errorf("bless socket: update map of ztunnel's sockets: %w", errno)
	}
	return nil
}
