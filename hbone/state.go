package hbone

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/weft-mesh/weft/internal/http2"
	"github.com/weft-mesh/weft/internal/pack"
)

// A TunnelState is all that another process needs to go on where a Tunnel
// stopped, so that its peer does not notice. What its driver holds is not in
// it: record protection, unread data of streams, requests without an answer.
//
// Two things begin anew, to no harm: the count of a peer's floods, and the
// HPACK table for what we send, which the next header block empties at the
// peer (RFC 7541 6.3).
type TunnelState struct {
	Role   Role
	Limits Limits // announced to the peer: they stay what they are

	Parser http2.ParserState
	Fields http2.FieldState
	Peer   http2.Peer
	Known  bool // the peer's SETTINGS have come
	Output []byte

	Streams []StreamState
	Next    uint32   // client: id of the next stream
	Seen    uint32   // server: highest id that the peer has used
	Last    uint32   // server: highest id that we serve
	Recent  []uint32 // ids that we reset lately, the oldest first

	Send    http2.SendWindow
	Receive http2.ReceiveWindow
	Queued  int // bytes given to Events.Data and not yet Consumed

	Draining, PeerAway bool
	GoAway             uint8         // how far a graceful end has come
	PingIn             time.Duration // until a PING is due, or its answer
	PingWaiting        bool
	PingDrain          bool

	FramePayload int // data of the DATA frame that is being read, so far
}

// A StreamState is one open stream of a TunnelState. A server's that is not
// Answered is a request: whoever goes on asks anew what to do with it.
type StreamState struct {
	ID       uint32
	Send     http2.SendWindow
	Receive  http2.ReceiveWindow
	Read     int32 // consumed since the window last grew
	SentEnd  bool
	GotEnd   bool
	Answered bool
	Hints    uint8 // 1xx answers seen
}

// Bounds of what a state may hold: more than a Tunnel within its limits does.
const (
	maxStateStreams = 1 << 20
	maxStateOutput  = 64 << 20
	maxStatePing    = 24 * time.Hour
)

// Pack names the fields to c. Read from bytes, they are not checked further
// than that they fit: ResumeTunnel does.
func (s *TunnelState) Pack(c *pack.Coder) {
	pack.Uint(c, &s.Role, math.MaxUint8)
	s.Limits.pack(c)
	s.Parser.Pack(c)
	s.Fields.Pack(c)
	s.Peer.Pack(c)
	pack.Bool(c, &s.Known)
	pack.Bytes(c, &s.Output, maxStateOutput)
	pack.List(c, &s.Streams, maxStateStreams, func(c *pack.Coder, st *StreamState) { st.pack(c) })
	pack.Uint(c, &s.Next, math.MaxUint32)
	pack.Uint(c, &s.Seen, http2.MaxStreamID)
	pack.Uint(c, &s.Last, http2.MaxStreamID)
	pack.List(c, &s.Recent, len(Tunnel{}.recent), func(c *pack.Coder, id *uint32) { pack.Uint(c, id, http2.MaxStreamID) })
	s.Send.Pack(c)
	s.Receive.Pack(c)
	pack.Uint(c, &s.Queued, math.MaxInt32)
	pack.Bool(c, &s.Draining)
	pack.Bool(c, &s.PeerAway)
	pack.Uint(c, &s.GoAway, uint64(goAwayFinal))
	pack.Uint(c, &s.PingIn, uint64(maxStatePing))
	pack.Bool(c, &s.PingWaiting)
	pack.Bool(c, &s.PingDrain)
	pack.Uint(c, &s.FramePayload, http2.MaxFrameSize)
}

func (s *StreamState) pack(c *pack.Coder) {
	pack.Uint(c, &s.ID, http2.MaxStreamID)
	s.Send.Pack(c)
	s.Receive.Pack(c)
	pack.Uint(c, &s.Read, math.MaxInt32)
	pack.Bool(c, &s.SentEnd)
	pack.Bool(c, &s.GotEnd)
	pack.Bool(c, &s.Answered)
	pack.Uint(c, &s.Hints, maxHints)
}

func (l *Limits) pack(c *pack.Coder) {
	for _, v := range []*int{&l.StreamWindow, &l.MaxStreamWindow, &l.ConnWindow, &l.QueueLimit, &l.MaxFrame, &l.MaxStreams, &l.MaxHeaderList} {
		pack.Uint(c, v, math.MaxInt64)
	}
	pack.Uint(c, &l.PingInterval, math.MaxInt64)
	pack.Uint(c, &l.PingTimeout, math.MaxInt64)
}

// State returns a copy of the tunnel's state at now. It fails when the tunnel
// has ended.
func (t *Tunnel) State(now time.Time) (TunnelState, error) {
	if t.fatal != nil {
		return TunnelState{}, fmt.Errorf("state of a tunnel: it has ended: %w", t.fatal)
	}
	fields, err := t.fields.State()
	if err != nil {
		return TunnelState{}, fmt.Errorf("state of a tunnel: %w", err)
	}
	s := TunnelState{
		Role: t.role, Limits: t.limits,
		Parser: t.parser.State(), Fields: fields, Peer: t.peer, Known: t.header.known,
		Output: slices.Clone(t.out),
		Next:   t.next, Seen: t.seen, Last: t.last,
		Send: t.send, Receive: t.receive, Queued: t.queued,
		Draining: t.draining, PeerAway: t.peerAway, GoAway: uint8(t.goAway),
		PingIn: min(max(t.ping.at.Sub(now), 0), maxStatePing), PingWaiting: t.ping.waiting, PingDrain: t.ping.drain,
		FramePayload: t.framePayload,
	}
	for id, st := range t.streams.All() {
		s.Streams = append(s.Streams, StreamState{
			ID: id, Send: st.send, Receive: st.receive, Read: st.read,
			SentEnd: st.sentEnd, GotEnd: st.gotEnd, Answered: st.answered, Hints: st.hints,
		})
	}
	for i := range t.recent {
		if id := t.recent[(t.recentPos+i)%len(t.recent)]; id != 0 {
			s.Recent = append(s.Recent, id)
		}
	}
	return s, nil
}

// ResumeTunnel returns a Tunnel that goes on from s at now. Of a server's, each
// stream counts as a request whose work is under way: call Release once for
// each.
func ResumeTunnel(s TunnelState, now time.Time) (*Tunnel, error) {
	if err := s.check(); err != nil {
		return nil, fmt.Errorf("resume tunnel: %w", err)
	}
	parser, err := http2.ResumeParser(http2.ParserConfig{MaxFrame: s.Limits.MaxFrame, MaxBlock: 2 * s.Limits.MaxHeaderList}, s.Parser)
	if err != nil {
		return nil, fmt.Errorf("resume tunnel: %w", err)
	}
	fields, err := http2.ResumeFieldReader(s.Limits.MaxHeaderList, s.Fields)
	if err != nil {
		return nil, fmt.Errorf("resume tunnel: %w", err)
	}
	t := &Tunnel{
		role: s.Role, limits: s.Limits,
		parser: parser, fields: fields, header: newHeaderWriter(), peer: s.Peer,
		out:  slices.Clone(s.Output),
		next: s.Next, seen: s.Seen, last: s.Last,
		send: s.Send, receive: s.Receive, queued: s.Queued,
		draining: s.Draining, peerAway: s.PeerAway, goAway: goAwayState(s.GoAway),
		ping:         pingState{at: now.Add(s.PingIn), waiting: s.PingWaiting, drain: s.PingDrain},
		framePayload: s.FramePayload,
	}
	if s.Known {
		t.header.peerTable(s.Peer.HeaderTable)
	}
	for _, st := range s.Streams {
		t.streams.Put(st.ID, &streamState{
			send: st.Send, receive: st.Receive, read: st.Read,
			sentEnd: st.SentEnd, gotEnd: st.GotEnd, answered: st.Answered, hints: st.Hints,
		})
	}
	if s.Role == ServerRole {
		t.working = len(s.Streams)
	}
	t.recentPos = copy(t.recent[:], s.Recent) % len(t.recent)
	return t, nil
}

// check reports whether a Tunnel can be in this state. What the parts check
// themselves is not looked at.
func (s *TunnelState) check() error {
	switch {
	case s.Role != ClientRole && s.Role != ServerRole:
		return errors.New("no role")
	case s.Limits != s.Limits.withDefaults(s.Role):
		return errors.New("limits that no tunnel has")
	case s.Next%2 == 0 || s.Next > http2.MaxStreamID+2:
		return fmt.Errorf("the next stream is %d", s.Next)
	case s.Next > http2.MaxStreamID && !s.Draining:
		return errors.New("no stream is left, and the tunnel does not end")
	case s.Last > s.Seen:
		return fmt.Errorf("stream %d is served and the peer has used %d", s.Last, s.Seen)
	case len(s.Recent) > len(Tunnel{}.recent):
		return errors.New("too many streams that were reset")
	case s.GoAway > uint8(goAwayFinal), s.GoAway == uint8(goAwayFinal) && !s.Draining:
		return errors.New("a graceful end that cannot be")
	case s.Queued < 0, s.FramePayload < 0, s.PingIn < 0:
		return errors.New("a negative count")
	case len(s.Streams) > s.Limits.MaxStreams:
		return fmt.Errorf("%d streams, at most %d may be open", len(s.Streams), s.Limits.MaxStreams)
	}
	last := uint32(0)
	for _, st := range s.Streams {
		switch {
		case st.ID <= last, st.ID%2 == 0:
			return fmt.Errorf("stream %d after %d", st.ID, last)
		case s.Role == ClientRole && st.ID >= s.Next, s.Role == ServerRole && st.ID > s.Last:
			return fmt.Errorf("stream %d was never opened", st.ID)
		case st.SentEnd && st.GotEnd:
			return fmt.Errorf("stream %d has ended", st.ID)
		case st.Read < 0, st.Hints > maxHints:
			return fmt.Errorf("stream %d has impossible counts", st.ID)
		}
		last = st.ID
	}
	return nil
}
