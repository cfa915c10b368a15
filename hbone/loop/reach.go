package loop

import (
	"context"
	"fmt"

	"github.com/weft-mesh/weft/hbone"
)

// Reach returns when there is a tunnel to t that would take a connection, which
// it makes if there is none. So a caller who has a choice of targets finds out
// which of them can be reached before it gives a connection away. Nothing is
// tried twice.
func (p *Pool) Reach(ctx context.Context, t hbone.Target) error {
	if err := p.reach(ctx, t); err != nil {
		return fmt.Errorf("reach %v: %w", t.Address, err)
	}
	return nil
}

func (p *Pool) reach(ctx context.Context, t hbone.Target) error {
	k := keyOf(t)
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return errPoolClosed
	}
	e := p.entries[k]
	if e == nil {
		e = &entry{pool: p, key: k, target: t}
		p.entries[k] = e
	}
	if e.withRoom() != nil {
		p.mu.Unlock()
		return nil
	}
	if e.dial == nil {
		p.startDial(ctx, t, e, nil)
	}
	d := e.dial
	p.mu.Unlock()
	select {
	case <-d.done:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if d.err != nil {
		return d.err
	}
	return d.made.useless()
}
