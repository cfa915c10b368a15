package ztunnel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"time"

	"github.com/weft-mesh/weft/hbone/loop"
	"github.com/weft-mesh/weft/internal/handover"
	"github.com/weft-mesh/weft/internal/pack"
	"github.com/weft-mesh/weft/mesh"
)

// PartVersion is the version of the parts that a Proxy gives to its successor
// and takes from its predecessor: a tunnel with its connections, or a connection
// without a tunnel. A change of anything that a part holds, down to the record
// protection, is a new version.
const PartVersion = 3

// An Heir takes what a Proxy hands over when it ends. A nil error of Give means
// that the part is the heir's; after any other it is the proxy's as before, and
// only after handover.ErrDeclined may another part be given. Ahead sends
// something that belongs to the next part, and Settle waits until that was read.
type Heir interface {
	Ahead(text []byte) error
	Settle() error
	Give(text []byte, files []int) error
	Done() error
}

const (
	// handoverTime bounds the time in which connections are handed over.
	handoverTime = 5 * time.Second
	// handoverPause is between two looks for connections that are still being
	// set up.
	handoverPause = 20 * time.Millisecond
)

// A movedPart is one part.
type movedPart struct {
	number uint32 // of those that one process gives
	pod    string // UID
	id     mesh.Identity
	frozen int64       // since when, in nanoseconds since 1970
	flows  []movedFlow // of tunnel.Conns, or the one that plain is about
	plain  *movedPlain // a connection without a tunnel; else nil
	tunnel loop.TunnelState
}

// A movedFlow is what is known of a connection beside its state.
type movedFlow struct {
	source, destination mesh.UID
	service             mesh.ServiceName
	start               int64
	src, dst, target    netip.AddrPort
	mutualTLS, opened   bool
	admitted            bool
}

func (m *movedPart) pack(c *pack.Coder) {
	pack.Uint(c, &m.number, math.MaxUint32)
	pack.String(c, &m.pod, 128)
	packIdentity(c, &m.id)
	pack.Uint(c, &m.frozen, math.MaxInt64)
	pack.List(c, &m.flows, handover.MaxPartFiles, func(c *pack.Coder, f *movedFlow) { f.pack(c) })
	plain := m.plain != nil
	if pack.Bool(c, &plain); !plain {
		m.tunnel.Pack(c)
		return
	}
	if c.Reading() {
		m.plain = new(movedPlain)
	}
	m.plain.pack(c)
}

func packIdentity(c *pack.Coder, id *mesh.Identity) {
	for _, s := range []*string{&id.TrustDomain, &id.Namespace, &id.ServiceAccount} {
		pack.String(c, s, 1<<10)
	}
}

func (f *movedFlow) pack(c *pack.Coder) {
	pack.String(c, &f.source, 1<<10)
	pack.String(c, &f.destination, 1<<10)
	pack.String(c, &f.service.Namespace, 1<<10)
	pack.String(c, &f.service.Host, 1<<10)
	pack.Uint(c, &f.start, math.MaxInt64)
	for _, a := range []*netip.AddrPort{&f.src, &f.dst, &f.target} {
		loop.PackAddr(c, a)
	}
	for _, b := range []*bool{&f.mutualTLS, &f.opened, &f.admitted} {
		pack.Bool(c, b)
	}
}

// handed returns what a successor is told of f.
func (f *flow) handed() movedFlow {
	p := f.who.Value()
	m := movedFlow{
		start: f.start, src: f.src(), dst: p.dst, target: p.target,
		mutualTLS: f.mutualTLS, opened: f.opened, admitted: f.admitted.Load(),
	}
	if p.source != nil {
		m.source = p.source.UID
	}
	if p.destination != nil {
		m.destination = p.destination.UID
	}
	if p.service != nil {
		m.service = p.service.Name
	}
	return m
}

// handOver gives the tunnels of every pod to heir, and then the connections
// without one, while nothing new is accepted any more. Tunnels that are being set
// up are waited for, and what the heir does not take stays.
func (p *Proxy) handOver(heir Heir) {
	p.mu.Lock()
	p.stopped = true
	var pods []*pod
	for _, q := range p.pods {
		pods = append(pods, q)
	}
	p.mu.Unlock()
	for _, q := range pods {
		q.closeListeners() // the agent and the heir have them too
		q.accepts.Wait()
	}
	start := time.Now()
	behind := make(map[*pod]bool) // of which a tunnel stays
	var all gifts
	var err error
	for {
		// What arrives becomes a tunnel or a flow, so it is given in a turn
		// that begins when nothing does.
		settled := p.arriving.Load() == 0
		for _, q := range pods {
			if err == nil {
				behind[q], err = giveAll(heir, q, q.movers(), &all)
			}
		}
		if err != nil || settled && p.flows.tunnelled(behind) == 0 || time.Since(start) > handoverTime {
			break
		}
		time.Sleep(handoverPause) // what is being set up
	}
	if err == nil {
		err = p.handOverPlain(heir, pods, start.Add(handoverTime), &all)
	}
	if derr := heir.Done(); err == nil {
		err = derr
	}
	if err != nil {
		p.cfg.Log.Error("connections were not handed over: they drain", "error", err)
	}
	p.cfg.Log.Info("handed over", "tunnels", all.tunnels, "connections", all.conns, "without_tunnel", all.plain, "left", len(p.flows.all()), "took", time.Since(start), "ahead", all.ahead, "longest_ahead", all.early, "awaited", all.awaited,
		"slowest_conns", all.slowest.conns, "slowest_bytes", all.slowest.bytes, "slowest_ahead", all.slowest.ahead, "slowest_freeze", all.slowest.freeze, "slowest_pack", all.slowest.pack, "slowest_give", all.slowest.give)
}

// tunnelled returns how many flows event loops carry, or will, but for those of
// some pods.
func (r *registry) tunnelled(without map[*pod]bool) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := 0
	for _, f := range r.open {
		if f.plain == nil && !without[f.pod()] {
			n++
		}
	}
	return n
}

// A mover is a tunnel that can be given, a loop.Mover.
type mover interface {
	Ahead() []loop.Backlog
	Freeze() (*loop.Frozen, error)
	Keep()
}

// movers returns the pod's tunnels. Each is to be given, or kept.
func (q *pod) movers() (all []mover) {
	for _, ms := range [][]loop.Mover{q.server.Movers(), q.proxy.pool.Movers(q.owner)} {
		for _, m := range ms {
			all = append(all, m)
		}
	}
	return all
}

// giveAll gives tunnels of a pod to heir, and notes them in all. behind says that
// one of them stays, since the heir does not want it or it cannot be given, and
// an error that the heir takes no more.
func giveAll(heir Heir, q *pod, movers []mover, all *gifts) (behind bool, err error) {
	for i, m := range movers {
		if all.stay[m] {
			behind = true
			m.Keep()
			continue
		}
		g, err := q.give(heir, m, all)
		switch {
		case err == nil:
			all.tunnels++
			all.add(g)
		case errors.Is(err, handover.ErrDeclined), errors.Is(err, errUnfrozen):
			behind = true
			all.stays(m)
			m.Keep()
			q.proxy.cfg.Log.Warn("a tunnel stays here, and drains", "pod", q.info.Load().Name, "error", err)
		case errors.Is(err, loop.ErrNotMovable): // it has just ended
		default:
			for _, rest := range movers[i:] {
				rest.Keep()
			}
			return behind, err
		}
	}
	return behind, nil
}

// errUnfrozen is why a tunnel is not given that lives.
var errUnfrozen = errors.New("the tunnel cannot be made to stand still")

// give gives one tunnel to heir, with its connections, as the next part.
func (q *pod) give(heir Heir, m mover, all *gifts) (gift, error) {
	start := time.Now()
	all.begun++
	ahead, err := sendAhead(heir, m, all.begun)
	if err != nil {
		return gift{}, err
	}
	if err := all.await(heir); err != nil {
		return gift{}, err
	}
	frozen, err := m.Freeze()
	if errors.Is(err, loop.ErrNotMovable) {
		return gift{}, err
	}
	if err != nil {
		return gift{}, fmt.Errorf("%w: %w", errUnfrozen, err)
	}
	g := gift{conns: len(frozen.Owners), ahead: ahead, early: frozen.Since.Sub(start), freeze: time.Since(frozen.Since)}
	part := movedPart{number: all.begun, pod: q.info.Load().UID, id: q.id, frozen: frozen.Since.UnixNano(), tunnel: frozen.State}
	for _, o := range frozen.Owners {
		part.flows = append(part.flows, o.(*flow).handed())
	}
	text := pack.Write(part.pack)
	frozen.State.Wipe()
	g.bytes, g.pack = len(text), time.Since(frozen.Since)-g.freeze
	err = heir.Give(text, frozen.Files)
	clear(text)
	if err != nil {
		frozen.Thaw()
		return gift{}, err
	}
	g.give = time.Since(frozen.Since) - g.freeze - g.pack
	frozen.Release()
	return g, nil
}

const (
	// aheadHeader is what begins all that is sent ahead: the number of the part,
	// and the stream whose backlog follows.
	aheadHeader = 8
	// aheadRounds is how often what has come meanwhile is sent ahead as well.
	aheadRounds = 10
)

// sendAhead sends what waits for applications in a tunnel while the tunnel still
// works, and returns how many bytes that was.
func sendAhead(heir Heir, m mover, number uint32) (sent int, err error) {
	text := make([]byte, handover.MaxAhead)
	defer clear(text)
	binary.BigEndian.PutUint32(text, number)
	for range aheadRounds {
		backlogs := m.Ahead()
		for _, b := range backlogs {
			binary.BigEndian.PutUint32(text[4:], b.ID)
			for _, piece := range b.Pieces {
				for len(piece) > 0 {
					n := copy(text[aheadHeader:], piece)
					if err := heir.Ahead(text[:aheadHeader+n]); err != nil {
						return sent, err
					}
					piece, sent = piece[n:], sent+n
				}
			}
		}
		if len(backlogs) == 0 {
			break
		}
		if err := heir.Settle(); err != nil {
			return sent, err
		}
	}
	return sent, nil
}

// unpackAhead returns what was sent ahead of the part of a number, by stream.
func unpackAhead(ahead [][]byte, number uint32) (map[uint32][][]byte, error) {
	var early map[uint32][][]byte
	for _, text := range ahead {
		if len(text) <= aheadHeader {
			return nil, fmt.Errorf("%d bytes were sent ahead, want more than %d", len(text), aheadHeader)
		}
		if binary.BigEndian.Uint32(text) != number {
			continue // of one that has ended before it could be given
		}
		if early == nil {
			early = make(map[uint32][][]byte)
		}
		id := binary.BigEndian.Uint32(text[4:])
		early[id] = append(early[id], text[aheadHeader:])
	}
	return early, nil
}

// Take prepares a tunnel of the proxy's predecessor. It implements
// handover.Taker.
func (p *Proxy) Take(version uint32, text []byte, ahead [][]byte, files []int) (goOn, keep func(), err error) {
	if version != PartVersion {
		return nil, nil, fmt.Errorf("a part of version %d, want %d", version, PartVersion)
	}
	start := time.Now()
	var part movedPart
	err = pack.Read(text, part.pack)
	got := pause{conns: len(part.flows), arrive: start.Sub(time.Unix(0, part.frozen)), read: time.Since(start)}
	defer part.tunnel.Wipe()
	if err != nil {
		return nil, nil, err
	}
	if part.plain == nil && len(part.flows) != len(part.tunnel.Conns) {
		return nil, nil, fmt.Errorf("%d flows for %d connections", len(part.flows), len(part.tunnel.Conns))
	}
	early, err := unpackAhead(ahead, part.number)
	if err != nil {
		return nil, nil, err
	}
	for i := range part.tunnel.Conns {
		part.tunnel.Conns[i].Early = early[part.tunnel.Conns[i].ID]
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	q := p.pods[part.pod]
	switch {
	case p.stopped:
		return nil, nil, errors.New("this ztunnel is stopping")
	case q == nil:
		return nil, nil, fmt.Errorf("pod %s is not served here", part.pod)
	case q.id != part.id:
		return nil, nil, fmt.Errorf("pod %s is %v here, and was %v", part.pod, q.id, part.id)
	}
	if part.plain != nil {
		return q.takePlain(&part, files, got)
	}
	return q.take(&part, files, got)
}

// take prepares a tunnel that was another process's. proxy.mu is held.
func (q *pod) take(part *movedPart, files []int, got pause) (goOn, keep func(), err error) {
	start := time.Now()
	server := !part.tunnel.Open.Client
	flows := make([]*flow, len(part.flows))
	places := make([]loop.Place, len(part.flows))
	for i := range part.flows {
		flows[i] = q.takeFlow(&part.flows[i], server)
		places[i] = loop.Place{Conn: &flows[i].conn, Owner: flows[i]}
	}
	var a *loop.Arrival
	if server {
		a, err = q.server.Resume(part.tunnel, files, places)
	} else if part.tunnel.Source != q.id {
		err = fmt.Errorf("a tunnel of %v in a pod of %v", part.tunnel.Source, q.id)
	} else {
		a, err = q.proxy.pool.Resume(q.owner, part.tunnel, files, places)
	}
	if err != nil {
		return nil, nil, err
	}
	for _, f := range flows {
		switch {
		case server:
			f.prove(*a.Peer(), &q.id)
		case f.opened:
			f.prove(q.id, a.Peer())
		default:
			f.prove(q.id, nil)
		}
		f.reported.sent, f.reported.received = f.moved()
		q.proxy.telemetry.resume(f)
		q.proxy.flows.add(f)
		q.open.Add(1)
		if f.counted {
			q.conns.Add(1)
		}
	}
	q.conns.Add(1) // so that the pod is not closed before the tunnel is somebody's
	got.resume = time.Since(start)
	goOn = func() {
		defer q.conns.Done()
		start := time.Now()
		noted := q.proxy.pauses.begin()
		a.Go(func() {
			got.begin = time.Since(start)
			got.whole = time.Since(time.Unix(0, part.frozen))
			noted(got)
		})
		q.proxy.recheckFlows(flows)
	}
	keep = func() {
		defer q.conns.Done()
		a.Discard()
	}
	return goOn, keep, nil
}

// takeFlow returns a flow that was another process's. What the View does not
// know any more is not known of it.
func (q *pod) takeFlow(m *movedFlow, in bool) *flow {
	v, d := q.proxy.cfg.View.Load(), outbound
	if in {
		d = inbound
	}
	f := newFlow(d, m.src, parties{
		pod: q, source: v.ByUID(m.source), destination: v.ByUID(m.destination), service: v.ServiceByName(m.service),
		dst: m.dst, target: m.target,
	})
	f.start, f.mutualTLS, f.opened, f.counted = m.start, m.mutualTLS, m.opened, !in
	f.admitted.Store(m.admitted)
	return f
}

// movedOn takes f out of the books of this process: another keeps them.
func (q *pod) movedOn(f *flow) {
	q.open.Add(-1)
	q.proxy.flows.remove(f)
	q.proxy.telemetry.progress(f)
}
