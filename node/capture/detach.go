package capture

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/weft-mesh/weft/bpf"
)

// Detach takes the pod out of the mesh and removes its pins. New connections go
// direct; captured ones stay with the proxy, which must serve them to their
// end; kept ones go on. One routing rule stays for the captured ones, see
// Drained. The pod's listeners are closed here; the proxy has its own
// descriptors and closes them when it has accepted what was waiting.
//
// After an error the pod may be captured in part. Call Detach again.
func (p *Pod) Detach(ctx context.Context) error {
	p.c.enrolling.RLock()
	defer p.c.enrolling.RUnlock()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ns == nil {
		return errClosed
	}
	if err := p.detach(ctx); err != nil {
		return fmt.Errorf("take pod %s out of the mesh: %w", p.uid, err)
	}
	return nil
}

// detach is attachRunning backwards: in mode leave, packets of captured
// connections that miss the rule before drain has marked their sockets are lost,
// not sent.
func (p *Pod) detach(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if !exists(p.dir) {
		return p.listeners.Close()
	}
	if err := p.unmarkCaptured(); err != nil {
		return err
	}
	if err := p.guardWire(); err != nil {
		return err
	}
	if err := p.setMode(bpf.CaptureModeMODE_LEAVE); err != nil {
		return err
	}
	if p.c.walkers != nil {
		if _, err := p.walk(bpf.SocketsProgDrain); err != nil {
			return err
		}
	}
	if err := p.place.removeRules(p.ns); err != nil {
		return err
	}
	if err := p.lastDrain(); err != nil {
		return err
	}
	for _, h := range append(p.hooks(), p.outboundHook(!p.c.features.SkLookup)) {
		if err := p.drop(h.pin); err != nil {
			return err
		}
	}
	if err := p.c.forgetSandboxes(p.dir, ""); err != nil {
		return err
	}
	return p.listeners.Close()
}

// guardWire puts guard_pod on if the pod has captured connections and it is not
// there yet: in mode leave nobody else holds their packets back.
func (p *Pod) guardWire() error {
	e, err := p.entry()
	if err != nil || e.Mode == bpf.CaptureModeMODE_IDLE {
		return err
	}
	h := p.hook(pinGuardPod)
	if on, err := p.on(h); err != nil || on {
		return err
	}
	return p.put(h, p.programs[h.program])
}

// lastDrain marks what was captured until now to stay with the proxy. Without
// iterators this cannot be done, and it is reset.
func (p *Pod) lastDrain() error {
	if p.c.walkers != nil {
		_, err := p.walk(bpf.SocketsProgDrain)
		return err
	}
	n, err := p.reset(true)
	if n > 0 {
		p.c.log.Warn("the pod's captured connections are reset: this kernel cannot let them go on", "pod", p.uid, "connections", n, "error", p.c.noWalkers)
	}
	return err
}

// drainPause is how often Drained looks, at most.
const drainPause = time.Second

// Drained waits, after Detach, until the last connection that was captured has
// ended, and then removes the rule and the route that held them. If nobody
// waits, they stay; they do no harm, and a later capture uses them again.
func (p *Pod) Drained(ctx context.Context) error {
	if err := p.drained(ctx); err != nil {
		return fmt.Errorf("wait for the captured connections of pod %s to end: %w", p.uid, err)
	}
	return nil
}

func (p *Pod) drained(ctx context.Context) error {
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, drainPause) {
		left, err := p.draining()
		if err != nil || left == 0 {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pause):
		}
	}
}

// draining returns how many sockets still need the rule, and removes it if
// none does.
func (p *Pod) draining() (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ns == nil {
		return 0, errClosed
	}
	if exists(p.dir) {
		return 0, errors.New("it is captured again, or not detached")
	}
	var r tally
	var err error
	if p.c.walkers != nil {
		r, err = p.walk(bpf.SocketsProgDrain)
	}
	if err != nil || r.done > 0 {
		return r.done, err
	}
	return 0, p.place.removeLocal(p.ns)
}

// Forget removes the pins of a pod that is gone and closes it.
func (p *Pod) Forget() error {
	p.closing.Store(true)
	p.background.Wait() // it must not pin what is about to be removed
	return errors.Join(p.c.Forget(p.uid), p.Close())
}
