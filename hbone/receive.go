package hbone

import (
	"errors"
	"fmt"
	"time"

	"github.com/weft-mesh/weft/internal/http2"
)

// Receive takes bytes that came from the peer at now and tells ev what they
// mean. It takes all of p. An error ends the tunnel: the driver sends what is
// left in Output, which ends in a GOAWAY, and closes.
func (t *Tunnel) Receive(now time.Time, p []byte, ev Events) error {
	for t.fatal == nil {
		f, rest, ok, err := t.parser.Next(p)
		if err != nil {
			t.fail(err)
			break
		}
		if !ok {
			return nil
		}
		p = rest
		t.more = f.Type == http2.Data && !f.Flags.Has(http2.EndStream) && beginsWithData(rest, f.StreamID)
		err = t.frame(now, f, ev)
		if err == nil && len(t.out) > maxOutput {
			err = &http2.ConnError{Code: http2.EnhanceYourCalm, Reason: "the peer does not read what it is sent"}
		}
		if err != nil {
			t.fail(err)
		}
	}
	t.more = false
	return fmt.Errorf("tunnel: %w", t.fatal)
}

// beginsWithData reports whether p, if a frame begins there, begins with data of
// the stream.
func beginsWithData(p []byte, id uint32) bool {
	if len(p) <= http2.HeaderLen {
		return false
	}
	h := http2.ParseHeader(p)
	return h.Type == http2.Data && h.StreamID == id && h.Length > 0 && !h.Flags.Has(http2.Padded)
}

// frame acts on one frame or piece of DATA. An error ends the tunnel.
func (t *Tunnel) frame(now time.Time, f http2.Frame, ev Events) error {
	switch f.Type {
	case http2.Data:
		return t.data(now, f, ev)
	case http2.Headers:
		if t.role == ServerRole {
			return t.request(now, f, ev)
		}
		return t.response(now, f, ev)
	case http2.RSTStream:
		return t.peerReset(now, f, ev)
	case http2.WindowUpdate:
		return t.windowUpdate(now, f, ev)
	case http2.Settings:
		return t.settings(now, f, ev)
	case http2.Ping:
		return t.pinged(now, f)
	case http2.GoAway:
		t.peerGoAway(f, ev)
	}
	return t.guard.Idle(now) // also PRIORITY and unknown types
}

// isIdle reports whether no end has used the stream yet. Streams of the
// server's are never used: there is no push.
func (t *Tunnel) isIdle(id uint32) bool {
	if id%2 == 0 {
		return true
	}
	if t.role == ClientRole {
		return id >= t.next
	}
	return id > t.seen
}

func (t *Tunnel) idleError(f http2.Frame) error {
	// RFC 9113 5.1: on an idle stream only HEADERS and PRIORITY may come.
	return &http2.ConnError{
		Code:   http2.ProtocolError,
		Reason: fmt.Sprintf("frame of type %d on idle stream %d", f.Type, f.StreamID),
	}
}

// data accounts for a DATA frame and passes its bytes on.
func (t *Tunnel) data(now time.Time, f http2.Frame, ev Events) error {
	if f.Start {
		if err := t.beginData(now, f, ev); err != nil {
			return err
		}
	}
	t.framePayload += len(f.Payload)
	s := t.streams.At(f.StreamID)
	if s != nil && len(f.Payload) > 0 {
		t.queued += len(f.Payload)
		ev.Data(f.StreamID, f.Payload)
		s = t.streams.At(f.StreamID) // the driver may have reset it
	}
	if !f.End || s == nil {
		return nil
	}
	if f.Flags.Has(http2.EndStream) {
		s.gotEnd = true
		ev.Ended(f.StreamID)
		t.closeIfDone(f.StreamID, s)
		return nil
	}
	if padding := int(f.Length) - t.framePayload; padding > 0 {
		s.receive.Credit(padding)
		t.announce(f.StreamID, &s.receive)
	}
	return nil
}

// beginData checks a DATA frame against the windows and the stream's state.
func (t *Tunnel) beginData(now time.Time, f http2.Frame, ev Events) error {
	n := int(f.Length)
	t.framePayload = 0
	if t.isIdle(f.StreamID) {
		return t.idleError(f)
	}
	if !t.receive.Receive(n) {
		return &http2.ConnError{Code: http2.FlowControlError, Reason: "more data than the connection's window"}
	}
	t.receive.Credit(n)
	t.announceConn()
	s := t.streams.At(f.StreamID)
	switch {
	case n == 0 && (s == nil || !f.Flags.Has(http2.EndStream)):
		if err := t.guard.Idle(now); err != nil {
			return err
		}
	case s != nil:
		t.guard.Moved(n)
	} // else it is late data for a stream that we reset: no progress, and no fault
	switch {
	case s == nil:
		return nil
	case s.gotEnd:
		return t.streamError(now, f.StreamID, http2.StreamClosed, "data after the end", ev)
	case t.role == ClientRole && !s.answered:
		return t.streamError(now, f.StreamID, http2.ProtocolError, "data before the answer", ev)
	case !s.receive.Receive(n):
		return t.streamError(now, f.StreamID, http2.FlowControlError, "more data than the stream's window", ev)
	}
	return nil
}

// streamError resets a stream for what the peer did on it. An error ends the
// tunnel: too many of them.
func (t *Tunnel) streamError(now time.Time, id uint32, code http2.ErrCode, reason string, ev Events) error {
	known := t.streams.At(id) != nil
	t.reset(id, code)
	if known {
		ev.Aborted(id, &http2.StreamError{StreamID: id, Code: code, Reason: reason}, false)
	}
	if err := t.guard.Reply(); err != nil {
		return err
	}
	return t.guard.Reset(now)
}

// request reads HEADERS as a server.
func (t *Tunnel) request(now time.Time, f http2.Frame, ev Events) error {
	id := f.StreamID
	fields, err := t.fields.Read(f.Payload)
	var ce *http2.ConnError
	if errors.As(err, &ce) {
		return err
	}
	if id%2 == 0 {
		return &http2.ConnError{Code: http2.ProtocolError, Reason: "request on an even stream"} // 5.1.1
	}
	if id <= t.seen {
		return t.lateHeaders(now, id, ev)
	}
	t.seen = id
	if t.goAway == goAwayFinal {
		return t.guard.Idle(now) // the peer has been told that we do nothing for it (6.8)
	}
	t.last = id
	if t.streams.Len() >= t.limits.MaxStreams || t.working >= 2*t.limits.MaxStreams {
		return t.streamError(now, id, http2.RefusedStream, "", ev) // 5.1.2, 8.7
	}
	var authority string
	var h Header
	if err == nil {
		authority, h, err = requestOf(fields)
	}
	var bad *http2.MalformedError
	if errors.As(err, &bad) {
		return t.streamError(now, id, http2.ProtocolError, bad.Reason, ev) // 8.1.1
	}
	s := t.newStream()
	s.gotEnd = f.Flags.Has(http2.EndStream)
	t.streams.Put(id, s)
	if err != nil {
		status := 400
		if errors.Is(err, http2.ErrListTooLarge) {
			status = 431
		}
		t.Answer(id, status, Header{})
		if err := t.guard.Reply(); err != nil {
			return err
		}
		return t.guard.Reset(now)
	}
	t.working++
	ev.Requested(id, authority, h)
	if s.gotEnd && t.streams.At(id) == s {
		ev.Ended(id)
	}
	return nil
}

// lateHeaders treats HEADERS on a stream that has had its request. A tunnel
// has no trailers (RFC 9113 8.5).
func (t *Tunnel) lateHeaders(now time.Time, id uint32, ev Events) error {
	switch s := t.streams.At(id); {
	case s != nil && s.gotEnd:
		return t.streamError(now, id, http2.StreamClosed, "HEADERS after the end", ev)
	case s != nil:
		return t.streamError(now, id, http2.ProtocolError, "a second HEADERS on a tunnel", ev)
	case t.resetByUs(id):
		return t.guard.Idle(now)
	}
	return &http2.ConnError{Code: http2.StreamClosed, Reason: fmt.Sprintf("HEADERS on closed stream %d", id)}
}

// response reads HEADERS as a client.
func (t *Tunnel) response(now time.Time, f http2.Frame, ev Events) error {
	id := f.StreamID
	fields, err := t.fields.Read(f.Payload)
	var ce *http2.ConnError
	if errors.As(err, &ce) {
		return err
	}
	if t.isIdle(id) {
		return t.idleError(f)
	}
	s := t.streams.At(id)
	switch {
	case s == nil:
		return t.guard.Idle(now) // an answer that crossed our reset
	case s.gotEnd:
		return t.streamError(now, id, http2.StreamClosed, "HEADERS after the end", ev)
	case s.answered:
		return t.streamError(now, id, http2.ProtocolError, "a second answer on a tunnel", ev)
	}
	var status int
	var h Header
	if err == nil {
		status, h, err = responseOf(fields)
	}
	if err != nil {
		return t.streamError(now, id, http2.ProtocolError, err.Error(), ev)
	}
	end := f.Flags.Has(http2.EndStream)
	if status < 200 {
		// 8.1: an interim answer does not end the stream; 8.6: there is no 101.
		if s.hints++; end || status == 101 || s.hints > maxHints {
			return t.streamError(now, id, http2.ProtocolError, fmt.Sprintf("interim answer %d", status), ev)
		}
		return nil
	}
	s.answered, s.gotEnd = true, end
	if status >= 300 {
		// Refused. What else the peer has to say about it is of no interest.
		t.reset(id, http2.Cancel)
		ev.Answered(id, status, h)
		return nil
	}
	ev.Answered(id, status, h)
	if end && t.streams.At(id) == s {
		ev.Ended(id)
	}
	return nil
}

// peerReset reads a RST_STREAM.
func (t *Tunnel) peerReset(now time.Time, f http2.Frame, ev Events) error {
	if t.isIdle(f.StreamID) {
		return t.idleError(f)
	}
	s := t.streams.At(f.StreamID)
	if s == nil {
		return t.guard.Idle(now)
	}
	code := http2.Code(f.Payload)
	t.streams.Delete(f.StreamID)
	// 8.7: REFUSED_STREAM promises that nothing was done for the request.
	refused := code == http2.RefusedStream && !s.answered
	ev.Aborted(f.StreamID, &http2.StreamError{StreamID: f.StreamID, Code: code, Reason: "reset by the peer"}, refused)
	if t.role == ServerRole && !s.sentEnd {
		return t.guard.Reset(now)
	}
	return nil
}

// windowUpdate reads a WINDOW_UPDATE.
func (t *Tunnel) windowUpdate(now time.Time, f http2.Frame, ev Events) error {
	if err := t.guard.Idle(now); err != nil {
		return err
	}
	id, n := f.StreamID, int64(http2.Increment(f.Payload))
	if id == 0 {
		if n == 0 {
			return &http2.ConnError{Code: http2.ProtocolError, Reason: "WINDOW_UPDATE of 0"} // 6.9
		}
		if !t.send.Add(n) {
			return &http2.ConnError{Code: http2.FlowControlError, Reason: "the connection's window is too large"} // 6.9.1
		}
		ev.Writable(0)
		return nil
	}
	if t.isIdle(id) {
		return t.idleError(f)
	}
	s := t.streams.At(id)
	switch {
	case s == nil:
		return nil
	case n == 0:
		return t.streamError(now, id, http2.ProtocolError, "WINDOW_UPDATE of 0", ev)
	case !s.send.Add(n):
		return t.streamError(now, id, http2.FlowControlError, "the stream's window is too large", ev)
	}
	ev.Writable(id)
	return nil
}

// settings reads a SETTINGS frame and answers it.
func (t *Tunnel) settings(now time.Time, f http2.Frame, ev Events) error {
	if err := t.guard.Idle(now); err != nil {
		return err
	}
	if f.Flags.Has(http2.Ack) {
		return nil
	}
	before := t.peer
	if err := t.peer.Apply(f.Payload, t.role == ClientRole); err != nil {
		return err
	}
	// 6.9.2: a changed initial window changes that of every open stream.
	if d := int64(t.peer.StreamWindow) - int64(before.StreamWindow); d != 0 {
		for _, s := range t.streams.All() {
			if !s.send.Add(d) {
				return &http2.ConnError{Code: http2.FlowControlError, Reason: "a new initial window makes a stream's too large"}
			}
		}
	}
	t.header.peerTable(t.peer.HeaderTable)
	t.out = http2.AppendSettingsAck(t.out)
	ev.Writable(0)
	return t.guard.Reply()
}

// pinged reads a PING or the answer to ours.
func (t *Tunnel) pinged(now time.Time, f http2.Frame) error {
	if err := t.guard.Idle(now); err != nil {
		return err
	}
	data := [8]byte(f.Payload)
	switch {
	case !f.Flags.Has(http2.Ack):
		t.out = http2.AppendPing(t.out, true, data)
		return t.guard.Reply()
	case data == pingDrain && t.ping.drain:
		t.ping.drain = false
		if t.goAway == goAwayWarned {
			t.finalGoAway(http2.NoError, "")
		}
		t.alive(now)
	case data == pingAlive && t.ping.waiting:
		t.alive(now)
	}
	return nil
}

// alive notes that the peer has answered a PING.
func (t *Tunnel) alive(now time.Time) {
	t.ping.waiting = false
	t.ping.at = now.Add(t.limits.PingInterval)
}

// peerGoAway reads a GOAWAY: the peer did and will do nothing for streams of
// ours above the one it names (RFC 9113 6.8).
func (t *Tunnel) peerGoAway(f http2.Frame, ev Events) {
	last, code, _ := http2.ParseGoAway(f.Payload)
	t.peerAway = true
	if t.role != ClientRole {
		return
	}
	t.draining = true
	for id, s := range t.streams.All() {
		if id > last {
			t.streams.Delete(id)
			ev.Aborted(id, &http2.StreamError{StreamID: id, Code: code, Reason: "the peer is going away"}, !s.answered)
		}
	}
}
