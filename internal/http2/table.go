package http2

import (
	"errors"
	"fmt"
	"math"

	"golang.org/x/net/http2/hpack"

	"github.com/weft-mesh/weft/internal/pack"
)

// A table is a second account of an HPACK decoder's dynamic table (RFC 7541
// 2.3.2): hpack.Decoder keeps its own to itself, and a tunnel that moves to
// another process must take it along. Its texts are those of the decoder, so it
// costs little more than their headers. The zero table keeps nothing.
type table struct {
	fields []hpack.HeaderField // the oldest first
	size   uint32              // of fields, by the measure of RFC 7541 4.1
	max    uint32

	// What is left of the block that the decoder reads.
	block []byte
	lost  bool // the block and the decoder do not agree; never seen
}

// resize sets the size that the table may have (RFC 7541 4.3).
func (t *table) resize(n uint32) {
	t.max = n
	t.evict(0)
}

// add inserts a field (RFC 7541 4.4).
func (t *table) add(f hpack.HeaderField) {
	n := f.Size()
	if n > t.max {
		t.fields, t.size = nil, 0
		return
	}
	t.evict(n)
	f.Sensitive = false
	t.fields = append(t.fields, f)
	t.size += n
}

// evict makes room for n bytes.
func (t *table) evict(n uint32) {
	i := 0
	for i < len(t.fields) && t.size+n > t.max {
		t.size -= t.fields[i].Size()
		i++
	}
	if i == 0 {
		return
	}
	rest := copy(t.fields, t.fields[i:])
	clear(t.fields[rest:])
	if t.fields = t.fields[:rest]; rest == 0 {
		t.fields = nil
	}
}

// decoded follows the decoder: f is what it made of the next representation in
// the block (RFC 7541 6).
func (t *table) decoded(f hpack.HeaderField) {
	if t.skip() {
		t.add(f)
	}
}

// skip passes over the representation of one field, and the changes of size
// before it, and reports whether it enters the table.
func (t *table) skip() (indexed bool) {
	for {
		if len(t.block) == 0 {
			t.lost = true
			return false
		}
		switch b := t.block[0]; {
		case b&0x80 != 0: // 6.1: a field of the tables
			t.integer(7)
			return false
		case b&0xc0 == 0x40: // 6.2.1: a literal that enters the table
			t.literal(6)
			return true
		case b&0xe0 == 0x20: // 6.3
			t.resize(uint32(t.integer(5)))
		default: // 6.2.2, 6.2.3
			t.literal(4)
			return false
		}
	}
}

// literal passes over a literal whose index has n bits in its first byte.
func (t *table) literal(n int) {
	if t.integer(n) == 0 {
		t.text()
	}
	t.text()
}

// text passes over a string (RFC 7541 5.2).
func (t *table) text() {
	n := t.integer(7)
	if n > uint64(len(t.block)) {
		t.lost = true
		n = uint64(len(t.block))
	}
	t.block = t.block[n:]
}

// integer reads an integer whose first byte has n bits of it (RFC 7541 5.1).
// The decoder has bounded it before.
func (t *table) integer(n int) uint64 {
	if len(t.block) == 0 {
		t.lost = true
		return 0
	}
	limit := uint64(1)<<n - 1
	v := uint64(t.block[0]) & limit
	t.block = t.block[1:]
	if v < limit {
		return v
	}
	for shift := 0; ; shift += 7 {
		if len(t.block) == 0 || shift > 56 {
			t.lost = true
			return 0
		}
		b := t.block[0]
		t.block = t.block[1:]
		v += uint64(b&0x7f) << shift
		if b&0x80 == 0 {
			return v
		}
	}
}

// finish takes in the changes of size that no field follows, and lets go of
// the block.
func (t *table) finish() {
	for len(t.block) > 0 && !t.lost {
		if t.block[0]&0xe0 != 0x20 {
			t.lost = true
			break
		}
		t.resize(uint32(t.integer(5)))
	}
	t.block = nil
}

// A FieldState is the HPACK state of a FieldReader between two blocks.
type FieldState struct {
	Max    uint32  // size that the peer gave its table
	Fields []Field // in the table, the oldest first
}

// Pack names the fields to c.
func (s *FieldState) Pack(c *pack.Coder) {
	pack.Uint(c, &s.Max, DefaultTableLen)
	pack.List(c, &s.Fields, DefaultTableLen/32, func(c *pack.Coder, f *Field) {
		pack.String(c, &f.Name, DefaultTableLen)
		pack.String(c, &f.Value, DefaultTableLen)
	})
}

// State returns the reader's state. It fails if that is not known.
func (r *FieldReader) State() (FieldState, error) {
	if r.table.lost {
		return FieldState{}, errors.New("the HPACK state is not known")
	}
	s := FieldState{Max: r.table.max}
	for _, f := range r.table.fields {
		s.Fields = append(s.Fields, Field{Name: f.Name, Value: f.Value})
	}
	return s, nil
}

// ResumeFieldReader returns a FieldReader that goes on from s.
func ResumeFieldReader(maxList int, s FieldState) (*FieldReader, error) {
	r := NewFieldReader(maxList)
	if s.Max > DefaultTableLen {
		return nil, fmt.Errorf("resume HPACK: a table of %d bytes", s.Max)
	}
	// The decoder learns of the table as it did before: from a block.
	block := appendInteger(nil, 0x20, 5, uint64(s.Max))
	var size uint64
	for _, f := range s.Fields {
		size += uint64(len(f.Name)) + uint64(len(f.Value)) + 32
		block = append(block, 0x40)
		for _, text := range []string{f.Name, f.Value} {
			block = appendInteger(block, 0, 7, uint64(len(text)))
			block = append(block, text...)
		}
	}
	if size > uint64(s.Max) {
		return nil, fmt.Errorf("resume HPACK: %d bytes in a table of %d", size, s.Max)
	}
	r.maxList = math.MaxInt // nobody asks for these fields
	_, err := r.Read(block)
	r.maxList = maxList
	var ce *ConnError
	if errors.As(err, &ce) {
		return nil, fmt.Errorf("resume HPACK: %w", err)
	}
	return r, nil
}

// appendInteger appends an integer whose first byte has n bits of it beside
// first (RFC 7541 5.1).
func appendInteger(dst []byte, first byte, n int, v uint64) []byte {
	limit := uint64(1)<<n - 1
	if v < limit {
		return append(dst, first|byte(v))
	}
	dst = append(dst, first|byte(limit))
	for v -= limit; v >= 0x80; v >>= 7 {
		dst = append(dst, byte(v)|0x80)
	}
	return append(dst, byte(v))
}
