package main

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/weft-mesh/weft/internal/handover"
	"github.com/weft-mesh/weft/ztunnel"
)

// A ztunnel that has one before it is ready only when that knows of it: in a
// rollout it is asked to end then.
func TestJoined(t *testing.T) {
	path := filepath.Join(t.TempDir(), "handover.sock")
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 2)
	start := func(warm <-chan struct{}) *succession {
		s := newSuccession(&succession{
			path: path, instance: "new", proxy: nil, tookOver: func() []any { return nil }, alone: make(chan struct{}), log: discard(),
			warm: func(ctx context.Context) error {
				select {
				case <-warm:
				case <-ctx.Done():
				}
				return ctx.Err()
			},
		})
		go func() { ended <- s.run(ctx, ctx) }()
		return s
	}
	joined := func(s *succession) {
		t.Helper()
		select {
		case <-s.joined:
		case <-time.After(joinPatience / 2):
			t.Fatal("it has not joined")
		}
	}
	joined(start(make(chan struct{}))) // nobody is before it

	old := handover.NewServer(handover.ServerConfig{Path: path, Parts: []uint32{ztunnel.PartVersion}, Log: discard()})
	stopped := make(chan error, 1)
	go func() { stopped <- old.Run(ctx) }()
	deadline, tick := time.After(joinPatience/2), time.Tick(time.Millisecond)
	for {
		if _, err := os.Stat(path); err == nil {
			break
		}
		select {
		case <-tick:
		case <-deadline:
			t.Fatal("the one before does not listen")
		}
	}
	warm := make(chan struct{})
	_, changed := old.Heir()
	s := start(warm)
	select {
	case <-s.joined:
		t.Error("it has joined before it could take over")
	case <-time.After(3 * redialPause):
	}
	close(warm)
	joined(s)
	select {
	case <-changed:
	case <-time.After(joinPatience / 2):
		t.Error("the one before has not heard of it")
	}
	cancel()
	for range cap(ended) {
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
}
