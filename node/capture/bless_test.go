package capture

import (
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// bless writes 1 for the socket into the map, as the proxy does, which has no
// eBPF library: bpf(2), BPF_MAP_UPDATE_ELEM.
func bless(mapFD, socket int) error {
	key, value := int32(socket), uint32(1)
	attr := struct {
		mapFD uint32
		_     uint32
		key   uint64
		value uint64
		flags uint64
	}{mapFD: uint32(mapFD), key: uint64(uintptr(unsafe.Pointer(&key))), value: uint64(uintptr(unsafe.Pointer(&value)))}
	_, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_MAP_UPDATE_ELEM, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	runtime.KeepAlive(&key)
	runtime.KeepAlive(&value)
	if errno != 0 {
		return errno
	}
	return nil
}

// connectRaw is connect(2) with an address that package unix does not know.
func connectRaw(fd int, to *unix.RawSockaddr) error {
	_, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(to)), unsafe.Sizeof(*to))
	if errno != 0 {
		return errno
	}
	return nil
}
