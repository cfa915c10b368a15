package loop

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/hbone"
	"github.com/weft-mesh/weft/hbone/record"
	"github.com/weft-mesh/weft/mesh"
)

// ErrMoved is what Owner.Ended is told of a connection that goes on in another
// process.
var ErrMoved = errors.New("the connection goes on in another process")

// ErrNotMovable is why Freeze fails for a tunnel that has ended, or moves
// already.
var ErrNotMovable = errors.New("the tunnel has ended or moves already")

// A Mover can take one tunnel out of an engine.
type Mover struct{ t *tunnel }

// A Frozen is a tunnel that stands still: its sockets are neither read nor
// written until Thaw, or never again after Release. Exactly one of the two is
// called, once.
type Frozen struct {
	State TunnelState // a copy: Wipe it after use
	// Files are the descriptors of the tunnel and then of State.Conns. They
	// stay the engine's.
	Files  []int
	Owners []Owner   // of State.Conns
	Since  time.Time // when it was stopped

	t *tunnel
}

// Movers returns the tunnels of the server.
func (s *Server) Movers() []Mover {
	s.mu.Lock()
	defer s.mu.Unlock()
	var ms []Mover
	for t := range s.tunnels {
		ms = append(ms, Mover{t})
	}
	return ms
}

// Movers returns the tunnels that were made for an owner. They take no new
// connections from then on: Freeze each, or Keep it.
func (p *Pool) Movers(owner string) []Mover {
	p.mu.Lock()
	defer p.mu.Unlock()
	var ms []Mover
	for k, e := range p.entries {
		if k.owner != owner {
			continue
		}
		for _, t := range e.tunnels {
			t.move.Store(true)
			t.gone.Store(true) // what was posted before is done before freeze
			ms = append(ms, Mover{t})
		}
	}
	return ms
}

// call runs f on the loop, or here when that has ended. It does not return
// before.
func (l *eventLoop) call(f func()) {
	done := make(chan struct{})
	if l.post(work{kind: workCall, call: func() { f(); close(done) }}) {
		<-done
		return
	}
	f()
}

// A Backlog is what waits for an application that does not keep up: a part of
// its queue.
type Backlog struct {
	ID     uint32 // of the stream
	Pieces [][]byte
}

// leastAhead is how much must wait to be worth sending ahead.
const leastAhead = 64 << 10

// Ahead returns what has waited for applications since it was called last, if
// that is much, so that it can be sent before the tunnel stands still. It does
// not change until the tunnel is released, kept or thawed, and the applications
// get none of it: their sockets are full.
func (m Mover) Ahead() (all []Backlog) {
	m.t.loop.call(func() { all = m.t.loop.ahead(m.t) })
	return all
}

// ahead gives out the queues of t.
func (l *eventLoop) ahead(t *tunnel) (all []Backlog) {
	if t.ended || t.frozen || l.gone() {
		return nil
	}
	for id, c := range t.conns.All() {
		if c.queue == nil || !c.is(connOpen) || c.queue.n-t.ahead[id] < leastAhead {
			continue
		}
		all = append(all, Backlog{id, c.queue.pieces(t.ahead[id])})
		if t.ahead == nil {
			t.ahead = make(map[uint32]int)
		}
		t.ahead[id] = c.queue.n
	}
	return all
}

// back undoes ahead: applications get what waits.
func (l *eventLoop) back(t *tunnel) {
	ids := t.ahead
	t.ahead = nil
	for id := range ids {
		if c := t.conns.At(id); c != nil && c.queue != nil {
			l.drainQueue(c)
		}
	}
}

// Freeze stops the tunnel and returns its state.
func (m Mover) Freeze() (*Frozen, error) {
	f, err := (*Frozen)(nil), ErrNotMovable
	m.t.loop.call(func() { f, err = m.t.loop.freeze(m.t) })
	return f, err
}

// Keep undoes what Movers has done: the tunnel takes new connections.
func (m Mover) Keep() {
	m.t.loop.call(func() {
		if !m.t.ended && !m.t.frozen {
			m.t.move.Store(false)
			m.t.gone.Store(m.t.core.Draining())
			m.t.loop.back(m.t)
		}
	})
}

// Thaw lets the tunnel go on here, as if nothing had been.
func (f *Frozen) Thaw() { f.t.loop.call(func() { f.t.loop.thaw(f.t) }) }

// Release lets go of the tunnel, which goes on elsewhere: nothing is said to
// anybody, and the descriptors here are closed.
func (f *Frozen) Release() { f.t.loop.call(func() { f.t.loop.release(f.t) }) }

// freeze sends what the socket takes, and takes t out of the loop.
func (l *eventLoop) freeze(t *tunnel) (*Frozen, error) {
	if t.ended || t.frozen || l.gone() {
		return nil, ErrNotMovable
	}
	since := time.Now()
	l.flush(t)
	if t.ended {
		return nil, ErrNotMovable
	}
	f := &Frozen{t: t, Files: []int{int(t.fd)}, Since: since}
	if err := f.export(l.now); err != nil {
		return nil, err
	}
	t.frozen = true
	l.unwatch(t)
	return f, nil
}

// unwatch takes t and what it carries out of the loop's care.
func (l *eventLoop) unwatch(t *tunnel) {
	_ = unix.EpollCtl(l.ep, unix.EPOLL_CTL_DEL, int(t.fd), nil) // it is there
	for _, c := range t.conns.All() {
		_ = unix.EpollCtl(l.ep, unix.EPOLL_CTL_DEL, int(c.fd), nil) // as above
		c.flags &^= connWatched | connAgain
		l.conns[c.slot] = nil
		l.freedConns = append(l.freedConns, c.slot)
	}
	l.tunnels[t.slot] = nil
	l.freedTunnels = append(l.freedTunnels, t.slot)
	l.open--
	mine := func(o *tunnel) bool { return o == t }
	l.dirty = slices.DeleteFunc(l.dirty, mine)
	l.againTunnels = slices.DeleteFunc(l.againTunnels, mine)
	l.held = slices.DeleteFunc(l.held, mine)
	l.again = slices.DeleteFunc(l.again, func(c *Conn) bool { return c.tunnel == t })
	t.dirty, t.again, t.held = false, false, false
}

// export fills in the state of f's tunnel.
func (f *Frozen) export(now time.Time) error {
	t, s := f.t, &f.State
	var err error
	if s.Core, err = t.core.State(now); err != nil {
		return err
	}
	if s.Seal, err = t.seal.State(); err != nil {
		return err
	}
	if s.Open, err = t.open.State(); err != nil {
		s.Seal.Wipe()
		return err
	}
	s.Peer, s.Ends, s.Remote, s.Local = t.peer, t.proof, t.remote, t.local
	if e, ok := t.host.(*entry); ok {
		s.Source, s.Peers, s.Address = e.target.Source, e.target.Peers, e.target.Address
	}
	s.Left, s.Unsent = slices.Clone(t.left), slices.Clone(t.unsent)
	s.Owed, s.Greeted = t.owed, t.greeted
	for _, c := range t.conns.All() {
		s.Conns = append(s.Conns, c.export(now, t.ahead[c.id]))
		f.Files = append(f.Files, int(c.fd))
		f.Owners = append(f.Owners, c.owner)
	}
	for _, r := range t.requests.All() {
		s.Requests = append(s.Requests, RequestState{
			ID: r.id, Authority: r.text, Header: r.Header, Early: r.early.bytes(0), Ended: r.ended,
		})
	}
	return nil
}

func (c *Conn) export(now time.Time, ahead int) ConnState {
	s := ConnState{
		ID: c.id, FromApp: c.fromApp.Load(), ToApp: c.toApp.Load(), Queue: c.queue.bytes(ahead), Ahead: ahead,
		Open: c.is(connOpen), ReadEnd: c.is(connReadEnd), PeerEnd: c.is(connPeerEnd), Shut: c.is(connShut), Deaf: c.is(connDeaf),
	}
	if op := c.opening; op != nil {
		s.Authority, s.Header = op.authority, op.header
		s.Patience = min(max(op.deadline.Sub(now), 0), maxPatience)
	}
	return s
}

// bytes returns a copy of what waits in q, which may be nil, but for the first
// bytes.
func (q *queue) bytes(without int) []byte {
	if q == nil {
		return nil
	}
	return slices.Concat(q.pieces(without)...)
}

// thaw gives t back to the loop, and does what was put aside meanwhile.
func (l *eventLoop) thaw(t *tunnel) {
	if l.gone() {
		t.abandon()
		return
	}
	t.frozen = false
	t.ahead = nil
	t.move.Store(false)
	t.gone.Store(t.core.Draining())
	t.core.Hold(false)
	l.take(t)
	late := t.late
	t.late = nil
	for i := range late {
		l.do(&late[i])
	}
}

// take makes t, which has its state, the loop's. What the kernel has to say of
// its sockets it says anew when they are watched.
func (l *eventLoop) take(t *tunnel) {
	t.slot = l.tunnelSlot(t)
	l.open++
	t.greedy = true
	t.waiting, t.waitHead = nil, 0
	err := watch(l.ep, int(t.fd), aboutTunnel, t.slot)
	for _, c := range t.conns.All() {
		c.flags = c.flags&^(connInLine|connStalled|connAgain) | connGreedy
		c.slot = l.connSlot(c)
		cerr := err
		if cerr == nil && c.Cause() != nil {
			cerr = errors.New("aborted") // its cause is what counts
		}
		if cerr == nil {
			cerr = watch(l.ep, int(c.fd), aboutConn, c.slot)
		}
		if cerr != nil {
			l.endConn(c, cerr)
			continue
		}
		c.flags |= connWatched
	}
	if err != nil {
		l.endTunnel(t, err, false)
		return
	}
	l.touch(t)
	l.wakeAt(t.due(l.now))
}

// release forgets t.
func (l *eventLoop) release(t *tunnel) {
	for _, c := range t.conns.All() {
		if c.queue != nil {
			c.queue.clear(&l.store)
			c.queue = nil
		}
		_ = unix.Close(int(c.fd)) // a copy of it is open elsewhere
		c.fd = -1
		c.flags |= connDead
		owner := c.owner
		c.owner, c.tunnel, c.opening = nil, nil, nil
		owner.Ended(ErrMoved)
	}
	for _, r := range t.requests.All() {
		r.gone = true
		if r.early != nil {
			r.early.clear(&l.store)
			r.early = nil
		}
	}
	t.forget()
	l.unread(t, -t.queued)
	t.host.over(t, nil)
}

// forget lets go of the tunnel's own.
func (t *tunnel) forget() {
	t.ended, t.frozen = true, false
	t.gone.Store(true)
	t.core.Close()
	_ = unix.Close(int(t.fd)) // as in release
	t.fd = -1
	t.seal.Wipe()
	t.open.Wipe()
	t.left, t.memory, t.unsent = nil, nil, nil
	late := t.late
	t.late = nil
	for i := range late {
		late[i].refuse()
	}
}

// abandon ends a tunnel that is not in the loop any more, which has ended.
func (t *tunnel) abandon() {
	t.abort(errStopped)
	t.forget()
	t.loop.engine.unread.Add(-int64(t.queued))
	t.host.over(t, errStopped)
}

// abort ends the connections of a tunnel that is not in the loop.
func (t *tunnel) abort(err error) {
	for _, c := range t.conns.All() {
		abortSocket(c.fd)
		c.fd = -1
		c.over(err)
	}
}

// gone reports whether the loop has ended.
func (l *eventLoop) gone() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.closed
}

// aside keeps w for later if what it is about is frozen.
func (l *eventLoop) aside(w *work) bool {
	t := w.tunnel
	switch {
	case w.kind == workAnswer:
		t = w.req.tunnel
	case w.kind == workAbort && w.conn.loop.Load() == l:
		t = w.conn.tunnel
	}
	if t == nil || !t.frozen {
		return false
	}
	t.late = append(t.late, *w)
	return true
}

// An Arrival is a tunnel from another process that has not begun here. Exactly
// one of Go and Discard is called, once.
type Arrival struct {
	t     *tunnel
	admit func() error // tells the host, and returns why it does not want t
	state TunnelState
}

// A Place is where a connection of an arriving tunnel is kept from then on.
type Place struct {
	Conn  *Conn
	Owner Owner
}

// Resume prepares a tunnel that comes from another process, for the pod that
// target names; its Peers are those of the state. files are the descriptors of
// the tunnel and of its connections, which are the engine's unless it fails.
func (p *Pool) Resume(owner string, s TunnelState, files []int, places []Place) (*Arrival, error) {
	target := hbone.Target{Owner: owner, Source: s.Source, Peers: s.Peers, Address: s.Address}
	if s.Core.Role != hbone.ClientRole || !slices.Contains(s.Peers, s.Peer) {
		return nil, errors.New("resume tunnel: it is not a client's with a peer that was asked for")
	}
	a, err := p.engine.arrive(s, files, places)
	if err != nil {
		return nil, err
	}
	a.t.idle = p.cfg.IdleTimeout
	for i, c := range s.Conns {
		if !c.Open {
			places[i].Conn.opening = &opening{
				pool: p, target: target, authority: c.Authority, header: c.Header,
				deadline: time.Now().Add(c.Patience),
			}
			a.t.opening++
		}
	}
	a.admit = func() error {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.closed {
			return errPoolClosed
		}
		k := keyOf(target)
		e := p.entries[k]
		if e == nil {
			e = &entry{pool: p, key: k, target: target}
			p.entries[k] = e
		}
		a.t.host = e
		e.tunnels = append(e.tunnels, a.t)
		p.wg.Add(1)
		return nil
	}
	return a, nil
}

// Resume prepares a tunnel that comes from another process, as Pool.Resume
// does.
func (s *Server) Resume(st TunnelState, files []int, places []Place) (*Arrival, error) {
	if st.Core.Role != hbone.ServerRole {
		return nil, errors.New("resume tunnel: it is not a server's")
	}
	a, err := s.engine.arrive(st, files, places)
	if err != nil {
		return nil, err
	}
	a.t.host = s
	a.admit = func() error {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.aborted != nil {
			return s.aborted
		}
		s.work.Add(1)
		s.tunnels[a.t] = struct{}{}
		if s.ending {
			a.t.loop.post(work{kind: workShutdown, tunnel: a.t})
		}
		return nil
	}
	return a, nil
}

// arrive makes the tunnel of a state. Its host is still missing.
func (e *Engine) arrive(s TunnelState, files []int, places []Place) (*Arrival, error) {
	if err := s.check(len(places)); err != nil {
		return nil, fmt.Errorf("resume tunnel: %w", err)
	}
	if len(files) != 1+len(places) {
		return nil, fmt.Errorf("resume tunnel: %d files for %d connections", len(files), len(places))
	}
	now := time.Now()
	t := &tunnel{
		loop: e.pick(), peer: s.Peer, client: s.Core.Role == hbone.ClientRole, proof: s.Ends,
		remote: s.Remote, local: s.Local,
		fd: int32(files[0]), left: s.Left, unsent: s.Unsent, memory: s.Unsent, blocked: len(s.Unsent) > 0,
		owed: s.Owed, greeted: s.Greeted, unused: now, frozen: true,
	}
	var err error
	if t.core, err = hbone.ResumeTunnel(s.Core, now); err != nil {
		return nil, err
	}
	if t.seal, err = record.ResumeSealer(s.Seal); err != nil {
		return nil, fmt.Errorf("resume tunnel: %w", err)
	}
	if t.open, err = record.ResumeOpener(s.Open); err != nil {
		t.seal.Wipe()
		return nil, fmt.Errorf("resume tunnel: %w", err)
	}
	if !t.client {
		// Of the streams, those with an answer have had their work.
		for range len(s.Core.Streams) - len(s.Requests) {
			t.core.Release()
		}
	}
	t.load.Store(int32(len(places)))
	t.room.Store(int32(t.core.MaxStreams()))
	t.gone.Store(t.core.Draining())
	for i, cs := range s.Conns {
		c := places[i].Conn
		c.owner, c.tunnel, c.id, c.fd = places[i].Owner, t, cs.ID, int32(files[1+i])
		c.fromApp.Store(cs.FromApp)
		c.toApp.Store(cs.ToApp)
		c.flags = cs.flags()
		if cs.Ahead > 0 {
			c.queue = queueOf(cs.Early)
		}
		c.loop.Store(t.loop)
		t.conns.Put(cs.ID, c)
	}
	s.Wipe()
	return &Arrival{t: t, state: s}, nil
}

func (s *ConnState) flags() connFlags {
	var f connFlags
	for _, b := range []struct {
		set  bool
		flag connFlags
	}{{s.Open, connOpen}, {s.ReadEnd, connReadEnd}, {s.PeerEnd, connPeerEnd}, {s.Shut, connShut}, {s.Deaf, connDeaf}} {
		if b.set {
			f |= b.flag
		}
	}
	return f
}

// Peer returns who is at the other end of the tunnel. It does not change.
func (a *Arrival) Peer() *mesh.Identity { return &a.t.peer }

// Go lets the tunnel go on here. Its former process must not touch it any more.
// Owners of connections that cannot go on hear so at once. It does not wait for
// the loop: begun is called when the tunnel goes on, or has ended, there or here.
func (a *Arrival) Go(begun func()) {
	t := a.t
	if err := a.admit(); err != nil {
		t.abort(err)
		t.forget()
		begun()
		return
	}
	begin := func() {
		if t.loop.gone() {
			t.abandon()
		} else {
			t.loop.resume(t, &a.state)
		}
		begun()
	}
	if !t.loop.post(work{kind: workCall, call: begin}) {
		begin()
	}
}

// Discard lets go of the tunnel, which does not go on here.
func (a *Arrival) Discard() {
	for _, c := range a.t.conns.All() {
		_ = unix.Close(int(c.fd)) // a copy of it is open elsewhere
		c.fd = -1
		c.over(ErrMoved)
	}
	a.t.forget()
}

// resume begins an arrival.
func (l *eventLoop) resume(t *tunnel, s *TunnelState) {
	t.frozen = false
	for i := range s.Conns {
		l.unread(t, s.Conns[i].Ahead)
		l.refill(t, &t.conns.At(s.Conns[i].ID).queue, s.Conns[i].Queue)
	}
	l.take(t)
	late := t.late
	t.late = nil
	for i := range late {
		l.do(&late[i])
	}
	for _, rs := range s.Requests {
		if t.ended {
			return
		}
		r := &Request{
			tunnel: t, id: rs.ID, text: rs.Authority, Header: rs.Header, Peer: &t.peer, Remote: t.remote, Local: t.local,
			ended: rs.Ended,
		}
		l.refill(t, &r.early, rs.Early)
		t.requests.Put(r.id, r)
		t.host.requested(r)
	}
}

// refill makes a queue of what waits.
func (l *eventLoop) refill(t *tunnel, q **queue, p []byte) {
	if len(p) == 0 {
		return
	}
	if *q == nil {
		*q = l.store.queue()
	}
	(*q).write(&l.store, p)
	l.unread(t, len(p))
}
