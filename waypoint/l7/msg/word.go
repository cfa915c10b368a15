package msg

import "math/bits"

// A word is eight bytes of a text, the first of which is the lowest. Names and
// values are read eight bytes at once where that gives the same as one by one.

const (
	ones  = 0x0101010101010101 // a word of bytes that are 1
	highs = 0x80 * ones
)

// word returns the first eight bytes of s, which has as many.
func word[T text](s T) uint64 {
	return uint64(s[0]) | uint64(s[1])<<8 | uint64(s[2])<<16 | uint64(s[3])<<24 |
		uint64(s[4])<<32 | uint64(s[5])<<40 | uint64(s[6])<<48 | uint64(s[7])<<56
}

// controls returns 0 if no byte of w is a control character, else a word whose
// lowest bit that is set is in the first one. The same bit of the bytes behind
// it says nothing: what is subtracted may borrow from them.
func controls(w uint64) uint64 { return (w-0x20*ones)&^w&highs | equal(w, 0x7f) }

// equal returns the same for the bytes that are c.
func equal(w uint64, c byte) uint64 {
	w ^= uint64(c) * ones // now they are 0
	return (w - ones) &^ w & highs
}

// place returns which byte the lowest bit of w that is set is in.
func place(w uint64) int { return bits.TrailingZeros64(w) / 8 }

// lowerWord returns w with its ASCII letters in lower case.
func lowerWord(w uint64) uint64 {
	low := w &^ highs
	upper := (low + (0x80-'A')*ones) &^ (low + (0x7f-'Z')*ones) &^ w & highs
	return w | upper>>2
}
