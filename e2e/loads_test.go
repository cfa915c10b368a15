package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// poll is eventually for questions that cost little: it asks twenty times a
// second.
func poll(t *testing.T, limit time.Duration, hold func() error) {
	t.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	eventually(t, limit, func() error {
		err := hold()
		if err != nil {
			<-tick.C
		}
		return err
	})
}

// An event is what the test program says of one request, transfer or long
// connection of a load. Times are nanoseconds since 1970.
type event struct {
	Load    string
	To      string
	Start   int64
	End     int64
	Refused bool
	Error   string
	// Of the verb "press": how many requests were answered meanwhile, what the
	// longest took in nanoseconds, and what a connection saw.
	N       int
	Longest int64
	Text    string
}

// A load is the test program at work in a pod. It is started by the container
// runtime of the node, so that no fault of Kubernetes or of Weft comes between
// the program and the test.
type load struct {
	name   string
	cmd    *exec.Cmd
	stdin  io.Closer
	stderr strings.Builder
	read   sync.WaitGroup

	mu     sync.Mutex
	ready  bool
	events []event
}

// startLoad starts the verb "load" in the first container of a pod.
func startLoad(t *testing.T, ns, pod string, args ...string) *load {
	t.Helper()
	return startVerb(t, ns, pod, "load", args...)
}

// startVerb starts a verb that tells events, and lasts until its input ends, in
// the first container of a pod.
func startVerb(t *testing.T, ns, pod, verb string, args ...string) *load {
	t.Helper()
	p, err := world.kube.CoreV1().Pods(ns).Get(t.Context(), pod, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	id := strings.TrimPrefix(p.Status.ContainerStatuses[0].ContainerID, "containerd://")
	l := &load{name: ns + "/" + pod}
	l.cmd = world.c.NodeCommand(t.Context(), p.Spec.NodeName, append([]string{
		"ctr", "--namespace", "k8s.io", "task", "exec", "--exec-id", fmt.Sprintf("load-%d", time.Now().UnixNano()), id, "/bin/testapp", verb,
	}, args...)...)
	l.cmd.Stderr = &l.stderr
	if l.stdin, err = l.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := l.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := l.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.end(t) })
	l.read.Go(func() { l.collect(out) })
	return l
}

func (l *load) collect(out io.Reader) {
	for d := json.NewDecoder(out); ; {
		var e event
		if d.Decode(&e) != nil {
			return
		}
		l.mu.Lock()
		if e.Load == "ready" {
			l.ready = true
		} else {
			l.events = append(l.events, e)
		}
		l.mu.Unlock()
	}
}

// waitReady waits until every load has succeeded once.
func (l *load) waitReady(t *testing.T) {
	t.Helper()
	poll(t, patience, func() error {
		l.mu.Lock()
		defer l.mu.Unlock()
		if !l.ready {
			return fmt.Errorf("the loads of %s are not all served: %d events, the last %+v", l.name, len(l.events), last(l.events))
		}
		return nil
	})
}

func last(events []event) event {
	if len(events) == 0 {
		return event{}
	}
	return events[len(events)-1]
}

// served waits until every path, that is each server, has answered requests
// that began after a moment.
func (l *load) served(t *testing.T, after time.Time, paths int) {
	t.Helper()
	poll(t, patience, func() error {
		l.mu.Lock()
		defer l.mu.Unlock()
		seen := map[string]bool{}
		for _, e := range l.events {
			if e.Load == "requests" && e.Error == "" && e.Start > after.UnixNano() {
				seen[e.To] = true
			}
		}
		if len(seen) < paths {
			return fmt.Errorf("%s: of %d servers %d have answered a request that began after %v", l.name, paths, len(seen), after)
		}
		return nil
	})
}

// told waits until the verb "press" has told of the time up to a moment.
func (l *load) told(t *testing.T, at time.Time) {
	t.Helper()
	poll(t, patience, func() error {
		l.mu.Lock()
		defer l.mu.Unlock()
		for i := len(l.events) - 1; i >= 0; i-- {
			if e := l.events[i]; e.Load == "answered" && e.End >= at.UnixNano() {
				return nil
			}
		}
		return fmt.Errorf("%s tells nothing of what was after %v; the last is %+v", l.name, at, last(l.events))
	})
}

// A pressing is what became of the requests of the verb "press" in some time.
type pressing struct {
	answered int
	longest  time.Duration
	cut      []event // ended without an answer, and were asked again
	failed   []event
}

// pressed sums up what was told between two moments.
func (l *load) pressed(from, to time.Time) (p pressing) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range l.events {
		if e.End <= from.UnixNano() || e.End > to.UnixNano() {
			continue
		}
		switch e.Load {
		case "answered":
			p.answered += e.N
			p.longest = max(p.longest, time.Duration(e.Longest))
		case "cut":
			p.cut = append(p.cut, e)
		case "failed":
			p.failed = append(p.failed, e)
		}
	}
	return p
}

// end lets the loads finish what is under way and returns all events. It may
// be called again.
func (l *load) end(t *testing.T) []event {
	t.Helper()
	if l.cmd.ProcessState == nil {
		l.stdin.Close()
		l.read.Wait()
		if err := l.cmd.Wait(); err != nil && !errors.Is(err, t.Context().Err()) {
			t.Errorf("the loads of %s: %v: %s", l.name, err, l.stderr.String())
		}
	}
	return l.events
}
