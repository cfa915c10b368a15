package node

import (
	"context"
	"fmt"

	"github.com/weft-mesh/weft/internal/handoff"
	"github.com/weft-mesh/weft/node/capture"
)

// A capturer puts pods into the mesh and keeps them there. kernelCapture is
// the real one.
type capturer interface {
	// prepare readies a pod, with the listeners in held if it is not nil,
	// without touching its traffic. dns says whether its DNS requests shall be
	// captured.
	prepare(ctx context.Context, uid string, s *sandbox, dns bool, held *handoff.Files) (captive, error)
	// pinned returns the UIDs of the pods that an agent has captured, now or
	// before a restart.
	pinned() ([]string, error)
	// forget removes what is left of a pod that is gone.
	forget(uid string) error
}

// A captive is a pod that is captured or about to be.
type captive interface {
	files() (handoff.Files, error) // duplicates, which the caller closes
	attach(ctx context.Context, m capture.Mode) error
	detach(ctx context.Context) error
	// captureDNS gives the DNS requests to ztunnel or, with on false, leaves
	// them alone. Without prepare's dns it has no effect.
	captureDNS(on bool) error
	// mend puts back what the pod has taken off its capture, and says what.
	mend() ([]string, error)
	// drained waits, after detach, until no captured connection is left, and
	// tidies up. The error is that of ctx if it ended first.
	drained(ctx context.Context) error
	close() error // lets go of it without changing anything
}

// kernelCapture is package capture as a capturer.
type kernelCapture struct{ *capture.Capture }

func (c kernelCapture) prepare(ctx context.Context, uid string, s *sandbox, dns bool, held *handoff.Files) (captive, error) {
	t := capture.Target{UID: uid, Netns: s.ns, Addrs: s.addrs, DNS: dns}
	var adopt *capture.Listeners
	if held != nil {
		l := capture.Listeners(held.Listeners)
		adopt = &l
	}
	p, err := c.Prepare(ctx, t, adopt)
	if err != nil {
		return nil, err
	}
	return kernelCaptive{p}, nil
}

func (c kernelCapture) pinned() ([]string, error) { return c.Pinned() }
func (c kernelCapture) forget(uid string) error   { return c.Forget(uid) }

type kernelCaptive struct{ *capture.Pod }

func (p kernelCaptive) files() (handoff.Files, error) {
	f, err := p.Files()
	if err != nil {
		return handoff.Files{}, fmt.Errorf("take the files of a pod: %w", err)
	}
	return handoff.Files{Netns: f.Netns, Blessed: f.Blessed, Listeners: f.Listeners}, nil
}

func (p kernelCaptive) attach(ctx context.Context, m capture.Mode) error { return p.Attach(ctx, m) }
func (p kernelCaptive) detach(ctx context.Context) error                 { return p.Detach(ctx) }
func (p kernelCaptive) drained(ctx context.Context) error                { return p.Drained(ctx) }
func (p kernelCaptive) captureDNS(on bool) error                         { return p.CaptureDNS(on) }
func (p kernelCaptive) mend() ([]string, error)                          { return p.Mend() }
func (p kernelCaptive) close() error                                     { return p.Close() }
