package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/e2e/cluster/internal/nodespec"
)

// launch turns this process into another one, or starts a node:
//
//	launch -pid FILE [-netns FILE] [-cgroup DIR]... [-node] -- PROGRAM ARG...
//
// It joins the cgroups and the network namespace, and records itself in the
// pid file, all before the program runs: a crash of the caller at any moment
// leaves no process that cannot be found again. If the pid file tells of a
// process that runs, launch does nothing: of two launches at once, one wins.
func launch(args []string) error {
	var netns, pidFile string
	var cgroups []string
	var node bool
	fs := flag.NewFlagSet("launch", flag.ContinueOnError)
	fs.StringVar(&netns, "netns", "", "network namespace to enter")
	fs.StringVar(&pidFile, "pid", "", "file to record the process in")
	fs.BoolVar(&node, "node", false, "start the program as the first process of new namespaces")
	fs.Func("cgroup", "cgroup to join", func(s string) error { cgroups = append(cgroups, s); return nil })
	if err := fs.Parse(args); err != nil {
		return err
	}
	if fs.NArg() == 0 || pidFile == "" {
		return errors.New("launch: want -pid and a program")
	}
	for _, dir := range cgroups {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0); err != nil {
			return fmt.Errorf("join cgroup: %w", err)
		}
	}
	unlock, running, err := claim(pidFile)
	if err != nil || running {
		return err
	}
	defer unlock()
	// A program replaced by exec, and a child, are born in the namespaces of
	// the thread that asked for them.
	runtime.LockOSThread()
	if netns != "" {
		f, err := os.Open(netns)
		if err != nil {
			return fmt.Errorf("open network namespace: %w", err)
		}
		if err := unix.Setns(int(f.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace %s: %w", netns, err)
		}
	}
	if node {
		return launchNode(pidFile, fs.Args())
	}
	return become(pidFile, fs.Args())
}

// claim takes the pid file for this launch, until unlock or the next exec, and
// reports whether the process it tells of runs.
func claim(pidFile string) (unlock func(), running bool, err error) {
	f, err := os.OpenFile(pidFile+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, false, fmt.Errorf("record process: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		f.Close()
		return nil, false, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	p, err := nodespec.ReadProcess(pidFile)
	if err != nil || p.Running() {
		f.Close()
		return nil, p.Running(), err
	}
	return func() { f.Close() }, false, nil
}

// become records this process and turns it into the program.
func become(pidFile string, argv []string) error {
	self, err := nodespec.Find(os.Getpid())
	if err != nil {
		return err
	}
	if err := self.Write(pidFile); err != nil {
		return fmt.Errorf("record process: %w", err)
	}
	return fmt.Errorf("run %s: %w", argv[0], syscall.Exec(argv[0], argv, os.Environ()))
}

// launchNode starts argv as process 1 of new namespaces and leaves it behind.
// The network namespace and the cgroups are those already joined, so that the
// new cgroup namespace has them for its root.
func launchNode(pidFile string, argv []string) error {
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid: true,
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC |
			syscall.CLONE_NEWPID | syscall.CLONE_NEWCGROUP,
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start node in new namespaces: %w", err)
	}
	child, err := nodespec.Find(cmd.Process.Pid)
	if err != nil {
		return fmt.Errorf("node ended at once: %w", err)
	}
	return child.Write(pidFile)
}
