package msg

import (
	"bytes"
	"math/rand/v2"
	"testing"
)

// Eight bytes at once mean what one by one do: each byte at each place, beside
// each of those where words could carry or borrow.
func TestWords(t *testing.T) {
	beside := []byte{0, '\t', 0x1f, ' ', '!', '"', '#', '@', 'A', 'Z', '[', 'a', 'z', 0x7e, 0x7f, 0x80, 0xc1, 0xff}
	for at := range 8 {
		for c := range 256 {
			for _, other := range beside {
				b := bytes.Repeat([]byte{other}, 8)
				b[at] = byte(c)
				control, quote := 8, 8 // where the first one is
				var low [8]byte
				for i, x := range b {
					if control == 8 && (x < 0x20 || x == 0x7f) {
						control = i
					}
					if quote == 8 && x == '"' {
						quote = i
					}
					low[i] = lower[x]
				}
				w := word(b)
				if c, q := place(controls(w)), place(equal(w, '"')); c != control || q != quote || lowerWord(w) != word(low[:]) {
					t.Fatalf("%q: control character at %d, want %d; quote at %d, want %d; in lower case %x, want %q", b, c, control, q, quote, lowerWord(w), low)
				}
			}
		}
	}
}

// What texts of any length are does not depend on where words of them begin.
func TestValueLenAndEqualFold(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 200_000 {
		b := make([]byte, r.IntN(40))
		for i := range b {
			b[i] = "abcxyzABCXYZ-09\t \"\x80\xff"[r.IntN(20)]
		}
		if len(b) > 0 && r.IntN(2) == 0 {
			b[r.IntN(len(b))] = byte(r.Uint32())
		}
		n := 0
		for n < len(b) && IsValue(b[n]) {
			n++
		}
		plain := 0
		for plain < len(b) && b[plain] >= 0x20 && b[plain] != 0x7f && b[plain] != '"' {
			plain++
		}
		if got := PlainLen(b); got > plain || got < min(plain, len(b)&^7)&^7 {
			t.Fatalf("%q: %d plain bytes, want about %d", b, got, plain)
		}
		if got := ValueLen(b); got != n || ValidValue(string(b)) != (n == len(b)) {
			t.Fatalf("%q: %d bytes of a value, want %d", b, got, n)
		}
		want := make([]byte, len(b))
		for i, c := range b {
			want[i] = lower[c]
		}
		if !EqualFold(b, string(want)) {
			t.Fatalf("%q is not %q", b, want)
		}
		if len(b) == 0 {
			continue
		}
		i := r.IntN(len(b))
		other := want[i] ^ 1<<r.IntN(8)
		if was := want[i]; lower[b[i]] != other {
			want[i] = other
			if EqualFold(b, string(want)) {
				t.Fatalf("%q is %q, which had %q", b, want, was)
			}
		}
	}
}

func TestKnownFields(t *testing.T) {
	for id := Other + 1; int(id) < len(names); id++ {
		if got := Identify(bytes.ToUpper([]byte(names[id]))); got != id || names[id] == "" {
			t.Errorf("%q is field %d, want %d", names[id], got, id)
		}
		h := parse("Accept: a")
		if !AppendID(h, id, "1") || !SetID(h, id, []byte("2")) || string(h.Lookup(names[id])) != "2" || string(h.Name(&h.Fields[2])) != names[id] {
			t.Errorf("%q was not set: %q", names[id], h.AppendLines(nil))
		}
		if AppendID(h, id, "1\r\ny: 2") || SetID(h, id, "\n") || string(h.Get(id)) != "2" {
			t.Errorf("%q took what cannot be in a message: %q", names[id], h.AppendLines(nil))
		}
	}
	if h := parse("Accept: a"); AppendID(h, Other, "1") || SetID(h, Other, "1") || len(h.Fields) != 1 {
		t.Errorf("added a field without a name: %q", h.AppendLines(nil))
	}
}
