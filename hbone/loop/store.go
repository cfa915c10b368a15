package loop

// store keeps the memory that is needed now and then, for one loop. What is
// idle has none of it.
type store struct {
	small, large []*chunk
	queues       []*queue
	plains       [][]byte // output that is not sealed yet
	records      [][]byte // beginnings of records
	bigs         [][]byte // sealed output
}

const (
	plainLen = 4 << 10
	maxPlain = 2 * gather
	// bigLen is all that is sealed at once.
	bigLen = readLen + 2*gather + 8<<10
	// keepBuffers bounds each kind of buffers that is kept.
	keepBuffers = 64
	keepBigs    = 8
)

func pop(list *[][]byte, size int) []byte {
	if n := len(*list); n > 0 {
		b := (*list)[n-1]
		(*list)[n-1] = nil
		*list = (*list)[:n-1]
		return b[:0]
	}
	return make([]byte, 0, size)
}

func push(list *[][]byte, b []byte, keep int) {
	if len(*list) < keep {
		*list = append(*list, b[:0])
	}
}

func (s *store) plain() []byte { return pop(&s.plains, plainLen) }

func (s *store) freePlain(b []byte) {
	if c := cap(b); c >= plainLen && c <= maxPlain {
		push(&s.plains, b, keepBuffers)
	}
}

func (s *store) record() []byte      { return pop(&s.records, recordRoom) }
func (s *store) freeRecord(b []byte) { push(&s.records, b, keepBuffers) }

func (s *store) bigBuffer() []byte { return pop(&s.bigs, bigLen) }

// freeSealed takes back what keep has taken, of either size.
func (s *store) freeSealed(b []byte) {
	if cap(b) >= bigLen {
		push(&s.bigs, b, keepBigs)
		return
	}
	s.freePlain(b)
}

// trim gives the memory back that a load has left behind.
func (s *store) trim() { *s = store{} }
