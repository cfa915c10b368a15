package handover

import (
	"encoding/binary"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// A claim decides whose a part is, without a word between the two: it can be
// taken once, by the successor when it goes on with the part, or by the
// predecessor to have it back. It is an eventfd(2) that holds one, which travels
// with the part; a read of it takes that, or finds nothing.
type claim struct{ fd int }

// newClaim returns a claim that nobody has taken. The caller closes it.
func newClaim() (claim, error) {
	fd, err := unix.Eventfd(1, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return claim{-1}, fmt.Errorf("make a claim: %w", os.NewSyscallError("eventfd", err))
	}
	return claim{fd}, nil
}

// take takes the claim, and reports whether it could.
func (c claim) take() bool {
	var b [8]byte
	n, err := unix.Read(c.fd, b[:])
	return err == nil && n == len(b) && binary.NativeEndian.Uint64(b[:]) == 1
}

func (c claim) close() { _ = unix.Close(c.fd) } // a copy of it may be open elsewhere
