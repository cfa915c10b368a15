package main

import (
	"fmt"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"
)

// children starts processes and, being process 1, collects every process that
// ends in the node, its own and orphans alike.
type children struct {
	mu    sync.Mutex
	ended map[int]chan syscall.WaitStatus // own children by pid
}

func newChildren() *children { return &children{ended: map[int]chan syscall.WaitStatus{}} }

// reap collects ended processes for as long as the node lives.
func (c *children) reap() {
	sig := make(chan os.Signal, 1)
	signal.Notify(sig, syscall.SIGCHLD)
	for {
		c.collect()
		<-sig
	}
}

func (c *children) collect() {
	// The lock keeps a child from being collected before start has noted it.
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
		if pid <= 0 || (err != nil && err != syscall.EINTR) {
			return
		}
		if ch, ok := c.ended[pid]; ok {
			ch <- status
			delete(c.ended, pid)
		}
	}
}

// start runs argv with its output appended to the log file. What comes out of
// the channel is how it ended.
func (c *children) start(log string, argv ...string) (<-chan syscall.WaitStatus, error) {
	out, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	c.mu.Lock()
	defer c.mu.Unlock()
	p, err := os.StartProcess(argv[0], argv, &os.ProcAttr{Files: []*os.File{null, out, out}, Env: os.Environ()})
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", argv[0], err)
	}
	ch := make(chan syscall.WaitStatus, 1)
	c.ended[p.Pid] = ch
	return ch, p.Release()
}

// run runs argv to its end. The error holds the end of what it wrote.
func (c *children) run(log string, argv ...string) error {
	ch, err := c.start(log, argv...)
	if err != nil {
		return err
	}
	if status := <-ch; status.ExitStatus() != 0 {
		b, _ := os.ReadFile(log)
		lines := strings.Split(strings.TrimSpace(string(b)), "\n")
		return fmt.Errorf("%s: %s: %s", strings.Join(argv, " "), describe(status), lines[len(lines)-1])
	}
	return nil
}

// keep runs argv for as long as the node lives, again whenever it ends.
func (c *children) keep(name, log string, argv ...string) {
	for {
		ch, err := c.start(log, argv...)
		if err != nil {
			say("%s: %v", name, err)
		} else {
			say("%s started", name)
			say("%s ended (%s); starting it again", name, describe(<-ch))
		}
		time.Sleep(time.Second)
	}
}

func describe(s syscall.WaitStatus) string {
	if s.Signaled() {
		return s.Signal().String()
	}
	return fmt.Sprintf("exit status %d", s.ExitStatus())
}

func say(format string, args ...any) {
	fmt.Printf("%s %s\n", time.Now().UTC().Format("2006-01-02T15:04:05.000Z"), fmt.Sprintf(format, args...))
}
