package hbone

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	h2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/weft-mesh/weft/internal/http2"
)

var epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// A foreign is the peer of a Tunnel under test, made of x/net's framer. It
// writes what it likes, reads what the Tunnel answers, and notes its events.
type foreign struct {
	t      testing.TB
	tunnel *Tunnel
	now    time.Time
	in     bytes.Buffer // for the tunnel
	fr     *h2.Framer
	enc    *hpack.Encoder
	block  bytes.Buffer
	events []string
	data   map[uint32]int
	auto   func(*foreign, uint32) // what a server does with a request
	more   uint32                 // the stream of which More has promised data
	dec    *hpack.Decoder
	err    error
}

func newForeign(t testing.TB, role Role, l Limits) *foreign {
	tn, err := NewTunnel(role, l, epoch)
	if err != nil {
		t.Fatal(err)
	}
	f := &foreign{t: t, tunnel: tn, now: epoch, data: make(map[uint32]int)}
	f.fr = h2.NewFramer(&f.in, nil)
	f.fr.AllowIllegalWrites = true
	f.enc = hpack.NewEncoder(&f.block)
	f.dec = hpack.NewDecoder(4096, nil)
	return f
}

// greeted is newForeign after both ends have exchanged settings.
func greeted(t testing.TB, role Role, l Limits, ss ...h2.Setting) *foreign {
	f := newForeign(t, role, l)
	if role == ServerRole {
		f.in.WriteString(http2.Preface)
	}
	f.must(f.fr.WriteSettings(ss...))
	f.must(f.fr.WriteSettingsAck())
	f.must(f.feed())
	f.answers()
	return f
}

func (f *foreign) must(err error) {
	f.t.Helper()
	if err != nil {
		f.t.Fatal(err)
	}
}

// feed gives the tunnel what was written.
func (f *foreign) feed() error {
	b := bytes.Clone(f.in.Bytes())
	f.in.Reset()
	f.err = f.tunnel.Receive(f.now, b, f)
	f.kept(f.err)
	return f.err
}

func (f *foreign) headers(id uint32, end bool, fields ...string) {
	f.t.Helper()
	f.must(f.fr.WriteHeaders(h2.HeadersFrameParam{StreamID: id, BlockFragment: f.encode(fields...), EndHeaders: true, EndStream: end}))
}

// encode returns a header block of "name=value" fields.
func (f *foreign) encode(fields ...string) []byte {
	f.block.Reset()
	for _, s := range fields {
		name, value, _ := strings.Cut(s, "=")
		f.must(f.enc.WriteField(hpack.HeaderField{Name: name, Value: value}))
	}
	return bytes.Clone(f.block.Bytes())
}

func (f *foreign) connect(id uint32) {
	f.t.Helper()
	f.headers(id, false, ":method=CONNECT", ":authority="+target)
}

// answers takes the tunnel's output and says it in words.
func (f *foreign) answers() []string {
	f.t.Helper()
	out := f.tunnel.TakeOutput(nil)
	if f.tunnel.role == ClientRole {
		out = bytes.TrimPrefix(out, []byte(http2.Preface))
	}
	fr := h2.NewFramer(io.Discard, bytes.NewReader(out))
	fr.SetMaxReadFrameSize(1 << 20)
	fr.ReadMetaHeaders = f.dec
	var words []string
	for {
		frame, err := fr.ReadFrame()
		if err == io.EOF {
			return words
		}
		if err != nil {
			f.t.Fatalf("our own output does not parse: %v after %q", err, words)
		}
		words = append(words, describe(frame))
	}
}

func describe(frame h2.Frame) string {
	h := frame.Header()
	end := ""
	switch frame := frame.(type) {
	case *h2.MetaHeadersFrame:
		if frame.StreamEnded() {
			end = " end"
		}
		return fmt.Sprintf("HEADERS %d %s%s%s", h.StreamID, frame.PseudoValue("status"), frame.PseudoValue("authority"), end)
	case *h2.DataFrame:
		if frame.StreamEnded() {
			end = " end"
		}
		return fmt.Sprintf("DATA %d %d%s", h.StreamID, len(frame.Data()), end)
	case *h2.RSTStreamFrame:
		return fmt.Sprintf("RST %d %v", h.StreamID, frame.ErrCode)
	case *h2.GoAwayFrame:
		return fmt.Sprintf("GOAWAY %d %v", frame.LastStreamID, frame.ErrCode)
	case *h2.WindowUpdateFrame:
		return fmt.Sprintf("WINDOW %d %d", h.StreamID, frame.Increment)
	case *h2.SettingsFrame:
		if frame.IsAck() {
			return "SETTINGS ack"
		}
		return "SETTINGS"
	case *h2.PingFrame:
		if frame.IsAck() {
			return "PING ack"
		}
		return "PING"
	}
	return h.Type.String()
}

// kept checks, when Receive has returned, that More has kept its promise.
func (f *foreign) kept(err error) {
	f.t.Helper()
	if f.more != 0 && err == nil {
		f.t.Errorf("more data of stream %d was promised, and has not come", f.more)
	}
}

func (f *foreign) note(format string, args ...any) {
	if f.more != 0 {
		f.t.Errorf("more data of stream %d was promised, and then it is %q", f.more, fmt.Sprintf(format, args...))
	}
	f.events = append(f.events, fmt.Sprintf(format, args...))
}

func (f *foreign) Requested(id uint32, authority string, _ Header) {
	f.note("requested %d %s", id, authority)
	if f.auto != nil {
		f.auto(f, id)
	}
}
func (f *foreign) Answered(id uint32, status int, _ Header) { f.note("answered %d %d", id, status) }
func (f *foreign) Ended(id uint32)                          { f.note("ended %d", id) }
func (f *foreign) Data(id uint32, p []byte) {
	if f.more != 0 && f.more != id {
		f.t.Errorf("more data of stream %d was promised, and then it is of %d", f.more, id)
	}
	f.more = 0
	if f.tunnel.More() {
		f.more = id
	}
	f.data[id] += len(p)
}
func (f *foreign) Aborted(id uint32, err *http2.StreamError, refused bool) {
	if f.more == id {
		f.more = 0
	}
	f.note("aborted %d %v refused=%v", id, err.Code, refused)
}
func (f *foreign) Writable(uint32) {}

func accept(f *foreign, id uint32) { f.tunnel.Answer(id, 200, Header{}) }

// TestServerRefuses plays what a peer must not do, and what we do about it.
func TestServerRefuses(t *testing.T) {
	tests := []struct {
		name string
		send func(f *foreign)
		want string // the last frame that we send
	}{
		{"GET is answered, not served", func(f *foreign) {
			f.headers(1, true, ":method=GET", ":scheme=https", ":path=/", ":authority="+target)
		}, "HEADERS 1 400 end"},
		{"an unfinished GET is stopped too", func(f *foreign) {
			f.headers(1, false, ":method=POST", ":scheme=https", ":path=/", ":authority="+target)
		}, "RST 1 NO_ERROR"},
		{"CONNECT with :path", func(f *foreign) {
			f.headers(1, false, ":method=CONNECT", ":authority="+target, ":path=/")
		}, "RST 1 PROTOCOL_ERROR"},
		{"CONNECT with :scheme", func(f *foreign) {
			f.headers(1, false, ":method=CONNECT", ":authority="+target, ":scheme=https")
		}, "RST 1 PROTOCOL_ERROR"},
		{"CONNECT with :protocol", func(f *foreign) {
			f.headers(1, false, ":method=CONNECT", ":authority="+target, ":protocol=websocket")
		}, "RST 1 PROTOCOL_ERROR"},
		{"CONNECT without :authority", func(f *foreign) { f.headers(1, false, ":method=CONNECT") }, "RST 1 PROTOCOL_ERROR"},
		{"two :authority", func(f *foreign) {
			f.headers(1, false, ":method=CONNECT", ":authority="+target, ":authority=10.0.0.8:80")
		}, "RST 1 PROTOCOL_ERROR"},
		{"a pseudo field after a regular one", func(f *foreign) {
			f.headers(1, false, ":method=CONNECT", "baggage=x", ":authority="+target)
		}, "RST 1 PROTOCOL_ERROR"},
		{"a pseudo field of responses", func(f *foreign) {
			f.headers(1, false, ":method=CONNECT", ":authority="+target, ":status=200")
		}, "RST 1 PROTOCOL_ERROR"},
		{"host that differs from :authority", func(f *foreign) {
			f.headers(1, false, ":method=CONNECT", ":authority="+target, "host=10.0.0.8:80")
		}, "RST 1 PROTOCOL_ERROR"},
		{"connection", func(f *foreign) {
			f.headers(1, false, ":method=CONNECT", ":authority="+target, "connection=close")
		}, "RST 1 PROTOCOL_ERROR"},
		{"transfer-encoding", func(f *foreign) {
			f.headers(1, false, ":method=CONNECT", ":authority="+target, "transfer-encoding=chunked")
		}, "RST 1 PROTOCOL_ERROR"},
		{"upgrade", func(f *foreign) {
			f.headers(1, false, ":method=CONNECT", ":authority="+target, "upgrade=h2c")
		}, "RST 1 PROTOCOL_ERROR"},
		{"te that is not trailers", func(f *foreign) {
			f.headers(1, false, ":method=CONNECT", ":authority="+target, "te=gzip")
		}, "RST 1 PROTOCOL_ERROR"},
		{"content-length", func(f *foreign) {
			f.headers(1, false, ":method=CONNECT", ":authority="+target, "content-length=3")
		}, "RST 1 PROTOCOL_ERROR"},
		{"capitals in a name", func(f *foreign) {
			f.headers(1, false, ":method=CONNECT", ":authority="+target, "Baggage=x")
		}, "RST 1 PROTOCOL_ERROR"},
		{"a line break in a value", func(f *foreign) {
			f.headers(1, false, ":method=CONNECT", ":authority="+target, "baggage=x\r\nforwarded: y")
		}, "RST 1 PROTOCOL_ERROR"},
		{"a large header list", func(f *foreign) {
			f.headers(1, true, ":method=CONNECT", ":authority="+target, "x="+strings.Repeat("a", 70<<10))
		}, "HEADERS 1 431 end"},
		{"a header list far too large", func(f *foreign) {
			f.headers(1, true, ":method=CONNECT", ":authority="+target, "x="+strings.Repeat("~", 200<<10))
		}, "GOAWAY 0 ENHANCE_YOUR_CALM"},
		{"trailers", func(f *foreign) { f.connect(1); f.headers(1, true, "x=y") }, "RST 1 PROTOCOL_ERROR"},
		{"HEADERS after the end", func(f *foreign) {
			f.headers(1, true, ":method=CONNECT", ":authority="+target)
			f.headers(1, true, "x=y")
		}, "RST 1 STREAM_CLOSED"},
		{"an even stream", func(f *foreign) { f.connect(2) }, "GOAWAY 0 PROTOCOL_ERROR"},
		{"a stream id that goes back", func(f *foreign) {
			f.connect(5)
			f.connect(3)
		}, "GOAWAY 5 STREAM_CLOSED"},
		{"broken HPACK", func(f *foreign) {
			f.must(f.fr.WriteHeaders(h2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0xff, 0xff, 0xff, 0xff, 0xff}, EndHeaders: true}))
		}, "GOAWAY 0 COMPRESSION_ERROR"},
		{"DATA on an idle stream", func(f *foreign) { f.must(f.fr.WriteData(1, false, []byte("x"))) }, "GOAWAY 0 PROTOCOL_ERROR"},
		{"RST_STREAM on an idle stream", func(f *foreign) { f.must(f.fr.WriteRSTStream(1, h2.ErrCodeCancel)) }, "GOAWAY 0 PROTOCOL_ERROR"},
		{"WINDOW_UPDATE on an idle stream", func(f *foreign) { f.must(f.fr.WriteWindowUpdate(1, 1)) }, "GOAWAY 0 PROTOCOL_ERROR"},
		{"WINDOW_UPDATE of 0 on a stream", func(f *foreign) { f.connect(1); f.must(f.fr.WriteWindowUpdate(1, 0)) }, "RST 1 PROTOCOL_ERROR"},
		{"WINDOW_UPDATE of 0", func(f *foreign) { f.must(f.fr.WriteWindowUpdate(0, 0)) }, "GOAWAY 0 PROTOCOL_ERROR"},
		{"a stream's window too large", func(f *foreign) {
			f.connect(1)
			f.must(f.fr.WriteWindowUpdate(1, 1<<31-1))
		}, "RST 1 FLOW_CONTROL_ERROR"},
		{"the tunnel's window too large", func(f *foreign) { f.must(f.fr.WriteWindowUpdate(0, 1<<31-1)) }, "GOAWAY 0 FLOW_CONTROL_ERROR"},
		{"an initial window too large", func(f *foreign) {
			f.must(f.fr.WriteSettings(h2.Setting{ID: h2.SettingInitialWindowSize, Val: 1 << 31}))
		}, "GOAWAY 0 FLOW_CONTROL_ERROR"},
		{"an initial window that makes a stream's too large", func(f *foreign) {
			f.connect(1)
			f.must(f.fr.WriteWindowUpdate(1, 1<<30))
			f.must(f.fr.WriteSettings(h2.Setting{ID: h2.SettingInitialWindowSize, Val: 1<<31 - 1}))
		}, "GOAWAY 1 FLOW_CONTROL_ERROR"},
		{"a frame size out of range", func(f *foreign) {
			f.must(f.fr.WriteSettings(h2.Setting{ID: h2.SettingMaxFrameSize, Val: 100}))
		}, "GOAWAY 0 PROTOCOL_ERROR"},
		{"more data than the stream's window", func(f *foreign) {
			f.connect(1)
			for range 5 {
				f.must(f.fr.WriteData(1, false, make([]byte, 64<<10)))
			}
		}, "RST 1 FLOW_CONTROL_ERROR"},
		{"data after the end", func(f *foreign) {
			f.headers(1, true, ":method=CONNECT", ":authority="+target)
			f.must(f.fr.WriteData(1, false, []byte("x")))
		}, "RST 1 STREAM_CLOSED"},
		{"a frame larger than allowed", func(f *foreign) { f.connect(1); f.must(f.fr.WriteData(1, false, make([]byte, 1<<20+1))) }, "GOAWAY 1 FRAME_SIZE_ERROR"},
		{"PUSH_PROMISE", func(f *foreign) {
			f.connect(1)
			f.must(f.fr.WritePushPromise(h2.PushPromiseParam{StreamID: 1, PromiseID: 2, EndHeaders: true}))
		}, "GOAWAY 1 PROTOCOL_ERROR"},
		{"CONTINUATION without HEADERS", func(f *foreign) { f.must(f.fr.WriteContinuation(1, true, nil)) }, "GOAWAY 0 PROTOCOL_ERROR"},
		{"a header block that is interrupted", func(f *foreign) {
			f.must(f.fr.WriteHeaders(h2.HeadersFrameParam{StreamID: 1, BlockFragment: f.encode(":method=CONNECT")}))
			f.must(f.fr.WritePing(false, [8]byte{}))
		}, "GOAWAY 0 PROTOCOL_ERROR"},
		{"a flood of CONTINUATION", func(f *foreign) {
			f.must(f.fr.WriteHeaders(h2.HeadersFrameParam{StreamID: 1, BlockFragment: f.encode(":method=CONNECT")}))
			for range 100 {
				f.must(f.fr.WriteContinuation(1, false, nil))
			}
		}, "GOAWAY 0 ENHANCE_YOUR_CALM"},
		{"a flood of PING", func(f *foreign) {
			for range 10000 {
				f.must(f.fr.WritePing(false, [8]byte{}))
			}
		}, "GOAWAY 0 ENHANCE_YOUR_CALM"},
		{"a flood of SETTINGS", func(f *foreign) {
			for range 10000 {
				f.must(f.fr.WriteSettings())
			}
		}, "GOAWAY 0 ENHANCE_YOUR_CALM"},
		{"a flood of PRIORITY", func(f *foreign) {
			for range 10000 {
				f.must(f.fr.WritePriority(1, h2.PriorityParam{StreamDep: 3}))
			}
		}, "GOAWAY 0 ENHANCE_YOUR_CALM"},
		{"a flood of empty DATA", func(f *foreign) {
			f.connect(1)
			for range 10000 {
				f.must(f.fr.WriteData(1, false, nil))
			}
		}, "GOAWAY 1 ENHANCE_YOUR_CALM"},
		{"a flood of unknown frames", func(f *foreign) {
			for range 10000 {
				f.must(f.fr.WriteRawFrame(0xbb, 0, 7, []byte("?")))
			}
		}, "GOAWAY 0 ENHANCE_YOUR_CALM"},
		{"opening and resetting", func(f *foreign) {
			for i := range uint32(10000) {
				f.connect(2*i + 1)
				f.must(f.fr.WriteRSTStream(2*i+1, h2.ErrCodeCancel))
			}
		}, ""},
		{"making us reset", func(f *foreign) {
			for i := range uint32(10000) {
				f.headers(2*i+1, true, ":method=CONNECT")
			}
		}, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := greeted(t, ServerRole, Limits{})
			tt.send(f)
			err := f.feed()
			words := f.answers()
			last := ""
			if len(words) > 0 {
				last = words[len(words)-1]
			}
			if tt.want == "" { // the last stream id is not of interest
				if !strings.HasSuffix(last, "ENHANCE_YOUR_CALM") {
					t.Errorf("we end with %q, want ENHANCE_YOUR_CALM", last)
				}
				return
			}
			if last != tt.want {
				t.Errorf("we end with %q of %d frames, want %q", last, len(words), tt.want)
			}
			var ce *http2.ConnError
			if goaway := strings.HasPrefix(tt.want, "GOAWAY"); goaway != errors.As(err, &ce) {
				t.Errorf("Receive: %v", err)
			}
		})
	}
}

// TestServerBears plays what a peer may do, though few do.
func TestServerBears(t *testing.T) {
	tests := []struct {
		name   string
		send   func(f *foreign)
		events []string
	}{
		{"priority, padding and unknown settings", func(f *foreign) {
			f.must(f.fr.WriteSettings(h2.Setting{ID: 0x99, Val: 7}))
			f.must(f.fr.WriteHeaders(h2.HeadersFrameParam{
				StreamID: 1, BlockFragment: f.encode(":method=CONNECT", ":authority="+target), EndHeaders: true, PadLength: 200,
				Priority: h2.PriorityParam{StreamDep: 1, Weight: 3},
			}))
			f.must(f.fr.WriteDataPadded(1, true, []byte("hello"), make([]byte, 100)))
		}, []string{"requested 1 " + target, "ended 1"}},
		{"a header block in pieces", func(f *foreign) {
			b := f.encode(":method=CONNECT", ":authority="+target)
			f.must(f.fr.WriteHeaders(h2.HeadersFrameParam{StreamID: 1, BlockFragment: b[:1], EndStream: true}))
			f.must(f.fr.WriteContinuation(1, false, b[1:2]))
			f.must(f.fr.WriteContinuation(1, true, b[2:]))
		}, []string{"requested 1 " + target, "ended 1"}},
		{"stream ids with gaps", func(f *foreign) {
			f.connect(7)
			f.connect(1001)
		}, []string{"requested 7 " + target, "requested 1001 " + target}},
		{"host beside :authority", func(f *foreign) {
			f.headers(1, false, ":method=CONNECT", ":authority="+target, "host="+target, "te=trailers", "user-agent=x")
		}, []string{"requested 1 " + target}},
		{"frames for a stream that we reset", func(f *foreign) {
			f.auto = func(f *foreign, id uint32) { f.tunnel.Reset(id, http2.Cancel) }
			f.connect(1)
			f.must(f.fr.WriteData(1, false, []byte("x")))
			f.must(f.fr.WriteWindowUpdate(1, 9))
			f.headers(1, true, "x=y")
			f.must(f.fr.WriteRSTStream(1, h2.ErrCodeCancel))
		}, []string{"requested 1 " + target}},
		{"a ping with every few bytes", func(f *foreign) {
			f.auto = accept
			f.connect(1)
			for range 20000 {
				f.must(f.fr.WriteData(1, false, []byte("x")))
				f.must(f.fr.WritePing(false, [8]byte{1}))
				f.must(f.feed())
				f.answers()
			}
		}, []string{"requested 1 " + target}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := greeted(t, ServerRole, Limits{})
			tt.send(f)
			if err := f.feed(); err != nil {
				t.Fatalf("Receive: %v", err)
			}
			if !slices.Equal(f.events, tt.events) {
				t.Errorf("events %q, want %q", f.events, tt.events)
			}
		})
	}
}

// TestClientRefuses is TestServerRefuses for our client, after one Connect.
func TestClientRefuses(t *testing.T) {
	tests := []struct {
		name string
		send func(f *foreign)
		want string
	}{
		{"no status", func(f *foreign) { f.headers(1, false, "x=y") }, "RST 1 PROTOCOL_ERROR"},
		{"a status that is no number", func(f *foreign) { f.headers(1, false, ":status=2x0") }, "RST 1 PROTOCOL_ERROR"},
		{"101", func(f *foreign) { f.headers(1, false, ":status=101") }, "RST 1 PROTOCOL_ERROR"},
		{"an interim answer that ends", func(f *foreign) { f.headers(1, true, ":status=100") }, "RST 1 PROTOCOL_ERROR"},
		{"interim answers without end", func(f *foreign) {
			for range 20 {
				f.headers(1, false, ":status=100")
			}
		}, "RST 1 PROTOCOL_ERROR"},
		{"a pseudo field of requests", func(f *foreign) { f.headers(1, false, ":status=200", ":path=/") }, "RST 1 PROTOCOL_ERROR"},
		{"a second answer", func(f *foreign) {
			f.headers(1, false, ":status=200")
			f.headers(1, false, ":status=200")
		}, "RST 1 PROTOCOL_ERROR"},
		{"data before the answer", func(f *foreign) { f.must(f.fr.WriteData(1, false, []byte("x"))) }, "RST 1 PROTOCOL_ERROR"},
		{"an answer to nothing", func(f *foreign) { f.headers(3, false, ":status=200") }, "GOAWAY 0 PROTOCOL_ERROR"},
		{"a stream of the server's", func(f *foreign) { f.headers(2, false, ":status=200") }, "GOAWAY 0 PROTOCOL_ERROR"},
		{"PUSH_PROMISE", func(f *foreign) {
			f.must(f.fr.WritePushPromise(h2.PushPromiseParam{StreamID: 1, PromiseID: 2, EndHeaders: true}))
		}, "GOAWAY 0 PROTOCOL_ERROR"},
		{"SETTINGS_ENABLE_PUSH from a server", func(f *foreign) {
			f.must(f.fr.WriteSettings(h2.Setting{ID: h2.SettingEnablePush, Val: 1}))
		}, "GOAWAY 0 PROTOCOL_ERROR"},
		{"a refusal with a body is cut short", func(f *foreign) {
			f.headers(1, false, ":status=503")
			f.must(f.fr.WriteData(1, true, []byte("sorry")))
		}, "RST 1 CANCEL"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := greeted(t, ClientRole, Limits{})
			if id, err := f.tunnel.Connect(target, Header{}); err != nil || id != 1 {
				t.Fatalf("Connect: %d, %v", id, err)
			}
			f.answers()
			tt.send(f)
			_ = f.feed()
			words := f.answers()
			if len(words) == 0 || words[len(words)-1] != tt.want {
				t.Errorf("we end with %q, want %q", words, tt.want)
			}
		})
	}
}

func TestFirstFrameMustBeSettings(t *testing.T) {
	for name, send := range map[string]func(f *foreign){
		"HTTP/1":       func(f *foreign) { f.in.WriteString("GET / HTTP/1.1\r\n\r\n") },
		"PING first":   func(f *foreign) { f.in.WriteString(http2.Preface); f.must(f.fr.WritePing(false, [8]byte{})) },
		"an ack first": func(f *foreign) { f.in.WriteString(http2.Preface); f.must(f.fr.WriteSettingsAck()) },
	} {
		t.Run(name, func(t *testing.T) {
			f := newForeign(t, ServerRole, Limits{})
			send(f)
			if err := f.feed(); err == nil {
				t.Error("accepted")
			}
		})
	}
}

func TestConcurrencyIsRefusedNotServed(t *testing.T) {
	f := greeted(t, ServerRole, Limits{MaxStreams: 3})
	for id := uint32(1); id <= 9; id += 2 {
		f.connect(id)
	}
	f.must(f.feed())
	if got, want := f.answers(), []string{"RST 7 REFUSED_STREAM", "RST 9 REFUSED_STREAM"}; !slices.Equal(got, want) {
		t.Errorf("we say %q, want %q", got, want)
	}
}

// A peer that resets its streams frees their places, but not the work that we
// still have with them.
func TestResetStreamsCountWhileTheirWorkGoesOn(t *testing.T) {
	f := greeted(t, ServerRole, Limits{MaxStreams: 3})
	for i := range uint32(10) {
		f.connect(2*i + 1)
		f.must(f.fr.WriteRSTStream(2*i+1, h2.ErrCodeCancel))
	}
	f.must(f.feed())
	n := 0
	for _, e := range f.events {
		if strings.HasPrefix(e, "requested") {
			n++
		}
	}
	if n != 6 {
		t.Errorf("%d requests are worked on, want twice the limit of 3", n)
	}
	for range n {
		f.tunnel.Release()
	}
	f.events = nil
	f.connect(101)
	f.must(f.feed())
	if len(f.events) != 1 {
		t.Errorf("after the work: %q", f.events)
	}
}

func TestFramesObeyThePeer(t *testing.T) {
	for _, size := range []int{16 << 10, 1 << 20} {
		f := greeted(t, ServerRole, Limits{},
			h2.Setting{ID: h2.SettingMaxFrameSize, Val: uint32(size)}, h2.Setting{ID: h2.SettingInitialWindowSize, Val: 100_000})
		f.auto = accept
		f.connect(1)
		f.must(f.feed())
		f.answers()
		if n := f.tunnel.Send(1, make([]byte, 200_000), true); n != 65535 {
			t.Errorf("sent %d bytes, want the tunnel's 65535", n)
		}
		for _, w := range f.answers() {
			var id, n int
			if _, err := fmt.Sscanf(w, "DATA %d %d", &id, &n); err != nil || n > min(size, maxSendFrame) {
				t.Errorf("we send %q", w)
			}
		}
		f.must(f.fr.WriteWindowUpdate(0, 1<<20))
		f.must(f.feed())
		if n := f.tunnel.Room(1); n != 100_000-65535 {
			t.Errorf("room is %d", n)
		}
		// A smaller initial window may make the stream's negative (6.9.2).
		f.must(f.fr.WriteSettings(h2.Setting{ID: h2.SettingInitialWindowSize, Val: 10}))
		f.must(f.feed())
		if n := f.tunnel.Room(1); n != 0 {
			t.Errorf("room is %d", n)
		}
		f.must(f.fr.WriteWindowUpdate(1, 65535))
		f.must(f.feed())
		if n := f.tunnel.Room(1); n != 10 {
			t.Errorf("room is %d, want 10", n)
		}
	}
}

func TestConnWindowReturnsOnReceiptUpToTheQueueLimit(t *testing.T) {
	f := greeted(t, ServerRole, Limits{StreamWindow: 1 << 20, ConnWindow: 1 << 20, QueueLimit: 2 << 20})
	f.auto = accept
	granted := 1 << 20
	sent := 0
	for id := uint32(1); id < 100; id += 2 {
		f.connect(id)
		for range 16 {
			if sent+65536 > granted {
				break
			}
			f.must(f.fr.WriteData(id, false, make([]byte, 65536)))
			sent += 65536
			f.must(f.feed())
			for _, w := range f.answers() {
				var n int
				if _, err := fmt.Sscanf(w, "WINDOW 0 %d", &n); err == nil {
					granted += n
				}
			}
		}
	}
	if max := 3 << 20; sent > max || sent < 2<<20 {
		t.Errorf("the peer could send %d unread bytes, want at most %d", sent, max)
	}
	if q := f.tunnel.Queued(); q != sent {
		t.Errorf("queued %d, sent %d", q, sent)
	}
	// Reading opens the tunnel again.
	f.tunnel.Consumed(1, 1<<20)
	f.tunnel.Consumed(3, 1<<20)
	if w := strings.Join(f.answers(), ";"); !strings.Contains(w, "WINDOW 0 ") {
		t.Errorf("after reading we say %q", w)
	}
}

func TestStreamWindowGrowsOnlyWhenRead(t *testing.T) {
	f := greeted(t, ServerRole, Limits{StreamWindow: 65535, MaxStreamWindow: 4 * 65535})
	f.auto = accept
	f.connect(1)
	f.must(f.feed())
	f.answers()
	granted := map[bool]int{}
	for range 200 {
		f.must(f.fr.WriteData(1, false, make([]byte, 16000)))
		f.must(f.feed())
		f.tunnel.Consumed(1, 16000)
		for _, w := range f.answers() {
			var n int
			if _, err := fmt.Sscanf(w, "WINDOW 1 %d", &n); err == nil {
				granted[true] += n
			}
		}
	}
	if left := 65535 + granted[true] - 200*16000; left < 3*65535 || left > 4*65535 {
		t.Errorf("the peer may send %d bytes, want nearly %d", left, 4*65535)
	}
}

// TestStreamWindowStaysForASlowReader lets a peer send all it may to one who
// reads all of it, but never so much that half of the window is free. More
// window would not make him faster.
func TestStreamWindowStaysForASlowReader(t *testing.T) {
	f := greeted(t, ServerRole, Limits{StreamWindow: 65535, MaxStreamWindow: 4 * 65535})
	f.auto = accept
	f.connect(1)
	f.must(f.feed())
	f.answers()
	may, unread := 65535, 0
	for range 200 {
		for may >= 1000 {
			f.must(f.fr.WriteData(1, false, make([]byte, 1000)))
			may -= 1000
			unread += 1000
		}
		f.must(f.feed())
		f.tunnel.Consumed(1, 20000)
		unread -= 20000
		for _, w := range f.answers() {
			var n int
			if _, err := fmt.Sscanf(w, "WINDOW 1 %d", &n); err == nil {
				may += n
			}
		}
	}
	if got := may + unread; got > 65535 {
		t.Errorf("%d bytes may be unread, want at most the first window of 65535", got)
	}
}

func TestPing(t *testing.T) {
	f := greeted(t, ClientRole, Limits{})
	if f.must(f.tunnel.Tick(epoch.Add(9 * time.Second))); len(f.answers()) != 0 {
		t.Error("a PING too early")
	}
	at := f.tunnel.Deadline()
	f.must(f.tunnel.Tick(at))
	if w := f.answers(); !at.Equal(epoch.Add(10*time.Second)) || !slices.Equal(w, []string{"PING"}) {
		t.Errorf("at %v we say %q", at, w)
	}
	f.now = at.Add(19 * time.Second)
	f.must(f.fr.WritePing(true, pingAlive))
	f.must(f.feed())
	if d := f.tunnel.Deadline().Sub(f.now); d != 10*time.Second {
		t.Errorf("next PING in %v", d)
	}
	f.must(f.tunnel.Tick(f.tunnel.Deadline()))
	f.must(f.fr.WritePing(true, [8]byte{9})) // an answer to something else
	f.must(f.feed())
	if err := f.tunnel.Tick(f.tunnel.Deadline()); err == nil {
		t.Error("a silent peer was not noticed")
	}
	if w := f.answers(); w[len(w)-1] != "GOAWAY 0 NO_ERROR" {
		t.Errorf("we say %q", w)
	}
}

func TestGracefulShutdown(t *testing.T) {
	for _, answered := range []bool{true, false} {
		f := greeted(t, ServerRole, Limits{})
		f.connect(1)
		f.must(f.feed())
		f.tunnel.Shutdown(epoch)
		if w := f.answers(); !slices.Equal(w, []string{"GOAWAY 2147483647 NO_ERROR", "PING"}) {
			t.Errorf("we say %q", w)
		}
		f.connect(3) // was on its way
		if answered {
			f.must(f.fr.WritePing(true, pingDrain))
			f.must(f.feed())
		} else {
			f.must(f.feed())
			f.must(f.tunnel.Tick(epoch.Add(drainPatience)))
		}
		if w := f.answers(); !slices.Equal(w, []string{"GOAWAY 3 NO_ERROR"}) {
			t.Errorf("then we say %q", w)
		}
		f.connect(5) // too late
		f.must(f.fr.WriteData(5, false, []byte("x")))
		f.must(f.feed())
		if len(f.events) != 2 || f.tunnel.Finished() {
			t.Errorf("events %q, finished %v", f.events, f.tunnel.Finished())
		}
		f.tunnel.Answer(1, 503, Header{})
		f.tunnel.Reset(3, http2.Cancel)
		if !f.tunnel.Finished() {
			t.Error("not finished without streams")
		}
	}
}

// The last id of a stream is used, and after it the tunnel takes none, says so,
// and ends with its streams (RFC 9113 5.1.1).
func TestStreamIDsEnd(t *testing.T) {
	f := greeted(t, ClientRole, Limits{})
	f.tunnel.next = http2.MaxStreamID
	id, err := f.tunnel.Connect(target, Header{})
	if err != nil || id != http2.MaxStreamID {
		t.Fatalf("the last stream is %d, %v", id, err)
	}
	if w := f.answers(); !slices.Equal(w, []string{"HEADERS 2147483647 " + target, "GOAWAY 0 NO_ERROR"}) {
		t.Errorf("we say %q", w)
	}
	if !f.tunnel.Draining() || f.tunnel.Finished() {
		t.Errorf("draining %v, finished %v", f.tunnel.Draining(), f.tunnel.Finished())
	}
	if _, err := f.tunnel.Connect(target, Header{}); err != ErrDraining {
		t.Errorf("one stream more: %v", err)
	}
	if moved := f.tunnel.moved(t, epoch); !moved.Draining() {
		t.Error("moved, it takes streams")
	}
	f.headers(id, true, ":status=200")
	f.must(f.feed())
	f.tunnel.Send(id, nil, true)
	if !f.tunnel.Finished() {
		t.Error("it does not end with its last stream")
	}
}

func TestPeerGoAway(t *testing.T) {
	f := greeted(t, ClientRole, Limits{})
	for range 3 {
		_, err := f.tunnel.Connect(target, Header{})
		f.must(err)
	}
	f.must(f.fr.WriteGoAway(3, h2.ErrCodeNo, bytes.Repeat([]byte("x"), 5000)))
	f.must(f.feed())
	if !slices.Equal(f.events, []string{"aborted 5 NO_ERROR refused=true"}) {
		t.Errorf("events %q", f.events)
	}
	if _, err := f.tunnel.Connect(target, Header{}); !errors.Is(err, ErrDraining) {
		t.Errorf("Connect: %v", err)
	}
	f.headers(1, true, ":status=200")
	f.must(f.fr.WriteRSTStream(3, h2.ErrCodeRefusedStream))
	f.must(f.feed())
	if want := "aborted 3 REFUSED_STREAM refused=true"; f.events[len(f.events)-1] != want {
		t.Errorf("events %q", f.events)
	}
}

// Whatever the pieces in which bytes come, they mean the same.
func TestReceiveInPieces(t *testing.T) {
	write := func(f *foreign) {
		f.in.WriteString(http2.Preface)
		f.must(f.fr.WriteSettings(h2.Setting{ID: h2.SettingInitialWindowSize, Val: 1 << 20}))
		f.must(f.fr.WriteHeaders(h2.HeadersFrameParam{StreamID: 1, BlockFragment: f.encode(":method=CONNECT"), PadLength: 3}))
		f.must(f.fr.WriteContinuation(1, true, f.encode(":authority="+target)))
		f.must(f.fr.WriteRawFrame(0xcc, 0, 0, []byte("unknown")))
		f.must(f.fr.WriteDataPadded(1, false, []byte("hello"), make([]byte, 9)))
		f.must(f.fr.WriteData(1, false, nil))
		f.must(f.fr.WritePing(false, [8]byte{1, 2, 3}))
		f.must(f.fr.WriteData(1, true, make([]byte, 300)))
		f.must(f.fr.WriteGoAway(0, h2.ErrCodeNo, make([]byte, 600)))
		f.connect(3)
	}
	whole := newForeign(t, ServerRole, Limits{})
	write(whole)
	b := bytes.Clone(whole.in.Bytes())
	whole.must(whole.feed())
	want := fmt.Sprint(whole.events, whole.data, whole.answers())
	for n := 1; n < 50; n++ {
		f := newForeign(t, ServerRole, Limits{})
		for p := range slices.Chunk(b, n) {
			f.must(f.tunnel.Receive(epoch, bytes.Clone(p), f))
		}
		if got := fmt.Sprint(f.events, f.data, f.answers()); got != want {
			t.Fatalf("in pieces of %d: %s, want %s", n, got, want)
		}
	}
}

// TestMore says when more of a stream is there. That it is true only when more
// does come is checked with all that a foreign ever writes.
func TestMore(t *testing.T) {
	first := func(f *foreign) { f.must(f.fr.WriteData(1, false, []byte("one"))) }
	for _, tc := range []struct {
		name string
		send func(f *foreign)
		want bool // of the first data
	}{
		{"nothing follows", first, false},
		{"data follows", func(f *foreign) { first(f); f.must(f.fr.WriteData(1, false, []byte("two"))) }, true},
		{"the last data follows", func(f *foreign) { first(f); f.must(f.fr.WriteData(1, true, []byte("two"))) }, true},
		{"a part of data follows", func(f *foreign) {
			first(f)
			f.must(f.fr.WriteData(1, false, []byte("two")))
			f.in.Truncate(f.in.Len() - 2)
		}, true},
		{"a header follows", func(f *foreign) {
			first(f)
			f.must(f.fr.WriteData(1, false, []byte("two")))
			f.in.Truncate(f.in.Len() - 3)
		}, false},
		{"data of another stream follows", func(f *foreign) {
			f.connect(3)
			first(f)
			f.must(f.fr.WriteData(3, false, []byte("two")))
		}, false},
		{"empty data follows", func(f *foreign) { first(f); f.must(f.fr.WriteData(1, false, nil)) }, false},
		{"padding follows", func(f *foreign) { first(f); f.must(f.fr.WriteDataPadded(1, false, nil, make([]byte, 9))) }, false},
		{"the end", func(f *foreign) { f.must(f.fr.WriteData(1, true, []byte("one"))) }, false},
		{"data follows the end", func(f *foreign) {
			f.must(f.fr.WriteData(1, true, []byte("one")))
			f.must(f.fr.WriteData(1, false, []byte("two")))
		}, false},
		{"too much follows", func(f *foreign) { first(f); f.must(f.fr.WriteData(1, false, make([]byte, 65536))) }, true},
		{"a broken frame follows", func(f *foreign) {
			first(f)
			f.must(f.fr.WriteData(1, false, make([]byte, 1<<20+1)))
		}, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := greeted(t, ServerRole, Limits{StreamWindow: 65535})
			f.auto = accept
			f.connect(1)
			f.must(f.feed())
			tc.send(f)
			m := &mores{foreign: f}
			_ = f.tunnel.Receive(f.now, f.in.Bytes(), m) // what follows may be an error
			if len(m.got) == 0 || m.got[0] != tc.want {
				t.Errorf("more: %v, want %v first", m.got, tc.want)
			}
			if f.tunnel.More() {
				t.Error("more, when all was read")
			}
		})
	}
}

// mores notes what More says.
type mores struct {
	*foreign
	got []bool
}

func (m *mores) Data(id uint32, p []byte) {
	m.got = append(m.got, m.tunnel.More())
	m.foreign.Data(id, p)
}

func FuzzServerTunnel(f *testing.F) { fuzzTunnel(f, ServerRole) }
func FuzzClientTunnel(f *testing.F) { fuzzTunnel(f, ClientRole) }
func fuzzTunnel(f *testing.F, r Role) {
	seed := greeted(f, ServerRole, Limits{})
	seed.connect(1)
	seed.must(seed.fr.WriteData(1, false, []byte("hello")))
	seed.headers(3, true, ":method=GET", ":path=/", ":scheme=https")
	seed.must(seed.fr.WriteSettings(h2.Setting{ID: h2.SettingMaxFrameSize, Val: 1 << 20}))
	seed.must(seed.fr.WriteGoAway(0, h2.ErrCodeNo, nil))
	f.Add(bytes.Clone(seed.in.Bytes()), byte(1))
	seed.in.Reset()
	seed.headers(1, false, ":status=200")
	seed.must(seed.fr.WriteDataPadded(1, true, []byte("hello"), make([]byte, 7)))
	seed.must(seed.fr.WriteRSTStream(3, h2.ErrCodeCancel))
	f.Add(bytes.Clone(seed.in.Bytes()), byte(9))
	f.Fuzz(func(t *testing.T, in []byte, cut byte) {
		p := greeted(t, r, Limits{MaxStreams: 10, StreamWindow: 65535, QueueLimit: 1 << 20})
		p.auto = accept
		if r == ClientRole {
			for range 3 {
				_, err := p.tunnel.Connect(target, Header{})
				p.must(err)
			}
		}
		for piece := range slices.Chunk(in, int(cut)+1) {
			err := p.tunnel.Receive(p.now, piece, p)
			p.kept(err)
			if err != nil {
				break
			}
			for id := range p.tunnel.streams.All() {
				p.tunnel.Send(id, make([]byte, 10), false)
			}
		}
		p.answers() // what we say to it parses
		if s, q := p.tunnel.Streams(), p.tunnel.Queued(); s > 10 || q > 11*65535 {
			t.Errorf("%d streams, %d bytes queued", s, q)
		}
	})
}
