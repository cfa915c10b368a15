package h2

// An ending is how a stream has ended.
type ending uint8

// The endings. The zero ending is not known: it is long ago, or never was.
const (
	longAgo    ending = iota
	ended             // both sides have ended it
	resetHere         // what comes of it has crossed with our reset
	resetThere        // by the peer, which may not send more
)

// A closedRing remembers how the last streams have ended. The zero closedRing
// remembers none.
type closedRing struct {
	ids  []closedStream
	next int
}

type closedStream struct {
	id  uint32
	how ending
}

// ringLen is how many streams are remembered.
const ringLen = 512

func (r *closedRing) add(id uint32, how ending) {
	if len(r.ids) < ringLen {
		r.ids = append(r.ids, closedStream{id, how})
		return
	}
	r.ids[r.next] = closedStream{id, how}
	r.next = (r.next + 1) % ringLen
}

// why returns how the stream has ended; a reset of ours counts before all.
func (r *closedRing) why(id uint32) ending {
	how := longAgo
	for _, s := range r.ids {
		if s.id == id && how != resetHere {
			how = s.how
		}
	}
	return how
}
