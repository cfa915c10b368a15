package main

import (
	"context"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

const (
	// tidyPause is how often the use of memory is looked at, which costs
	// nothing, and tidyLeast the least time between two collections for its
	// sake, which cost some ten milliseconds of CPU time each.
	tidyPause = 10 * time.Second
	tidyLeast = 30 * time.Second
	// tidyQuiet is how much may be allocated in a tidyPause that counts as
	// quiet: idle connections, and those that are busy, allocate nothing.
	tidyQuiet = 512 << 10
)

// tidyMemory gives back what a rush of new connections, or a large change of the
// View, has left behind, once it is over, until ctx ends. The runtime would
// collect it after minutes, and keep more than it has in use even then: while
// nothing is allocated that is of no use to anybody.
func tidyMemory(ctx context.Context) error {
	tick := time.NewTicker(tidyPause)
	defer tick.Stop()
	read := heapReader()
	last, tidied := read(), time.Time{}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		now := read()
		if now.untidy(last) && time.Since(tidied) >= tidyLeast {
			debug.FreeOSMemory()
			now, tidied = read(), time.Now()
		}
		last = now
	}
}

// A heap is how the runtime uses memory, in bytes.
type heap struct {
	live    uint64 // what the last collection has found in use
	objects uint64 // that and what is new or garbage since
	free    uint64 // neither in use nor given back
	ever    uint64 // allocated since the start
	caches  uint64 // what of free processors may keep for what comes next
}

// untidy reports whether a good part of the heap serves nothing, and little was
// allocated since last.
func (h heap) untidy(last heap) bool {
	return h.ever-last.ever < tidyQuiet && h.objects+h.free > h.live+max(1<<20, h.live/16, h.caches)
}

// pageCache is what the runtime lets a processor keep: 64 pages of 8 KiB.
const pageCache = 512 << 10

func heapReader() func() heap {
	s := []metrics.Sample{
		{Name: "/gc/heap/live:bytes"}, {Name: "/memory/classes/heap/objects:bytes"},
		{Name: "/memory/classes/heap/free:bytes"}, {Name: "/gc/heap/allocs:bytes"},
	}
	return func() heap {
		metrics.Read(s)
		return heap{
			live: s[0].Value.Uint64(), objects: s[1].Value.Uint64(), free: s[2].Value.Uint64(), ever: s[3].Value.Uint64(),
			caches: uint64(runtime.GOMAXPROCS(0)) * pageCache,
		}
	}
}
