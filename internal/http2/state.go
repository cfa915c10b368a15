package http2

import (
	"errors"
	"fmt"
	"math"

	"github.com/weft-mesh/weft/internal/pack"
)

// A ParserState is a Parser between two calls of Next, with what it holds of
// frames that are not whole.
type ParserState struct {
	Preface bool // all of the client's preface has come, or none is wanted
	Settled bool // the first SETTINGS has come

	Head []byte // of a frame header that is not whole; or of the preface, without Preface

	InFrame             bool // the rest is of the frame at hand
	Frame               Header
	Left, Padding, Skip int // bytes to come
	PadLength           bool
	Started             bool
	Payload             []byte

	InBlock       bool // the rest is of the header block at hand
	Block         []byte
	BlockHead     Header
	Continuations int
}

// Pack names the fields to c.
func (s *ParserState) Pack(c *pack.Coder) {
	pack.Bool(c, &s.Preface)
	pack.Bool(c, &s.Settled)
	pack.Bytes(c, &s.Head, len(Preface))
	pack.Bool(c, &s.InFrame)
	packHeader(c, &s.Frame)
	pack.Uint(c, &s.Left, MaxFrameSize)
	pack.Uint(c, &s.Padding, math.MaxUint8)
	pack.Uint(c, &s.Skip, MaxFrameSize)
	pack.Bool(c, &s.PadLength)
	pack.Bool(c, &s.Started)
	pack.Bytes(c, &s.Payload, MaxFrameSize)
	pack.Bool(c, &s.InBlock)
	pack.Bytes(c, &s.Block, MaxFrameSize)
	packHeader(c, &s.BlockHead)
	pack.Uint(c, &s.Continuations, maxContinuations)
}

func packHeader(c *pack.Coder, h *Header) {
	pack.Uint(c, &h.Length, MaxFrameSize)
	pack.Uint(c, &h.Type, math.MaxUint8)
	pack.Uint(c, &h.Flags, math.MaxUint8)
	pack.Uint(c, &h.StreamID, MaxStreamID)
}

// State returns a copy of the parser's state.
func (p *Parser) State() ParserState {
	s := ParserState{Preface: p.preface == len(Preface), Settled: p.settled}
	switch {
	case !s.Preface:
		s.Head = []byte(Preface[:p.preface])
	case p.headLen > 0:
		s.Head = append([]byte(nil), p.head[:p.headLen]...)
	}
	if p.inFrame {
		s.InFrame, s.Frame = true, p.frame
		s.Left, s.Padding, s.Skip = p.left, p.pad, p.skip
		s.PadLength, s.Started = p.padLen, p.started
		s.Payload = append([]byte(nil), p.buf...)
	}
	if p.inBlock {
		s.InBlock, s.BlockHead, s.Continuations = true, p.blockHead, p.continuations
		s.Block = append([]byte(nil), p.block...)
	}
	return s
}

// ResumeParser returns a Parser that goes on from s. Of cfg, Preface does not
// matter.
func ResumeParser(cfg ParserConfig, s ParserState) (*Parser, error) {
	if err := s.check(cfg); err != nil {
		return nil, fmt.Errorf("resume parser: %w", err)
	}
	cfg.Preface = !s.Preface
	p := NewParser(cfg)
	p.settled = s.Settled
	if s.Preface {
		p.headLen = copy(p.head[:], s.Head)
	} else {
		p.preface = len(s.Head)
	}
	if s.InFrame {
		p.inFrame, p.frame = true, s.Frame
		p.left, p.pad, p.skip, p.padLen, p.started = s.Left, s.Padding, s.Skip, s.PadLength, s.Started
		p.buf = append(p.buf, s.Payload...)
	}
	if s.InBlock {
		p.inBlock, p.blockHead, p.continuations = true, s.BlockHead, s.Continuations
		p.block = append(p.block, s.Block...)
	}
	return p, nil
}

// check reports whether a Parser of cfg can be in this state, and would hold
// no more than it may.
func (s *ParserState) check(cfg ParserConfig) error {
	switch {
	case !s.Preface && (len(s.Head) >= len(Preface) || string(s.Head) != Preface[:len(s.Head)] || s.Settled || s.InFrame || s.InBlock):
		return errors.New("what came before the end of the preface cannot be")
	case s.Preface && len(s.Head) >= HeaderLen:
		return errors.New("a frame header that is whole")
	case s.InFrame && s.Preface && len(s.Head) > 0:
		return errors.New("a frame header inside a frame")
	case s.InBlock && (s.BlockHead.Type != Headers || s.BlockHead.StreamID == 0 || !s.Settled):
		return errors.New("a header block without HEADERS")
	case len(s.Block) > cfg.MaxBlock:
		return errors.New("a header block that is too long")
	case s.Continuations < 0 || s.Continuations > maxContinuations:
		return errors.New("too many CONTINUATION frames")
	}
	if s.InFrame {
		return s.checkFrame(cfg)
	}
	return nil
}

// checkFrame checks the frame at hand: that the parser would have begun it,
// and that what has come and what is to come make its length.
func (s *ParserState) checkFrame(cfg ParserConfig) error {
	// begin changes nothing that outlives this.
	probe := Parser{
		cfg: cfg, settled: s.Settled, inBlock: s.InBlock, blockHead: s.BlockHead, block: s.Block, continuations: max(0, s.Continuations-1),
	}
	if err := probe.begin(s.Frame); err != nil {
		return fmt.Errorf("the frame at hand: %w", err)
	}
	if !s.Settled {
		return errors.New("a frame before SETTINGS")
	}
	if s.Left < 0 || s.Padding < 0 || s.Skip < 0 || s.Left > probe.left || s.Skip > probe.skip {
		return errors.New("more is to come of the frame at hand than it has")
	}
	if s.Frame.Type == Data {
		switch {
		case len(s.Payload) > 0, s.Skip > 0, s.PadLength && (!probe.padLen || s.Left != probe.left || s.Padding > 0):
			return errors.New("a DATA frame that cannot be")
		case s.Left+s.Padding > probe.left || s.Padding > 0 && !probe.padLen:
			return errors.New("DATA with more padding than payload")
		}
		return nil
	}
	if s.Padding > 0 || s.PadLength || s.Started {
		return errors.New("the marks of DATA on another frame")
	}
	// readWhole keeps nothing of a frame that it has not begun, and all of what
	// it has taken otherwise.
	if len(s.Payload)+s.Left != probe.left {
		return errors.New("a part of the frame at hand is missing")
	}
	return nil
}

// Pack names the fields of w to c.
func (w *SendWindow) Pack(c *pack.Coder) { pack.Int(c, &w.left, MaxWindow) }

// Pack names the fields of w to c. What is read is a window that can be.
func (w *ReceiveWindow) Pack(c *pack.Coder) {
	pack.Uint(c, &w.size, MaxWindow)
	pack.Uint(c, &w.left, MaxWindow)
	pack.Uint(c, &w.owing, MaxWindow)
	if c.Reading() && c.Err() == nil && int64(w.left)+int64(w.owing) > int64(w.size) {
		c.Fail(errors.New("unpack: a window that is larger than its size"))
	}
}

// Pack names the fields of p to c.
func (p *Peer) Pack(c *pack.Coder) {
	for _, v := range []*uint32{&p.HeaderTable, &p.MaxStreams, &p.StreamWindow, &p.MaxFrame, &p.MaxHeaderList} {
		pack.Uint(c, v, math.MaxUint32)
	}
	if c.Reading() && c.Err() == nil && (p.StreamWindow > MaxWindow || p.MaxFrame < MinFrameSize || p.MaxFrame > MaxFrameSize) {
		c.Fail(errors.New("unpack: settings that no peer can have")) // RFC 9113 6.5.2
	}
}
