package ztunnel

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"unique"

	"github.com/weft-mesh/weft/hbone/loop"
	"github.com/weft-mesh/weft/internal/relay"
	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/authz"
)

// direction is which way a connection goes, seen from the pod.
type direction uint8

const (
	outbound direction = iota
	inbound
)

// String returns the word for the access log.
func (d direction) String() string {
	if d == inbound {
		return "inbound"
	}
	return "outbound"
}

// flow is one connection through the proxy: what is known of it, for logs and
// metrics, and how to end it. Tens of thousands are idle at a time, so it is
// small: 160 bytes with the engine's part.
type flow struct {
	conn loop.Conn // through a tunnel; of other flows only the cause of an abort is used

	who           unique.Handle[parties]
	destinationID *mesh.Identity // proved, whatever the View says; nil when nothing was. It does not change
	counters      *counters      // set by telemetry
	plain         *plainFlow     // of a flow without a tunnel; else nil

	start    int64                          // in nanoseconds since 1970
	reported struct{ sent, received int64 } // how much is counted; guarded by telemetry.counting

	place     int32  // in the registry, and guarded by its mu
	port      uint16 // of src
	direction direction
	mutualTLS bool
	opened    bool        // the other end of the tunnel has accepted
	counted   bool        // pod.conns waits for it, though no goroutine serves it
	admitted  atomic.Bool // inbound: a decision was made, and is to be kept current
}

// plainFlow is what a flow without a tunnel has besides.
type plainFlow struct {
	stats  *relay.Stats // Sent is what the client sent
	mu     sync.Mutex
	ends   []net.Conn   // guarded by mu
	looked atomic.Bool  // the application's keepalive was looked at
	halter relay.Halter // while it is copied
	// outer is the client's flow, if this is the server's and both are pods of
	// this node. The two share stats and bytes.
	outer *flow
}

// parties are what a flow has in common with all between the same two ends. They
// are mostly few, and there once for all of their flows. Addresses are without a
// zone.
type parties struct {
	pod                 *pod
	source, destination *mesh.Workload // nil when not known
	service             *mesh.Service
	sourceID            mesh.Identity // proved, whatever the View says; zero when nothing was

	from   netip.Addr     // of the TCP connection, or of the tunnel; each flow has its port
	dst    netip.AddrPort // its other end
	target netip.AddrPort // what the tunnel was asked for; zero without one
}

// newFlow returns a flow that begins now, from src. Of p, from is set here.
func newFlow(d direction, src netip.AddrPort, p parties) *flow {
	p.from, p.dst, p.target = src.Addr().WithZone(""), withoutZone(p.dst), withoutZone(p.target)
	return &flow{direction: d, who: unique.Make(p), port: src.Port(), start: time.Now().UnixNano()}
}

func withoutZone(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().WithZone(""), a.Port())
}

func (f *flow) pod() *pod { return f.who.Value().pod }

// src is the client's end of the TCP connection, or of the tunnel.
func (f *flow) src() netip.AddrPort { return netip.AddrPortFrom(f.who.Value().from, f.port) }

// prove notes who the ends are. Nobody else has f yet.
func (f *flow) prove(source mesh.Identity, destination *mesh.Identity) {
	p := f.who.Value()
	p.sourceID = source
	f.who, f.destinationID = unique.Make(p), destination
}

// facts are what an inbound flow is admitted by.
func (f *flow) facts() authz.Facts {
	p := f.who.Value()
	to := p.dst
	if p.target.IsValid() {
		to = p.target
	}
	return authz.Facts{Peer: p.sourceID, Source: f.src(), Destination: to}
}

// verdict says why policies let an inbound flow in, by the View of now: what was
// let in is decided on again whenever the View changes. It is empty if they were
// not asked, or do not let it in any more.
func (f *flow) verdict() string {
	if f.direction != inbound || !f.admitted.Load() {
		return ""
	}
	q := f.pod()
	a := admitUnless(guards, q.proxy.cfg.View.Load(), *q.info.Load(), q.id, f.facts())
	if a.verdict != admitted {
		return ""
	}
	return a.reason
}

// proved returns the identity that was proved; none if nothing was.
func proved(id *mesh.Identity) mesh.Identity {
	if id == nil {
		return mesh.Identity{}
	}
	return *id
}

// moved returns how many bytes the client and the server have sent.
func (f *flow) moved() (sent, received int64) {
	switch {
	case f.plain != nil:
		return f.plain.stats.Sent.Load(), f.plain.stats.Received.Load()
	case f.direction == inbound:
		return f.conn.ToApp(), f.conn.FromApp()
	}
	return f.conn.FromApp(), f.conn.ToApp()
}

// carry says that the bytes of a flow without a tunnel go between these. If the
// flow has been aborted already, they are aborted and carry reports false.
func (f *flow) carry(ends ...net.Conn) bool {
	f.plain.mu.Lock()
	defer f.plain.mu.Unlock()
	if f.conn.Cause() == nil {
		f.plain.ends = ends
		return true
	}
	for _, c := range ends {
		abort(c)
	}
	return false
}

// abort ends the flow at once, for a reason that goes to the log.
func (f *flow) abort(cause error) {
	f.conn.Abort(cause)
	if f.plain == nil {
		return
	}
	f.plain.mu.Lock()
	defer f.plain.mu.Unlock()
	for _, c := range f.plain.ends {
		abort(c)
	}
}

// outcome returns why the flow ended: what aborted it, or else err.
func (f *flow) outcome(err error) error {
	if cause := f.conn.Cause(); cause != nil {
		return cause
	}
	return err
}

// Opened notes who is at the other end of the tunnel. The engine calls it.
func (f *flow) Opened(peer *mesh.Identity) { f.destinationID, f.opened = peer, true }

// Ended counts and logs a flow that an event loop has carried. The engine calls
// it, so it does not block.
func (f *flow) Ended(err error) {
	if errors.Is(err, loop.ErrMoved) {
		q, counted := f.pod(), f.counted
		q.movedOn(f)
		if counted {
			q.conns.Done()
		}
		return
	}
	if err != nil && f.direction == outbound && !f.opened {
		err = connectError(explain(err))
	}
	q, counted := f.pod(), f.counted
	q.over(f, err)
	if counted {
		q.conns.Done()
	}
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
	open []*flow // each at its place, in no order
}

func (r *registry) add(f *flow) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f.place = int32(len(r.open))
	r.open = append(r.open, f)
}

// remove does nothing if f is not there.
func (r *registry) remove(f *flow) {
	r.mu.Lock()
	defer r.mu.Unlock()
	last := len(r.open) - 1
	if int(f.place) > last || r.open[f.place] != f {
		return
	}
	r.open[f.place] = r.open[last]
	r.open[f.place].place = f.place
	r.open[last] = nil
	if r.open = r.open[:last]; last == 0 {
		r.open = nil // what was needed for a rush is not kept
	}
}

// all returns the open flows, in no order.
func (r *registry) all() []*flow {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.open)
}

// each calls do for the open flows, a few at a time, so that it needs no memory
// for all of them. While flows end it may pass by some that do not.
func (r *registry) each(do func(*flow)) {
	var some [64]*flow
	for at, n := 0, len(some); n == len(some); at += n {
		r.mu.Lock()
		n = copy(some[:], r.open[min(at, len(r.open)):])
		r.mu.Unlock()
		for _, f := range some[:n] {
			do(f)
		}
	}
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
	return p.recheckSome(p.flows.all(), patient)
}

// recheckFlows decides on flows by the View of now.
func (p *Proxy) recheckFlows(flows []*flow) { p.recheckSome(flows, true) }

func (p *Proxy) recheckSome(flows []*flow, patient bool) (waiting int) {
	v := p.cfg.View.Load()
	for _, f := range flows {
		if !f.admitted.Load() {
			continue
		}
		// What was open when the pod moved behind a waypoint goes on.
		q := f.pod()
		a := admitUnless(guards, v, *q.info.Load(), q.id, f.facts())
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
