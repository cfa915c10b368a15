package h2

import (
	"io"
	"sync"

	"github.com/weft-mesh/weft/internal/http2"
	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

// A Stream is one stream of a Conn. What sends may be called from any
// goroutine, one at a time; what it queues goes with the next Flush.
type Stream struct {
	conn *Conn
	sink Sink
	id   uint32 // 0 until a client has sent the head

	// Of the goroutine of Run.
	got      int64
	declared int64 // content-length of what comes, -1 if it has not said

	// Under the Conn's mutex.
	recv      http2.ReceiveWindow
	unread    int // received, not credited
	window    http2.SendWindow
	pend      []byte // pend[off:] is to be sent
	off       int
	trail     *msg.Head // after pend
	ends      bool      // after pend and trail
	source    *Stream   // credited when bytes of pend leave
	queued    bool      // is in the Conn's ready
	headed    bool      // a client has got the final head
	localEnd  bool
	remoteEnd bool
	discard   bool
	dead      error
	room      sync.Cond // on pend
}

func (c *Conn) newStream(sink Sink) *Stream {
	s := &Stream{conn: c, sink: sink, declared: -1}
	s.recv = http2.NewReceiveWindow(c.cfg.StreamWindow)
	s.window.Add(int64(c.peer.StreamWindow))
	s.room.L = &c.mu
	return s
}

// Open reserves a stream for a request. The request begins with Head; Reset
// gives it back unused. It fails with ErrRefused if there are as many streams as
// the peer allows, and at most so many, or that part in percent of them (but one
// in any case); or if none may be begun any more.
func (c *Conn) Open(sink Sink, most, percent int) (*Stream, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.goingAway || c.dead != nil || c.nextID > http2.MaxStreamID-2*defaultStreams {
		return nil, ErrRefused
	}
	allowed := int(min(c.peer.MaxStreams, uint32(most)))
	if allowed > 1 {
		allowed = max(1, allowed*percent/100)
	}
	if len(c.streams)+c.reserved >= allowed {
		return nil, ErrRefused
	}
	c.reserved++
	return c.newStream(sink), nil
}

// ID returns the number of the stream, 0 before it has begun.
func (s *Stream) ID() uint32 { return s.id }

// Conn returns the connection of the stream.
func (s *Stream) Conn() *Conn { return s.conn }

// Expect says how long the body is that comes; what differs resets the stream.
// It is called by a Sink that has read the head, or by Accept.
func (s *Stream) Expect(n int64) { s.declared = n }

// Answered notes that the final head of a response has come: what follows is
// its body. It is called by a Sink that has read the head.
func (s *Stream) Answered() {
	s.conn.mu.Lock()
	s.headed = true
	s.conn.mu.Unlock()
}

// From makes bytes of what is sent on s count as taken from source, once they
// leave: what is queued then counts, too. With nil nobody is credited.
func (s *Stream) From(source *Stream) {
	s.conn.mu.Lock()
	s.source = source
	s.conn.mu.Unlock()
}

// Queued returns how many bytes of Data have not left yet.
func (s *Stream) Queued() int {
	s.conn.mu.Lock()
	defer s.conn.mu.Unlock()
	return len(s.pend) - s.off
}

// Credit lets the peer send n bytes more: those of Data that nobody needs any
// more.
func (s *Stream) Credit(n int) {
	c := s.conn
	c.mu.Lock()
	s.credit(n)
	c.mu.Unlock()
}

// credit is Credit with the mutex held.
func (s *Stream) credit(n int) {
	n = min(n, s.unread)
	if n <= 0 {
		return
	}
	s.unread -= n
	s.conn.recv.Credit(n)
	s.recv.Credit(n)
	if !s.remoteEnd && s.dead == nil {
		if inc := s.recv.Announce(); inc > 0 {
			s.conn.out = http2.AppendWindowUpdate(s.conn.out, s.id, inc)
		}
	}
	s.conn.announce()
}

// announce opens the connection's window. The mutex is held.
func (c *Conn) announce() {
	if inc := c.recv.Announce(); inc > 0 {
		c.out = http2.AppendWindowUpdate(c.out, 0, inc)
	}
}

// Discard throws away what comes from now on. Once the stream has been sent to
// its end, the peer is told that the rest is of no interest.
func (s *Stream) Discard() {
	s.conn.mu.Lock()
	s.throwAway()
	s.conn.mu.Unlock()
}

// throwAway is Discard with the mutex held.
func (s *Stream) throwAway() {
	s.credit(s.unread)
	if s.discard || s.dead != nil || s.localEnd && s.remoteEnd {
		return
	}
	s.discard = true
	s.conn.finished(s)
}

// Reset ends the stream with an error, unless it has ended. Its Sink is not
// called any more, but for a call that is being made.
func (s *Stream) Reset(code http2.ErrCode) {
	c := s.conn
	c.mu.Lock()
	s.credit(s.unread) // nobody else will, if the stream has ended
	if s.dead != nil || s.localEnd && s.remoteEnd {
		c.mu.Unlock()
		return
	}
	s.gone(&http2.StreamError{StreamID: s.id, Code: code, Reason: "reset by this proxy"})
	if s.id == 0 {
		c.reserved--
		c.drained()
		c.freed()
	} else {
		c.out = http2.AppendRSTStream(c.out, s.id, code)
		c.closed.add(s.id, resetHere)
		c.remove(s)
	}
	notes := c.takeNotes()
	c.mu.Unlock()
	settle(notes)
}

// Release says that what Accept has begun is over. It discards, as Discard does.
func (s *Stream) Release() {
	s.conn.mu.Lock()
	s.conn.running--
	s.throwAway()
	s.conn.mu.Unlock()
}

// Err returns why nothing more can be sent on the stream, nil if it can.
func (s *Stream) Err() error {
	s.conn.mu.Lock()
	defer s.conn.mu.Unlock()
	return s.cannotSend()
}

// cannotSend is Err with the mutex held.
func (s *Stream) cannotSend() error {
	switch {
	case s.dead != nil:
		return s.dead
	case s.conn.dead != nil:
		return s.conn.dead
	case s.ends || s.localEnd:
		return io.ErrClosedPipe
	}
	return nil
}

// gone marks the stream dead and lets go of what it holds. The mutex is held.
func (s *Stream) gone(why error) {
	s.dead = why
	s.credit(s.unread)
	if n := len(s.pend) - s.off; n > 0 && s.source != nil {
		s.conn.note(s.source, n)
	}
	s.pend, s.off, s.trail = nil, 0, nil
	s.room.Broadcast()
}

// finished removes the stream if both sides have ended it. The mutex is held.
func (c *Conn) finished(s *Stream) {
	if !s.localEnd || s.dead != nil {
		return
	}
	switch {
	case s.remoteEnd:
		c.closed.add(s.id, ended)
		c.remove(s)
	case s.discard:
		c.out = http2.AppendRSTStream(c.out, s.id, http2.NoError)
		c.closed.add(s.id, resetHere)
		c.remove(s)
		s.gone(io.ErrClosedPipe)
	}
}

// remove forgets the stream. The mutex is held.
func (c *Conn) remove(s *Stream) {
	delete(c.streams, s.id)
	if len(c.streams) == 0 {
		c.since = c.now
	}
	c.drained()
	c.freed()
}

// freed tells that there is room for another stream. The mutex is held.
func (c *Conn) freed() {
	if c.cfg.Room != nil {
		c.cfg.Room()
	}
}
