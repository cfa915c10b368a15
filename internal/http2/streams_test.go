package http2

import (
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
)

// Streams do what a map does.
func TestStreams(t *testing.T) {
	for seed := range uint64(50) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		var s Streams[int]
		want := map[uint32]*int{}
		next := uint32(1)
		for range 600 {
			id := 1 + 2*rnd.Uint32N(next/2+2)
			switch rnd.IntN(8) {
			case 0, 1, 2:
				id, next = next, next+2
				fallthrough
			case 3:
				v := new(int)
				s.Put(id, v)
				want[id] = v
			case 4, 5, 6:
				s.Delete(id)
				delete(want, id)
			}
			if got := s.At(id); got != want[id] {
				t.Fatalf("seed %d: at %d is %p, want %p", seed, id, got, want[id])
			}
			if s.Len() != len(want) {
				t.Fatalf("seed %d: %d streams, want %d", seed, s.Len(), len(want))
			}
		}
		var ids []uint32
		for id, v := range s.All() {
			if v != want[id] {
				t.Fatalf("seed %d: all have %p at %d, want %p", seed, v, id, want[id])
			}
			ids = append(ids, id)
		}
		if all := slices.Sorted(maps.Keys(want)); !slices.Equal(ids, all) {
			t.Fatalf("seed %d: all are %v, want %v", seed, ids, all)
		}
	}
}

// Whoever walks through streams may take them out meanwhile, as the end of one
// can be the end of others.
func TestStreamsChangedMeanwhile(t *testing.T) {
	for seed := range uint64(200) {
		rnd := rand.New(rand.NewPCG(seed, 2))
		var s Streams[int]
		there := map[uint32]bool{}
		for id := uint32(1); id < 80; id += 2 {
			s.Put(id, new(int))
			there[id] = true
		}
		last := uint32(0)
		for id := range s.All() {
			if !there[id] || id <= last {
				t.Fatalf("seed %d: stream %d after %d, there: %v", seed, id, last, there[id])
			}
			for before := last + 2; last > 0 && before < id; before += 2 {
				if there[before] {
					t.Fatalf("seed %d: stream %d was passed by", seed, before)
				}
			}
			last = id
			for range rnd.IntN(4) {
				gone := 1 + 2*rnd.Uint32N(40)
				if rnd.IntN(3) == 0 {
					gone = id
				}
				s.Delete(gone)
				delete(there, gone)
			}
		}
		if len(there) > 0 && slices.Max(slices.Collect(maps.Keys(there))) > last {
			t.Fatalf("seed %d: the walk ended at %d", seed, last)
		}
	}
}

// What a rush has needed is given back when it is over.
func TestStreamsGiveBack(t *testing.T) {
	var s Streams[int]
	for id := range uint32(100) {
		s.Put(id, new(int))
	}
	for id := range uint32(100) {
		s.Delete(id)
	}
	if cap(s.ids) != 0 || cap(s.of) != 0 {
		t.Errorf("room for %d streams is kept", cap(s.of))
	}
}

func BenchmarkStreams(b *testing.B) {
	var s Streams[int]
	m := map[uint32]*int{}
	for id := uint32(1); id < 200; id += 2 {
		v := new(int)
		s.Put(id, v)
		m[id] = v
	}
	b.Run("at", func(b *testing.B) {
		for i := range b.N {
			if s.At(uint32(i*7%100)*2+1) == nil {
				b.Fatal("one is missing")
			}
		}
	})
	b.Run("at_of_a_map", func(b *testing.B) {
		for i := range b.N {
			if m[uint32(i*7%100)*2+1] == nil {
				b.Fatal("one is missing")
			}
		}
	})
	b.Run("put_and_delete", func(b *testing.B) {
		id, v := uint32(201), new(int)
		for range b.N {
			s.Put(id, v)
			s.Delete(id - 200) // the first: all others move
			id += 2
		}
	})
}
