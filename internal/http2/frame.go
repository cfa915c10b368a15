// Package http2 holds the parts of HTTP/2 (RFC 9113) that its users share:
// frames, SETTINGS, header fields, flow-control windows and flood limits. It
// does no I/O, starts no goroutine and reads no clock.
package http2

import "encoding/binary"

// Preface is what a client sends before its first frame (RFC 9113 3.4).
const Preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

// Sizes and limits of the protocol.
const (
	HeaderLen       = 9         // bytes of a frame header (RFC 9113 4.1)
	MinFrameSize    = 16 << 10  // every peer takes frames of this size (4.2)
	MaxFrameSize    = 1<<24 - 1 // the largest a peer may ask for (6.5.2)
	MaxWindow       = 1<<31 - 1 // the largest flow-control window (6.9.1)
	InitialWindow   = 65535     // every window before SETTINGS and WINDOW_UPDATE (6.9.2)
	MaxStreamID     = 1<<31 - 1 // (5.1.1)
	DefaultTableLen = 4096      // HPACK table before SETTINGS (6.5.2)
)

// A FrameType is the type octet of a frame (RFC 9113 6).
type FrameType uint8

// The frame types of RFC 9113. Others are skipped.
const (
	Data         FrameType = 0x0
	Headers      FrameType = 0x1
	Priority     FrameType = 0x2
	RSTStream    FrameType = 0x3
	Settings     FrameType = 0x4
	PushPromise  FrameType = 0x5
	Ping         FrameType = 0x6
	GoAway       FrameType = 0x7
	WindowUpdate FrameType = 0x8
	Continuation FrameType = 0x9
)

// Flags are the flags octet of a frame. What a bit means depends on the type.
type Flags uint8

// The flags of RFC 9113.
const (
	EndStream       Flags = 0x1  // DATA, HEADERS
	Ack             Flags = 0x1  // SETTINGS, PING
	EndHeaders      Flags = 0x4  // HEADERS, CONTINUATION
	Padded          Flags = 0x8  // DATA, HEADERS
	PriorityPresent Flags = 0x20 // HEADERS
)

// Has reports whether all bits of o are set.
func (f Flags) Has(o Flags) bool { return f&o == o }

// A Header is the nine octets before each frame's payload.
type Header struct {
	Length   uint32 // of the payload
	Type     FrameType
	Flags    Flags
	StreamID uint32 // without the reserved bit
}

// ParseHeader reads a frame header. b holds at least HeaderLen bytes.
func ParseHeader(b []byte) Header {
	_ = b[HeaderLen-1]
	return Header{
		Length:   uint32(b[0])<<16 | uint32(b[1])<<8 | uint32(b[2]),
		Type:     FrameType(b[3]),
		Flags:    Flags(b[4]),
		StreamID: binary.BigEndian.Uint32(b[5:]) & MaxStreamID, // 4.1: the reserved bit is ignored
	}
}

// AppendHeader appends a frame header. h.Length must be below 1<<24.
func AppendHeader(dst []byte, h Header) []byte {
	return append(dst,
		byte(h.Length>>16), byte(h.Length>>8), byte(h.Length), byte(h.Type), byte(h.Flags),
		byte(h.StreamID>>24), byte(h.StreamID>>16), byte(h.StreamID>>8), byte(h.StreamID))
}

// AppendWindowUpdate appends a WINDOW_UPDATE; stream 0 is the connection.
func AppendWindowUpdate(dst []byte, stream, increment uint32) []byte {
	dst = AppendHeader(dst, Header{Length: 4, Type: WindowUpdate, StreamID: stream})
	return binary.BigEndian.AppendUint32(dst, increment)
}

// AppendRSTStream appends a RST_STREAM.
func AppendRSTStream(dst []byte, stream uint32, code ErrCode) []byte {
	dst = AppendHeader(dst, Header{Length: 4, Type: RSTStream, StreamID: stream})
	return binary.BigEndian.AppendUint32(dst, uint32(code))
}

// AppendPing appends a PING, or with ack its answer.
func AppendPing(dst []byte, ack bool, data [8]byte) []byte {
	h := Header{Length: 8, Type: Ping}
	if ack {
		h.Flags = Ack
	}
	return append(AppendHeader(dst, h), data[:]...)
}

// AppendGoAway appends a GOAWAY. last is the highest stream of the peer that
// was or may still be processed; debug is a word for the person who reads the
// peer's log, and holds no secret.
func AppendGoAway(dst []byte, last uint32, code ErrCode, debug string) []byte {
	dst = AppendHeader(dst, Header{Length: uint32(8 + len(debug)), Type: GoAway})
	dst = binary.BigEndian.AppendUint32(dst, last)
	dst = binary.BigEndian.AppendUint32(dst, uint32(code))
	return append(dst, debug...)
}

// AppendHeaders appends a header block as HEADERS and, where it is longer than
// maxFrame, CONTINUATION frames.
func AppendHeaders(dst []byte, stream uint32, block []byte, end bool, maxFrame int) []byte {
	h := Header{Type: Headers, StreamID: stream}
	if end {
		h.Flags = EndStream
	}
	for {
		n := min(len(block), maxFrame)
		if n == len(block) {
			h.Flags |= EndHeaders
		}
		h.Length = uint32(n)
		dst = append(AppendHeader(dst, h), block[:n]...)
		block = block[n:]
		if len(block) == 0 {
			return dst
		}
		h.Type, h.Flags = Continuation, 0
	}
}
