package h2

import (
	"hash/maphash"

	"github.com/weft-mesh/weft/internal/http2"
)

// An encoder makes the header blocks of one direction (RFC 7541). It works on
// bytes, and allocates nothing once its table is full.
//
// What is the same in many messages enters the table when it is met for the
// second time; so values of one message only, as the names of requests are, do
// not drive out the others. A field's name enters when it is met first. Texts
// are not compressed with the Huffman code: for what is left after the tables
// that costs more than it saves.
type encoder struct {
	seed maphash.Seed

	// entries is a ring: the entry n is at n modulo its length. Those from
	// oldest to next-1 are in the table.
	entries      []tableEntry
	oldest, next uint32
	size, max    uint32
	// lowest is the smallest size that the table was given since the last
	// block, and changed that the peer has to be told (RFC 7541 4.2).
	lowest  uint32
	changed bool

	// Where to look for a field, and for a name, by their hashes: the number
	// of an entry, plus 1. Who is not found there is not in the table, as far
	// as the encoder knows.
	byField, byName [hashes]uint32
	seen            [hashes]uint32 // hashes of the last that were not in the table
}

const hashes = 256

// A tableEntry is one of the dynamic table. Its memory is used again.
type tableEntry struct {
	text    []byte // name and value
	nameLen int
}

func (t *tableEntry) name() []byte  { return t.text[:t.nameLen] }
func (t *tableEntry) value() []byte { return t.text[t.nameLen:] }

// entrySize is what a field without text counts (RFC 7541 4.1).
const entrySize = 32

func newEncoder() encoder {
	return encoder{seed: maphash.MakeSeed(), max: http2.DefaultTableLen}
}

// resize sets the size of the table: what the peer allows, and not more than
// the default.
func (e *encoder) resize(allowed uint32) {
	n := min(allowed, http2.DefaultTableLen)
	if n == e.max {
		return
	}
	if !e.changed || n < e.lowest {
		e.lowest = n
	}
	e.max, e.changed = n, true
	e.evict(0)
}

// begin begins a block in dst.
func (e *encoder) begin(dst []byte) []byte {
	if !e.changed {
		return dst
	}
	e.changed = false
	if e.lowest < e.max {
		// The peer must hear of the smaller size, too. Of nothing, for there
		// are decoders that take a second update only with an empty table.
		dst = append(dst, 0x20)
		e.oldest, e.size = e.next, 0
	}
	return appendInteger(dst, 0x20, 5, e.max)
}

// field appends a field. The name is in lower case. What is sensitive never
// enters a table.
func (e *encoder) field(dst, name, value []byte, sensitive bool) []byte {
	hn := uint32(maphash.Bytes(e.seed, name))
	if sensitive {
		return appendLiteral(dst, 0x10, 4, e.nameIndex(name, hn), name, value)
	}
	h := hn*0x9e3779b1 ^ uint32(maphash.Bytes(e.seed, value))
	if n := e.byField[h%hashes]; e.has(n) {
		if t := e.entry(n - 1); string(t.value()) == string(value) && string(t.name()) == string(name) {
			return appendInteger(dst, 0x80, 7, e.index(n-1))
		}
	}
	index := e.nameIndex(name, hn)
	size := uint32(len(name) + len(value) + entrySize)
	known := e.seen[h%hashes] == h
	e.seen[h%hashes] = h
	if !known && index != 0 || size > e.max/4 {
		return appendLiteral(dst, 0, 4, index, name, value)
	}
	dst = appendLiteral(dst, 0x40, 6, index, name, value)
	e.insert(name, value, size)
	e.byField[h%hashes], e.byName[hn%hashes] = e.next, e.next
	return dst
}

// has reports whether the table still has the entry n-1; 0 is none.
func (e *encoder) has(n uint32) bool { return n > e.oldest && n <= e.next }

// entry returns the entry n.
func (e *encoder) entry(n uint32) *tableEntry { return &e.entries[n%uint32(len(e.entries))] }

// index returns what the entry n goes by now (RFC 7541 2.3.3).
func (e *encoder) index(n uint32) uint32 { return staticLen + e.next - n }

// nameIndex returns the index of some entry with that name, 0 if none is known.
func (e *encoder) nameIndex(name []byte, hash uint32) uint32 {
	if n, ok := staticNames[string(name)]; ok {
		return n
	}
	if n := e.byName[hash%hashes]; e.has(n) && string(e.entry(n-1).name()) == string(name) {
		return e.index(n - 1)
	}
	return 0
}

// insert adds an entry (RFC 7541 4.4).
func (e *encoder) insert(name, value []byte, size uint32) {
	if e.next == 1<<32-1 {
		return // after 4 billion entries: the peer's table goes on, and is used no more
	}
	e.evict(size)
	if e.entries == nil {
		e.entries = make([]tableEntry, http2.DefaultTableLen/entrySize)
	}
	t := e.entry(e.next)
	t.text = append(append(t.text[:0], name...), value...)
	t.nameLen = len(name)
	e.next++
	e.size += size
}

// evict makes room for n bytes.
func (e *encoder) evict(n uint32) {
	for e.size+n > e.max && e.oldest < e.next {
		e.size -= uint32(len(e.entry(e.oldest).text) + entrySize)
		e.oldest++
	}
}

// appendLiteral appends a literal whose first byte has the given bits before the
// index of its name, which is of so many bits.
func appendLiteral(dst []byte, first byte, bits int, index uint32, name, value []byte) []byte {
	dst = appendInteger(dst, first, bits, index)
	if index == 0 {
		dst = append(appendInteger(dst, 0, 7, uint32(len(name))), name...)
	}
	return append(appendInteger(dst, 0, 7, uint32(len(value))), value...)
}

// appendInteger appends an integer whose first byte has so many bits of it
// (RFC 7541 5.1).
func appendInteger(dst []byte, first byte, bits int, v uint32) []byte {
	limit := uint32(1)<<bits - 1
	if v < limit {
		return append(dst, first|byte(v))
	}
	dst = append(dst, first|byte(limit))
	for v -= limit; v >= 0x80; v >>= 7 {
		dst = append(dst, byte(v)|0x80)
	}
	return append(dst, byte(v))
}

// staticLen is the length of the static table.
const staticLen = 61

// staticNames are the names of the static table (RFC 7541 A), by the first
// entry that has them. It is read only.
var staticNames = map[string]uint32{
	":authority": 1, ":method": 2, ":path": 4, ":scheme": 6, ":status": 8,
	"accept-charset": 15, "accept-encoding": 16, "accept-language": 17, "accept-ranges": 18, "accept": 19,
	"access-control-allow-origin": 20, "age": 21, "allow": 22, "authorization": 23, "cache-control": 24,
	"content-disposition": 25, "content-encoding": 26, "content-language": 27, "content-length": 28, "content-location": 29,
	"content-range": 30, "content-type": 31, "cookie": 32, "date": 33, "etag": 34, "expect": 35, "expires": 36, "from": 37,
	"host": 38, "if-match": 39, "if-modified-since": 40, "if-none-match": 41, "if-range": 42, "if-unmodified-since": 43,
	"last-modified": 44, "link": 45, "location": 46, "max-forwards": 47, "proxy-authenticate": 48, "proxy-authorization": 49,
	"range": 50, "referer": 51, "refresh": 52, "retry-after": 53, "server": 54, "set-cookie": 55,
	"strict-transport-security": 56, "transfer-encoding": 57, "user-agent": 58, "vary": 59, "via": 60, "www-authenticate": 61,
}

// status appends a :status field.
func (e *encoder) status(dst, text []byte) []byte {
	switch string(text) {
	case "200":
		return append(dst, 0x80|8)
	case "204":
		return append(dst, 0x80|9)
	case "304":
		return append(dst, 0x80|11)
	case "404":
		return append(dst, 0x80|13)
	}
	return e.field(dst, []byte(":status"), text, false)
}

// method appends a :method field.
func (e *encoder) method(dst, text []byte) []byte {
	switch string(text) {
	case "GET":
		return append(dst, 0x80|2)
	case "POST":
		return append(dst, 0x80|3)
	}
	return e.field(dst, []byte(":method"), text, false)
}

// scheme appends a :scheme field.
func (e *encoder) scheme(dst, text []byte) []byte {
	switch string(text) {
	case "http":
		return append(dst, 0x80|6)
	case "https":
		return append(dst, 0x80|7)
	}
	return e.field(dst, []byte(":scheme"), text, false)
}
