package h1

import (
	"strconv"

	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

// maxExtension bounds what a body may have in chunk extensions, which are
// dropped (RFC 9112 7.1.1), and maxTrailer its trailers.
const (
	maxExtension = 4 << 10
	maxTrailer   = 16 << 10
)

// A Chunks decodes one chunked body. Its zero value is ready.
type Chunks struct {
	// Done is set when the body and its trailers have come to their end.
	Done bool

	state     chunkState
	left      uint64 // of the chunk
	digits    int
	extension int
	trailer   []byte
	lineFrom  int
	head      *msg.Head
}

type chunkState uint8

const (
	inSize chunkState = iota
	inExtension
	afterSize // LF is due
	inData
	afterData // CR is due
	afterDataCR
	inTrailer
)

// Next reads from b. It returns how much of it is used up, and a piece of the
// body, which is part of b and may be empty; call it again with the rest while
// there is one and the body is not done.
func (c *Chunks) Next(b []byte) (used int, data []byte, err error) {
	for i := 0; i < len(b); i++ {
		x := b[i]
		switch c.state {
		case inSize:
			if err := c.sizeByte(x); err != nil {
				return i, nil, err
			}
		case inExtension:
			c.extension++
			switch {
			case x == '\r':
				c.state = afterSize
			case !inValue[x] || c.extension > maxExtension:
				return i, nil, errChunk
			}
		case afterSize:
			if x != '\n' {
				return i, nil, errChunk
			}
			c.state = inData
			if c.left == 0 {
				c.state = inTrailer
			}
			c.digits = 0
		case inData:
			n := min(uint64(len(b)-i), c.left)
			if c.left -= n; c.left == 0 {
				c.state = afterData
			}
			return i + int(n), b[i : i+int(n)], nil
		case afterData:
			if x != '\r' {
				return i, nil, errChunk
			}
			c.state = afterDataCR
		case afterDataCR:
			if x != '\n' {
				return i, nil, errChunk
			}
			c.state = inSize
		case inTrailer:
			if err := c.trailerByte(x); err != nil || c.Done {
				return i + 1, nil, err
			}
		}
	}
	return len(b), nil, nil
}

// sizeByte reads a byte of a chunk's size: up to 15 digits, no spaces.
func (c *Chunks) sizeByte(x byte) error {
	d := msg.Lower(x)
	switch {
	case d >= '0' && d <= '9':
		d -= '0'
	case d >= 'a' && d <= 'f':
		d -= 'a' - 10
	case c.digits == 0:
		return errChunk
	case d == '\r':
		c.state = afterSize
		return nil
	case d == ';':
		c.state = inExtension
		return nil
	default:
		return errChunk
	}
	c.left = c.left<<4 | uint64(d)
	if c.digits++; c.digits > 15 {
		return errChunk
	}
	return nil
}

// trailerByte reads a byte after the last chunk. Lines are kept until the empty
// one, and then checked like those of a head.
func (c *Chunks) trailerByte(x byte) error {
	c.trailer = append(c.trailer, x)
	n := len(c.trailer)
	if n > maxTrailer {
		return errTrailer
	}
	if x != '\n' {
		return nil
	}
	if n-c.lineFrom < 2 || c.trailer[n-2] != '\r' {
		return errLineEnd
	}
	empty := n-c.lineFrom == 2
	c.lineFrom = n
	if !empty {
		return nil
	}
	c.Done = true
	if n == 2 {
		return nil
	}
	return c.parseTrailer()
}

// parseTrailer reads the lines of the trailers. Fields that are about the
// message's framing, way, or target mean nothing there, or would mean too much
// to who merges them into the head (RFC 9110 6.5.1): they are dropped.
func (c *Chunks) parseTrailer() error {
	h := &msg.Head{}
	h.Reset()
	h.Lines = c.trailer
	for i := 0; i < len(h.Lines)-2; { // then comes the empty line
		var f msg.Field
		next, err := line(h.Lines, i, &f)
		if err != nil {
			return err
		}
		i = next
		if !InTrailer(f.ID) || lookalike(h.Name(&f)) {
			continue
		}
		h.Fields = append(h.Fields, f)
	}
	if len(h.Fields) > 0 {
		c.head = h
	}
	return nil
}

// Trailer returns the trailers when the body is done, and nil if there are
// none.
func (c *Chunks) Trailer() *msg.Head { return c.head }

// InTrailer reports whether a field may be sent after a body.
func InTrailer(id msg.ID) bool {
	switch id {
	case msg.Authorization, msg.Connection, msg.ContentLength, msg.ContentType, msg.Cookie, msg.Expect, msg.Forwarded,
		msg.Host, msg.HTTP2Settings, msg.KeepAlive, msg.Location, msg.ProxyAuthenticate, msg.ProxyAuthorization,
		msg.ProxyConnection, msg.SetCookie, msg.TE, msg.Trailer, msg.TransferEncoding, msg.Upgrade, msg.Via,
		msg.XEnvoyPeerMetadata, msg.XEnvoyPeerMetadataID, msg.XForwardedClientCert, msg.XForwardedFor,
		msg.XForwardedHost, msg.XForwardedPort, msg.XForwardedProto, msg.XRequestID:
		return false
	}
	return true
}

// AppendChunk appends data as one chunk. Empty data appends nothing: an empty
// chunk would be the last one.
func AppendChunk(dst, data []byte) []byte {
	if len(data) == 0 {
		return dst
	}
	dst = AppendChunkSize(dst, len(data))
	dst = append(dst, data...)
	return append(dst, "\r\n"...)
}

// AppendChunkSize appends what comes before the n bytes of a chunk; after them
// CRLF is due.
func AppendChunkSize(dst []byte, n int) []byte {
	dst = strconv.AppendInt(dst, int64(n), 16)
	return append(dst, "\r\n"...)
}

// AppendLastChunk appends the end of a body, with trailers if h is not nil.
func AppendLastChunk(dst []byte, h *msg.Head) []byte {
	dst = append(dst, "0\r\n"...)
	if h != nil {
		dst = h.AppendLines(dst)
	}
	return append(dst, "\r\n"...)
}
