package h2

import (
	"runtime"
	"sync"
	"time"

	"github.com/weft-mesh/weft/internal/http2"
	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

const (
	// batch is how much is gathered for one write.
	batch = 64 << 10
	// highWater is how much a writer that waits may have queued on a stream.
	highWater = 64 << 10
	// quantum is how much one stream sends before the next has its turn.
	quantum = 16 << 10
)

// A note says that bytes which came from a stream have left.
type note struct {
	source *Stream
	n      int
}

// notesLen is how many notes are made without more memory.
const notesLen = 128

// notePool holds the memory of notes.
var notePool = sync.Pool{New: func() any { return new([notesLen]note) }}

// note notes that n bytes have left s, or never will. The mutex is held.
func (c *Conn) note(source *Stream, n int) {
	if c.notes == nil {
		c.notes = notePool.Get().(*[notesLen]note)[:0]
	}
	c.notes = append(c.notes, note{source, n})
}

// takeNotes takes the notes, to be settled without the mutex. The mutex is
// held.
func (c *Conn) takeNotes() []note {
	notes := c.notes
	c.notes = nil
	return notes
}

// settle credits streams of other connections. No mutex is held.
func settle(notes []note) {
	for i := 0; i < len(notes); {
		c := notes[i].source.conn
		c.mu.Lock()
		for ; i < len(notes) && notes[i].source.conn == c; i++ {
			notes[i].source.credit(notes[i].n)
		}
		waiting := len(c.out) > 0
		c.mu.Unlock()
		if waiting {
			c.Flush()
		}
	}
	if cap(notes) == notesLen {
		clear(notes)
		notePool.Put((*[notesLen]note)(notes[:notesLen]))
	}
}

// Head sends the head of the message, or an interim one; end says that nothing
// follows.
func (s *Stream) Head(h *msg.Head, end bool) error {
	c := s.conn
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := s.cannotSend(); err != nil {
		return err
	}
	if s.id == 0 {
		if c.goingAway {
			return ErrRefused
		}
		c.reserved--
		s.id = c.nextID
		c.nextID += 2
		c.streams[s.id] = s
	}
	c.encode(h)
	c.putBlock(s, end)
	return nil
}

// putBlock sends the encoded block as HEADERS. The mutex is held.
func (c *Conn) putBlock(s *Stream, end bool) {
	c.out = http2.AppendHeaders(c.out, s.id, c.block, end, int(min(c.peer.MaxFrame, http2.MinFrameSize)))
	if end {
		s.ends, s.localEnd = true, true
		c.finished(s)
	}
}

// Data sends a piece of the body, which it copies. end says that nothing
// follows. It does not wait: who may send much at once calls Wait before.
func (s *Stream) Data(p []byte, end bool) error {
	c := s.conn
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := s.cannotSend(); err != nil {
		return err
	}
	s.ends = end
	if s.off == len(s.pend) {
		p = c.direct(s, p)
	}
	if len(p) > 0 {
		s.pend = append(s.pend, p...)
	}
	c.queue(s)
	return nil
}

// Trailers ends the stream with trailers, after what is queued; h may be nil or
// empty.
func (s *Stream) Trailers(h *msg.Head) error {
	if h == nil || !hasFields(h) {
		return s.Data(nil, true)
	}
	c := s.conn
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := s.cannotSend(); err != nil {
		return err
	}
	s.ends = true
	if s.off == len(s.pend) {
		c.encodeTrailers(h)
		c.putBlock(s, true)
		return nil
	}
	s.trail = &msg.Head{}
	s.trail.Reset()
	for name, value := range h.All {
		msg.Append(s.trail, name, value)
	}
	c.queue(s)
	return nil
}

func hasFields(h *msg.Head) bool {
	for range h.All {
		return true
	}
	return false
}

// Wait waits until little enough is queued on the stream for another piece.
func (s *Stream) Wait() error {
	c := s.conn
	c.mu.Lock()
	defer c.mu.Unlock()
	for s.dead == nil && c.dead == nil && len(s.pend)-s.off >= highWater {
		s.room.Wait()
	}
	return s.cannotSend()
}

// Sent waits until all that is queued on the stream has left.
func (s *Stream) Sent() error {
	c := s.conn
	c.mu.Lock()
	defer c.mu.Unlock()
	for s.dead == nil && c.dead == nil && s.off < len(s.pend) {
		s.room.Wait()
	}
	return s.dead
}

// direct sends of p what may go at once, without queueing it, and returns the
// rest. The mutex is held.
func (c *Conn) direct(s *Stream, p []byte) []byte {
	for len(p) > 0 && len(c.out) < batch && len(c.ready) == 0 {
		n := c.may(s, len(p))
		if n == 0 {
			break
		}
		c.putData(s, p[:n], s.ends && n == len(p))
		p = p[n:]
	}
	return p
}

// may returns how much of n bytes s may send in one frame now.
func (c *Conn) may(s *Stream, n int) int {
	return min(n, s.window.Left(), c.window.Left(), int(min(c.peer.MaxFrame, quantum)))
}

// putData sends one DATA frame. The mutex is held.
func (c *Conn) putData(s *Stream, p []byte, end bool) {
	h := http2.Header{Length: uint32(len(p)), Type: http2.Data, StreamID: s.id}
	if end {
		h.Flags = http2.EndStream
	}
	c.out = append(http2.AppendHeader(c.out, h), p...)
	s.window.Take(len(p))
	c.window.Take(len(p))
	c.guard.Moved(len(p))
	if s.source != nil && len(p) > 0 {
		c.note(s.source, len(p))
	}
	if end {
		s.localEnd = true
		c.finished(s)
	}
}

// queue puts s among the streams that may send, if it can. The mutex is held.
func (c *Conn) queue(s *Stream) {
	if s.queued || s.dead != nil || s.localEnd || s.id == 0 {
		return
	}
	if s.off < len(s.pend) && s.window.Left() > 0 || s.off == len(s.pend) && s.ends {
		s.queued = true
		c.ready = append(c.ready, s)
	}
}

// fill takes from the streams in turn what may be sent. The mutex is held.
func (c *Conn) fill() {
	for len(c.out) < batch && len(c.ready) > 0 {
		s := c.ready[0]
		if s.dead == nil && s.off < len(s.pend) && s.window.Left() > 0 && c.window.Left() == 0 {
			return // until the connection's window opens
		}
		c.ready[0] = nil
		if c.ready = c.ready[1:]; len(c.ready) == 0 {
			c.ready = nil
		}
		s.queued = false
		if s.dead != nil || s.localEnd {
			continue
		}
		if n := c.may(s, len(s.pend)-s.off); n > 0 {
			last := s.off+n == len(s.pend)
			c.putData(s, s.pend[s.off:s.off+n], last && s.ends && s.trail == nil)
			if s.off += n; last {
				s.pend, s.off = s.pend[:0], 0
			}
			if len(s.pend)-s.off < highWater {
				s.room.Broadcast()
			}
		}
		if s.off == len(s.pend) && s.ends && !s.localEnd {
			c.putEnd(s)
			continue
		}
		c.queue(s)
	}
}

// putEnd ends s, all of whose bytes have gone. The mutex is held.
func (c *Conn) putEnd(s *Stream) {
	if s.trail != nil {
		c.encodeTrailers(s.trail)
		s.trail = nil
		c.putBlock(s, true)
		return
	}
	c.putData(s, nil, true)
}

// Flush sends what is queued, without waiting for the peer.
func (c *Conn) Flush() { c.flush(false) }

// FlushSoon is Flush by another goroutine, after those that are ready to run:
// what they send goes with the same write. It is for goroutines of streams, of
// which many run at once.
func (c *Conn) FlushSoon() {
	c.mu.Lock()
	due := !c.soon && !c.writing && c.dead == nil && (len(c.out) > 0 || len(c.ready) > 0)
	if due {
		c.soon = true
		c.writers.Add(1)
	}
	c.mu.Unlock()
	if due {
		go c.flushSoon()
	}
}

func (c *Conn) flushSoon() {
	defer c.writers.Done()
	runtime.Gosched()
	c.mu.Lock()
	c.soon = false
	c.mu.Unlock()
	c.Flush()
}

// flush is Flush; last sends although nothing may follow.
func (c *Conn) flush(last bool) {
	c.mu.Lock()
	for !c.writing && !c.broken && (c.dead == nil || last) {
		if c.dead == nil {
			c.fill()
		}
		if len(c.out) == 0 {
			break
		}
		b, notes := c.swap()
		c.mu.Unlock()
		settle(notes)
		n, err := c.try(b)
		c.mu.Lock()
		if err == nil && n < len(b) {
			c.writers.Add(1)
			go c.write(b, n)
			break // c.writing stays set
		}
		c.written(b, err)
	}
	c.leave()
}

// leave unlocks the mutex, and closes a connection that has nothing left to do.
func (c *Conn) leave() {
	if c.over && !c.writing && len(c.out) == 0 && c.dead == nil {
		c.shut() // Run returns
	}
	notes := c.takeNotes()
	c.mu.Unlock()
	settle(notes)
}

// swap takes what is to be written and begins to write. The mutex is held.
func (c *Conn) swap() ([]byte, []note) {
	b := c.out
	if c.spare == nil {
		c.spare = outPool.Get().(*[outLen]byte)[:0]
	}
	c.out, c.spare = c.spare, nil
	c.writing = true
	c.guard.Flushed()
	return b, c.takeNotes()
}

// written ends what swap began. The mutex is held.
func (c *Conn) written(b []byte, err error) {
	c.writing = false
	if err != nil && !c.broken {
		c.broken = true
		if c.dead == nil {
			c.dead = err
			c.shut() // Run returns and ends the streams
		}
		for _, s := range c.streams {
			s.room.Broadcast()
		}
	}
	if cap(b) > 4*batch {
		b = nil
	}
	if len(c.streams) == 0 && len(c.out) == 0 {
		// An idle connection keeps no buffers.
		putOut(c.out)
		putOut(b)
		c.out, c.spare = nil, nil
		return
	}
	if c.spare == nil && b != nil {
		c.spare = b[:0]
	} else {
		putOut(b)
	}
}

// outLen is the size of buffers for what is sent; a larger batch has one of its
// own.
const outLen = 8 << 10

// outPool holds the buffers that idle connections do not need.
var outPool = sync.Pool{New: func() any { return new([outLen]byte) }}

func putOut(b []byte) {
	if cap(b) == outLen {
		outPool.Put((*[outLen]byte)(b[:outLen]))
	}
}

// try writes as much of b as the connection takes at once.
func (c *Conn) try(b []byte) (int, error) {
	if c.sock.raw != nil {
		return c.sock.write(b)
	}
	if t, ok := c.conn.(interface{ TryWrite([]byte) (int, error) }); ok { // such as a stream of a tunnel
		return t.TryWrite(b)
	}
	return 0, nil
}

// shut closes the connection. It does not wait: whoever flushes may be the one
// that reads, and a close waits for the reader. The mutex is held.
func (c *Conn) shut() {
	if c.shutting {
		return
	}
	c.shutting = true
	c.writers.Add(1)
	go func() {
		defer c.writers.Done()
		_ = c.conn.Close() // nothing that mattered is left
	}()
}

// write writes what a flush could not, and what gathers meanwhile. It is a
// goroutine of its own, which ends when nothing is left.
func (c *Conn) write(b []byte, from int) {
	defer c.writers.Done()
	for {
		err := c.conn.SetWriteDeadline(time.Now().Add(writeStall))
		if err == nil {
			_, err = c.conn.Write(b[from:])
		}
		from = 0
		c.mu.Lock()
		c.written(b, err)
		if c.dead == nil {
			c.fill()
		}
		if c.broken || len(c.out) == 0 {
			if c.dead == nil {
				_ = c.conn.SetWriteDeadline(time.Time{}) // it fails on a closed one only
			}
			c.leave()
			return
		}
		var notes []note
		b, notes = c.swap()
		c.mu.Unlock()
		settle(notes)
	}
}
