package pack

import (
	"errors"
	"math"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

type kind uint8

type thing struct {
	Kind  kind
	Small int
	Big   uint64
	Debt  int64
	Yes   bool
	Key   []byte
	Fixed [3]byte
	Name  string
	Parts []part
}

type part struct {
	ID   uint32
	Text string
}

func (t *thing) fields(c *Coder) {
	Uint(c, &t.Kind, 3)
	Uint(c, &t.Small, 1000)
	Uint(c, &t.Big, math.MaxUint64)
	Int(c, &t.Debt, math.MaxInt64)
	Bool(c, &t.Yes)
	Bytes(c, &t.Key, 8)
	Array(c, t.Fixed[:])
	String(c, &t.Name, 300)
	List(c, &t.Parts, 100, func(c *Coder, p *part) {
		Uint(c, &p.ID, math.MaxUint32)
		String(c, &p.Text, 10)
	})
}

func TestReadGivesWhatWasWritten(t *testing.T) {
	for _, want := range []thing{
		{},
		{Kind: 3, Small: 1000, Big: math.MaxUint64, Debt: math.MinInt64 + 1, Yes: true, Key: []byte("12345678"), Fixed: [3]byte{1, 2, 3},
			Name: strings.Repeat("n", 300), Parts: []part{{1, "a"}, {math.MaxUint32, "b"}}},
		{Debt: math.MaxInt64}, {Debt: -1}, {Debt: 1},
	} {
		b := Write(want.fields)
		var got thing
		if err := Read(b, got.fields); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Error(d)
		}
		for i := range b {
			if err := Read(b[:i], new(thing).fields); !errors.Is(err, ErrShort) {
				t.Errorf("the first %d of %d bytes: %v", i, len(b), err)
			}
		}
		if err := Read(append(b, 0), new(thing).fields); err == nil {
			t.Error("a byte too many was taken")
		}
	}
}

func TestBoundsHold(t *testing.T) {
	for name, bad := range map[string]thing{
		"kind":  {Kind: 4},
		"small": {Small: 1001},
		"key":   {Key: make([]byte, 9)},
		"name":  {Name: strings.Repeat("n", 301)},
		"parts": {Parts: make([]part, 101)},
		"text":  {Parts: []part{{1, "longer than ten"}}},
	} {
		if err := Read(Write(bad.fields), new(thing).fields); err == nil {
			t.Errorf("%s: a value out of its bounds was taken", name)
		}
	}
}

func TestWhatIsLeftBehindIsCleared(t *testing.T) {
	secret := []byte("0123456789abcdef")
	c := &Coder{}
	Bytes(c, &secret, 16)
	first := c.buf
	more := make([]byte, 1000)
	Bytes(c, &more, 1000)
	if strings.Contains(string(first), "789abc") {
		t.Error("the memory that the bytes outgrew holds the secret")
	}
	if !strings.Contains(string(c.buf), "789abc") {
		t.Error("the secret is lost")
	}
}

func FuzzRead(f *testing.F) {
	f.Add(Write((&thing{Key: []byte("k"), Name: "n", Parts: []part{{1, "a"}}}).fields))
	f.Fuzz(func(t *testing.T, b []byte) {
		var got thing
		if Read(b, got.fields) != nil {
			return
		}
		var again thing
		if err := Read(Write(got.fields), again.fields); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(got, again); d != "" {
			t.Fatal(d)
		}
	})
}
