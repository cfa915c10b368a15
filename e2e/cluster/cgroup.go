package cluster

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/weft-mesh/weft/e2e/cluster/internal/nodespec"
)

// hierarchies lists the machine's cgroup hierarchies, with Dir the mount point.
func hierarchies() ([]nodespec.Hierarchy, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	hs := parseHierarchies(string(b))
	if len(hs) == 0 {
		return nil, errors.New("no cgroup hierarchy is mounted: a cluster needs at least cgroup2 on /sys/fs/cgroup")
	}
	return hs, nil
}

// parseHierarchies reads the text of /proc/self/mountinfo; its format is in
// proc_pid_mountinfo(5). Only the first mount of each hierarchy counts.
func parseHierarchies(mountinfo string) []nodespec.Hierarchy {
	var hs []nodespec.Hierarchy
	for line := range strings.Lines(mountinfo) {
		before, after, ok := strings.Cut(strings.TrimSpace(line), " - ")
		left, right := strings.Fields(before), strings.Fields(after)
		if !ok || len(left) < 5 || len(right) < 3 {
			continue
		}
		h := nodespec.Hierarchy{Dir: left[4], Mount: filepath.Base(left[4])}
		switch right[0] {
		case "cgroup2":
			h.Mount = "unified"
		case "cgroup":
			h.Options = versionOneOptions(right[2])
		default:
			continue
		}
		if !slices.ContainsFunc(hs, func(o nodespec.Hierarchy) bool { return o.Options == h.Options }) {
			hs = append(hs, h)
		}
	}
	return hs
}

// versionOneOptions keeps of a version 1 hierarchy's mount options those that
// say which hierarchy it is.
func versionOneOptions(options string) string {
	var keep []string
	for o := range strings.SplitSeq(options, ",") {
		switch {
		case strings.HasPrefix(o, "name="):
			keep = append(keep, "none", o)
		case o == "rw" || o == "ro" || o == "xattr" || o == "clone_children" || strings.HasPrefix(o, "release_agent="):
		default:
			keep = append(keep, o)
		}
	}
	return strings.Join(keep, ",")
}

// makeCgroups makes the group part ("control" or a node's name) of the cluster
// in the given hierarchies and returns them with Dir set to it.
func (c *Cluster) makeCgroups(part string, in []nodespec.Hierarchy) ([]nodespec.Hierarchy, error) {
	out := slices.Clone(in)
	for i, h := range in {
		top := filepath.Join(h.Dir, c.record.name())
		out[i].Dir = filepath.Join(top, part)
		if h.Options == "" {
			handDown(h.Dir)
		}
		if err := os.MkdirAll(out[i].Dir, 0o755); err != nil {
			return nil, fmt.Errorf("make cgroup: %w", err)
		}
		if h.Options == "" {
			handDown(top)
		}
		if slices.Contains(strings.Split(h.Options, ","), "cpuset") {
			// A version 1 cpuset begins empty, and admits no process then.
			for _, d := range []string{top, out[i].Dir} {
				if err := copyCpuset(d); err != nil {
					return nil, err
				}
			}
		}
	}
	return out, nil
}

// handDown enables for the children of a version 2 group the controllers that
// a kubelet uses, as far as they can be. On the machine's top group this adds
// what systemd or a container engine has most often added before, and it stays.
func handDown(dir string) {
	for _, name := range controllers(dir) {
		if slices.Contains([]string{"cpu", "cpuset", "io", "memory", "pids"}, name) {
			os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+name), 0)
		}
	}
}

func controllers(dir string) []string {
	b, _ := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	return strings.Fields(string(b))
}

func copyCpuset(dir string) error {
	for _, name := range []string{"cpuset.cpus", "cpuset.mems"} {
		b, err := os.ReadFile(filepath.Join(filepath.Dir(dir), name))
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), b, 0)
		}
		if err != nil {
			return fmt.Errorf("set up cpuset: %w", err)
		}
	}
	return nil
}

// limitless reports whether a version 2 group lacks a controller that limits of
// containers need.
func limitless(dir string) bool {
	have := controllers(dir)
	for _, need := range []string{"cpu", "memory", "pids"} {
		if !slices.Contains(have, need) {
			return true
		}
	}
	return false
}

// cgroupDirs lists every cgroup of part of the cluster, deepest first. An empty
// part means all of it.
func (c *Cluster) cgroupDirs(part string) []string {
	hs, err := hierarchies()
	if err != nil {
		return nil
	}
	var dirs []string
	for _, h := range hs {
		filepath.WalkDir(filepath.Join(h.Dir, c.record.name(), part), func(path string, e fs.DirEntry, err error) error {
			if err == nil && e.IsDir() {
				dirs = append(dirs, path)
			}
			return nil
		})
	}
	slices.Reverse(dirs)
	return dirs
}

// removeCgroups kills what still runs in part of the cluster and removes its
// cgroups. Every process the cluster starts is in one from its first moment, so
// this finds those too that no file tells of.
func (c *Cluster) removeCgroups(ctx context.Context, part string) error {
	for {
		dirs := c.cgroupDirs(part)
		left := 0
		for _, d := range dirs {
			killAll(d)
			if err := syscall.Rmdir(d); err != nil && !errors.Is(err, fs.ErrNotExist) {
				left++
			}
		}
		if left == 0 {
			return nil
		}
		if err := pause(ctx); err != nil {
			return fmt.Errorf("remove cgroups: %d of them still hold processes: %w", left, err)
		}
	}
}

func killAll(dir string) {
	b, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	for _, f := range strings.Fields(string(b)) {
		// 0 is a process that our pid namespace does not show; 1 is nobody's.
		if pid, err := strconv.Atoi(f); err == nil && pid > 1 && pid != os.Getpid() {
			syscall.Kill(pid, syscall.SIGKILL)
		}
	}
}
