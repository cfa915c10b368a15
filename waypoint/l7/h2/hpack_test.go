package h2

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"golang.org/x/net/http2/hpack"
)

// What the encoder makes is what another decoder reads, whatever happens to the
// size of the table.
func TestEncoder(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	e := newEncoder()
	var got []hpack.HeaderField
	d := hpack.NewDecoder(4096, func(f hpack.HeaderField) { got = append(got, f) })
	names := []string{":path", "content-type", "x-request-id", "te", "user-agent", "authorization", strings.Repeat("n", 300), "x"}
	for i := range 20_000 {
		if rnd.IntN(50) == 0 {
			for range 1 + rnd.IntN(3) {
				e.resize([]uint32{0, 32, 64, 200, 1000, 4096, 1 << 20}[rnd.IntN(7)])
			}
		}
		block := e.begin(nil)
		var want []hpack.HeaderField
		for range rnd.IntN(12) {
			f := hpack.HeaderField{Name: names[rnd.IntN(len(names))], Sensitive: rnd.IntN(10) == 0}
			switch rnd.IntN(4) {
			case 0:
				f.Value = fmt.Sprint("unique ", i)
			case 1:
				f.Value = strings.Repeat("v", rnd.IntN(400))
			case 2:
				f.Value = fmt.Sprint(rnd.IntN(200))
			}
			if rnd.IntN(20) == 0 {
				f.Name = fmt.Sprint("x-", rnd.IntN(1000))
			}
			block = e.field(block, []byte(f.Name), []byte(f.Value), f.Sensitive)
			want = append(want, f)
		}
		got = nil
		if _, err := d.Write(block); err != nil {
			t.Fatalf("block %d: %v", i, err)
		}
		if err := d.Close(); err != nil {
			t.Fatalf("block %d: %v", i, err)
		}
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Fatalf("block %d: decoded %v, want %v", i, got, want)
		}
	}
}

// Fields that come again cost a byte or two, and names of requests drive nothing
// out of the table.
func TestEncoderIndexes(t *testing.T) {
	e := newEncoder()
	block := func(id int) int {
		b := e.begin(nil)
		b = e.method(b, []byte("POST"))
		b = e.scheme(b, []byte("http"))
		b = e.field(b, []byte(":path"), []byte("/shop.Cart/Get"), false)
		b = e.field(b, []byte("content-type"), []byte("application/grpc"), false)
		b = e.field(b, []byte("x-shop"), []byte("main street"), false)
		return len(e.field(b, []byte("x-request-id"), fmt.Appendf(nil, "%036d", id), false))
	}
	block(0)
	block(1)
	const want = 1 + 1 + 1 + 1 + 1 + 2 + 1 + 36
	for i := range 10_000 {
		if n := block(2 + i); n > want {
			t.Fatalf("block %d has %d bytes, want at most %d", i, n, want)
		}
	}
	if n := testing.AllocsPerRun(100, func() {
		e.field(make([]byte, 0, 64), []byte("x-shop"), []byte("main street"), false)
	}); n > 0 {
		t.Errorf("%v allocations for a field", n)
	}
}

// A secret is in no table: whether a guess of another client is in it must not
// show.
func TestEncoderKeepsSecretsOut(t *testing.T) {
	e := newEncoder()
	for range 3 {
		b := e.field(nil, []byte("cookie"), []byte("secret"), true)
		if b[0]&0xf0 != 0x10 || e.next != 0 {
			t.Fatalf("%x: it may enter a table", b)
		}
	}
}
