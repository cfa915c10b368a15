package balance

import (
	"cmp"
	"encoding/binary"
	"encoding/hex"
	"math/bits"
	"slices"
	"strconv"

	"github.com/weft-mesh/weft/mesh"
)

// Sizes of the tables of consistent hashing.
const (
	defaultRing  = 1024
	maxRing      = 8 << 20
	defaultTable = 65537
	maxTable     = 5000011
)

// Hash returns the hash of a text that decides an endpoint. It is the same in
// every proxy, so that all agree.
func Hash[T ~string | ~[]byte](text T) uint64 {
	h := uint64(14695981039346656037) // FNV-1a
	for i := range len(text) {
		h = (h ^ uint64(text[i])) * 1099511628211
	}
	return mix(h)
}

// mix spreads what differs in few bits over all (the finalizer of MurmurHash3).
func mix(h uint64) uint64 {
	h ^= h >> 33
	h *= 0xff51afd7ed558ccd
	h ^= h >> 33
	h *= 0xc4ceb9fe1a85ec53
	return h ^ h>>33
}

// sessionHash is the number of which sessionName is the text.
func sessionHash(k Key) uint64 {
	return Hash(string(k.UID) + "\x00" + strconv.Itoa(int(k.Port)))
}

func sessionName(k Key) string {
	return hex.EncodeToString(binary.BigEndian.AppendUint64(nil, sessionHash(k)))
}

func parseSession(name string) (uint64, bool) {
	if len(name) != 16 {
		return 0, false
	}
	h, err := strconv.ParseUint(name, 16, 64)
	return h, err == nil
}

// hashes finds endpoints by hash. Ejected ones are passed over, so only their
// own keys move while they are away.
type hashes struct {
	ends  []*Endpoint // members by name
	ring  []point     // sorted; of ring hash
	table []int32     // of Maglev
}

// A point of the ring begins the arc before it.
type point struct {
	hash uint64
	at   int32 // in ends
}

// newHashes returns the tables that the algorithm needs, nil if none. The order
// of members does not matter.
func newHashes(b *mesh.Balance, members []*Endpoint) *hashes {
	h := &hashes{}
	switch b.Algorithm {
	case mesh.RingHash, mesh.Maglev:
	default:
		return nil
	}
	h.ends = byName(members)
	if b.Algorithm == mesh.RingHash {
		h.makeRing(b.RingSize)
	} else {
		h.makeTable(b.TableSize)
	}
	return h
}

// over returns the same tables for members of the same names and weights.
func (h *hashes) over(members []*Endpoint) *hashes {
	if h == nil {
		return nil
	}
	return &hashes{ends: byName(members), ring: h.ring, table: h.table}
}

func byName(members []*Endpoint) []*Endpoint {
	return slices.SortedFunc(slices.Values(members), func(a, b *Endpoint) int {
		return cmp.Or(cmp.Compare(a.state.key.UID, b.state.key.UID), cmp.Compare(a.Port, b.Port))
	})
}

// makeRing puts points on the ring, by weight.
func (h *hashes) makeRing(size uint64) {
	if size == 0 {
		size = defaultRing
	}
	size = min(max(size, uint64(len(h.ends))), maxRing)
	var sum uint64
	for _, e := range h.ends {
		sum += e.weight
	}
	for i, e := range h.ends {
		hi, lo := bits.Mul64(size, e.weight)
		n, rest := bits.Div64(hi, lo, sum)
		if rest > 0 {
			n++
		}
		base := sessionHash(e.state.key)
		for k := range n {
			h.ring = append(h.ring, point{mix(base + k*0x9e3779b97f4a7c15), int32(i)})
		}
	}
	slices.SortFunc(h.ring, func(a, b point) int { return cmp.Or(cmp.Compare(a.hash, b.hash), cmp.Compare(a.at, b.at)) })
}

// makeTable fills the table as Maglev does (Eisenbud and others, NSDI 2016,
// 3.4): each in turn takes the next free place of a permutation of its own,
// those of less weight not in every turn.
func (h *hashes) makeTable(size uint64) {
	if size == 0 {
		size = defaultTable
	}
	size = nextPrime(min(max(size, uint64(len(h.ends))), maxTable))
	h.table = make([]int32, size)
	for i := range h.table {
		h.table[i] = -1
	}
	type row struct{ at, skip, due uint64 }
	rows := make([]row, len(h.ends))
	var most uint64
	for i, e := range h.ends {
		base := sessionHash(e.state.key)
		rows[i] = row{at: base % size, skip: mix(base+1)%(size-1) + 1}
		most = max(most, e.weight)
	}
	for left, round := size, uint64(1); left > 0; round++ {
		for i := range rows {
			r := &rows[i]
			if round*h.ends[i].weight < r.due {
				continue
			}
			r.due += most
			for h.table[r.at] >= 0 {
				r.at = (r.at + r.skip) % size
			}
			h.table[r.at] = int32(i)
			if left--; left == 0 {
				return
			}
		}
	}
}

// nextPrime returns the first prime from n on. A step of the table's
// permutations reaches every place only if its size is prime.
func nextPrime(n uint64) uint64 {
	n = max(n, 3)
	for n |= 1; ; n += 2 {
		prime := true
		for d := uint64(3); d*d <= n && prime; d += 2 {
			prime = n%d != 0
		}
		if prime {
			return n
		}
	}
}

// find returns the endpoint for the request's hash, the next one if that is
// ejected (where some are) or to be avoided, and nil if all are.
func (h *hashes) find(r *Request, ejected bool) *Endpoint {
	usable := func(e *Endpoint) bool {
		return !(ejected && e.state.ejected.Load()) && !r.avoids(e)
	}
	if h.ring != nil {
		start, _ := slices.BinarySearchFunc(h.ring, r.Hash, func(p point, hash uint64) int { return cmp.Compare(p.hash, hash) })
		for i := range h.ring {
			if e := h.ends[h.ring[(start+i)%len(h.ring)].at]; usable(e) {
				return e
			}
		}
		return nil
	}
	hash := r.Hash
	for range 64 { // the chance that all are away, and not all are, is nil
		if e := h.ends[h.table[hash%uint64(len(h.table))]]; usable(e) {
			return e
		}
		hash = mix(hash + 1)
	}
	return nil
}
