package capture

import (
	"context"
	"fmt"

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
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ns == nil {
		return errClosed
	}
	if err := p.attachAs(ctx, m); err != nil {
		return fmt.Errorf("capture pod %s: %w", p.uid, err)
	}
	return nil
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
		return p.attachClosed()
	}
	if err := p.unmarkCaptured(); err != nil {
		return err
	}
	return p.attachRunning(ctx, m.Existing)
}

// attachClosed captures a pod whose connections, if it has any, are captured
// already: what keeps things out comes first.
func (p *Pod) attachClosed() error {
	if !p.wantsDNS() { // before the program, which no longer takes queries
		if err := p.setDNS(); err != nil {
			return err
		}
	}
	if err := p.setMode(bpf.CaptureModeMODE_STRICT); err != nil {
		return err
	}
	if err := p.hookUp(); err != nil {
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

// hookUp attaches all programs. What they do is said by the pod's mode.
func (p *Pod) hookUp() error {
	for _, h := range p.hooks() {
		if err := p.put(h, p.programs[h.program]); err != nil {
			return err
		}
	}
	return nil
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
// To attach a program takes a grace period of RCU, to change the mode does not:
// so nothing of the pod is touched until all are there.
func (p *Pod) attachRunning(ctx context.Context, existing Existing) error {
	if err := p.hookUp(); err != nil {
		return err
	}
	if err := p.c.acceptMark(p.ns); err != nil {
		return err
	}
	if err := p.place.addLocal(p.ns); err != nil {
		return err
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
	last := bpf.SocketsProgKeep
	if existing == Reset {
		last = bpf.SocketsProgDestroy
	}
	if _, err := p.walk(last); err != nil {
		return err
	}
	if err := p.setDNS(); err != nil {
		return err
	}
	return p.markCaptured()
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
