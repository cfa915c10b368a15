package hbone

import (
	"errors"
	"fmt"
	"time"

	"github.com/weft-mesh/weft/hbone/record"
	"github.com/weft-mesh/weft/internal/http2"
)

// A Role says which end of a tunnel this is.
type Role uint8

// The roles. The zero Role is neither, and NewTunnel refuses it.
const (
	NoRole     Role = iota
	ClientRole      // asks for connections
	ServerRole      // is asked
)

// Errors of Tunnel.Connect.
var (
	// ErrDraining means that the tunnel takes no new streams.
	ErrDraining = errors.New("tunnel is draining")
	// ErrStreamLimit means that as many streams are open as either end allows.
	ErrStreamLimit = errors.New("tunnel has as many streams as it may")
)

// errTunnelEnded is why streams end when their tunnel has no other reason.
var errTunnelEnded = errors.New("the tunnel was closed")

// Events is what a Tunnel tells its driver while it reads. The methods are
// called in the order of the frames; they may call the Tunnel's methods other
// than Receive and Tick.
type Events interface {
	// Requested: the peer asks for a connection (server only). Answer it with
	// Answer or Reset, and call Release once when the work for it is over.
	Requested(id uint32, authority string, h Header)
	// Answered: the peer's final answer to Connect (client only).
	Answered(id uint32, status int, h Header)
	// Data: p came on the stream. p is valid during the call. Its length is
	// owed to Consumed, now or later, and also if the stream ends before.
	Data(id uint32, p []byte)
	// Ended: the peer will send no more data.
	Ended(id uint32)
	// Aborted: the stream is gone, in both directions. refused says that the
	// peer certainly did nothing for it, so that it may be tried elsewhere.
	Aborted(id uint32, err *http2.StreamError, refused bool)
	// Writable: Room of the stream may have grown; of every stream if id is 0.
	Writable(id uint32)
}

// A Tunnel is the state of one HBONE connection, an HTTP/2 connection whose
// every stream is a CONNECT (RFC 9113 8.5). It does no I/O, starts no goroutine
// and reads no clock: a driver feeds it what came from the peer and sends what
// it leaves in Output. It is not safe for concurrent use. Use NewTunnel.
type Tunnel struct {
	role   Role
	limits Limits

	parser *http2.Parser
	fields *http2.FieldReader
	header *headerWriter
	peer   http2.Peer
	guard  http2.Guard
	out    []byte
	taken  uint64 // bytes of output that the driver has taken
	fatal  error  // set once; nothing is read after it

	streams   http2.Streams[streamState]
	working   int        // server: requests that were not yet Released
	next      uint32     // client: id of the next stream
	seen      uint32     // server: highest id that the peer has used
	last      uint32     // server: highest id that we serve
	recent    [32]uint32 // ids that we reset lately: frames for them may be on their way
	recentPos int

	send    http2.SendWindow
	receive http2.ReceiveWindow
	queued  int  // bytes given to Data and not yet Consumed
	held    bool // the driver has too much unread, of this tunnel or of others

	draining bool // no new streams, by either end's wish
	peerAway bool // the peer has sent a GOAWAY
	goAway   goAwayState
	ping     pingState

	framePayload int  // data of the DATA frame that is being read, so far
	more         bool // while Data runs: see More
}

// streamState is one stream that is not closed.
type streamState struct {
	send     http2.SendWindow
	receive  http2.ReceiveWindow
	read     int32 // consumed since the window last grew
	sentEnd  bool  // our direction has ended
	gotEnd   bool  // theirs has
	answered bool  // the final status was sent or has come
	hints    uint8 // 1xx answers seen
}

// goAwayState is how far a graceful end has come (RFC 9113 6.8).
type goAwayState uint8

const (
	goAwayNone   goAwayState = iota
	goAwayWarned             // GOAWAY with the highest id, and a PING, are out
	goAwayFinal              // GOAWAY with the last id that we served
)

// pingState is the liveness check.
type pingState struct {
	at      time.Time // when to send the next, or when to give up on this one
	waiting bool
	drain   bool // the PING of a graceful end is on its way
}

// The opaque data of our PINGs, to tell their answers apart.
var (
	pingAlive = [8]byte{'w', 'e', 'f', 't', 'l', 'i', 'v', 'e'}
	pingDrain = [8]byte{'w', 'e', 'f', 't', 'd', 'o', 'n', 'e'}
)

const (
	// maxSendFrame keeps our frames below what peers take: some peers hold a
	// whole frame before they pass it on, and a stream should not wait for a
	// neighbour's frame for long.
	maxSendFrame = 64 << 10
	// maxHints bounds 1xx answers to one request.
	maxHints = 8
	// maxOutput bounds what is queued for a peer that goes on asking, and does not
	// read the answers. A driver that sends keeps far below it.
	maxOutput = 1 << 20
	// drainPatience is how long a peer may take to answer the PING of a
	// graceful end before we name the last stream anyway.
	drainPatience = time.Second
)

// NewTunnel begins a tunnel at now. Its first bytes are in Output at once.
func NewTunnel(role Role, l Limits, now time.Time) (*Tunnel, error) {
	if role != ClientRole && role != ServerRole {
		return nil, errors.New("new tunnel: no role")
	}
	l = l.withDefaults(role)
	t := &Tunnel{
		role:   role,
		limits: l,
		parser: http2.NewParser(http2.ParserConfig{
			Preface:  role == ServerRole,
			MaxFrame: l.MaxFrame,
			MaxBlock: 2 * l.MaxHeaderList,
		}),
		fields:  http2.NewFieldReader(l.MaxHeaderList),
		header:  newHeaderWriter(),
		peer:    http2.DefaultPeer(),
		next:    1,
		receive: http2.NewReceiveWindow(http2.InitialWindow),
	}
	t.send.Add(http2.InitialWindow)
	t.ping.at = now.Add(l.PingInterval)
	t.greet()
	return t, nil
}

// greet queues our preface and settings.
func (t *Tunnel) greet() {
	ss := []http2.Setting{
		{ID: http2.InitialWindowSize, Value: uint32(t.limits.StreamWindow)},
		{ID: http2.MaxFrameLen, Value: uint32(t.limits.MaxFrame)},
		{ID: http2.MaxHeaderListSize, Value: uint32(t.limits.MaxHeaderList)},
	}
	if t.role == ClientRole {
		t.out = append(t.out, http2.Preface...)
		ss = append(ss, http2.Setting{ID: http2.EnablePush, Value: 0})
	} else {
		ss = append(ss, http2.Setting{ID: http2.MaxConcurrentStreams, Value: uint32(t.limits.MaxStreams)})
	}
	t.out = http2.AppendSettings(t.out, ss...)
	t.receive.Grow(t.limits.ConnWindow)
	t.announce(0, &t.receive)
}

// Connect asks for a connection to authority (client only) and returns its
// stream. The error is ErrDraining, ErrStreamLimit, or says what is wrong with
// the arguments.
func (t *Tunnel) Connect(authority string, h Header) (uint32, error) {
	if t.role != ClientRole {
		return 0, errors.New("connect: this end of the tunnel is the server")
	}
	for _, v := range []string{authority, h.Forwarded, h.Baggage, h.Traceparent, h.Network} {
		if !http2.ValidValue(v) {
			return 0, fmt.Errorf("connect %.80q: a header value has bytes that HTTP does not allow: %.80q", authority, v)
		}
	}
	if t.draining || t.fatal != nil || t.next > http2.MaxStreamID {
		return 0, ErrDraining
	}
	if t.Full() {
		return 0, ErrStreamLimit
	}
	id := t.next
	t.next += 2
	t.streams.Put(id, t.newStream())
	t.out = http2.AppendHeaders(t.out, id, t.header.request(authority, h), false, t.frameSize())
	if t.next > http2.MaxStreamID {
		// RFC 9113 5.1.1: that was the last id. Who comes next needs another tunnel,
		// and this one ends with its streams.
		t.finalGoAway(http2.NoError, "")
	}
	return id, nil
}

// Full reports whether no stream can be added for now.
func (t *Tunnel) Full() bool {
	n := t.streams.Len()
	return n >= t.limits.MaxStreams || uint64(n) >= uint64(t.peer.MaxStreams)
}

// MaxStreams returns how many streams either end allows at once.
func (t *Tunnel) MaxStreams() int {
	return int(min(uint64(t.limits.MaxStreams), uint64(t.peer.MaxStreams)))
}

// Answer answers a request (server only): 200 opens the connection; any other
// status refuses it and ends the stream. An answer to a stream that is gone
// does nothing.
func (t *Tunnel) Answer(id uint32, status int, h Header) {
	s := t.streams.At(id)
	if s == nil || s.answered || t.role != ServerRole {
		return
	}
	s.answered = true
	ok := status == 200
	t.out = http2.AppendHeaders(t.out, id, t.header.response(status, h), !ok, t.frameSize())
	if ok {
		return
	}
	s.sentEnd = true
	if !s.gotEnd {
		// The answer is whole, and the rest of the request is not wanted
		// (RFC 9113 8.1).
		t.reset(id, http2.NoError)
		return
	}
	t.closeIfDone(id, s)
}

// Room returns how many bytes Send would take of the stream now.
func (t *Tunnel) Room(id uint32) int {
	s := t.streams.At(id)
	if s == nil || s.sentEnd || !s.answered {
		return 0
	}
	return min(s.send.Left(), t.send.Left())
}

// ConnRoom returns how many bytes the peer takes on all streams together now.
func (t *Tunnel) ConnRoom() int { return t.send.Left() }

// PieceLen returns the distance between the frames that Pieces takes.
func (t *Tunnel) PieceLen() int {
	n := min(t.frameSize(), maxSendFrame-http2.HeaderLen) + http2.HeaderLen
	return n - n%record.MaxPlaintext // whole records, as PieceLen is at least one
}

// Pieces sends n bytes of the stream without queueing them: buf holds, every
// PieceLen bytes, room for a frame header and then data, all pieces full but
// the last. It returns the part of buf that is to be sent after what is in
// Output, or nil if the stream takes no data. n is above 0 and at most Room.
func (t *Tunnel) Pieces(id uint32, buf []byte, n int) []byte {
	s := t.streams.At(id)
	if s == nil || s.sentEnd || !s.answered {
		return nil
	}
	size := t.PieceLen() - http2.HeaderLen
	at := 0
	for n > 0 {
		k := min(n, size)
		t.appendData(buf[at:at], id, s, k, false)
		at += http2.HeaderLen + k
		n -= k
	}
	return buf[:at]
}

// Send queues as much of p as the windows allow, and returns how much that
// was. With end it also ends our direction, once all of p is queued. It takes
// nothing on a stream that is gone or not yet answered.
func (t *Tunnel) Send(id uint32, p []byte, end bool) int {
	s := t.streams.At(id)
	if s == nil || s.sentEnd || !s.answered {
		return 0
	}
	sent := 0
	for {
		n := min(len(p)-sent, s.send.Left(), t.send.Left(), maxSendFrame, t.frameSize())
		last := sent+n == len(p)
		if n == 0 && !(end && last) {
			return sent
		}
		t.out = t.appendData(t.out, id, s, n, end && last)
		t.out = append(t.out, p[sent:sent+n]...)
		sent += n
		if last {
			t.closeIfDone(id, s)
			return sent
		}
	}
}

// appendData appends the header of a DATA frame of n bytes, and accounts for it.
func (t *Tunnel) appendData(dst []byte, id uint32, s *streamState, n int, end bool) []byte {
	h := http2.Header{Length: uint32(n), Type: http2.Data, StreamID: id}
	if end {
		h.Flags = http2.EndStream
		s.sentEnd = true
	}
	s.send.Take(n)
	t.send.Take(n)
	t.guard.Moved(n)
	return http2.AppendHeader(dst, h)
}

// More reports, while Data runs, whether more data of the same stream has come
// already: then the driver's next event is Data for it, or the stream or the
// tunnel ends for what the peer did.
func (t *Tunnel) More() bool { return t.more }

// Consumed notes that n bytes that Data passed on have been read, or dropped,
// so that the peer may send more.
func (t *Tunnel) Consumed(id uint32, n int) {
	t.queued -= n
	t.announceConn()
	s := t.streams.At(id)
	if s == nil || s.gotEnd || n == 0 {
		return
	}
	s.receive.Credit(n)
	// For one who does not keep up, more window would be more that waits here.
	if size := s.receive.Size(); size < t.limits.MaxStreamWindow && s.receive.Unread() <= size/2 {
		s.read += int32(n)
	}
	if s.read > 0 && int(s.read) >= s.receive.Size() {
		s.read = 0
		s.receive.Grow(min(2*s.receive.Size(), t.limits.MaxStreamWindow))
	}
	t.announce(id, &s.receive)
}

// Hold keeps the tunnel's window from the peer, or with false gives it again:
// a driver holds it while the received and unread bytes of all its tunnels are
// too many.
func (t *Tunnel) Hold(hold bool) {
	if t.held = hold; !hold {
		t.announceConn()
	}
}

// announceConn gives the tunnel's window back, unless too much is unread.
func (t *Tunnel) announceConn() {
	if t.queued <= t.limits.QueueLimit && !t.held {
		t.announce(0, &t.receive)
	}
}

func (t *Tunnel) announce(id uint32, w *http2.ReceiveWindow) {
	if n := w.Announce(); n > 0 && t.fatal == nil {
		t.out = http2.AppendWindowUpdate(t.out, id, n)
	}
}

// Reset aborts a stream in both directions. The driver hears no more of it.
func (t *Tunnel) Reset(id uint32, code http2.ErrCode) {
	if t.streams.At(id) != nil {
		t.reset(id, code)
	}
}

// reset sends a RST_STREAM and forgets the stream.
func (t *Tunnel) reset(id uint32, code http2.ErrCode) {
	t.streams.Delete(id)
	t.recent[t.recentPos] = id
	t.recentPos = (t.recentPos + 1) % len(t.recent)
	if t.fatal == nil {
		t.out = http2.AppendRSTStream(t.out, id, code)
	}
}

// Release notes that the driver's work for a request is over (server only).
// Until then a stream that the peer has reset still counts against it: that is
// what makes opening and resetting streams in a loop useless.
func (t *Tunnel) Release() { t.working-- }

// Streams returns how many streams are open.
func (t *Tunnel) Streams() int { return t.streams.Len() }

// Queued returns how many received bytes were not yet Consumed.
func (t *Tunnel) Queued() int { return t.queued }

// Draining reports whether the tunnel takes no new streams.
func (t *Tunnel) Draining() bool { return t.draining || t.fatal != nil }

// Finished reports whether a graceful end is complete: nothing is left to do
// but to send Output and close.
func (t *Tunnel) Finished() bool {
	return (t.goAway == goAwayFinal || t.peerAway) && t.streams.Len() == 0
}

// Output returns the bytes to send to the peer. It is valid until the next
// call of any method.
func (t *Tunnel) Output() []byte { return t.out }

// TakeOutput returns the bytes to send and goes on with spare, an empty slice
// whose memory may be used for the next.
func (t *Tunnel) TakeOutput(spare []byte) []byte {
	out := t.out
	t.out = spare[:0]
	t.taken += uint64(len(out))
	t.guard.Flushed()
	return out
}

// Taken returns how many bytes TakeOutput has returned so far.
func (t *Tunnel) Taken() uint64 { return t.taken }

// Wants reports whether the tunnel has no memory for its output: then Lend may
// give it some, so that a driver can share it among many tunnels, and take it
// back with TakeOutput.
func (t *Tunnel) Wants() bool { return cap(t.out) == 0 }

// Lend gives the tunnel memory for its output, if it Wants any.
func (t *Tunnel) Lend(buf []byte) {
	if t.Wants() {
		t.out = buf[:0]
	}
}

// Shutdown begins a graceful end. A server first warns the peer and names the
// last stream it serves after a round trip, so that no request on its way is
// lost (RFC 9113 6.8); a client, which the peer sends no requests, says so at
// once. Open streams go on.
func (t *Tunnel) Shutdown(now time.Time) {
	if t.goAway != goAwayNone || t.fatal != nil {
		return
	}
	if t.role == ClientRole {
		t.draining = true
		t.finalGoAway(http2.NoError, "")
		return
	}
	t.goAway = goAwayWarned
	t.out = http2.AppendGoAway(t.out, http2.MaxStreamID, http2.NoError, "")
	t.out = http2.AppendPing(t.out, false, pingDrain)
	t.ping.drain = true
	t.ping.at = earlier(t.ping.at, now.Add(drainPatience))
}

// finalGoAway names the last stream that we serve.
func (t *Tunnel) finalGoAway(code http2.ErrCode, reason string) {
	t.goAway = goAwayFinal
	t.draining = true
	t.out = http2.AppendGoAway(t.out, t.last, code, reason)
}

// fail ends the tunnel for what the peer did: a GOAWAY says so.
func (t *Tunnel) fail(err error) {
	if t.fatal != nil {
		return
	}
	code, reason := http2.InternalError, ""
	var ce *http2.ConnError
	if errors.As(err, &ce) {
		code, reason = ce.Code, ce.Reason
	}
	t.finalGoAway(code, reason)
	t.fatal = err
}

// Close ends the tunnel without a word: nothing more is read or queued. What
// Output holds already may still be sent.
func (t *Tunnel) Close() {
	if t.fatal == nil {
		t.fatal = errTunnelEnded
	}
}

// Deadline returns when Tick wants to be called next.
func (t *Tunnel) Deadline() time.Time { return t.ping.at }

// Tick does what is due at now. An error ends the tunnel: the peer is gone.
func (t *Tunnel) Tick(now time.Time) error {
	if t.fatal != nil {
		return t.fatal
	}
	if now.Before(t.ping.at) {
		return nil
	}
	switch {
	case t.goAway == goAwayWarned:
		t.finalGoAway(http2.NoError, "")
		t.ping.at = now.Add(t.limits.PingTimeout)
		t.ping.waiting = true // the PING of the warning serves
	case t.ping.waiting:
		t.fail(&http2.ConnError{Code: http2.NoError, Reason: "no answer to PING"})
		return fmt.Errorf("tunnel: the peer did not answer a PING for %v", t.limits.PingTimeout)
	default:
		t.ping.waiting = true
		t.ping.at = now.Add(t.limits.PingTimeout)
		t.out = http2.AppendPing(t.out, false, pingAlive)
	}
	return nil
}

func (t *Tunnel) newStream() *streamState {
	s := &streamState{receive: http2.NewReceiveWindow(t.limits.StreamWindow)}
	s.send.Add(int64(t.peer.StreamWindow))
	return s
}

// closeIfDone forgets a stream that both ends have ended.
func (t *Tunnel) closeIfDone(id uint32, s *streamState) {
	if s.sentEnd && s.gotEnd {
		t.streams.Delete(id)
	}
}

// frameSize returns the largest frame the peer takes.
func (t *Tunnel) frameSize() int { return int(t.peer.MaxFrame) }

// resetByUs reports whether we reset the stream lately.
func (t *Tunnel) resetByUs(id uint32) bool {
	for _, r := range t.recent {
		if r == id {
			return true
		}
	}
	return false
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}
