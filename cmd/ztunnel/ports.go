package main

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/weft-mesh/weft/internal/obs"
)

// bindPause is how often a port that is in use is tried again. The other
// ztunnel of the pair has it until it has drained.
const bindPause = 20 * time.Millisecond

// A turnstile says when this ztunnel may have the ports of its pair, which are
// one pod's: the active one has them.
type turnstile struct {
	standby   bool            // let the other one be first
	synced    <-chan struct{} // closed when the agent has said who is active
	activated chan struct{}   // closed when that is this one
	once      sync.Once
	comm      string // the file with the process's name; empty leaves that alone
	log       *slog.Logger
}

// The names by which the two processes of a pair are told apart, in ps and in
// /proc/PID/comm, which holds 15 bytes.
const (
	activeName  = "ztunnel"
	passiveName = "ztunnel-standby"
)

// name names this process. What cannot be named works as well.
func (t *turnstile) name(name string) {
	if t.comm == "" {
		return
	}
	if err := os.WriteFile(t.comm, []byte(name), 0); err != nil {
		t.log.Debug("the process was not named", "error", err)
	}
}

// activate lets this ztunnel have the ports from now on.
func (t *turnstile) activate() {
	t.once.Do(func() {
		t.name(activeName)
		close(t.activated)
	})
}

// watch names the process after what it does, until ctx ends.
func (t *turnstile) watch(ctx context.Context) error {
	if t.standby {
		t.name(passiveName)
	}
	select {
	case <-ctx.Done():
		return nil
	case <-t.synced:
	}
	if !t.active() {
		t.name(passiveName)
	}
	if t.active() { // in this very moment
		t.name(activeName)
	}
	<-ctx.Done()
	return nil
}

func (t *turnstile) active() bool {
	select {
	case <-t.activated:
		return true
	default:
		return false
	}
}

// serve serves h at addr while this ztunnel has the ports: when it is active,
// and until the agent has said who is, unless it stands by. So a ztunnel that
// cannot reach the agent says why.
func (t *turnstile) serve(ctx context.Context, addr string, h http.Handler) error {
	if !t.standby {
		first, cancel := context.WithCancel(ctx)
		defer cancel()
		go func() {
			select {
			case <-t.synced:
				if !t.active() {
					cancel()
				}
			case <-first.Done():
			}
		}()
		if err := t.serveWhenFree(first, addr, h); err != nil || ctx.Err() != nil {
			return err
		}
	}
	select {
	case <-ctx.Done():
		return nil
	case <-t.activated:
		return t.serveWhenFree(ctx, addr, h)
	}
}

// serveWhenFree serves h at addr, as soon as nobody else has the port, until
// ctx ends.
func (t *turnstile) serveWhenFree(ctx context.Context, addr string, h http.Handler) error {
	for told := false; ; {
		err := obs.Serve(ctx, addr, h)
		if !errors.Is(err, syscall.EADDRINUSE) {
			return err
		}
		if ctx.Err() != nil { // it is not wanted any more
			return nil
		}
		if !told {
			told = true
			t.log.Info("waiting for a port that is in use, by the other ztunnel of this pod unless something is wrong", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(bindPause):
		}
	}
}
