package loop

import (
	"github.com/weft-mesh/weft/hbone"
	"github.com/weft-mesh/weft/internal/http2"
)

// The Events of the protocol, which come while a loop reads a tunnel.
var _ hbone.Events = (*tunnel)(nil)

// conn returns the connection of a stream, or nil.
func (t *tunnel) conn(id uint32) *Conn {
	if t.last == nil || t.last.id != id {
		t.last = t.conns.At(id)
	}
	return t.last
}

// Requested begins the work for a request.
func (t *tunnel) Requested(id uint32, authority string, h hbone.Header) {
	r := &Request{tunnel: t, id: id, text: authority, Header: h, Peer: &t.peer, Remote: t.remote, Local: t.local}
	t.requests.Put(id, r)
	t.host.requested(r)
}

// Answered opens a connection, or ends it.
func (t *tunnel) Answered(id uint32, status int, _ hbone.Header) {
	c := t.conns.At(id)
	if c == nil {
		return
	}
	if status/100 != 2 {
		t.loop.endConn(c, &hbone.StatusError{Code: status})
		return
	}
	t.opening--
	c.opening.free() // nothing but c has it
	c.opening = nil
	c.flags |= connOpen
	c.owner.Opened(&t.peer)
	t.loop.later(c) // what it has said so far was not read
	if c.queue != nil {
		t.loop.drainQueue(c)
	}
}

// Data gives p to the application.
func (t *tunnel) Data(id uint32, p []byte) {
	if c := t.conn(id); c != nil && !c.is(connDeaf) {
		t.loop.deliver(c, p)
		return
	}
	if r := t.requests.At(id); r != nil {
		r.hold(p)
		return
	}
	t.core.Consumed(id, len(p))
}

// Ended passes the end on.
func (t *tunnel) Ended(id uint32) {
	if c := t.conn(id); c != nil {
		c.flags |= connPeerEnd
		t.loop.passEnd(c)
	} else if r := t.requests.At(id); r != nil {
		r.ended = true
	}
}

// Aborted ends a connection. A peer that is done resets the stream, but ends
// its direction before (RFC 9113 8.1): then the application still gets what
// came. Without that end the peer has cut it short.
func (t *tunnel) Aborted(id uint32, err *http2.StreamError, refused bool) {
	if r := t.requests.At(id); r != nil {
		t.loop.forgetRequest(r)
		return
	}
	c := t.conns.At(id)
	switch {
	case c == nil:
	case c.opening != nil && refused && t.greeted:
		t.loop.bounce(c, &resetError{"the peer refused the connection", err})
	case c.is(connPeerEnd) && c.is(connOpen) && (err.Code == http2.NoError || err.Code == http2.Cancel):
		c.flags |= connDeaf
		t.loop.later(c)
	default:
		t.loop.endConn(c, &resetError{"the tunnelled connection was aborted", err})
	}
}

// Writable lets go on what waited for window. Those that wait for the
// tunnel's have their turns at the end of the batch.
func (t *tunnel) Writable(id uint32) {
	if id != 0 {
		if c := t.conn(id); c != nil && c.is(connStalled) {
			c.flags &^= connStalled
			t.loop.later(c)
		}
		return
	}
	t.greeted = true
	for _, c := range t.conns.All() {
		if c.is(connStalled) {
			c.flags &^= connStalled
			t.loop.later(c)
		}
	}
}
