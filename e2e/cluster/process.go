package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/weft-mesh/weft/e2e/cluster/internal/nodespec"
)

// LogDir is where every process of the cluster writes its log.
func (c *Cluster) LogDir() string { return filepath.Join(c.State, "log") }

func (c *Cluster) logFile(name string) string { return filepath.Join(c.LogDir(), name+".log") }

func (c *Cluster) pidFile(name string) string { return filepath.Join(c.State, "pid", name) }

// A start says how a process is started.
type start struct {
	name    string
	netns   string // empty: the machine's
	cgroups []nodespec.Hierarchy
	node    bool // as the first process of new namespaces
	argv    []string
}

// process returns the running process called name; the zero Process if it does
// not run.
func (c *Cluster) process(name string) nodespec.Process {
	p, err := nodespec.ReadProcess(c.pidFile(name))
	if err != nil || !p.Running() {
		return nodespec.Process{}
	}
	return p
}

// ensure starts a process unless it runs. The process outlives this one.
func (c *Cluster) ensure(ctx context.Context, s start) error {
	if c.process(s.name).Running() {
		return nil
	}
	for _, d := range []string{c.LogDir(), filepath.Dir(c.pidFile(s.name))} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	log, err := os.OpenFile(c.logFile(s.name), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	args := []string{"launch", "-pid", c.pidFile(s.name)}
	if s.netns != "" {
		args = append(args, "-netns", s.netns)
	}
	for _, g := range s.cgroups {
		args = append(args, "-cgroup", g.Dir)
	}
	if s.node {
		args = append(args, "-node")
	}
	cmd := exec.Command(c.record.Programs.Node, append(append(args, "--"), s.argv...)...)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan struct{})
	go func() {
		cmd.Wait()
		close(ended)
	}()
	return c.waitStarted(ctx, s.name, ended)
}

// waitStarted waits until the launched process has recorded itself, which is a
// matter of milliseconds. It does so also when ctx has ended: what follows, a
// down perhaps, must find the process.
func (c *Cluster) waitStarted(ctx context.Context, name string, ended <-chan struct{}) error {
	settle, cancel := context.WithTimeout(context.WithoutCancel(ctx), 20*time.Second)
	defer cancel()
	for {
		if c.process(name).Running() {
			return nil
		}
		select {
		case <-ended:
			if c.process(name).Running() {
				return nil // a node's launcher ends when the node has begun
			}
			return fmt.Errorf("%s did not start: %s", name, c.logTail(name, 3))
		default:
		}
		if err := pause(settle); err != nil {
			return fmt.Errorf("%s did not start: %w", name, err)
		}
	}
}

// alive returns an error that quotes the log if a process has ended.
func (c *Cluster) alive(name string) error {
	if c.process(name).Running() {
		return nil
	}
	return fmt.Errorf("%s has ended; the end of %s:\n%s", name, c.logFile(name), c.logTail(name, 8))
}

func (c *Cluster) logTail(name string, lines int) string {
	return tail(c.logFile(name), lines)
}

func tail(path string, lines int) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimRight(string(b), "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// stop kills a process and waits until it is gone.
func (c *Cluster) stop(ctx context.Context, name string) error {
	p := c.process(name)
	if p.Running() {
		if err := syscall.Kill(p.PID, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("stop %s: %w", name, err)
		}
	}
	for p.Running() {
		if err := pause(ctx); err != nil {
			return fmt.Errorf("stop %s: process %d does not end: %w", name, p.PID, err)
		}
	}
	os.Remove(c.pidFile(name))
	return nil
}
