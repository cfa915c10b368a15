package node

import (
	"context"
	"sync"
)

// turns lets one at a time work on each key. The zero turns is ready to use.
type turns struct {
	mu   sync.Mutex
	keys map[string]*turn
}

// A turn is the right to work on one key: a token in a channel, so that
// waiting for it can end with a context.
type turn struct {
	token chan struct{}
	users int // who has it or waits for it
}

// take waits for the turn of key. The caller calls done exactly once. The
// error is that of ctx.
func (t *turns) take(ctx context.Context, key string) (done func(), err error) {
	t.mu.Lock()
	if t.keys == nil {
		t.keys = map[string]*turn{}
	}
	k := t.keys[key]
	if k == nil {
		k = &turn{token: make(chan struct{}, 1)}
		t.keys[key] = k
	}
	k.users++
	t.mu.Unlock()

	select {
	case k.token <- struct{}{}:
		return func() { <-k.token; t.drop(key, k) }, nil
	case <-ctx.Done():
		t.drop(key, k)
		return nil, context.Cause(ctx)
	}
}

func (t *turns) drop(key string, k *turn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if k.users--; k.users == 0 {
		delete(t.keys, key)
	}
}
