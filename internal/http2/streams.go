package http2

import (
	"iter"
	"slices"
)

// Streams are the streams of a connection, or what else there is for each of
// some of them, by id. It takes half of the memory of a map, which with many
// idle connections counts, and is walked through in the order of the ids. To find
// one costs what it costs in a map; to take one out of a thousand costs a copy of
// some kilobytes. The zero Streams is empty. It is not safe for concurrent use.
type Streams[T any] struct {
	ids []uint32 // ascending
	of  []*T     // of the id at the same place; not nil
}

// fewStreams is how many have room without more memory.
const fewStreams = 8

// Len returns how many there are.
func (s *Streams[T]) Len() int { return len(s.ids) }

// At returns that of stream id, or nil.
func (s *Streams[T]) At(id uint32) *T {
	if i, ok := slices.BinarySearch(s.ids, id); ok {
		return s.of[i]
	}
	return nil
}

// Put makes v that of stream id. v is not nil.
func (s *Streams[T]) Put(id uint32, v *T) {
	if s.ids == nil {
		s.ids, s.of = make([]uint32, 0, fewStreams), make([]*T, 0, fewStreams)
	}
	i, ok := len(s.ids), false
	if i > 0 && s.ids[i-1] >= id { // ids grow, so mostly it is the last
		i, ok = slices.BinarySearch(s.ids, id)
	}
	if ok {
		s.of[i] = v
		return
	}
	s.ids, s.of = slices.Insert(s.ids, i, id), slices.Insert(s.of, i, v)
}

// Delete takes out that of stream id, if there is one.
func (s *Streams[T]) Delete(id uint32) {
	i, ok := slices.BinarySearch(s.ids, id)
	if !ok {
		return
	}
	s.ids, s.of = slices.Delete(s.ids, i, i+1), slices.Delete(s.of, i, i+1)
	if len(s.ids) == 0 && cap(s.ids) > fewStreams {
		*s = Streams[T]{} // what was needed for a rush is not kept
	}
}

// All yields each once, in the order of the ids. Meanwhile some may be taken out,
// and are not yielded if they were not yet, or put in.
func (s *Streams[T]) All() iter.Seq2[uint32, *T] {
	return func(yield func(uint32, *T) bool) {
		for i := 0; i < len(s.ids); {
			id := s.ids[i]
			if !yield(id, s.of[i]) {
				return
			}
			if i < len(s.ids) && s.ids[i] == id {
				i++
				continue
			}
			i, _ = slices.BinarySearch(s.ids, id+1)
		}
	}
}
