package main

import (
	"runtime/debug"
	"testing"
)

func TestUntidy(t *testing.T) {
	const mb = 1 << 20
	for _, c := range []struct {
		what      string
		last, now heap
		want      bool
	}{
		{"nothing happens", heap{live: 6 * mb, objects: 6 * mb, ever: 90 * mb}, heap{live: 6 * mb, objects: 6*mb + 4096, ever: 90*mb + 4096}, false},
		{"a rush", heap{live: 4 * mb, objects: 5 * mb, ever: 90 * mb}, heap{live: 6 * mb, objects: 10 * mb, free: mb, ever: 99 * mb}, false},
		{"garbage after it", heap{live: 6 * mb, objects: 10 * mb, ever: 99 * mb}, heap{live: 6 * mb, objects: 10 * mb, ever: 99 * mb}, true},
		{"room after it", heap{live: 6 * mb, objects: 6 * mb, free: 2 * mb, ever: 99 * mb}, heap{live: 6 * mb, objects: 6 * mb, free: 2 * mb, ever: 99 * mb}, true},
		{"what many processors keep", heap{live: 6 * mb, objects: 6 * mb, free: 20 * mb, ever: 99 * mb, caches: 32 * mb}, heap{live: 6 * mb, objects: 6 * mb, free: 20 * mb, ever: 99 * mb, caches: 32 * mb}, false},
		{"a little in a large heap", heap{live: 100 * mb, objects: 102 * mb, free: 3 * mb, ever: 999 * mb}, heap{live: 100 * mb, objects: 102 * mb, free: 3 * mb, ever: 999 * mb}, false},
	} {
		if got := c.now.untidy(c.last); got != c.want {
			t.Errorf("%s: untidy is %v, want %v", c.what, got, c.want)
		}
	}
}

// The runtime knows the names that heapReader asks for, and FreeOSMemory gives
// back what they count.
func TestHeapReader(t *testing.T) {
	read := heapReader()
	before := read()
	garbage := make([]byte, 64<<20)
	full := read()
	if full.ever-before.ever < uint64(len(garbage)) || full.objects < uint64(len(garbage)) {
		t.Fatalf("a slice of %d bytes was made, and from %+v came %+v", len(garbage), before, full)
	}
	clear(garbage)
	debug.FreeOSMemory()
	after := read()
	if after.live == 0 || after.objects > full.objects-64<<20+8<<20 {
		t.Errorf("when it was given back there are %+v, before %+v", after, full)
	}
	if after.caches < pageCache || after.free > 8<<20+after.caches {
		t.Errorf("when it was given back %d bytes are free", after.free)
	}
}
