package loop

const (
	smallChunk = 4 << 10
	largeChunk = 64 << 10
	// keepChunks bounds the memory that a loop keeps for queues when they are
	// empty: 8 MiB of large chunks.
	keepChunks = 128
)

// A queue is what came for an application that does not read fast enough. A
// connection without such data has none.
type queue struct {
	first, last *chunk
	n           int
}

// A chunk is a piece of a queue, of which buf[r:w] is waiting.
type chunk struct {
	next *chunk
	r, w int
	buf  []byte
}

// queue returns an empty queue.
func (s *store) queue() *queue {
	if n := len(s.queues); n > 0 {
		q := s.queues[n-1]
		s.queues = s.queues[:n-1]
		return q
	}
	return &queue{}
}

// release takes back an emptied queue.
func (s *store) release(q *queue) {
	if len(s.queues) < keepChunks {
		s.queues = append(s.queues, q)
	}
}

func (s *store) chunk(n int) *chunk {
	list, size := &s.small, smallChunk
	if n > smallChunk {
		list, size = &s.large, largeChunk
	}
	if k := len(*list); k > 0 {
		c := (*list)[k-1]
		*list = (*list)[:k-1]
		return c
	}
	return &chunk{buf: make([]byte, size)}
}

func (s *store) free(c *chunk) {
	list := &s.small
	switch len(c.buf) {
	case smallChunk:
	case largeChunk:
		list = &s.large
	default: // it came from another process
		return
	}
	*c = chunk{buf: c.buf}
	if len(*list) < keepChunks {
		*list = append(*list, c)
	}
}

// write adds a copy of p.
func (q *queue) write(s *store, p []byte) {
	q.n += len(p)
	for {
		if q.last != nil {
			n := copy(q.last.buf[q.last.w:], p)
			q.last.w += n
			p = p[n:]
		}
		if len(p) == 0 {
			return
		}
		c := s.chunk(max(len(p), q.n-len(p))) // a queue that grows goes on growing
		if q.last == nil {
			q.first = c
		} else {
			q.last.next = c
		}
		q.last = c
	}
}

// front returns the first bytes; none if the queue is empty.
func (q *queue) front() []byte {
	if q.first == nil {
		return nil
	}
	return q.first.buf[q.first.r:q.first.w]
}

// drop removes the first n bytes, at most those of front.
func (q *queue) drop(s *store, n int) {
	q.n -= n
	c := q.first
	if c.r += n; c.r < c.w {
		return
	}
	if q.first = c.next; q.first == nil {
		q.last = nil
	}
	s.free(c)
}

// pieces returns what waits but for the first bytes. It stays what it is until
// something is dropped.
func (q *queue) pieces(without int) (ps [][]byte) {
	for c := q.first; c != nil; c = c.next {
		p := c.buf[c.r:c.w:c.w]
		k := min(without, len(p))
		if without -= k; k < len(p) {
			ps = append(ps, p[k:])
		}
	}
	return ps
}

// queueOf makes a queue of pieces, whose memory is its own from then on.
func queueOf(ps [][]byte) *queue {
	q := new(queue)
	for _, p := range ps {
		c := &chunk{buf: p, w: len(p)}
		if q.last == nil {
			q.first = c
		} else {
			q.last.next = c
		}
		q.last = c
		q.n += len(p)
	}
	return q
}

// clear drops everything and returns how much that was.
func (q *queue) clear(s *store) int {
	n := q.n
	for c := q.first; c != nil; {
		next := c.next
		s.free(c)
		c = next
	}
	*q = queue{}
	return n
}
