package main

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
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
	log       *slog.Logger
}

// activate lets this ztunnel have the ports from now on.
func (t *turnstile) activate() { t.once.Do(func() { close(t.activated) }) }

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
		if ctx.Err() != nil || !errors.Is(err, syscall.EADDRINUSE) {
			return err
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
