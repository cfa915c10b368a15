package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/e2e/cluster/internal/nodespec"
)

// buildRoot gives the node a file system of its own and moves into it: the
// machine's programs read-only, a private copy-on-write /etc, and /var, /opt
// and /run that are the node's. Nothing the node does there is seen outside.
func buildRoot(n nodespec.Node) error {
	root := filepath.Join(n.Dir, "root")
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := mount("tmpfs", root, "tmpfs", 0, "mode=755"); err != nil {
		return err
	}
	steps := []func() error{
		func() error { return bindPrograms(root) },
		func() error { return overlayEtc(root) },
		func() error { return bindData(root, n) },
		func() error { return bind("/dev", filepath.Join(root, "dev"), unix.MS_REC) },
		func() error { return os.MkdirAll(filepath.Join(root, "tmp"), 0o777|os.ModeSticky) },
		func() error { return pivot(root) },
		// Made after the move: proc and sysfs show the namespaces of who mounts them.
		func() error { return mount("proc", "/proc", "proc", 0, "") },
		func() error { return mount("sysfs", "/sys", "sysfs", 0, "") },
		func() error { return mount("tmpfs", "/run", "tmpfs", 0, "mode=755") },
		func() error { return mount("tmpfs", "/dev/shm", "tmpfs", 0, "mode=1777") },
		func() error { return mountCgroups(n) },
		func() error { return mount("bpf", "/sys/fs/bpf", "bpf", 0, "mode=700") },
		func() error { return os.MkdirAll("/run/netns", 0o755) },
		func() error { return os.MkdirAll("/run/lock", 0o755) },
		func() error { return link("/run", "/var/run") },
		// Pods that mount with propagation need shared mounts to share with.
		func() error { return unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, "") },
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return fmt.Errorf("build the node's file system: %w", err)
		}
	}
	return nil
}

// bindPrograms shows the machine's programs and libraries, read-only.
func bindPrograms(root string) error {
	for _, name := range []string{"usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32"} {
		src, dst := "/"+name, filepath.Join(root, name)
		info, err := os.Lstat(src)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		if info.Mode()&fs.ModeSymlink != 0 {
			target, err := os.Readlink(src)
			if err != nil {
				return err
			}
			if err := os.Symlink(target, dst); err != nil {
				return err
			}
			continue
		}
		if err := bind(src, dst, unix.MS_REC|unix.MS_RDONLY); err != nil {
			return err
		}
	}
	return nil
}

// overlayEtc shows the machine's /etc; what the node writes stays in memory.
func overlayEtc(root string) error {
	upper, work := filepath.Join(root, ".etc/upper"), filepath.Join(root, ".etc/work")
	for _, d := range []string{upper, work} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	options := "lowerdir=/etc,upperdir=" + upper + ",workdir=" + work
	return mount("overlay", filepath.Join(root, "etc"), "overlay", 0, options)
}

// bindData shows the cluster's state, at the same place as on the machine, and
// the node's own part of it as /var, /opt and /etc/cni.
func bindData(root string, n nodespec.Node) error {
	type pair struct {
		src, dst string
		flags    uintptr
	}
	for _, p := range []pair{
		{n.Dir + "/var", "/var", 0},
		{n.Dir + "/opt", "/opt", 0},
		// Not the machine's network configuration; and it outlives the node's
		// processes, as on a disk.
		{n.Dir + "/cni", "/etc/cni", 0},
		// After /var and /opt: they may lie below either.
		{n.StateDir, n.StateDir, 0},
		{n.ProgramDir, n.ProgramDir, unix.MS_RDONLY},
	} {
		if err := os.MkdirAll(p.src, 0o755); err != nil {
			return err
		}
		if err := bind(p.src, filepath.Join(root, p.dst), p.flags); err != nil {
			return err
		}
	}
	for _, d := range []string{"var/lib/containerd", "var/lib/kubelet", "var/lib/cni", "var/log/pods", "var/log/containers", "var/tmp", "opt/cni/bin", "root"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			return err
		}
	}
	return nil
}

// pivot makes root the root directory and lets go of everything else.
func pivot(root string) error {
	old := filepath.Join(root, ".machine")
	if err := os.Mkdir(old, 0o700); err != nil {
		return err
	}
	if err := unix.PivotRoot(root, old); err != nil {
		return fmt.Errorf("pivot_root to %s: %w", root, err)
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	if err := unix.Unmount("/.machine", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount the machine's file systems: %w", err)
	}
	return os.Remove("/.machine")
}

// mountCgroups shows the node's cgroups as if they were whole hierarchies.
func mountCgroups(n nodespec.Node) error {
	const top = "/sys/fs/cgroup"
	if n.UnifiedOnly {
		return mount("cgroup2", top, "cgroup2", 0, "")
	}
	if err := mount("tmpfs", top, "tmpfs", 0, "mode=755"); err != nil {
		return err
	}
	for _, h := range n.Hierarchies {
		kind := "cgroup"
		if h.Options == "" {
			kind = "cgroup2"
		}
		if err := mount(kind, filepath.Join(top, h.Mount), kind, 0, h.Options); err != nil {
			return err
		}
	}
	return nil
}

// link makes a symbolic link, unless a start of the node before this one has.
func link(to, name string) error {
	if err := os.Symlink(to, name); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

func mount(source, target, kind string, flags uintptr, options string) error {
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(source, target, kind, flags, options); err != nil {
		return fmt.Errorf("mount %s on %s (%s): %w", kind, target, options, err)
	}
	return nil
}

// bind shows src, a directory or a file, at dst as well.
func bind(src, dst string, flags uintptr) error {
	info, err := os.Stat(src)
	if err != nil {
		return err
	}
	if info.IsDir() {
		err = os.MkdirAll(dst, 0o755)
	} else if err = os.MkdirAll(filepath.Dir(dst), 0o755); err == nil {
		var f *os.File
		if f, err = os.OpenFile(dst, os.O_CREATE|os.O_RDONLY, 0o644); err == nil {
			f.Close()
		}
	}
	if err != nil {
		return err
	}
	if err := unix.Mount(src, dst, "", unix.MS_BIND|flags&unix.MS_REC, ""); err != nil {
		return fmt.Errorf("bind %s to %s: %w", src, dst, err)
	}
	if flags&unix.MS_RDONLY == 0 {
		return nil
	}
	if err := unix.Mount("", dst, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""); err != nil {
		return fmt.Errorf("make %s read-only: %w", dst, err)
	}
	return nil
}
