package l7

import (
	"errors"
	"io"

	"github.com/weft-mesh/weft/waypoint/l7/h1"
	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

// errTruncated is the error of a body whose sender has left.
var errTruncated = errors.New("the connection ended within a body")

// http1Body is the body of a request of HTTP/1.
type http1Body struct {
	d      *http1
	kind   msg.BodyKind
	left   int64
	chunks h1.Chunks
	done   bool // it was read to its end
	err    error
}

func (b *http1Body) reset(d *http1, h *msg.Head) {
	*b = http1Body{d: d, kind: h.Body, left: h.Length, done: h.Body == msg.NoBody}
	d.settled.Store(b.done)
}

// Ready reports whether something is there.
func (b *http1Body) Ready() bool { return b.done || b.err != nil || b.d.r < b.d.w }

// Trailer returns what came after the last chunk.
func (b *http1Body) Trailer() *msg.Head { return b.chunks.Trailer() }

// Next implements Body.
func (b *http1Body) Next() ([]byte, error) {
	for {
		switch {
		case b.err != nil:
			return nil, b.err
		case b.done:
			return nil, io.EOF
		}
		d := b.d
		if d.r == d.w {
			if err := b.more(); err != nil {
				b.err = err
				return nil, err
			}
		}
		piece, used, err := decode(b.kind, &b.left, &b.chunks, d.unread())
		d.r += used
		switch {
		case err == io.EOF:
			b.done = true
			d.settled.Store(true)
		case err != nil:
			b.err = err
			return nil, err // and nothing of what came together with it
		}
		if len(piece) > 0 {
			if err == io.EOF {
				return piece, err
			}
			return piece, nil
		}
	}
}

// more reads from the connection, into a large buffer if much is to come.
func (b *http1Body) more() error {
	d := b.d
	if d.informs.CompareAndSwap(true, false) {
		if _, err := d.Conn.Write(continue100); err != nil {
			return err
		}
	}
	if len(d.buf)-d.pinned < bufLen && (b.kind != msg.Sized || b.left > int64(len(d.buf)-d.pinned)) {
		if err := d.grow(); err != nil {
			return err
		}
	}
	err := d.fill()
	if err == io.EOF {
		return errTruncated
	}
	return err
}

// continue100 is read only. It is written past the socket, by whoever reads the
// body: somebody else may be about to write the answer.
var continue100 = []byte("HTTP/1.1 100 Continue\r\n\r\n")

// whole reads a body of n bytes and returns it in one piece, valid until the
// exchange ends.
func (b *http1Body) whole(n int) ([]byte, error) {
	d := b.d
	if d.w-d.r < n && d.informs.CompareAndSwap(true, false) {
		if _, err := d.Conn.Write(continue100); err != nil {
			return nil, err
		}
	}
	if err := d.need(n); err != nil {
		if err == io.EOF {
			err = errTruncated
		}
		b.err = err
		return nil, err
	}
	piece := d.buf[d.r : d.r+n : d.r+n]
	d.pin(n)
	b.left, b.done = 0, true
	d.settled.Store(true)
	return piece, nil
}

// drain drops what has come of a body that nobody wants, and reports whether that
// was all.
func (b *http1Body) drain() bool {
	for !b.done && b.err == nil && b.d.r < b.d.w {
		if _, err := b.Next(); err != nil {
			break
		}
	}
	return b.done
}

// decode takes the framing off the bytes in buf. It returns a piece of the body,
// which is in buf, and how much of buf is used up; io.EOF comes with the last
// piece. Chunks are moved together, so that many small ones are one piece.
func decode(kind msg.BodyKind, left *int64, chunks *h1.Chunks, buf []byte) (piece []byte, used int, err error) {
	if kind == msg.Sized {
		n := int(min(*left, int64(len(buf))))
		if *left -= int64(n); *left == 0 {
			err = io.EOF
		}
		return buf[:n], n, err
	}
	for used < len(buf) {
		k, data, err := chunks.Next(buf[used:])
		used += k
		switch {
		case len(data) == 0:
		case piece == nil:
			piece = data
		default:
			piece = append(piece, data...) // within buf, over framing that is used up
		}
		if err != nil {
			return piece, used, err
		}
		if chunks.Done {
			return piece, used, io.EOF
		}
	}
	return piece, used, nil
}
