package capture

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/bpf"
)

// Existing says what becomes of the connections that a pod has when it is
// captured.
type Existing int

const (
	Keep  Existing = iota // they live on, outside the mesh
	Reset                 // they are reset, and the app connects anew through the mesh
)

// Mode says how to attach.
type Mode struct {
	// New: no process of the pod has run yet, so there is nothing to be
	// careful with, and the guards come first.
	New bool
	// Existing is for a pod that runs.
	Existing Existing
}

// Captured reports whether the pod is captured, by this Pod or before it: all
// programs are attached where they should be. It is never true of a capture
// that was cut short.
func (p *Pod) Captured() (bool, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ns == nil {
		return false, errClosed
	}
	return p.captured()
}

// Attach captures the pod. It may be called again: it finishes a capture that
// was cut short, and brings a captured pod's programs and rules up to date
// without a gap. After an error the pod counts as not captured; what holds of
// the capture by then keeps more out, not less. Call Attach again, or Detach.
func (p *Pod) Attach(ctx context.Context, m Mode) error {
	p.c.enrolling.RLock()
	defer p.c.enrolling.RUnlock()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ns == nil || p.c.closed {
		return errClosed
	}
	if err := p.attachAs(ctx, m); err != nil {
		return fmt.Errorf("capture pod %s: %w", p.uid, err)
	}
	p.c.background.Add(1)
	p.background.Go(func() {
		defer p.c.background.Done()
		p.fasten()
	})
	return nil
}

// fasten replaces the filters, with which Attach of a new pod is quick, by
// links, which nothing in the pod can take off, and puts the late hook on a
// running one. Until then what the pod cannot reach is the guard at the host's
// end, as on a kernel without links. Each step has the lock for itself. What
// fails is for Mend.
func (p *Pod) fasten() {
	for _, h := range p.hooks() {
		err := p.fastenOne(h)
		if errors.Is(err, unix.ENODEV) {
			return // the pod is gone
		}
		if err != nil {
			p.c.log.Error("a program in the pod is missing, or held only by a filter, which a process of the pod with NET_ADMIN can take off; the guard at the host's end holds", "pod", p.uid, "program", h.pin, "error", err)
		}
	}
}

func (p *Pod) fastenOne(h hook) error {
	p.c.enrolling.Lock()
	defer p.c.enrolling.Unlock()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ns == nil || p.c.closed || p.closing.Load() || !exists(filepath.Join(p.dir, pinCaptured)) {
		return nil // closed, or no longer captured
	}
	if l, err := p.pinned(h); err != nil || l != nil {
		return err
	}
	return p.put(h, p.programs[h.program])
}

func (p *Pod) attachAs(ctx context.Context, m Mode) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	captured, err := p.captured()
	if err != nil {
		return err
	}
	if captured || m.New {
		return p.attachClosed(m.New)
	}
	if err := p.unmarkCaptured(); err != nil {
		return err
	}
	return p.attachRunning(ctx, m.Existing)
}

// attachClosed captures a pod whose connections, if it has any, are captured
// already: what keeps things out comes first. Nothing of a silent pod runs yet.
func (p *Pod) attachClosed(silent bool) error {
	if !p.wantsDNS() { // before the program, which no longer takes queries
		if err := p.setDNS(); err != nil {
			return err
		}
	}
	if err := p.setMode(bpf.CaptureModeMODE_STRICT); err != nil {
		return err
	}
	if err := p.hookUp(silent, p.hooks()...); err != nil {
		return err
	}
	if err := p.c.acceptMark(p.ns); err != nil {
		return err
	}
	if err := p.place.addLocal(p.ns); err != nil {
		return err
	}
	if err := p.place.addCapture(p.ns); err != nil {
		return err
	}
	if err := p.setDNS(); err != nil {
		return err
	}
	return p.markCaptured()
}

// hookUp attaches programs. What they do is said by the pod's mode. It is
// quicker with a silent pod, one that has never sent anything.
func (p *Pod) hookUp(silent bool, hooks ...hook) error {
	for _, h := range hooks {
		if err := p.putSoon(h, p.programs[h.program], silent); err != nil {
			return err
		}
	}
	return p.drop(p.outboundHook(!p.c.features.SkLookup).pin) // of another rung
}

// attachRunning captures a pod that has connections. The order loses no packet
// that TCP would not send again, and resets nothing:
//
//	what changes nothing by itself    programs in mode idle, tcp_fwmark_accept, rule 99
//	pass 1                            keep what is connected or connecting
//	mode enrol                        new connections in are captured; a stray packet is lost, not reset
//	rules 100 to 102                  new connections out are captured
//	pass 2, repeated                  keep what came to be since pass 1
//	mode strict                       nothing else passes
//	pass 3                            keep what came to be since pass 2
//
// Nothing of the pod is touched until all programs are there, but the late one.
// Without iterators nothing can be kept: then what is connected is reset,
// whatever was asked for.
func (p *Pod) attachRunning(ctx context.Context, existing Existing) error {
	soon := slices.DeleteFunc(p.hooks(), func(h hook) bool { return h.late })
	if err := p.hookUp(false, soon...); err != nil {
		return err
	}
	if err := p.c.acceptMark(p.ns); err != nil {
		return err
	}
	if err := p.place.addLocal(p.ns); err != nil {
		return err
	}
	if existing == Keep && !p.c.features.Keep {
		p.c.log.Warn("the pod's connections are reset: this kernel cannot keep them", "pod", p.uid, "error", p.c.noWalkers)
		existing = Reset
	}
	if existing == Keep {
		if _, err := p.walk(bpf.SocketsProgKeep); err != nil {
			return err
		}
	}
	if err := p.setMode(bpf.CaptureModeMODE_ENROL); err != nil {
		return err
	}
	if err := p.place.addCapture(p.ns); err != nil {
		return err
	}
	if existing == Keep {
		if err := p.keepPending(ctx); err != nil {
			return err
		}
	}
	if err := p.setMode(bpf.CaptureModeMODE_STRICT); err != nil {
		return err
	}
	if err := p.lastPass(existing); err != nil {
		return err
	}
	if err := p.setDNS(); err != nil {
		return err
	}
	return p.markCaptured()
}

// lastPass does what existing says with connections that came to be while
// capture was put on, or, to reset, with all.
func (p *Pod) lastPass(existing Existing) (err error) {
	switch {
	case existing == Keep:
		_, err = p.walk(bpf.SocketsProgKeep)
	case p.c.features.destroys:
		_, err = p.walk(bpf.SocketsProgDestroy)
	default:
		_, err = p.reset(false)
	}
	return err
}

// CaptureDNS lets name queries go to the proxy, or, with on false, to the
// servers that are asked, as without capture. After Prepare it is on if the
// Target says DNS; for others it has no effect. A pod that is not captured yet
// is only told.
//
// It is for a time in which no proxy is there that takes the pod's sockets for
// name queries, because it is of a release that has none. A proxy that is just
// restarting is no reason: queries wait in the sockets.
func (p *Pod) CaptureDNS(on bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ns == nil {
		return errClosed
	}
	p.noDNS = !on
	captured, err := p.captured()
	if err == nil && captured {
		err = p.setDNS()
	}
	if err != nil {
		return fmt.Errorf("capture name queries of pod %s: %w", p.uid, err)
	}
	return nil
}

// setDNS is no part of what keeps traffic in: it comes last.
func (p *Pod) setDNS() error {
	return p.place.setDNS(p.ns, p.wantsDNS())
}

func (p *Pod) wantsDNS() bool { return p.place.dns && !p.noDNS }
