package ztunnel

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/weft-mesh/weft/internal/relay"
	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/authz"
)

// direction is which way a connection goes, seen from the pod.
type direction string

const (
	outbound direction = "outbound"
	inbound  direction = "inbound"
)

// flow is one connection through the proxy: what is known of it, for logs and
// metrics, and how to end it.
type flow struct {
	direction direction
	pod       *pod
	src, dst  netip.AddrPort // the ends of the TCP connection, or of the tunnel
	target    netip.AddrPort // what the tunnel was asked for; zero without one

	source, destination *mesh.Workload // nil when not known
	service             *mesh.Service
	// sourceID and destinationID are what was proved, not what the View says;
	// zero when nothing was.
	sourceID, destinationID mesh.Identity
	mutualTLS               bool

	facts    authz.Facts // of an inbound flow: what it is admitted by
	admitted atomic.Bool // a decision was made, and is to be kept current
	start    time.Time
	stats    *relay.Stats // Sent is what the client sent

	counters *counters // set by telemetry

	mu       sync.Mutex
	reported struct{ sent, received int64 } // how much of stats is counted
	ends     []net.Conn
	cause    error // why it was aborted
}

// carry says that the flow's bytes go between these. If the flow has been
// aborted already, they are aborted and carry reports false.
func (f *flow) carry(ends ...net.Conn) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.cause == nil {
		f.ends = ends
		return true
	}
	for _, c := range ends {
		abort(c)
	}
	return false
}

// abort ends the flow at once, for a reason that goes to the log.
func (f *flow) abort(cause error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.cause != nil {
		return
	}
	f.cause = cause
	for _, c := range f.ends {
		abort(c)
	}
}

// outcome returns why the flow ended: what aborted it, or else err.
func (f *flow) outcome(err error) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.cause != nil {
		return f.cause
	}
	return err
}

// abort closes c so that its other end sees an error and not an orderly end.
func abort(c net.Conn) {
	switch c := c.(type) {
	case *net.TCPConn:
		c.SetLinger(0) // close sends RST
		c.Close()
	case interface{ Reset() }:
		c.Reset()
	default:
		c.Close()
	}
}

// registry holds the flows that are open.
type registry struct {
	mu   sync.Mutex
	open map[*flow]struct{}
}

func (r *registry) add(f *flow) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.open == nil {
		r.open = make(map[*flow]struct{})
	}
	r.open[f] = struct{}{}
}

func (r *registry) remove(f *flow) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.open, f)
}

// all returns the open flows, in no order.
func (r *registry) all() []*flow {
	r.mu.Lock()
	defer r.mu.Unlock()
	fs := make([]*flow, 0, len(r.open))
	for f := range r.open {
		fs = append(fs, f)
	}
	return fs
}

const (
	// recheckPause keeps a burst of changes from rechecking each time.
	recheckPause = 100 * time.Millisecond
	// policyGrace is how long an open connection may wait for a policy that a
	// workload lists and that has not arrived: the two come separately.
	policyGrace = 500 * time.Millisecond
)

// recheck decides anew on every admitted flow whenever the View changes, and
// aborts those that it now forbids, until ctx ends.
func (p *Proxy) recheck(ctx context.Context) error {
	var deadline time.Time // when patience with missing policies ends
	for {
		changed := p.cfg.View.Changed()
		var grace <-chan time.Time
		switch waiting := p.recheckAll(deadline.IsZero() || time.Now().Before(deadline)); {
		case waiting == 0:
			deadline = time.Time{}
		case deadline.IsZero():
			deadline = time.Now().Add(policyGrace)
			fallthrough
		default:
			grace = time.After(time.Until(deadline))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-grace:
			continue
		case <-changed:
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(recheckPause):
		}
	}
}

// recheckAll decides on every admitted flow by the current View and returns
// how many it left open only because patient is set.
func (p *Proxy) recheckAll(patient bool) (waiting int) {
	v := p.cfg.View.Load()
	for _, f := range p.flows.all() {
		if !f.admitted.Load() {
			continue
		}
		a := admit(v, *f.pod.info.Load(), f.pod.id, f.facts)
		switch {
		case a.verdict == admitted:
		case a.workload == nil:
			// The pod is leaving the mesh, or the control service starts
			// anew. That is no decision against a connection that was
			// admitted; new ones wait for one.
		case a.verdict == unresolved && patient:
			waiting++
		default:
			f.abort(fmt.Errorf("closed: no longer allowed: %s", a.reason))
		}
	}
	return waiting
}
