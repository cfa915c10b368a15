package hbone

import "sync"

// chunkLen is the largest TLS record: data comes in pieces of at most this.
const chunkLen = 16 << 10

// chunks caches memory between the queues of all streams. It holds nothing
// anyone depends on.
var chunks = sync.Pool{New: func() any { return new([chunkLen]byte) }}

// A queue holds received bytes in order. The zero queue is empty and holds no
// memory.
type queue struct {
	parts []part
	n     int
}

// part is a chunk of which buf[r:w] is waiting.
type part struct {
	buf  *[chunkLen]byte
	r, w int
}

// write adds a copy of p.
func (q *queue) write(p []byte) {
	q.n += len(p)
	if k := len(q.parts); k > 0 {
		last := &q.parts[k-1]
		n := copy(last.buf[last.w:], p)
		last.w += n
		p = p[n:]
	}
	for len(p) > 0 {
		c := part{buf: chunks.Get().(*[chunkLen]byte)}
		c.w = copy(c.buf[:], p)
		p = p[c.w:]
		q.parts = append(q.parts, c)
	}
}

// read moves bytes to p and returns how many.
func (q *queue) read(p []byte) int {
	n := 0
	for n < len(p) && len(q.parts) > 0 {
		c := &q.parts[0]
		k := copy(p[n:], c.buf[c.r:c.w])
		c.r += k
		n += k
		if c.r == c.w {
			q.pop().free()
		}
	}
	q.n -= n
	return n
}

// take removes the first part, which the caller frees. There must be one.
func (q *queue) take() part {
	c := q.pop()
	q.n -= c.w - c.r
	return c
}

func (q *queue) pop() part {
	c := q.parts[0]
	q.parts[0] = part{}
	if q.parts = q.parts[1:]; len(q.parts) == 0 {
		q.parts = nil
	}
	return c
}

// clear drops everything and returns how much that was.
func (q *queue) clear() int {
	n := q.n
	for _, c := range q.parts {
		c.free()
	}
	*q = queue{}
	return n
}

func (c part) bytes() []byte { return c.buf[c.r:c.w] }
func (c part) free()         { chunks.Put(c.buf) }
