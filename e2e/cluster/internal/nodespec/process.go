package nodespec

import (
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
)

// A Process is a process that still means the same one after its number has
// been given away again: the number together with the time it started.
type Process struct {
	PID   int
	Start uint64 // clock ticks since boot, field 22 of /proc/<pid>/stat
}

// Find returns the running process with number pid.
func Find(pid int) (Process, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return Process{}, err
	}
	// The command's name, field 2, is in parentheses and may hold anything.
	s := string(b)
	fields := strings.Fields(s[strings.LastIndexByte(s, ')')+1:])
	if len(fields) < 20 {
		return Process{}, fmt.Errorf("read /proc/%d/stat: too short: %q", pid, s)
	}
	// A first thread that is a zombie among others is a process that is still
	// ending, and still holds its files and ports.
	if threads := fields[17]; fields[0] == "X" || fields[0] == "Z" && (threads == "0" || threads == "1") {
		return Process{}, fmt.Errorf("process %d has ended", pid)
	}
	start, err := strconv.ParseUint(fields[19], 10, 64)
	if err != nil {
		return Process{}, fmt.Errorf("read /proc/%d/stat: %w", pid, err)
	}
	return Process{PID: pid, Start: start}, nil
}

// Running reports whether p still runs. The zero Process does not.
func (p Process) Running() bool {
	if p.PID <= 0 {
		return false
	}
	now, err := Find(p.PID)
	return err == nil && now == p
}

// ReadProcess reads a process from a file that Write made. A missing
// file is the zero Process.
func ReadProcess(path string) (Process, error) {
	var p Process
	b, err := os.ReadFile(path)
	if os.IsNotExist(err) {
		return p, nil
	}
	if err != nil {
		return p, err
	}
	if err := json.Unmarshal(b, &p); err != nil {
		return Process{}, fmt.Errorf("read %s: %w", path, err)
	}
	return p, nil
}

// Write records p in a file; the file is never seen half written.
func (p Process) Write(path string) error {
	b, err := json.Marshal(p)
	if err != nil {
		return err
	}
	next := path + ".next"
	if err := os.WriteFile(next, b, 0o644); err != nil {
		return err
	}
	return os.Rename(next, path)
}
