package conformance

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	h2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// A peer is a client on one connection. It does what it is told, whether that
// is allowed or not, and keeps what comes back. It is used by one goroutine.
type peer struct {
	conn    net.Conn
	timeout time.Duration
	out     *bufio.Writer
	fr      *h2.Framer
	enc     *hpack.Encoder
	block   bytes.Buffer
	dec     *hpack.Decoder

	in      inbox
	settled bool // their first SETTINGS have come
	acked   bool // they have acknowledged ours
	theirs  map[h2.SettingID]uint32
	window  int64 // what we may send on the connection
	frame   int   // largest DATA that came
	pongs   [][8]byte
	pings   int
	goAways []h2.ErrCode
	ended   error // why nothing more comes
	stall   bool  // give no credit for what comes
	deaf    bool  // answer no PING

	next    uint32
	streams map[uint32]*stream
	initial int64 // stream window that we have announced
	owed    int   // received on the connection, not yet given back
}

// stream is what is known of one of them.
type stream struct {
	id      uint32
	status  string
	window  int64 // what we may send
	ours    int64 // what they may send
	over    bool  // they have sent more than that
	got     bytes.Buffer
	ended   bool
	reset   bool
	code    h2.ErrCode
	stalled bool // give no credit
}

// inbox holds frames until they are looked at, so that the server can always
// write.
type inbox struct {
	mu    sync.Mutex
	items []item
	err   error
	wake  chan struct{}
}

type item struct {
	head    h2.FrameHeader
	payload []byte
}

// fields of the usual request.
func connectTo(authority string, more ...string) []string {
	return append([]string{":method=CONNECT", ":authority=" + authority}, more...)
}

// dial connects and shakes hands, presenting the suite's certificate.
func (s *suite) dial(change func(*tls.Config)) (*tls.Conn, error) {
	cfg := s.tls()
	if change != nil {
		change(cfg)
	}
	c, err := s.Dial(s.ctx, "tcp", s.Address)
	if err != nil {
		return nil, err
	}
	_ = c.SetDeadline(time.Now().Add(s.Timeout)) // fails only on closed connections
	t := tls.Client(c, cfg)
	if err := t.HandshakeContext(s.ctx); err != nil {
		_ = c.Close() // the handshake's error says more
		return nil, handshakeError(err)
	}
	_ = c.SetDeadline(time.Time{})
	return t, nil
}

// handshakeError says in plain words why a handshake has failed, where
// crypto/tls and the kernel do not.
func handshakeError(err error) error {
	var timeout net.Error
	var strange tls.RecordHeaderError
	switch {
	case errors.As(err, &timeout) && timeout.Timeout():
		return errors.New("handshake: the server says nothing")
	case errors.Is(err, io.EOF), errors.Is(err, syscall.ECONNRESET):
		return fmt.Errorf("handshake: the server ends it without an alert: %w", err)
	case errors.As(err, &strange), strings.Contains(err.Error(), "unexpected handshake message"):
		return fmt.Errorf("handshake: the server does not seem to speak TLS: %w", err)
	}
	return fmt.Errorf("handshake: %w", err)
}

// greet opens a connection and exchanges SETTINGS.
func (s *suite) greet(ours ...h2.Setting) (*peer, error) {
	c, err := s.dial(nil)
	if err != nil {
		return nil, err
	}
	return s.greetOver(c, ours...)
}

func (s *suite) greetOver(c net.Conn, ours ...h2.Setting) (*peer, error) {
	p := s.peer(c)
	p.write([]byte(h2.ClientPreface))
	p.said(p.fr.WriteSettings(ours...))
	for _, o := range ours {
		if o.ID == h2.SettingInitialWindowSize {
			p.initial = int64(o.Val)
		}
	}
	if err := p.wait("SETTINGS and the answer to ours", func() bool { return p.settled && p.acked }); err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

// peer reads from c and has said nothing yet.
func (s *suite) peer(c net.Conn) *peer {
	p := &peer{
		conn: c, timeout: s.Timeout, out: bufio.NewWriterSize(c, 64<<10),
		theirs: map[h2.SettingID]uint32{}, window: 65535, initial: 65535,
		next: 1, streams: map[uint32]*stream{}, dec: hpack.NewDecoder(4096, nil),
	}
	p.in.wake = make(chan struct{}, 1)
	p.fr = h2.NewFramer(p.out, nil)
	p.fr.AllowIllegalWrites = true
	p.enc = hpack.NewEncoder(&p.block)
	go p.read() // ends with the connection, which close closes
	return p
}

// read fills the inbox until the connection ends.
func (p *peer) read() {
	var err error
	for err == nil {
		var head h2.FrameHeader
		var payload []byte
		if head, err = h2.ReadFrameHeader(p.conn); err == nil {
			payload = make([]byte, head.Length)
			_, err = io.ReadFull(p.conn, payload)
		}
		p.in.mu.Lock()
		if err == nil {
			p.in.items = append(p.in.items, item{head, payload})
		} else {
			p.in.err = err
		}
		p.in.mu.Unlock()
		select {
		case p.in.wake <- struct{}{}:
		default:
		}
	}
}

func (p *peer) close() { _ = p.conn.Close() } // nothing depends on how

// write and said put frames into the buffer; when the server has gone that
// shows in what comes, so errors are of no interest here.
func (p *peer) write(b []byte) { _, _ = p.out.Write(b) }
func (p *peer) said(error)     {}

// flush sends what was written.
func (p *peer) flush() {
	_ = p.conn.SetWriteDeadline(time.Now().Add(p.timeout))
	_ = p.out.Flush()
}

// wait flushes, and takes in what comes until ok, or fails.
func (p *peer) wait(what string, ok func() bool) error {
	p.flush()
	deadline := time.NewTimer(p.timeout)
	defer deadline.Stop()
	for !ok() {
		if p.takeIn() {
			continue
		}
		if p.ended != nil {
			return fmt.Errorf("want %s, got the end of the connection (%s)", what, p.ending())
		}
		p.flush()
		select {
		case <-p.in.wake:
		case <-deadline.C:
			return fmt.Errorf("want %s, got nothing for %v", what, p.timeout)
		}
	}
	p.flush()
	return nil
}

// takeIn looks at one frame, if one is there.
func (p *peer) takeIn() bool {
	p.in.mu.Lock()
	defer p.in.mu.Unlock()
	if len(p.in.items) == 0 {
		p.ended = p.in.err
		return false
	}
	it := p.in.items[0]
	p.in.items = p.in.items[1:]
	p.handle(it)
	return true
}

// ending says how the server took its leave.
func (p *peer) ending() string {
	if len(p.goAways) > 0 {
		return fmt.Sprintf("GOAWAY %v", p.goAways)
	}
	if p.ended != nil {
		return p.ended.Error()
	}
	return "it goes on"
}

// handle does with a frame what an honest client does, and takes notes.
func (p *peer) handle(it item) {
	s := p.streams[it.head.StreamID]
	switch it.head.Type {
	case h2.FrameSettings:
		p.settings(it)
	case h2.FramePing:
		p.ping(it)
	case h2.FrameGoAway:
		if len(it.payload) >= 8 {
			p.goAways = append(p.goAways, h2.ErrCode(be32(it.payload[4:])))
		}
	case h2.FrameWindowUpdate:
		n := int64(be32(it.payload) & 0x7fffffff)
		if it.head.StreamID == 0 {
			p.window += n
		} else if s != nil {
			s.window += n
		}
	case h2.FrameHeaders:
		if s != nil {
			p.headers(s, it)
		}
	case h2.FrameData:
		p.data(s, it)
	case h2.FrameRSTStream:
		if s != nil {
			s.reset, s.code = true, h2.ErrCode(be32(it.payload))
		}
	}
}

func be32(b []byte) uint32 {
	if len(b) < 4 {
		return 0
	}
	return uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])
}

func (p *peer) settings(it item) {
	if it.head.Flags.Has(h2.FlagSettingsAck) {
		p.acked = true
		return
	}
	p.settled = true
	for b := it.payload; len(b) >= 6; b = b[6:] {
		id, v := h2.SettingID(uint16(b[0])<<8|uint16(b[1])), be32(b[2:])
		if id == h2.SettingInitialWindowSize {
			for _, s := range p.streams {
				s.window += int64(v) - p.initialWindow()
			}
		}
		p.theirs[id] = v
	}
	p.said(p.fr.WriteSettingsAck())
}

// initialWindow is what a new stream of ours may send.
func (p *peer) initialWindow() int64 {
	if v, ok := p.theirs[h2.SettingInitialWindowSize]; ok {
		return int64(v)
	}
	return 65535
}

// maxFrame is the largest frame that the server takes.
func (p *peer) maxFrame() int {
	if v, ok := p.theirs[h2.SettingMaxFrameSize]; ok {
		return int(v)
	}
	return 16 << 10
}

func (p *peer) ping(it item) {
	if len(it.payload) != 8 {
		return
	}
	data := [8]byte(it.payload)
	switch {
	case it.head.Flags.Has(h2.FlagPingAck):
		p.pongs = append(p.pongs, data)
	default:
		p.pings++
		if !p.deaf {
			p.said(p.fr.WritePing(true, data))
		}
	}
}

// headers reads the answer to a request. A block in several frames, which no
// answer of a tunnel needs, is not understood.
func (p *peer) headers(s *stream, it item) {
	b := it.payload
	if it.head.Flags.Has(h2.FlagHeadersPadded) && len(b) > 0 {
		b = b[1:max(1, len(b)-int(b[0]))]
	}
	if it.head.Flags.Has(h2.FlagHeadersPriority) && len(b) >= 5 {
		b = b[5:]
	}
	fields, err := p.dec.DecodeFull(b)
	if err != nil {
		s.status = "a header block that does not decode: " + err.Error()
	}
	for _, f := range fields {
		if f.Name == ":status" && s.status == "" && !strings.HasPrefix(f.Value, "1") {
			s.status = f.Value
		}
	}
	s.ended = s.ended || it.head.Flags.Has(h2.FlagHeadersEndStream)
}

// data keeps what comes and gives the window back.
func (p *peer) data(s *stream, it item) {
	n := len(it.payload)
	p.frame = max(p.frame, n)
	if p.owed += n; p.owed > 16<<10 && !p.stall {
		p.said(p.fr.WriteWindowUpdate(0, uint32(p.owed)))
		p.owed = 0
	}
	if s == nil {
		return
	}
	b := it.payload
	if it.head.Flags.Has(h2.FlagDataPadded) && n > 0 {
		b = b[1:max(1, n-int(b[0]))]
	}
	s.got.Write(b)
	if s.ours -= int64(n); s.ours < 0 {
		s.over = true
	}
	s.ended = s.ended || it.head.Flags.Has(h2.FlagDataEndStream)
	if n > 0 && !s.stalled && !p.stall && !s.ended {
		p.grant(s, n)
	}
}

// grant lets the server send n more on s.
func (p *peer) grant(s *stream, n int) {
	s.ours += int64(n)
	p.said(p.fr.WriteWindowUpdate(s.id, uint32(n)))
}

// encode returns a header block of "name=value" fields.
func (p *peer) encode(fields ...string) []byte {
	p.block.Reset()
	for _, f := range fields {
		name, value, _ := strings.Cut(f, "=")
		_ = p.enc.WriteField(hpack.HeaderField{Name: name, Value: value}) // to memory
	}
	return bytes.Clone(p.block.Bytes())
}

// ask sends a request on a new stream.
func (p *peer) ask(end bool, fields ...string) *stream {
	s := &stream{id: p.next, window: p.initialWindow(), ours: p.initial}
	p.next += 2
	p.streams[s.id] = s
	p.said(p.fr.WriteHeaders(h2.HeadersFrameParam{StreamID: s.id, BlockFragment: p.encode(fields...), EndHeaders: true, EndStream: end}))
	return s
}

// open asks for a connection to authority and waits until it is granted.
func (p *peer) open(authority string, more ...string) (*stream, error) {
	s := p.ask(false, connectTo(authority, more...)...)
	err := p.wait("an answer to CONNECT "+authority, func() bool { return s.status != "" || s.reset })
	switch {
	case err != nil:
		return nil, err
	case s.reset:
		return nil, fmt.Errorf("CONNECT %s: want 200, got RST_STREAM %v", authority, s.code)
	case s.status != "200":
		return nil, fmt.Errorf("CONNECT %s: want 200, got %s", authority, s.status)
	case s.ended:
		return nil, fmt.Errorf("CONNECT %s: 200 came with END_STREAM, so nothing can come back", authority)
	}
	return s, nil
}

// send sends b as the windows allow, in frames of at most size, and ends the
// stream if end is set.
func (p *peer) send(s *stream, b []byte, size int, end bool) error {
	for {
		room := func() int { return int(min(s.window, p.window)) }
		if len(b) > 0 && room() <= 0 {
			if err := p.wait(fmt.Sprintf("window for %d more bytes", len(b)), func() bool { return room() > 0 || s.reset }); err != nil {
				return err
			}
		}
		if s.reset {
			return fmt.Errorf("the server has reset the stream: %v", s.code)
		}
		n := min(len(b), size, p.maxFrame(), max(room(), 0))
		p.said(p.fr.WriteData(s.id, end && n == len(b), b[:n]))
		s.window -= int64(n)
		p.window -= int64(n)
		if b = b[n:]; len(b) == 0 {
			p.flush()
			return nil
		}
		for p.takeIn() {
		}
	}
}

// echo sends b, ends, and wants b back and the end.
func (p *peer) echo(s *stream, b []byte, size int) error {
	if err := p.send(s, b, size, true); err != nil {
		return err
	}
	if err := p.wait(fmt.Sprintf("%d bytes back and END_STREAM", len(b)), func() bool { return s.ended || s.reset }); err != nil {
		return err
	}
	return s.returned(b)
}

// returned says whether b came back, and then the end.
func (s *stream) returned(b []byte) error {
	switch {
	case s.reset && !s.ended:
		return fmt.Errorf("want the end of the stream, got RST_STREAM %v", s.code)
	case !bytes.Equal(s.got.Bytes(), b):
		return fmt.Errorf("%d bytes went out, %d came back and are not the same", len(b), s.got.Len())
	case s.over:
		return errors.New("the server has sent more than the stream's window")
	}
	return nil
}

// alive wants the answer to a PING.
func (p *peer) alive() error {
	data := [8]byte{'a', 'l', 'i', 'v', 'e', byte(len(p.pongs)), byte(len(p.pongs) >> 8), 1}
	p.said(p.fr.WritePing(false, data))
	return p.wait("the answer to a PING", func() bool { return slices.Contains(p.pongs, data) })
}

// wantConnError wants the connection to end. A GOAWAY is not demanded (RFC 9113
// 5.4.1: should), but if one with an error comes it has one of the codes.
func (p *peer) wantConnError(codes ...h2.ErrCode) error {
	p.flush()
	failed := func() bool {
		return slices.ContainsFunc(p.goAways, func(c h2.ErrCode) bool { return c != h2.ErrCodeNo })
	}
	err := p.wait("the end of the connection", failed)
	if err != nil && p.ended == nil {
		return fmt.Errorf("want the end of the connection with %v, but it goes on", codes)
	}
	return p.judge(codes)
}

// judge looks at the codes of the GOAWAYs.
func (p *peer) judge(codes []h2.ErrCode) error {
	for _, c := range p.goAways {
		if c != h2.ErrCodeNo && len(codes) > 0 && !slices.Contains(codes, c) {
			return fmt.Errorf("want %v, got GOAWAY %v", codes, c)
		}
	}
	return nil
}

// wantStreamError wants s, or the whole connection, to end with one of the
// codes.
func (p *peer) wantStreamError(s *stream, codes ...h2.ErrCode) error {
	failed := func() bool { return s.reset || s.status != "" || len(p.goAways) > 0 }
	if err := p.wait("the end of the stream", failed); err != nil && p.ended == nil {
		return fmt.Errorf("want RST_STREAM %v, but the stream goes on", codes)
	}
	switch {
	case s.status != "" && s.status[0] == '2' && !s.reset && len(p.goAways) == 0:
		return fmt.Errorf("want RST_STREAM %v, got status %s", codes, s.status)
	case s.reset && s.status == "" && !slices.Contains(codes, s.code):
		return fmt.Errorf("want RST_STREAM %v, got RST_STREAM %v", codes, s.code)
	}
	return p.judge(codes)
}
