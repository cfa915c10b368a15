package node

import (
	"bufio"
	"context"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// tidyInterval is how often memory that was needed only for a while is given
// back: the agent has little to do, so that the runtime would take long to.
const tidyInterval = 5 * time.Minute

// tidyMemory gives back what the start and bursts have used, until ctx ends.
func tidyMemory(ctx context.Context) {
	tick := time.NewTicker(tidyInterval)
	defer tick.Stop()
	for {
		debug.FreeOSMemory()
		dropProgramText()
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// dropProgramText unmaps the pages of the program's own file, half of which
// only the start needs. Those that are used again come back from the page
// cache. Only mappings that nobody can have written are dropped.
func dropProgramText() {
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return
	}
	f, err := os.Open("/proc/self/smaps")
	if err != nil {
		return
	}
	defer f.Close()
	for _, m := range cleanMappings(bufio.NewScanner(f), exe) {
		// An error costs memory and nothing else.
		_, _, _ = unix.Syscall(unix.SYS_MADVISE, m.start, m.end-m.start, unix.MADV_DONTNEED)
	}
}

// A mapping is a range of addresses.
type mapping struct{ start, end uintptr }

// cleanMappings reads /proc/PID/smaps and returns the private mappings of file
// that cannot be written and have no page of their own (proc_pid_smaps(5)).
func cleanMappings(smaps *bufio.Scanner, file string) []mapping {
	var out []mapping
	var m mapping
	ours := false
	for smaps.Scan() {
		f := strings.Fields(smaps.Text())
		if len(f) < 2 {
			continue
		}
		if from, to, ok := strings.Cut(f[0], "-"); ok && !strings.HasSuffix(f[0], ":") {
			start, err1 := strconv.ParseUint(from, 16, 64)
			end, err2 := strconv.ParseUint(to, 16, 64)
			ours = err1 == nil && err2 == nil && start < end && len(f) == 6 && f[5] == file && (f[1] == "r-xp" || f[1] == "r--p")
			m = mapping{uintptr(start), uintptr(end)}
			continue
		}
		if ours && f[0] == "Anonymous:" {
			if f[1] == "0" {
				out = append(out, m)
			}
			ours = false
		}
	}
	return out
}
