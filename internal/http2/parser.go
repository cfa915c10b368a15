package http2

import "encoding/binary"

// Limits of what a Parser keeps. DATA is never kept.
const (
	maxSettings      = 4096 // bytes of a SETTINGS frame: hundreds of entries, where a peer needs eight
	maxDebug         = 256  // bytes of a GOAWAY's debug data that are kept; the rest is skipped
	maxContinuations = 16   // a block of many tiny pieces is an attack (CVE-2024-27316)
)

// ParserConfig says what a Parser accepts.
type ParserConfig struct {
	// Preface makes it demand the client connection preface first.
	Preface bool
	// MaxFrame is the largest payload, as announced in SETTINGS_MAX_FRAME_SIZE.
	MaxFrame int
	// MaxBlock is the largest header block, compressed, over all its frames.
	MaxBlock int
	// Priorities makes it refuse a stream that depends on itself, as RFC 7540
	// 5.3.1 has it. RFC 9113 gives priorities no meaning.
	Priorities bool
}

// A Parser cuts a byte stream into frames. It holds partial frames except
// DATA, whose bytes it passes on as they come, so a peer's choice of frame size
// neither delays them nor costs memory. The zero Parser accepts only empty
// frames; use NewParser.
type Parser struct {
	cfg     ParserConfig
	preface int // bytes of Preface seen
	head    [HeaderLen]byte
	headLen int

	inFrame bool
	frame   Header
	left    int // payload bytes to come, without padding
	pad     int // padding bytes to come
	padLen  bool
	started bool // the first piece of this DATA frame is out
	skip    int  // bytes to throw away after left
	buf     []byte

	block         []byte // header block so far
	blockHead     Header // of the HEADERS frame it began with; Type Headers while it is open
	inBlock       bool
	continuations int
	settled       bool // the first SETTINGS has come
}

// NewParser returns a Parser for a new connection.
func NewParser(cfg ParserConfig) *Parser {
	p := &Parser{cfg: cfg}
	if !cfg.Preface {
		p.preface = len(Preface)
	}
	return p
}

// A Frame is what Next returns: a piece of a DATA frame, or any other frame
// whole. HEADERS comes with its CONTINUATION frames as one block.
type Frame struct {
	Header
	// Payload is valid until the next call of Next and while its input is. It
	// has no padding and no priority field. It is nil for PRIORITY and for
	// unknown types.
	Payload []byte
	// Start and End mark the first and last piece of a DATA frame. Flow
	// control counts Header.Length at Start, padding included (RFC 9113 6.1).
	Start, End bool
}

// Next reads from in. It returns the next frame or piece of DATA and what is
// left of in, or ok false when it has taken all of in and needs more. An error
// is a *ConnError and final.
func (p *Parser) Next(in []byte) (f Frame, rest []byte, ok bool, err error) {
	for {
		if !p.inFrame {
			in, err = p.readHead(in)
			if err != nil || !p.inFrame {
				return Frame{}, in, false, err
			}
		}
		if p.frame.Type == Data {
			f, in, ok, err = p.readData(in)
			if ok || err != nil || p.inFrame {
				return f, in, ok, err
			}
			continue
		}
		var payload []byte
		payload, in, ok = p.readWhole(in)
		if !ok {
			return Frame{}, in, false, nil
		}
		f, ok, err = p.finish(payload)
		if ok || err != nil {
			return f, in, ok, err
		}
	}
}

// readHead reads the preface and the frame header, and begins the frame once
// it has all of the header.
func (p *Parser) readHead(in []byte) (rest []byte, err error) {
	for p.preface < len(Preface) && len(in) > 0 {
		if in[0] != Preface[p.preface] {
			return nil, connError(ProtocolError, "the peer does not speak HTTP/2")
		}
		p.preface++
		in = in[1:]
	}
	n := copy(p.head[p.headLen:], in)
	p.headLen += n
	in = in[n:]
	if p.headLen < HeaderLen {
		return in, nil
	}
	p.headLen = 0
	return in, p.begin(ParseHeader(p.head[:]))
}

// begin checks a frame by its header and prepares to read its payload.
func (p *Parser) begin(h Header) error {
	if int64(h.Length) > int64(p.cfg.MaxFrame) {
		return connError(FrameSizeError, "frame of %d bytes, at most %d are allowed", h.Length, p.cfg.MaxFrame)
	}
	if p.inBlock && (h.Type != Continuation || h.StreamID != p.blockHead.StreamID) {
		return connError(ProtocolError, "a header block was interrupted") // 6.10
	}
	if !p.settled && (h.Type != Settings || h.Flags.Has(Ack)) {
		return connError(ProtocolError, "the first frame is not SETTINGS") // 3.4
	}
	if err := checkSize(h); err != nil {
		return err
	}
	if err := checkStream(h); err != nil {
		return err
	}
	p.frame, p.inFrame = h, true
	p.buf = p.buf[:0]
	p.left, p.pad, p.skip, p.padLen, p.started = int(h.Length), 0, 0, false, false
	switch h.Type {
	case Data:
		p.padLen = h.Flags.Has(Padded)
	case Settings:
		p.settled = true
		if p.left > maxSettings {
			return connError(EnhanceYourCalm, "SETTINGS of %d bytes", p.left)
		}
	case GoAway:
		if over := p.left - 8 - maxDebug; over > 0 {
			p.left, p.skip = p.left-over, over
		}
	case Headers, Continuation:
		return p.beginBlock()
	case RSTStream, Ping, WindowUpdate:
	case Priority:
		if !p.cfg.Priorities {
			p.left, p.skip = 0, p.left
		}
	default: // unknown frames mean nothing to us
		p.left, p.skip = 0, p.left
	}
	return nil
}

// beginBlock bounds a header block before any of it is kept.
func (p *Parser) beginBlock() error {
	if p.frame.Type == Continuation {
		if !p.inBlock {
			return connError(ProtocolError, "CONTINUATION without HEADERS")
		}
		if p.continuations++; p.continuations > maxContinuations {
			return connError(EnhanceYourCalm, "header block of more than %d frames", maxContinuations)
		}
	} else {
		p.block, p.continuations = p.block[:0], 0
	}
	const padAndPriority = 1 + 255 + 5
	if len(p.block)+p.left > p.cfg.MaxBlock+padAndPriority {
		return connError(EnhanceYourCalm, "header block of more than %d bytes", p.cfg.MaxBlock)
	}
	return nil
}

// checkSize refuses frames whose length their type does not allow. PRIORITY is
// a stream error by RFC 9113 6.3; as 5.4.2 permits, all are errors of the
// connection here.
func checkSize(h Header) error {
	var bad bool
	switch h.Type {
	case Priority:
		bad = h.Length != 5
	case RSTStream, WindowUpdate:
		bad = h.Length != 4
	case Ping:
		bad = h.Length != 8
	case GoAway:
		bad = h.Length < 8
	case Settings:
		bad = h.Length%6 != 0 || h.Flags.Has(Ack) && h.Length != 0
	}
	if bad {
		return connError(FrameSizeError, "frame of type %d with %d bytes", h.Type, h.Length)
	}
	return nil
}

// checkStream refuses frames on stream 0 that belong to a stream, and the
// other way round.
func checkStream(h Header) error {
	switch h.Type {
	case Data, Headers, Priority, RSTStream, Continuation:
		if h.StreamID == 0 {
			return connError(ProtocolError, "frame of type %d on stream 0", h.Type)
		}
	case Settings, Ping, GoAway:
		if h.StreamID != 0 {
			return connError(ProtocolError, "frame of type %d on stream %d", h.Type, h.StreamID)
		}
	case PushPromise:
		// Clients switch push off, and servers are never pushed to (6.6, 8.4).
		return connError(ProtocolError, "PUSH_PROMISE, and push is off")
	}
	return nil
}

// readData returns the next piece of a DATA frame.
func (p *Parser) readData(in []byte) (f Frame, rest []byte, ok bool, err error) {
	if p.padLen {
		if p.left == 0 {
			return Frame{}, in, false, connError(FrameSizeError, "padded DATA without a pad length")
		}
		if len(in) == 0 {
			return Frame{}, in, false, nil
		}
		pad := int(in[0])
		in, p.left, p.padLen = in[1:], p.left-1, false
		if pad > p.left {
			return Frame{}, in, false, connError(ProtocolError, "DATA with more padding than payload") // 6.1
		}
		p.left, p.pad = p.left-pad, pad
	}
	n := min(p.left, len(in))
	payload := in[:n:n]
	in, p.left = in[n:], p.left-n
	if p.left == 0 && p.pad > 0 {
		k := min(p.pad, len(in))
		in, p.pad = in[k:], p.pad-k
	}
	end := p.left == 0 && p.pad == 0
	if n == 0 && !end {
		return Frame{}, in, false, nil
	}
	f = Frame{Header: p.frame, Payload: payload, Start: !p.started, End: end}
	p.started, p.inFrame = true, !end
	return f, in, true, nil
}

// readWhole collects the payload of any other frame, without a copy when in
// holds all of it.
func (p *Parser) readWhole(in []byte) (payload, rest []byte, ok bool) {
	if len(p.buf) == 0 && len(in) >= p.left {
		payload, in, p.left = in[:p.left:p.left], in[p.left:], 0
	} else if p.left > 0 {
		n := min(p.left, len(in))
		p.buf = append(p.buf, in[:n]...)
		in, p.left = in[n:], p.left-n
		payload = p.buf
	} else {
		payload = p.buf
	}
	if p.left > 0 {
		return nil, in, false
	}
	if p.skip > 0 {
		if len(p.buf) == 0 && len(payload) > 0 {
			p.buf = append(p.buf, payload...) // in may end before the skipped part does
			payload = p.buf
		}
		n := min(p.skip, len(in))
		in, p.skip = in[n:], p.skip-n
		if p.skip > 0 {
			return nil, in, false
		}
	}
	return payload, in, true
}

// finish ends a frame that is not DATA. It returns ok false for a piece of a
// header block that goes on.
func (p *Parser) finish(payload []byte) (f Frame, ok bool, err error) {
	p.inFrame = false
	f = Frame{Header: p.frame, Payload: payload, Start: true, End: true}
	switch p.frame.Type {
	case Headers:
		var on uint32
		if f.Payload, on, err = stripHeaders(p.frame.Flags, payload); err != nil {
			return Frame{}, false, err
		}
		if p.cfg.Priorities && on == p.frame.StreamID {
			return Frame{}, false, errItself
		}
		if len(f.Payload) > p.cfg.MaxBlock {
			return Frame{}, false, connError(EnhanceYourCalm, "header block of more than %d bytes", p.cfg.MaxBlock)
		}
		if p.frame.Flags.Has(EndHeaders) {
			return f, true, nil
		}
		p.block = append(p.block[:0], f.Payload...)
		p.blockHead, p.inBlock = p.frame, true
		return Frame{}, false, nil
	case Continuation:
		p.block = append(p.block, payload...)
		if len(p.block) > p.cfg.MaxBlock {
			return Frame{}, false, connError(EnhanceYourCalm, "header block of more than %d bytes", p.cfg.MaxBlock)
		}
		if !p.frame.Flags.Has(EndHeaders) {
			return Frame{}, false, nil
		}
		p.inBlock = false
		f.Header, f.Payload = p.blockHead, p.block
		f.Flags |= EndHeaders
	case Settings, RSTStream, Ping, GoAway, WindowUpdate:
	case Priority:
		if p.cfg.Priorities && dependency(payload) == p.frame.StreamID {
			return Frame{}, false, errItself
		}
		f.Payload = nil
	default:
		f.Payload = nil
	}
	return f, true, nil
}

// errItself is of a stream that depends on itself. It is read only.
var errItself = connError(ProtocolError, "a stream that depends on itself")

// dependency reads the stream in a priority field.
func dependency(b []byte) uint32 { return binary.BigEndian.Uint32(b) & MaxStreamID }

// stripHeaders removes padding and the priority field, which has no meaning
// any more (RFC 9113 5.3.2). on is the stream in it, 0 if there is none.
func stripHeaders(flags Flags, b []byte) (block []byte, on uint32, err error) {
	pad := 0
	if flags.Has(Padded) {
		if len(b) == 0 {
			return nil, 0, connError(FrameSizeError, "padded HEADERS without a pad length")
		}
		pad, b = int(b[0]), b[1:]
	}
	if flags.Has(PriorityPresent) {
		if len(b) < 5 {
			return nil, 0, connError(FrameSizeError, "HEADERS too short for its priority field")
		}
		on, b = dependency(b), b[5:]
	}
	if pad > len(b) {
		return nil, 0, connError(ProtocolError, "HEADERS with more padding than payload")
	}
	return b[:len(b)-pad], on, nil
}

// Code reads the error code of a RST_STREAM payload.
func Code(payload []byte) ErrCode { return ErrCode(binary.BigEndian.Uint32(payload)) }

// Increment reads the payload of a WINDOW_UPDATE.
func Increment(payload []byte) uint32 { return binary.BigEndian.Uint32(payload) & MaxWindow }

// ParseGoAway reads the payload of a GOAWAY.
func ParseGoAway(payload []byte) (last uint32, code ErrCode, debug []byte) {
	return binary.BigEndian.Uint32(payload) & MaxStreamID, ErrCode(binary.BigEndian.Uint32(payload[4:])), payload[8:]
}
