package loop

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"time"

	"github.com/weft-mesh/weft/hbone"
	"github.com/weft-mesh/weft/hbone/record"
	"github.com/weft-mesh/weft/internal/pack"
	"github.com/weft-mesh/weft/mesh"
)

// A TunnelState is all that another process needs, beside the sockets, to go on
// with a tunnel and what it carries, so that nobody at either end notices. It
// holds the secrets of the tunnel: Wipe it.
type TunnelState struct {
	Peer          mesh.Identity // as TLS has verified
	Ends          time.Time     // when the peer's proof ends; zero is never
	Remote, Local netip.AddrPort

	// Of a client's: what the tunnel was made for.
	Source  mesh.Identity
	Peers   []mesh.Identity
	Address netip.AddrPort

	Core hbone.TunnelState
	Seal record.SealerState
	Open record.OpenerState

	Left    []byte // the beginning of a record
	Unsent  []byte // sealed, and not yet taken by the socket
	Owed    bool   // the peer has asked for a new key
	Greeted bool   // the peer has spoken

	Conns    []ConnState
	Requests []RequestState
}

// A ConnState is a connection in a TunnelState.
type ConnState struct {
	ID             uint32 // of its stream
	FromApp, ToApp int64
	Queue          []byte // what the application has not taken, but for what was sent ahead
	Open           bool   // the peer has accepted
	ReadEnd        bool   // the application has ended its direction
	PeerEnd        bool   // the peer has ended its
	Shut           bool   // and the application was told
	Deaf           bool   // nobody hears the application any more

	// What waits before Queue, as Mover.Ahead has told it, and how much that is.
	// Whoever resumes fills in Early, which becomes the engine's; it is not packed.
	Ahead int
	Early [][]byte

	// Of one that is not Open: what was asked for, and how long the peer may
	// take to answer.
	Authority string
	Header    hbone.Header
	Patience  time.Duration
}

// A RequestState is a request without an answer in a TunnelState. Whoever goes
// on asks anew what to do with it.
type RequestState struct {
	ID        uint32
	Authority string
	Header    hbone.Header
	Early     []byte // what came before the answer
	Ended     bool   // and the end
}

// Bounds of what a state may hold. A tunnel within its limits holds less.
const (
	maxText      = 1 << 20
	maxMoved     = 128 << 20
	maxPeers     = 1 << 12
	maxPatience  = 24 * time.Hour
	maxMoveConns = 1 << 20
)

// Wipe clears the secrets.
func (s *TunnelState) Wipe() {
	s.Seal.Wipe()
	s.Open.Wipe()
}

// Pack names the fields to c.
func (s *TunnelState) Pack(c *pack.Coder) {
	packIdentity(c, &s.Peer)
	packTime(c, &s.Ends)
	PackAddr(c, &s.Remote)
	PackAddr(c, &s.Local)
	packIdentity(c, &s.Source)
	pack.List(c, &s.Peers, maxPeers, packIdentity)
	PackAddr(c, &s.Address)
	s.Core.Pack(c)
	s.Seal.Pack(c)
	s.Open.Pack(c)
	pack.Bytes(c, &s.Left, recordRoom)
	pack.Bytes(c, &s.Unsent, maxMoved)
	pack.Bool(c, &s.Owed)
	pack.Bool(c, &s.Greeted)
	pack.List(c, &s.Conns, maxMoveConns, func(c *pack.Coder, cs *ConnState) { cs.pack(c) })
	pack.List(c, &s.Requests, maxMoveConns, func(c *pack.Coder, rs *RequestState) { rs.pack(c) })
}

func (s *ConnState) pack(c *pack.Coder) {
	pack.Uint(c, &s.ID, math.MaxInt32)
	pack.Uint(c, &s.FromApp, math.MaxInt64)
	pack.Uint(c, &s.ToApp, math.MaxInt64)
	pack.Bytes(c, &s.Queue, maxMoved)
	pack.Uint(c, &s.Ahead, maxMoved)
	for _, b := range []*bool{&s.Open, &s.ReadEnd, &s.PeerEnd, &s.Shut, &s.Deaf} {
		pack.Bool(c, b)
	}
	pack.String(c, &s.Authority, maxText)
	packHeader(c, &s.Header)
	pack.Uint(c, &s.Patience, uint64(maxPatience))
}

func (s *RequestState) pack(c *pack.Coder) {
	pack.Uint(c, &s.ID, math.MaxInt32)
	pack.String(c, &s.Authority, maxText)
	packHeader(c, &s.Header)
	pack.Bytes(c, &s.Early, maxMoved)
	pack.Bool(c, &s.Ended)
}

func packHeader(c *pack.Coder, h *hbone.Header) {
	for _, s := range []*string{&h.Forwarded, &h.Baggage, &h.Traceparent, &h.Network} {
		pack.String(c, s, maxText)
	}
}

func packIdentity(c *pack.Coder, id *mesh.Identity) {
	for _, s := range []*string{&id.TrustDomain, &id.Namespace, &id.ServiceAccount} {
		pack.String(c, s, 1<<10)
	}
}

// packTime keeps the second, which is what certificates have.
func packTime(c *pack.Coder, t *time.Time) {
	var sec int64
	if !t.IsZero() {
		sec = t.Unix()
	}
	pack.Int(c, &sec, math.MaxInt64)
	if c.Reading() && c.Err() == nil && sec != 0 {
		*t = time.Unix(sec, 0)
	}
}

// PackAddr names an address to c.
func PackAddr(c *pack.Coder, a *netip.AddrPort) {
	var b []byte
	if !c.Reading() {
		b, _ = a.MarshalBinary() // it does not fail
	}
	pack.Bytes(c, &b, 64)
	if !c.Reading() || c.Err() != nil {
		return
	}
	if err := a.UnmarshalBinary(b); err != nil {
		c.Fail(fmt.Errorf("unpack: an address: %w", err))
	}
}

// check reports whether a tunnel can be in this state with conns connections.
// What the protocol's state checks itself is not looked at.
func (s *TunnelState) check(conns int) error {
	if s.Peer.IsZero() {
		return errors.New("the peer has no identity")
	}
	client := s.Core.Role == hbone.ClientRole
	if client != s.Open.Client {
		return errors.New("two roles in one state")
	}
	if conns != len(s.Conns) {
		return fmt.Errorf("%d sockets for %d connections", conns, len(s.Conns))
	}
	open := make(map[uint32]bool) // answered
	for _, st := range s.Core.Streams {
		open[st.ID] = st.Answered
	}
	queued := 0
	for _, c := range s.Conns {
		answered, there := open[c.ID]
		switch {
		case !there && !c.Deaf && !(c.ReadEnd && c.PeerEnd):
			return fmt.Errorf("a connection on stream %d, which is not open", c.ID)
		case there && answered != c.Open:
			return fmt.Errorf("a connection on stream %d that was and was not accepted", c.ID)
		case !c.Open && !client:
			return fmt.Errorf("a connection on stream %d before its answer", c.ID)
		}
		open[c.ID] = false
		early := 0
		for _, p := range c.Early {
			early += len(p)
		}
		if early != c.Ahead {
			return fmt.Errorf("of a connection on stream %d %d bytes came ahead, want %d", c.ID, early, c.Ahead)
		}
		queued += c.Ahead + len(c.Queue)
	}
	for _, r := range s.Requests {
		answered, there := open[r.ID]
		if client || !there || answered {
			return fmt.Errorf("a request on stream %d, which is not waiting", r.ID)
		}
		queued += len(r.Early)
	}
	if queued > s.Core.Queued {
		return errors.New("more is unread than was received")
	}
	return nil
}
