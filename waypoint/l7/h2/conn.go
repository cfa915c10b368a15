package h2

import (
	"errors"
	"net"
	"sync"
	"time"

	"github.com/weft-mesh/weft/internal/http2"
)

// Defaults of Config.
const (
	defaultStreams      = 256
	defaultStreamWindow = 256 << 10
	defaultConnWindow   = 1 << 20
	defaultList         = 60 << 10
	// writeStall is how long a write may take before the peer is given up.
	writeStall = 30 * time.Second
)

// A Sink takes what comes on one stream. Its methods are called by the goroutine
// of Run, one at a time, and do not wait. What they are given is theirs until
// they return only.
type Sink interface {
	// Fields takes a header list: a response's head, that of an interim
	// response, or trailers; end says that nothing follows. An error resets
	// the stream with PROTOCOL_ERROR.
	Fields(fields []http2.Field, end bool) error
	// Data takes a piece of the body. The stream's window shrinks by it until
	// Stream.Credit. p may be empty if end is set.
	Data(p []byte, end bool)
	// Reset says that the stream was cut by the peer, or with its connection.
	// It may come again, and from other goroutines than Run's; it does not
	// come once both sides have ended the stream.
	Reset(err error)
}

// Config is what a Conn is made of.
type Config struct {
	// Server is set on the side that is called.
	Server bool
	// Accept is called by the goroutine of Run for each stream that a client
	// has begun, and returns who takes what follows. An error resets the stream
	// with PROTOCOL_ERROR. tooLarge says that the head is too large to be read.
	// For a server only.
	Accept func(s *Stream, fields []http2.Field, end, tooLarge bool) (Sink, error)
	// Ended is called when the connection is over and all streams have ended. It
	// may be nil, and must not wait.
	Ended func()
	// Room is called when a stream has ended, so that another may begin. It may
	// be nil, must not wait, and must not call the Conn: its mutex is held.
	Room func()
	// Streams that the peer may have open; 0 is 256.
	Streams int
	// StreamWindow and ConnWindow are the receive windows in bytes; 0 is 256
	// KiB and 1 MiB.
	StreamWindow, ConnWindow int
	// List bounds header lists, by the measure of RFC 9113 6.5.2; 0 is 60 KiB.
	List int
}

// A Conn is one connection. Make it with New; Run must run for anything to
// come.
type Conn struct {
	cfg  Config
	conn net.Conn
	sock socket // conn, if it is one of TCP

	// Of the goroutine of Run.
	parser  *http2.Parser
	fields  *http2.FieldReader
	now     time.Time // of the batch at hand; written under the mutex
	lastID  uint32    // highest stream of the client, on a server
	dataLen int       // of the DATA frame at hand, without what has come of it
	dataTo  *Stream
	dirty   []*Conn
	held    int // bytes that were taken since the last flush

	mu      sync.Mutex // above all that follows
	streams map[uint32]*Stream
	// reserved are streams that a client will begin, and running those whose
	// Accept was called on a server and that nobody has released.
	reserved, running int
	closed            closedRing
	guard             http2.Guard
	peer              http2.Peer
	window            http2.SendWindow
	recv              http2.ReceiveWindow
	nextID            uint32
	enc               encoder
	block             []byte // the header block at hand
	notes             []note
	ready             []*Stream // have something queued that may go
	out               []byte
	spare             []byte
	writing           bool
	soon              bool      // a flush is on its way
	goingAway         bool      // we have sent, or a client has got, GOAWAY
	final             bool      // and no stream will be begun
	over              bool      // and none is open
	lost              bool      // Ended was called
	broken            bool      // a write has failed
	shutting          bool      // the connection is being closed
	dead              error     // why nothing can be sent any more
	since             time.Time // without streams since then
	writers           sync.WaitGroup
}

// New returns a Conn over conn, which it owns once Run is called. It sends
// nothing yet.
func New(conn net.Conn, cfg Config) *Conn {
	orDefault(&cfg.Streams, defaultStreams)
	orDefault(&cfg.StreamWindow, defaultStreamWindow)
	orDefault(&cfg.ConnWindow, defaultConnWindow)
	orDefault(&cfg.List, defaultList)
	c := &Conn{
		cfg: cfg, conn: conn,
		parser:  http2.NewParser(http2.ParserConfig{Preface: cfg.Server, MaxFrame: http2.MinFrameSize, MaxBlock: cfg.List, Priorities: cfg.Server}),
		fields:  http2.NewFieldReader(cfg.List),
		now:     time.Now(),
		since:   time.Now(),
		streams: map[uint32]*Stream{},
		peer:    http2.DefaultPeer(),
		recv:    http2.NewReceiveWindow(http2.InitialWindow),
		nextID:  1,
		enc:     newEncoder(),
	}
	c.window.Add(http2.InitialWindow)
	c.sock.open(conn, c.flushBatch)
	settings := []http2.Setting{
		{ID: http2.InitialWindowSize, Value: uint32(cfg.StreamWindow)},
		{ID: http2.MaxHeaderListSize, Value: uint32(cfg.List)},
	}
	if cfg.Server {
		settings = append(settings, http2.Setting{ID: http2.MaxConcurrentStreams, Value: uint32(cfg.Streams)})
	} else {
		settings = append(settings, http2.Setting{ID: http2.EnablePush, Value: 0})
		c.out = append(c.out, http2.Preface...)
	}
	c.out = http2.AppendSettings(c.out, settings...)
	c.recv.Grow(cfg.ConnWindow)
	if n := c.recv.Announce(); n > 0 {
		c.out = http2.AppendWindowUpdate(c.out, 0, n)
	}
	return c
}

func orDefault(v *int, n int) {
	if *v <= 0 {
		*v = n
	}
}

// ErrClosed is why streams end whose connection is closed without an error.
var ErrClosed = errors.New("the HTTP/2 connection is closed")

// ErrRefused is why a stream ended that the peer has certainly not looked at:
// it may be tried again elsewhere, whatever it asks for.
var ErrRefused = errors.New("the peer refused the stream unprocessed")

// ErrReset is why a stream ended that the peer has reset.
type ErrReset struct{ Code http2.ErrCode }

// Error names the code.
func (e ErrReset) Error() string { return "the peer reset the stream: " + e.Code.String() }

// Run reads from the connection until it ends, and closes it; first is what was
// read from it before. All streams have ended when it returns. The error is nil
// if the peer has closed, or Close was called.
func (c *Conn) Run(first []byte) error {
	c.Flush()
	err := c.read(first)
	c.end(err)
	c.writers.Wait()
	if errors.Is(err, ErrClosed) {
		return nil
	}
	return err
}

// end tells the peer why, if there is a reason, closes, and ends all streams.
func (c *Conn) end(err error) {
	var ce *http2.ConnError
	why := err
	if why == nil {
		why = ErrClosed
	}
	c.mu.Lock()
	if errors.As(err, &ce) && c.dead == nil {
		c.out = http2.AppendGoAway(c.out, c.lastID, ce.Code, ce.Reason)
	}
	c.mu.Unlock()
	c.flush(true)
	c.lose(why)
	c.linger(ce != nil)
	_ = c.conn.Close() // nothing that mattered is left
}

// linger waits for what is being written, for a moment, so that the peer learns
// why.
func (c *Conn) linger(wanted bool) {
	if !wanted {
		return
	}
	_ = c.conn.SetWriteDeadline(time.Now().Add(time.Second)) // it fails on a closed one only
	c.writers.Wait()
	if hc, ok := c.conn.(interface{ CloseWrite() error }); ok {
		// A close with bytes unread would reset the connection, and take the
		// GOAWAY with it.
		if hc.CloseWrite() != nil {
			return
		}
		_ = c.conn.SetReadDeadline(time.Now().Add(time.Second)) // as above
		var scratch [4096]byte
		for range 64 {
			if _, err := c.conn.Read(scratch[:]); err != nil {
				return
			}
		}
	}
}

// lose ends all streams; nothing is sent any more.
func (c *Conn) lose(why error) {
	c.mu.Lock()
	if c.dead == nil {
		c.dead = why
	}
	c.goingAway = true
	first := !c.lost
	c.lost = true
	list := make([]*Stream, 0, len(c.streams))
	for _, s := range c.streams {
		list = append(list, s)
	}
	for _, s := range list {
		s.gone(why)
	}
	clear(c.streams)
	notes := c.takeNotes()
	c.mu.Unlock()
	settle(notes)
	for _, s := range list {
		if s.sink != nil {
			s.sink.Reset(why)
		}
	}
	if first && c.cfg.Ended != nil {
		c.cfg.Ended()
	}
}

// Close ends the connection and all of its streams now.
func (c *Conn) Close() {
	c.lose(ErrClosed)
	_ = c.conn.Close() // nothing that mattered is left
}

// Drain tells the peer to use another connection for what it begins from now
// on. Streams that are open go on, and the connection ends after the last.
func (c *Conn) Drain() {
	c.mu.Lock()
	if c.goingAway {
		c.mu.Unlock()
		return
	}
	c.goingAway = true
	if c.cfg.Server {
		// Streams that are on their way are still served: the second GOAWAY
		// follows the answer to the PING (RFC 9113 6.8).
		c.out = http2.AppendGoAway(c.out, http2.MaxStreamID, http2.NoError, "draining")
		c.out = http2.AppendPing(c.out, false, drainPing)
	} else {
		c.out = http2.AppendGoAway(c.out, 0, http2.NoError, "draining")
		c.final = true
		c.drained()
	}
	c.mu.Unlock()
	c.Flush()
}

// drained notes that a connection that goes away has nothing left to do. The
// mutex is held, and a flush follows.
func (c *Conn) drained() { c.over = c.final && len(c.streams) == 0 && c.reserved == 0 }

// drainPing is the PING that follows the first GOAWAY.
var drainPing = [8]byte{'w', 'e', 'f', 't', 'd', 'r', 'a', 'i'}

// Now returns when the bytes came that are being taken. It is for Sinks, within
// a call by Run.
func (c *Conn) Now() time.Time { return c.now }

// Idle returns since when there are no streams, and false if there are some.
func (c *Conn) Idle() (since time.Time, idle bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.since, len(c.streams) == 0 && c.reserved == 0
}

// smallRead is what a connection reads into while little comes.
const smallRead = 2 << 10

// readPool holds the buffers of connections from which much comes.
var readPool = sync.Pool{New: func() any { return new([64 << 10]byte) }}

// maxHeld is how many bytes are taken at most before what they have led to is
// sent.
const maxHeld = 64 << 10

// read takes what comes until the end. What it leads to is sent when nothing
// more is there: so batches grow with the load, and nobody waits for them.
func (c *Conn) read(first []byte) error {
	if err := c.take(first); err != nil {
		return err
	}
	defer c.flushDirty()
	small := make([]byte, smallRead)
	var large *[64 << 10]byte
	for {
		buf := small
		if large != nil {
			buf = large[:]
		}
		n, err := c.receive(buf)
		if n > 0 {
			if err := c.take(buf[:n]); err != nil {
				return err
			}
		}
		if err != nil {
			return c.readError(err)
		}
		switch {
		case large == nil && n == len(buf):
			large = readPool.Get().(*[64 << 10]byte)
		case large != nil && n < smallRead:
			readPool.Put(large)
			large = nil
		}
	}
}

// receive reads what comes next.
func (c *Conn) receive(buf []byte) (int, error) {
	if c.sock.raw == nil {
		// It cannot be known whether more is there.
		c.flushBatch()
		return c.conn.Read(buf)
	}
	if c.held >= maxHeld {
		c.flushBatch()
	}
	return c.sock.read(buf)
}

// flushBatch sends what a batch has led to, on all connections.
func (c *Conn) flushBatch() {
	if c.held == 0 {
		return
	}
	c.held = 0
	c.flushDirty()
	c.Flush()
}

// readError says why nothing comes any more.
func (c *Conn) readError(err error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.dead != nil {
		return c.dead
	}
	if isEnd(err) {
		return nil
	}
	return err
}

// take takes a batch of bytes.
func (c *Conn) take(in []byte) error {
	c.held += len(in)
	now := time.Now()
	c.mu.Lock()
	c.now = now
	c.mu.Unlock()
	var err error
	for len(in) > 0 && err == nil {
		var f http2.Frame
		var ok bool
		f, in, ok, err = c.parser.Next(in)
		if err != nil || !ok {
			break
		}
		err = c.frame(f)
	}
	return err
}

// maxDirty is how many connections one batch may leave to be flushed.
const maxDirty = 64

func (c *Conn) flushDirty() {
	for i, d := range c.dirty {
		d.Flush()
		c.dirty[i] = nil
	}
	c.dirty = c.dirty[:0]
}

// Dirty makes the goroutine of Run flush other when it has taken all that has
// come. It is for Sinks.
func (c *Conn) Dirty(other *Conn) {
	for _, d := range c.dirty {
		if d == other {
			return
		}
	}
	if len(c.dirty) == maxDirty {
		c.flushDirty()
	}
	c.dirty = append(c.dirty, other)
}

// frame handles one frame, or piece of DATA.
func (c *Conn) frame(f http2.Frame) error {
	switch f.Type {
	case http2.Data:
		return c.onData(f)
	case http2.Headers:
		return c.onHeaders(f)
	case http2.RSTStream:
		return c.onReset(f)
	case http2.WindowUpdate:
		return c.onWindow(f)
	case http2.Settings:
		return c.onSettings(f)
	case http2.Ping:
		return c.onPing(f)
	case http2.GoAway:
		return c.onGoAway(f)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.guard.Idle(c.now)
}
