package ztunnel

import (
	"testing"
	"unsafe"
)

// Tens of thousands of flows are idle at a time.
func TestFlowIsSmall(t *testing.T) {
	if n := unsafe.Sizeof(flow{}); n > 160 {
		t.Errorf("a flow is %d bytes, want at most 160, the next size that memory comes in", n)
	}
}
