package http2

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	h2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// all runs a parser over in, in pieces of n, and says what it found.
func all(cfg ParserConfig, in []byte, n int) (frames []string, err error) {
	p := NewParser(cfg)
	for piece := range slices.Chunk(in, n) {
		for {
			f, rest, ok, err := p.Next(piece)
			if err != nil {
				return frames, err
			}
			if !ok {
				if len(rest) != 0 {
					return frames, fmt.Errorf("%d bytes left over", len(rest))
				}
				break
			}
			piece = rest
			if f.Type == Data {
				// Pieces of one frame are told as one.
				if f.Start {
					frames = append(frames, fmt.Sprintf("%v ", f.Header))
				}
				frames[len(frames)-1] += string(f.Payload)
				if f.End {
					frames[len(frames)-1] += "."
				}
				continue
			}
			frames = append(frames, fmt.Sprintf("%v %x", f.Header, f.Payload))
		}
	}
	return frames, nil
}

var roomy = ParserConfig{MaxFrame: 1 << 20, MaxBlock: 1 << 16}

// stream returns frames that a framer of another make has written.
func stream(t testing.TB, write func(fr *h2.Framer)) []byte {
	t.Helper()
	var b bytes.Buffer
	fr := h2.NewFramer(&b, nil)
	fr.AllowIllegalWrites = true
	if err := fr.WriteSettings(); err != nil {
		t.Fatal(err)
	}
	write(fr)
	return b.Bytes()
}

func every(fr *h2.Framer) {
	_ = fr.WriteSettings(h2.Setting{ID: 4, Val: 70000})
	_ = fr.WriteSettingsAck()
	_ = fr.WriteHeaders(h2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte("block"), EndHeaders: true, EndStream: true, PadLength: 7, Priority: h2.PriorityParam{StreamDep: 9, Weight: 1}})
	_ = fr.WriteHeaders(h2.HeadersFrameParam{StreamID: 3, BlockFragment: []byte("one "), PadLength: 2})
	_ = fr.WriteContinuation(3, false, []byte("two "))
	_ = fr.WriteContinuation(3, true, []byte("three"))
	_ = fr.WriteData(1, false, []byte("hello"))
	_ = fr.WriteDataPadded(1, false, []byte("padded"), make([]byte, 250))
	_ = fr.WriteDataPadded(1, false, nil, make([]byte, 3))
	_ = fr.WriteData(1, true, nil)
	_ = fr.WritePriority(5, h2.PriorityParam{StreamDep: 5})
	_ = fr.WriteRSTStream(1, h2.ErrCodeCancel)
	_ = fr.WritePing(true, [8]byte{1, 2, 3})
	_ = fr.WriteRawFrame(0xee, 0xff, 77, []byte("unknown"))
	_ = fr.WriteWindowUpdate(0, 1<<31-1)
	_ = fr.WriteGoAway(7, h2.ErrCodeNo, bytes.Repeat([]byte("d"), 300))
}

func TestParserReadsEveryFrame(t *testing.T) {
	in := stream(t, every)
	got, err := all(roomy, in, len(in))
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"{0 4 0 0} ",
		"{6 4 0 0} 000400011170",
		"{0 4 1 0} ",
		"{18 1 45 1} 626c6f636b",
		"{7 1 12 3} 6f6e652074776f207468726565",
		"{5 0 0 1} hello.",
		"{257 0 8 1} padded.",
		"{4 0 8 1} .",
		"{0 0 1 1} .",
		"{5 2 0 5} ",
		"{4 3 0 1} 00000008",
		"{8 6 1 0} 0102030000000000",
		"{7 238 255 77} ",
		"{4 8 0 0} 7fffffff",
		"{308 7 0 0} 0000000700000000" + strings.Repeat("64", maxDebug),
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	for n := 1; n < 40; n++ {
		if pieces, err := all(roomy, in, n); err != nil || !slices.Equal(pieces, want) {
			t.Fatalf("in pieces of %d: %v, %q", n, err, pieces)
		}
	}
}

func TestDataIsNotHeldBack(t *testing.T) {
	p := NewParser(roomy)
	in := AppendHeader(AppendSettings(nil), Header{Length: 1 << 20, Type: Data, StreamID: 1})
	in = append(in, "first"...)
	if f, rest, ok, err := p.Next(in); !ok || err != nil || f.Type != Settings {
		t.Fatal(f, ok, err)
	} else {
		in = rest
	}
	f, _, ok, err := p.Next(in)
	if !ok || err != nil || string(f.Payload) != "first" || !f.Start || f.End {
		t.Errorf("%+v, %v, %v", f, ok, err)
	}
	if f, _, ok, _ := p.Next([]byte("more")); !ok || string(f.Payload) != "more" || f.Start || f.End {
		t.Errorf("%+v, %v", f, ok)
	}
}

func TestParserRefuses(t *testing.T) {
	raw := func(typ h2.FrameType, flags h2.Flags, id uint32, n int) func(*h2.Framer) {
		return func(fr *h2.Framer) { _ = fr.WriteRawFrame(typ, flags, id, make([]byte, n)) }
	}
	tests := []struct {
		name  string
		write func(*h2.Framer)
		code  ErrCode
	}{
		{"DATA on stream 0", raw(h2.FrameData, 0, 0, 1), ProtocolError},
		{"HEADERS on stream 0", raw(h2.FrameHeaders, 4, 0, 1), ProtocolError},
		{"PRIORITY on stream 0", raw(h2.FramePriority, 0, 0, 5), ProtocolError},
		{"RST_STREAM on stream 0", raw(h2.FrameRSTStream, 0, 0, 4), ProtocolError},
		{"SETTINGS on a stream", raw(h2.FrameSettings, 0, 1, 0), ProtocolError},
		{"PING on a stream", raw(h2.FramePing, 0, 1, 8), ProtocolError},
		{"GOAWAY on a stream", raw(h2.FrameGoAway, 0, 1, 8), ProtocolError},
		{"PUSH_PROMISE", raw(h2.FramePushPromise, 4, 1, 4), ProtocolError},
		{"CONTINUATION alone", raw(h2.FrameContinuation, 4, 1, 4), ProtocolError},
		{"short PRIORITY", raw(h2.FramePriority, 0, 1, 4), FrameSizeError},
		{"long RST_STREAM", raw(h2.FrameRSTStream, 0, 1, 5), FrameSizeError},
		{"short PING", raw(h2.FramePing, 0, 0, 7), FrameSizeError},
		{"short GOAWAY", raw(h2.FrameGoAway, 0, 0, 7), FrameSizeError},
		{"short WINDOW_UPDATE", raw(h2.FrameWindowUpdate, 0, 0, 3), FrameSizeError},
		{"SETTINGS of 7 bytes", raw(h2.FrameSettings, 0, 0, 7), FrameSizeError},
		{"SETTINGS ack with payload", raw(h2.FrameSettings, 1, 0, 6), FrameSizeError},
		{"huge SETTINGS", raw(h2.FrameSettings, 0, 0, 6000), EnhanceYourCalm},
		{"frame over the limit", raw(h2.FrameData, 0, 1, 1<<20+1), FrameSizeError},
		{"padded DATA without a pad length", raw(h2.FrameData, 8, 1, 0), FrameSizeError},
		{"padding longer than DATA", func(fr *h2.Framer) { _ = fr.WriteRawFrame(h2.FrameData, 8, 1, []byte{3, 0, 0}) }, ProtocolError},
		{"padding longer than HEADERS", func(fr *h2.Framer) { _ = fr.WriteRawFrame(h2.FrameHeaders, 8|4, 1, []byte{3, 0, 0}) }, ProtocolError},
		{"padded HEADERS without a pad length", raw(h2.FrameHeaders, 8|4, 1, 0), FrameSizeError},
		{"HEADERS without room for priority", raw(h2.FrameHeaders, 0x20|4, 1, 4), FrameSizeError},
		{"a large header block", raw(h2.FrameHeaders, 4, 1, 1<<16+1), EnhanceYourCalm},
		{"a header block that grows", func(fr *h2.Framer) {
			_ = fr.WriteHeaders(h2.HeadersFrameParam{StreamID: 1, BlockFragment: make([]byte, 40000)})
			_ = fr.WriteContinuation(1, false, make([]byte, 40000))
		}, EnhanceYourCalm},
		{"CONTINUATION of another stream", func(fr *h2.Framer) {
			_ = fr.WriteHeaders(h2.HeadersFrameParam{StreamID: 1})
			_ = fr.WriteContinuation(3, true, nil)
		}, ProtocolError},
		{"DATA within a header block", func(fr *h2.Framer) {
			_ = fr.WriteHeaders(h2.HeadersFrameParam{StreamID: 1})
			_ = fr.WriteData(1, true, nil)
		}, ProtocolError},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			in := stream(t, tt.write)
			for _, n := range []int{len(in), 1} {
				_, err := all(roomy, in, n)
				var ce *ConnError
				if !errors.As(err, &ce) || ce.Code != tt.code {
					t.Errorf("in pieces of %d: %v, want %v", n, err, tt.code)
				}
			}
		})
	}
}

func TestPreface(t *testing.T) {
	cfg := roomy
	cfg.Preface = true
	good := append([]byte(Preface), stream(t, func(*h2.Framer) {})...)
	for _, n := range []int{1, 5, 100} {
		if f, err := all(cfg, good, n); err != nil || len(f) != 1 {
			t.Errorf("%q, %v", f, err)
		}
	}
	for _, bad := range []string{"GET / HTTP/1.1\r\n\r\n", "PRI * HTTP/1.1\r\n", "\x16\x03\x01"} {
		if _, err := all(cfg, []byte(bad), 1); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

func TestAppendReadsBack(t *testing.T) {
	b := AppendSettings(nil, Setting{InitialWindowSize, 7})
	b = AppendSettingsAck(b)
	b = AppendHeaders(b, 1, bytes.Repeat([]byte{0x82}, 40), true, 16)
	b = AppendWindowUpdate(b, 1, 99)
	b = AppendRSTStream(b, 1, Cancel)
	b = AppendPing(b, true, [8]byte{9})
	b = AppendGoAway(b, 5, EnhanceYourCalm, "calm")
	fr := h2.NewFramer(nil, bytes.NewReader(b))
	want := []string{
		"[FrameHeader SETTINGS len=6]", "[FrameHeader SETTINGS flags=ACK len=0]",
		"[FrameHeader HEADERS flags=END_STREAM stream=1 len=16]", "[FrameHeader CONTINUATION stream=1 len=16]",
		"[FrameHeader CONTINUATION flags=END_HEADERS stream=1 len=8]",
		"[FrameHeader WINDOW_UPDATE stream=1 len=4]", "[FrameHeader RST_STREAM stream=1 len=4]",
		"[FrameHeader PING flags=ACK len=8]", "[FrameHeader GOAWAY len=12]",
	}
	for _, w := range want {
		f, err := fr.ReadFrame()
		if err != nil || f.Header().String() != w {
			t.Errorf("%v, %v, want %s", f, err, w)
		}
	}
}

func TestWindows(t *testing.T) {
	var s SendWindow
	if !s.Add(MaxWindow) || s.Add(1) {
		t.Error("a send window may be as large as 2^31-1 and no larger")
	}
	s.Take(MaxWindow)
	s.Add(-5)
	if s.Left() != 0 || !s.Add(6) || s.Left() != 1 {
		t.Errorf("left %d", s.Left())
	}
	r := NewReceiveWindow(100)
	if !r.Receive(100) || r.Receive(1) {
		t.Error("a receive window lets in what it is and no more")
	}
	r.Credit(24)
	if n := r.Announce(); n != 0 {
		t.Errorf("announced %d, less than a quarter", n)
	}
	r.Credit(1)
	if n := r.Announce(); n != 25 || r.Announce() != 0 {
		t.Errorf("announced %d", n)
	}
	r.Grow(50)
	r.Grow(200)
	if n := r.Announce(); n != 100 || !r.Receive(125) || r.Receive(1) {
		t.Errorf("grown by %d", n)
	}
}

func TestBucketRefillsWithTime(t *testing.T) {
	now := time.Unix(0, 0)
	var b Bucket
	for range 10 {
		if !b.Take(now, 10, 2) {
			t.Fatal("the burst is 10")
		}
	}
	if b.Take(now, 10, 2) || b.Take(now.Add(400*time.Millisecond), 10, 2) {
		t.Error("more than the burst")
	}
	if !b.Take(now.Add(600*time.Millisecond), 10, 2) {
		t.Error("no refill")
	}
	if !b.Take(now, 10, 2) && b.Take(now, 10, 2) {
		t.Error("a clock that goes back gives uses")
	}
}

func TestPeerApply(t *testing.T) {
	for _, tt := range []struct {
		s      Setting
		server bool
		ok     bool
	}{
		{Setting{EnablePush, 0}, true, true}, {Setting{EnablePush, 1}, true, false}, {Setting{EnablePush, 1}, false, true},
		{Setting{EnablePush, 2}, false, false}, {Setting{InitialWindowSize, 1 << 31}, true, false}, {Setting{MaxFrameLen, 16383}, true, false},
		{Setting{MaxFrameLen, 1 << 24}, true, false}, {Setting{0x77, 1 << 31}, true, true},
	} {
		p := DefaultPeer()
		if err := p.Apply(AppendSettings(nil, tt.s)[HeaderLen:], tt.server); (err == nil) != tt.ok {
			t.Errorf("%+v: %v", tt.s, err)
		}
	}
}

func TestFieldReader(t *testing.T) {
	encode := func(fs ...hpack.HeaderField) []byte {
		var b bytes.Buffer
		e := hpack.NewEncoder(&b)
		for _, f := range fs {
			_ = e.WriteField(f)
		}
		return b.Bytes()
	}
	r := NewFieldReader(200)
	got, err := r.Read(encode(hpack.HeaderField{Name: ":method", Value: "CONNECT"}, hpack.HeaderField{Name: "baggage", Value: "x"}))
	if err != nil || !slices.Equal(got, []Field{{":method", "CONNECT"}, {"baggage", "x"}}) {
		t.Errorf("%v, %v", got, err)
	}
	var bad *MalformedError
	for _, f := range []Field{
		{"Baggage", "x"}, {"", "x"}, {"a b", "x"}, {"a:b", "x"}, {"é", "x"}, {"x", " y"}, {"x", "y\t"}, {"x", "a\x00b"}, {"x", "a\nb"}, {"x", "a\x7fb"},
		{"connection", "x"}, {"keep-alive", "x"}, {"proxy-connection", "x"}, {"transfer-encoding", "x"}, {"upgrade", "x"}, {"te", "gzip"},
	} {
		if _, err := NewFieldReader(200).Read(encode(hpack.HeaderField{Name: f.Name, Value: f.Value})); !errors.As(err, &bad) {
			t.Errorf("%q: %v", f, err)
		}
	}
	if _, err := r.Read(encode(hpack.HeaderField{Name: "x", Value: strings.Repeat("y", 200)})); !errors.Is(err, ErrListTooLarge) {
		t.Errorf("large list: %v", err)
	}
	// The stream is lost, and the connection goes on.
	if got, err := r.Read(encode(hpack.HeaderField{Name: "x", Value: "y"})); err != nil || len(got) != 1 {
		t.Errorf("after a large list: %v, %v", got, err)
	}
	// A bomb: one large entry of the table, named over and over.
	var b bytes.Buffer
	e := hpack.NewEncoder(&b)
	_ = e.WriteField(hpack.HeaderField{Name: "x", Value: strings.Repeat("y", 100)})
	bomb := append(b.Bytes(), bytes.Repeat([]byte{0x80 | 62}, 100_000)...)
	if _, err := r.Read(bomb); !errors.Is(err, ErrListTooLarge) || cap(r.fields) > 10 {
		t.Errorf("bomb: %v, %d fields", err, cap(r.fields))
	}
	var ce *ConnError
	if _, err := r.Read([]byte{0xbf, 0xff}); !errors.As(err, &ce) || ce.Code != CompressionError {
		t.Errorf("broken block: %v", err)
	}
}

func FuzzParser(f *testing.F) {
	f.Add(stream(f, every), byte(3))
	f.Add(stream(f, func(fr *h2.Framer) { _ = fr.WriteRawFrame(h2.FrameData, 8, 1, []byte{2, 0, 0}) }), byte(0))
	f.Fuzz(func(t *testing.T, in []byte, cut byte) {
		whole, err1 := all(roomy, in, len(in)+1)
		pieces, err2 := all(roomy, in, int(cut)+1)
		// A frame that is not whole may have shown more of itself in one case.
		n := min(len(whole), len(pieces))
		if fmt.Sprint(err1) != fmt.Sprint(err2) || !slices.Equal(whole[:n], pieces[:n]) || len(whole) != len(pieces) {
			t.Errorf("whole %q, %v; in pieces %q, %v", whole, err1, pieces, err2)
		}
		var ce *ConnError
		if err1 != nil && !errors.As(err1, &ce) {
			t.Errorf("error %T", err1)
		}
	})
}

func FuzzFieldReader(f *testing.F) {
	f.Add([]byte("\x82\x84\x41\x8c\xf1\xe3\xc2\xe5\xf2\x3a\x6b\xa0\xab\x90\xf4\xff"))
	f.Add([]byte{0x40, 1, 'x', 1, 'y', 0xbe, 0xbe, 0x20})
	f.Fuzz(func(t *testing.T, block []byte) {
		r := NewFieldReader(1000)
		fields, err := r.Read(block)
		if err != nil {
			var ce *ConnError
			var bad *MalformedError
			if !errors.As(err, &ce) && !errors.As(err, &bad) && !errors.Is(err, ErrListTooLarge) {
				t.Errorf("error %T %v", err, err)
			}
			return
		}
		size, regular := 0, false
		for _, f := range fields {
			size += len(f.Name) + len(f.Value) + 32
			if f.IsPseudo() && regular || strings.ContainsAny(f.Name+f.Value, "\r\n\x00") || f.Name != strings.ToLower(f.Name) {
				t.Errorf("let through %q", f)
			}
			regular = regular || !f.IsPseudo()
		}
		if size > 1000 {
			t.Errorf("list of %d bytes", size)
		}
	})
}
