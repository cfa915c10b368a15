// Package run owns goroutines: it starts tasks together, waits for all of
// them, repeats the ones that fail, and turns signals into the end of a
// context.
package run

import (
	"context"
	"os/signal"
	"sync"
	"syscall"
)

// A Task is long work that ends when its context does. It returns only after
// everything that it started has stopped.
type Task func(ctx context.Context) error

// All runs tasks together and returns when every one of them has returned. The
// first to return, with or without an error, cancels the context of the rest.
// All returns the cause: the error of that first task, or nil if it left
// without one or because ctx had ended. Without tasks it returns nil at once.
func All(ctx context.Context, tasks ...Task) error {
	inner, cancel := context.WithCancel(ctx)
	defer cancel()
	var (
		wg    sync.WaitGroup
		first sync.Once
		cause error
	)
	for _, task := range tasks {
		wg.Go(func() {
			err := task(inner)
			first.Do(func() {
				if ctx.Err() == nil {
					cause = err
				}
				cancel()
			})
		})
	}
	wg.Wait()
	return cause
}

// UntilSignal returns a context that ends with parent, or at the first SIGINT
// or SIGTERM. The caller must call the function returned with it; from then
// on, and after the first signal, a second signal kills the process as usual.
func UntilSignal(parent context.Context) (context.Context, context.CancelFunc) {
	ctx, stop := signal.NotifyContext(parent, syscall.SIGINT, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	return ctx, stop
}

// UntilDrained runs a server until ctx ends, which stop does when another task
// fails, and the others until the server has drained: what it still serves
// needs them.
func UntilDrained(ctx context.Context, stop func(), server Task, others ...Task) error {
	tasks := []Task{func(context.Context) error { return server(ctx) }}
	for _, task := range others {
		tasks = append(tasks, func(inner context.Context) error {
			defer stop() // one that fails ends the server in order
			return task(inner)
		})
	}
	return All(context.WithoutCancel(ctx), tasks...)
}
