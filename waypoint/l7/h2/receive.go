package h2

import (
	"errors"
	"io"
	"net"

	"github.com/weft-mesh/weft/internal/http2"
)

func isEnd(err error) bool { return errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) }

func protocolError(reason string) error {
	return &http2.ConnError{Code: http2.ProtocolError, Reason: reason}
}

// idle reports whether a stream has never been.
func (c *Conn) idle(id uint32) bool {
	if c.cfg.Server {
		return id%2 == 0 || id > c.lastID
	}
	return id%2 == 0 || id >= c.nextID
}

// offend resets a stream on which the peer has broken a rule. The mutex is
// held.
func (c *Conn) offend(id uint32, code http2.ErrCode, reason string) error {
	s := c.streams[id]
	c.out = http2.AppendRSTStream(c.out, id, code)
	c.closed.add(id, resetHere)
	if s != nil {
		why := &http2.StreamError{StreamID: id, Code: code, Reason: reason}
		s.gone(why)
		c.remove(s)
		if sink := s.sink; sink != nil {
			notes := c.takeNotes()
			c.mu.Unlock()
			settle(notes)
			sink.Reset(why)
			c.mu.Lock()
		}
	}
	if !c.cfg.Server {
		return nil
	}
	return c.guard.Reset(c.now)
}

func (c *Conn) onData(f http2.Frame) error {
	c.mu.Lock()
	if f.Start {
		if err := c.beginData(f); err != nil {
			c.mu.Unlock()
			return err
		}
	}
	c.dataLen -= len(f.Payload)
	c.guard.Moved(len(f.Payload))
	s := c.dataTo
	if s == nil {
		c.mu.Unlock()
		return nil
	}
	if f.End {
		// What is left is padding.
		s.credit(c.dataLen)
		c.dataTo = nil
	}
	end := f.End && f.Flags.Has(http2.EndStream)
	s.got += int64(len(f.Payload))
	if s.dead != nil {
		s.credit(len(f.Payload))
		c.mu.Unlock()
		return nil
	}
	if s.declared >= 0 && (s.got > s.declared || end && s.got < s.declared) {
		c.dataTo = nil
		err := c.offend(s.id, http2.ProtocolError, "DATA does not match content-length")
		c.mu.Unlock()
		return err
	}
	if end {
		s.remoteEnd = true
		c.finished(s)
	}
	discard := s.discard
	if discard {
		s.credit(len(f.Payload))
	}
	c.mu.Unlock()
	if !discard && (len(f.Payload) > 0 || end) {
		s.sink.Data(f.Payload, end)
	}
	return nil
}

// beginData accounts for a DATA frame and finds its stream. The mutex is held.
func (c *Conn) beginData(f http2.Frame) error {
	n := int(f.Length)
	c.dataLen, c.dataTo = n, nil
	if !c.recv.Receive(n) {
		return &http2.ConnError{Code: http2.FlowControlError, Reason: "more DATA than the connection's window"}
	}
	if n == 0 && !f.Flags.Has(http2.EndStream) {
		if err := c.guard.Idle(c.now); err != nil {
			return err
		}
	}
	s := c.streams[f.StreamID]
	if s != nil && !s.remoteEnd && (c.cfg.Server || s.headed) {
		if !s.recv.Receive(n) {
			c.recv.Credit(n)
			return c.offend(s.id, http2.FlowControlError, "more DATA than the stream's window")
		}
		s.unread += n
		c.dataTo = s
		return nil
	}
	c.recv.Credit(n)
	c.announce()
	switch {
	case s != nil && !s.remoteEnd:
		return c.offend(f.StreamID, http2.ProtocolError, "DATA before the head")
	case s == nil && c.idle(f.StreamID):
		return protocolError("DATA on a stream that was never begun")
	case s == nil && c.closed.why(f.StreamID) == resetHere:
		return nil // it has crossed with our reset
	}
	return c.offend(f.StreamID, http2.StreamClosed, "DATA after the end")
}

func (c *Conn) onHeaders(f http2.Frame) error {
	fields, err := c.fields.Read(f.Payload)
	if err != nil && isLost(err) {
		return err
	}
	end := f.Flags.Has(http2.EndStream)
	c.mu.Lock()
	s := c.streams[f.StreamID]
	if s == nil {
		return c.onHeadOfNone(f.StreamID, fields, end, err) // unlocks
	}
	defer c.mu.Unlock()
	switch {
	case s.remoteEnd:
		return c.offend(s.id, http2.StreamClosed, "HEADERS after the end")
	case err != nil:
		return c.offend(s.id, http2.ProtocolError, err.Error())
	case (c.cfg.Server || s.headed) && (!end || !regular(fields)):
		return c.offend(s.id, http2.ProtocolError, "malformed trailers")
	case end && s.headed && s.declared >= 0 && s.got != s.declared:
		return c.offend(s.id, http2.ProtocolError, "DATA does not match content-length")
	}
	s.remoteEnd = end
	if s.dead != nil || s.discard {
		c.finished(s)
		return nil
	}
	c.mu.Unlock()
	err = s.sink.Fields(fields, end)
	c.mu.Lock()
	if err != nil {
		return c.offend(s.id, http2.ProtocolError, err.Error())
	}
	if end && s.declared > s.got {
		return c.offend(s.id, http2.ProtocolError, "DATA does not match content-length")
	}
	c.finished(s)
	return nil
}

// isLost reports whether an error is one of the connection.
func isLost(err error) bool {
	var ce *http2.ConnError
	return errors.As(err, &ce)
}

// unlocked calls f without the mutex.
func (c *Conn) unlocked(f func() error) error {
	c.mu.Unlock()
	defer c.mu.Lock()
	return f()
}

// regular reports whether there is no pseudo field.
func regular(fields []http2.Field) bool { return len(fields) == 0 || !fields[0].IsPseudo() }

// onHeadOfNone takes a head for which there is no stream: on a server that is
// how one begins. It unlocks the mutex.
func (c *Conn) onHeadOfNone(id uint32, fields []http2.Field, end bool, err error) error {
	defer c.mu.Unlock()
	if !c.cfg.Server || !c.idle(id) {
		switch c.closed.why(id) {
		case resetHere:
			return nil // it has crossed with our reset
		case resetThere:
			return c.offend(id, http2.StreamClosed, "HEADERS after a reset")
		case ended:
			return &http2.ConnError{Code: http2.StreamClosed, Reason: "HEADERS on a stream that has ended"}
		}
		return protocolError("HEADERS on a stream that cannot be")
	}
	if id%2 == 0 {
		return protocolError("a client's stream with an even number")
	}
	c.lastID = id
	if len(c.streams) >= c.cfg.Streams || c.running >= 2*c.cfg.Streams {
		return c.offend(id, http2.RefusedStream, "too many streams")
	}
	if err != nil && !errors.Is(err, http2.ErrListTooLarge) {
		return c.offend(id, http2.ProtocolError, err.Error())
	}
	s := c.newStream(nil)
	s.id, s.remoteEnd = id, end
	c.streams[id] = s
	c.running++
	c.mu.Unlock()
	sink, refused := c.cfg.Accept(s, fields, end, err != nil)
	c.mu.Lock()
	s.sink = sink
	switch {
	case refused != nil:
		c.running--
		return c.offend(id, http2.ProtocolError, refused.Error())
	case c.dead != nil && sink != nil:
		why := c.dead
		c.mu.Unlock()
		sink.Reset(why)
		c.mu.Lock()
	}
	return nil
}

func (c *Conn) onReset(f http2.Frame) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.streams[f.StreamID]
	if s == nil {
		if c.idle(f.StreamID) {
			return protocolError("RST_STREAM of a stream that was never begun")
		}
		return c.guard.Idle(c.now)
	}
	code := http2.Code(f.Payload)
	var why error = ErrReset{code}
	switch {
	case code == http2.RefusedStream && !c.cfg.Server:
		why = ErrRefused
	case code == http2.NoError && !c.cfg.Server && s.remoteEnd:
		why = io.EOF // the answer is whole, and the rest of the request is of no interest (RFC 9113 8.1)
	}
	s.gone(why)
	c.closed.add(s.id, resetThere)
	c.remove(s)
	if s.sink != nil {
		notes := c.takeNotes()
		_ = c.unlocked(func() error { settle(notes); s.sink.Reset(why); return nil }) // it has none
	}
	if !c.cfg.Server {
		return nil
	}
	return c.guard.Reset(c.now)
}

func (c *Conn) onWindow(f http2.Frame) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.guard.Idle(c.now); err != nil {
		return err
	}
	n := http2.Increment(f.Payload)
	if f.StreamID == 0 {
		if n == 0 {
			return protocolError("WINDOW_UPDATE by nothing")
		}
		if !c.window.Add(int64(n)) {
			return &http2.ConnError{Code: http2.FlowControlError, Reason: "the connection's window is too large"}
		}
		return nil
	}
	s := c.streams[f.StreamID]
	if s == nil {
		if c.idle(f.StreamID) {
			return protocolError("WINDOW_UPDATE of a stream that was never begun")
		}
		return nil
	}
	if n == 0 {
		return c.offend(s.id, http2.ProtocolError, "WINDOW_UPDATE by nothing")
	}
	if !s.window.Add(int64(n)) {
		return c.offend(s.id, http2.FlowControlError, "the stream's window is too large")
	}
	c.queue(s)
	return nil
}

func (c *Conn) onSettings(f http2.Frame) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f.Flags.Has(http2.Ack) {
		return c.guard.Idle(c.now)
	}
	if err := errors.Join(c.guard.Idle(c.now), c.guard.Reply()); err != nil {
		return err
	}
	before := c.peer.StreamWindow
	if err := c.peer.Apply(f.Payload, !c.cfg.Server); err != nil {
		return err
	}
	if d := int64(c.peer.StreamWindow) - int64(before); d != 0 {
		for _, s := range c.streams {
			if !s.window.Add(d) {
				return &http2.ConnError{Code: http2.FlowControlError, Reason: "a stream's window is too large"}
			}
			c.queue(s)
		}
	}
	c.enc.resize(c.peer.HeaderTable)
	c.out = http2.AppendSettingsAck(c.out)
	return nil
}

func (c *Conn) onPing(f http2.Frame) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.guard.Idle(c.now); err != nil {
		return err
	}
	data := [8]byte(f.Payload)
	if f.Flags.Has(http2.Ack) {
		if c.goingAway && c.cfg.Server && data == drainPing {
			c.out = http2.AppendGoAway(c.out, c.lastID, http2.NoError, "draining")
			c.final = true
			c.drained()
		}
		return nil
	}
	if err := c.guard.Reply(); err != nil {
		return err
	}
	c.out = http2.AppendPing(c.out, true, data)
	return nil
}

func (c *Conn) onGoAway(f http2.Frame) error {
	last, code, _ := http2.ParseGoAway(f.Payload)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cfg.Server {
		return c.guard.Idle(c.now) // a client that leaves still wants its answers
	}
	c.goingAway = true
	why := ErrRefused
	if code != http2.NoError {
		why = errors.Join(ErrRefused, ErrReset{code})
	}
	var lost []*Stream
	for id, s := range c.streams {
		if id > last {
			lost = append(lost, s)
		}
	}
	for _, s := range lost {
		s.gone(why)
		c.remove(s)
	}
	notes := c.takeNotes()
	_ = c.unlocked(func() error { // it has none
		settle(notes)
		for _, s := range lost {
			s.sink.Reset(why)
		}
		return nil
	})
	c.final = true
	c.drained()
	return nil
}
