package http2

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	h2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/weft-mesh/weft/internal/pack"
)

// moved returns a parser in the state of p that shares no memory with it.
func (p *Parser) moved(t testing.TB) *Parser {
	t.Helper()
	s := p.State()
	var read ParserState
	if err := pack.Read(pack.Write(s.Pack), read.Pack); err != nil {
		t.Fatal(err)
	}
	n, err := ResumeParser(p.cfg, read)
	if err != nil {
		t.Fatalf("%v in state %+v", err, s)
	}
	return n
}

// told runs a parser over in in two pieces, moving it between them.
func told(t testing.TB, cfg ParserConfig, in []byte, cut int) (got []string) {
	p := NewParser(cfg)
	for _, piece := range [][]byte{in[:cut], in[cut:]} {
		for {
			f, rest, ok, err := p.Next(piece)
			if err != nil {
				return append(got, err.Error())
			}
			if !ok {
				break
			}
			piece = rest
			if f.Type == Data && !f.Start {
				got[len(got)-1] += fmt.Sprintf("%x %v", f.Payload, f.End)
				continue
			}
			text := fmt.Sprintf("%v %x", f.Header, f.Payload)
			if f.Type == Data && f.End {
				text += " true"
			}
			got = append(got, text)
		}
		p = p.moved(t)
	}
	return got
}

// TestParserMovesAtEveryByte moves a parser to another object at each byte of
// a connection that has every frame, and of each that is wrong.
func TestParserMovesAtEveryByte(t *testing.T) {
	cfg := roomy
	cfg.Preface = true
	in := append([]byte(Preface), stream(t, every)...)
	want := strings.ReplaceAll(strings.Join(told(t, cfg, in, 0), "\n"), " ", "")
	if strings.Count(want, "\n") < 14 {
		t.Fatal(want)
	}
	for cut := range in {
		got := strings.ReplaceAll(strings.Join(told(t, cfg, in, cut), "\n"), " ", "")
		if strings.ReplaceAll(got, "false", "") != strings.ReplaceAll(want, "false", "") {
			t.Fatalf("cut at %d:\n%s\nwant\n%s", cut, got, want)
		}
	}
}

// TestResumeParserRefuses shows that a state that no parser can reach is not
// taken: it would read memory that is not there, or hold more than it may.
func TestResumeParserRefuses(t *testing.T) {
	good := func(fr *h2.Framer) {
		_ = fr.WriteHeaders(h2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte("block")})
	}
	in := stream(t, good)
	p := NewParser(roomy)
	if _, _, _, err := p.Next(in[:9]); err != nil {
		t.Fatal(err)
	}
	p = NewParser(roomy)
	for rest := in[:len(in)-2]; ; {
		_, r, ok, err := p.Next(rest)
		if err != nil {
			t.Fatal(err)
		}
		if rest = r; !ok {
			break
		}
	}
	if s := p.State(); !s.InFrame {
		t.Fatalf("%+v", s)
	}
	p.moved(t)
	for name, change := range map[string]func(*ParserState){
		"before SETTINGS": func(s *ParserState) { s.Settled = false },
		"length":          func(s *ParserState) { s.Frame.Length = 1 << 21 },
		"left":            func(s *ParserState) { s.Left = 100 },
		"missing":         func(s *ParserState) { s.Payload = s.Payload[1:] },
		"padding":         func(s *ParserState) { s.Padding = 3 },
		"stream 0":        func(s *ParserState) { s.Frame.StreamID = 0 },
		"interrupted":     func(s *ParserState) { s.InBlock, s.BlockHead = true, Header{Type: Headers, StreamID: 3} },
		"no headers":      func(s *ParserState) { s.InBlock = true },
		"whole header":    func(s *ParserState) { s.InFrame, s.Head = false, make([]byte, HeaderLen) },
		"block":           func(s *ParserState) { s.Block = make([]byte, 1<<16+1) },
		"preface":         func(s *ParserState) { *s = ParserState{Head: []byte("POST")} },
		"negative":        func(s *ParserState) { s.Left = -1 },
		"data":            func(s *ParserState) { s.Frame.Type, s.Frame.Flags = Data, 0 },
		"continuations":   func(s *ParserState) { s.Continuations = maxContinuations + 1 },
	} {
		s := p.State()
		change(&s)
		if _, err := ResumeParser(roomy, s); err == nil {
			t.Errorf("%s: taken: %+v", name, s)
		}
	}
}

// blocks makes header blocks as an encoder of another make does, which changes
// the size of its table as it likes.
func blocks(n int, rnd *rand.Rand) [][]byte {
	var buf bytes.Buffer
	enc := hpack.NewEncoder(&buf)
	var out [][]byte
	for range n {
		if rnd.IntN(4) == 0 {
			if rnd.IntN(2) == 0 {
				enc.SetMaxDynamicTableSize(0) // two changes in one block
			}
			enc.SetMaxDynamicTableSize(uint32(rnd.IntN(DefaultTableLen + 1)))
		}
		for range 1 + rnd.IntN(12) {
			value := strings.Repeat("v", rnd.IntN(300)) + fmt.Sprint(rnd.IntN(20))
			if rnd.IntN(30) == 0 {
				value = strings.Repeat("w", 5000) // larger than any table
			}
			_ = enc.WriteField(hpack.HeaderField{Name: fmt.Sprint("name", rnd.IntN(8)), Value: value, Sensitive: rnd.IntN(4) == 0})
		}
		out = append(out, bytes.Clone(buf.Bytes()))
		buf.Reset()
	}
	return out
}

// moved returns a reader in the state of r that shares no memory with it.
func (r *FieldReader) moved(t testing.TB) *FieldReader {
	t.Helper()
	s, err := r.State()
	if err != nil {
		t.Fatal(err)
	}
	var read FieldState
	if err := pack.Read(pack.Write(s.Pack), read.Pack); err != nil {
		t.Fatal(err)
	}
	n, err := ResumeFieldReader(r.maxList, read)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestFieldReaderMovesBetweenBlocks moves a reader before each block, and
// compares what it reads with one that stays. Lists that are too large or
// malformed count as well.
func TestFieldReaderMovesBetweenBlocks(t *testing.T) {
	for seed := range uint64(200) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		stays, moves := NewFieldReader(2000), NewFieldReader(2000)
		for i, b := range blocks(30, rnd) {
			moves = moves.moved(t)
			want, werr := stays.Read(b)
			got, gerr := moves.Read(b)
			if fmt.Sprint(werr) != fmt.Sprint(gerr) || !slices.Equal(got, want) {
				t.Fatalf("seed %d, block %d: got %v, %v, want %v, %v", seed, i, got, gerr, want, werr)
			}
			var ce *ConnError
			if errors.As(werr, &ce) {
				t.Fatal(werr)
			}
		}
	}
}

func TestResumeFieldReaderRefuses(t *testing.T) {
	for name, s := range map[string]FieldState{
		"max":  {Max: DefaultTableLen + 1},
		"full": {Max: 40, Fields: []Field{{"name", "value"}}},
	} {
		if _, err := ResumeFieldReader(1000, s); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

// FuzzMovedFieldReader reads two blocks of anything, and moves in between.
func FuzzMovedFieldReader(f *testing.F) {
	for seed := range uint64(4) {
		b := blocks(2, rand.New(rand.NewPCG(seed, 2)))
		f.Add(b[0], b[1])
	}
	f.Fuzz(func(t *testing.T, a, b []byte) {
		stays := NewFieldReader(4000)
		var ce *ConnError
		if _, err := stays.Read(a); errors.As(err, &ce) {
			return
		}
		moves := stays.moved(t)
		want, werr := stays.Read(b)
		got, gerr := moves.Read(b)
		if errors.As(werr, &ce) && errors.As(gerr, &ce) {
			return
		}
		if fmt.Sprint(werr) != fmt.Sprint(gerr) || !slices.Equal(got, want) {
			t.Fatalf("got %v, %v, want %v, %v", got, gerr, want, werr)
		}
	})
}

// FuzzParserState reads states from anything. What can be resumed can be used,
// and holds no more than it may.
func FuzzParserState(f *testing.F) {
	in := stream(f, every)
	for cut := 0; cut < len(in); cut += 20 {
		p := NewParser(roomy)
		for rest := in[:cut]; ; {
			_, r, ok, err := p.Next(rest)
			if err != nil {
				f.Fatal(err)
			}
			if rest = r; !ok {
				break
			}
		}
		s := p.State()
		f.Add(pack.Write(s.Pack), in[cut:])
	}
	f.Fuzz(func(t *testing.T, b, in []byte) {
		var s ParserState
		if pack.Read(b, s.Pack) != nil {
			return
		}
		p, err := ResumeParser(roomy, s)
		if err != nil {
			return
		}
		for {
			f, rest, ok, err := p.Next(in)
			if err != nil || !ok {
				break
			}
			if f.Type == Data && len(f.Payload) > int(f.Length) {
				t.Fatalf("%d bytes in a frame of %d", len(f.Payload), f.Length)
			}
			in = rest
		}
		if len(p.buf)+len(p.block) > roomy.MaxFrame+roomy.MaxBlock+1024 {
			t.Fatal("it holds too much")
		}
	})
}
