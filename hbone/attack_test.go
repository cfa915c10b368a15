package hbone

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	h2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/weft-mesh/weft/internal/http2"
)

// heap returns how much is in use after a collection.
func heap() int64 {
	runtime.GC()
	runtime.GC() // what finalizers and pools let go of
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// Frames that make a Tunnel keep something, for ever or for long, unless it is
// careful. Each is sent until the tunnel ends or many times over, and what the
// tunnel holds at any time stays small.
func TestAttacksDoNotGrowMemory(t *testing.T) {
	const times = 60_000
	seq := uint32(0)
	next := func() uint32 { seq += 2; return seq - 1 }
	rows := []struct {
		name string
		send func(f *foreign, i int)
		most int64 // bytes of heap
	}{
		{"requests that are refused, each with a new name", func(f *foreign, i int) {
			f.headers(next(), true, ":method=CONNECT", fmt.Sprintf(":authority=h%d.example:80", i), fmt.Sprintf("x-%d=%d", i, i))
		}, 1 << 20},
		{"requests that are reset", func(f *foreign, i int) {
			id := next()
			f.connect(id)
			f.must(f.fr.WriteRSTStream(id, h2.ErrCodeCancel))
		}, 1 << 20},
		{"windows of streams that are gone", func(f *foreign, i int) {
			id := next()
			f.connect(id)
			f.must(f.fr.WriteRSTStream(id, h2.ErrCodeCancel))
			f.must(f.fr.WriteWindowUpdate(id, 1<<20))
		}, 1 << 20},
		{"data of a byte with a PING each", func(f *foreign, i int) {
			if i == 0 {
				seq = 3
				f.connect(1)
			}
			f.must(f.fr.WriteData(1, false, []byte{1}))
			f.must(f.fr.WritePing(false, [8]byte{}))
		}, 1 << 20},
		{"padding", func(f *foreign, i int) {
			if i == 0 {
				seq = 3
				f.connect(1)
			}
			f.must(f.fr.WriteDataPadded(1, false, nil, make([]byte, 250)))
		}, 1 << 20},
		{"settings that change the windows of all streams", func(f *foreign, i int) {
			if i < 150 {
				f.connect(next())
			}
			f.must(f.fr.WriteSettings(h2.Setting{ID: h2.SettingInitialWindowSize, Val: uint32(i % 2 * 1 << 30)}))
		}, 1 << 20},
		{"the HPACK table resized", func(f *foreign, i int) {
			f.must(f.fr.WriteSettings(h2.Setting{ID: h2.SettingHeaderTableSize, Val: uint32(i) << 20}))
		}, 1 << 20},
		{"GOAWAY with debug data", func(f *foreign, i int) {
			f.must(f.fr.WriteGoAway(0, h2.ErrCodeNo, make([]byte, 4000)))
		}, 1 << 20},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			seq = 1
			f := greeted(t, ServerRole, Limits{})
			f.auto = func(f *foreign, id uint32) {
				f.tunnel.Answer(id, choose(id == 1, 200, 400), Header{})
				f.tunnel.Release()
			}
			f.in.Grow(1 << 20)
			before := heap()
			for i := range times {
				row.send(f, i)
				f.now = f.now.Add(time.Microsecond)
				if f.in.Len() < 64<<10 {
					continue
				}
				f.events = f.events[:0]
				if f.feed() != nil {
					break
				}
				if n := len(f.tunnel.TakeOutput(nil)); n > 1<<20 {
					t.Fatalf("%d bytes of answers to %d frames", n, i)
				}
			}
			f.events, f.in = nil, bytes.Buffer{}
			if grown := heap() - before; grown > row.most {
				t.Errorf("the tunnel holds %d KiB", grown>>10)
			}
			runtime.KeepAlive(f)
		})
	}
}

// A few KiB of references to one entry of the table would be a list of many
// MiB: it is counted while it is read, not afterwards.
func TestHeaderBombIsNotUnpacked(t *testing.T) {
	f := greeted(t, ServerRole, Limits{})
	block := f.encode(":method=CONNECT", ":authority="+target, "x="+strings.Repeat("a", 3900))
	block = append(block, bytes.Repeat([]byte{0x80 | 62}, 60_000)...)
	f.must(f.fr.WriteHeaders(h2.HeadersFrameParam{StreamID: 1, BlockFragment: block, EndHeaders: true}))
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	_ = f.feed()
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 4<<20 {
		t.Errorf("reading 64 KiB took %d KiB", n>>10)
	}
	if w := f.answers(); len(w) == 0 || !strings.HasPrefix(w[0], "HEADERS 1 431") && !strings.HasPrefix(w[0], "GOAWAY") && !strings.HasPrefix(w[0], "RST 1") {
		t.Errorf("we say %q", w)
	}
	if slices.ContainsFunc(f.events, func(e string) bool { return strings.HasPrefix(e, "requested") }) {
		t.Error("the request was served")
	}
}

// A server may not make a client hold or do without end either.
func TestClientIsNotFlooded(t *testing.T) {
	for name, send := range map[string]func(f *foreign, i int){
		"PING":                func(f *foreign, i int) { f.must(f.fr.WritePing(false, [8]byte{})) },
		"SETTINGS":            func(f *foreign, i int) { f.must(f.fr.WriteSettings()) },
		"PRIORITY":            func(f *foreign, i int) { f.must(f.fr.WritePriority(1, h2.PriorityParam{})) },
		"unknown frames":      func(f *foreign, i int) { f.must(f.fr.WriteRawFrame(0xcc, 0, 0, nil)) },
		"WINDOW_UPDATE":       func(f *foreign, i int) { f.must(f.fr.WriteWindowUpdate(0, 1)) },
		"empty DATA":          func(f *foreign, i int) { f.must(f.fr.WriteData(1, false, nil)) },
		"GOAWAY":              func(f *foreign, i int) { f.must(f.fr.WriteGoAway(1, h2.ErrCodeNo, nil)) },
		"RST of what is gone": func(f *foreign, i int) { f.must(f.fr.WriteRSTStream(1, h2.ErrCodeCancel)) },
		"CONTINUATION": func(f *foreign, i int) {
			if i == 0 {
				f.must(f.fr.WriteHeaders(h2.HeadersFrameParam{StreamID: 1, BlockFragment: f.encode(":status=200")}))
			}
			f.must(f.fr.WriteContinuation(1, false, nil))
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := greeted(t, ClientRole, Limits{})
			if _, err := f.tunnel.Connect(target, Header{}); err != nil {
				t.Fatal(err)
			}
			if name != "CONTINUATION" {
				f.headers(1, false, ":status=200")
			}
			f.must(f.feed())
			f.answers()
			for i := range 50_000 {
				send(f, i)
			}
			err := f.feed()
			if w := f.answers(); err == nil || !strings.HasSuffix(w[len(w)-1], "ENHANCE_YOUR_CALM") {
				t.Errorf("we bear it: %v, %q", err, w[len(w)-1])
			}
		})
	}
}

// A peer that asks and asks, is refused, and reads none of it, makes nobody keep
// all those answers.
func TestAnswersThatNobodyReads(t *testing.T) {
	f := greeted(t, ServerRole, Limits{})
	f.auto = func(f *foreign, id uint32) {
		f.tunnel.Answer(id, 401, Header{})
		f.tunnel.Release()
	}
	for i := range uint32(100_000) {
		f.connect(2*i + 1)
		f.events = f.events[:0]
		if f.feed() != nil {
			break
		}
	}
	if n := len(f.tunnel.Output()); n > maxOutput+100 {
		t.Errorf("%d KiB wait for a peer that does not read", n>>10)
	}
	var ce *http2.ConnError
	if !errors.As(f.err, &ce) || ce.Code != http2.EnhanceYourCalm {
		t.Errorf("we bear it: %v", f.err)
	}
}

// A peer that hears of a reset late has sent up to a whole window by then, also
// in small pieces: that is no flood, and other streams go on.
func TestLateDataIsNoFlood(t *testing.T) {
	f := greeted(t, ServerRole, Limits{})
	f.auto = accept
	f.connect(1)
	for i := range uint32(100) {
		f.connect(2*i + 3)
	}
	f.must(f.feed())
	for i := range uint32(100) {
		f.tunnel.Reset(2*i+3, http2.Cancel)
	}
	for range 100 { // of what all of them had
		for i := range uint32(100) {
			f.must(f.fr.WriteData(2*i+3, false, make([]byte, 512)))
		}
		f.must(f.feed())
	}
	f.must(f.fr.WriteData(1, false, []byte("hello")))
	f.must(f.feed())
	if f.data[1] != len("hello") {
		t.Errorf("the stream beside them got %d bytes", f.data[1])
	}
}

// quiet is rawClient that reads, and drops, what comes.
func (w *world) quiet() *h2.Framer {
	fr, _ := w.rawClient()
	go func() { // ends with the connection
		for {
			if _, err := fr.ReadFrame(); err != nil {
				return
			}
		}
	}()
	return fr
}

// An attacker on one tunnel takes nothing from a connection on another.
func TestFloodsLeaveOtherTunnelsAlone(t *testing.T) {
	w := newWorld(t, func(ctx context.Context, r *Request) {
		if r.Authority.Port == 9 {
			_ = r.Reject(400)
			return
		}
		echo(ctx, r)
	}, overSockets)
	honest := w.connect()
	block := encodeBlock(t, ":method", "CONNECT", ":authority", "10.0.0.7:9")
	attacks := map[string]func(fr *h2.Framer, i uint32) error{
		"rapid reset": func(fr *h2.Framer, i uint32) error {
			err := fr.WriteHeaders(h2.HeadersFrameParam{StreamID: 2*i + 1, BlockFragment: block, EndHeaders: true})
			if err == nil {
				err = fr.WriteRSTStream(2*i+1, h2.ErrCodeCancel)
			}
			return err
		},
		"refused requests": func(fr *h2.Framer, i uint32) error {
			return fr.WriteHeaders(h2.HeadersFrameParam{StreamID: 2*i + 1, BlockFragment: block, EndHeaders: true, EndStream: true})
		},
		"settings": func(fr *h2.Framer, i uint32) error {
			return fr.WriteSettings(h2.Setting{ID: h2.SettingInitialWindowSize, Val: i})
		},
		"pings": func(fr *h2.Framer, i uint32) error { return fr.WritePing(false, [8]byte{byte(i)}) },
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	for _, attack := range attacks {
		fr := w.quiet()
		wg.Go(func() {
			for i := range uint32(20_000) {
				if attack(fr, i) != nil {
					return // it has been cut off
				}
			}
		})
	}
	for n := range 50 {
		p := payload(1000 + n)
		if _, err := honest.Write(p); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(p))
		if _, err := io.ReadFull(honest, got); err != nil || !bytes.Equal(got, p) {
			t.Fatalf("exchange %d: %v", n, err)
		}
	}
}

func encodeBlock(t testing.TB, fields ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	enc := hpack.NewEncoder(&b)
	for i := 0; i < len(fields); i += 2 {
		if err := enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]}); err != nil {
			t.Fatal(err)
		}
	}
	return b.Bytes()
}

// A peer that asks for data on every stream and gives no window for it, or
// does not read its socket, makes nobody hold more than a window's worth.
func TestPeerThatTakesNothing(t *testing.T) {
	for _, reads := range []bool{true, false} {
		t.Run(fmt.Sprintf("it reads its socket: %v", reads), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const n = 100
				wrote := make(chan int64, n)
				w := newWorld(t, func(ctx context.Context, r *Request) {
					s, err := r.Accept(Header{})
					if err != nil {
						return
					}
					var total int64
					b := make([]byte, 32<<10)
					for {
						k, err := s.Write(b)
						total += int64(k)
						if err != nil {
							wrote <- total
							return
						}
					}
				})
				before := heap()
				fr, c := w.rawClient()
				var wg sync.WaitGroup
				if reads {
					wg.Go(func() {
						for {
							if _, err := fr.ReadFrame(); err != nil {
								return
							}
						}
					})
				}
				block := encodeBlock(t, ":method", "CONNECT", ":authority", target)
				var sent sync.WaitGroup
				sent.Go(func() {
					for i := range uint32(n) {
						if fr.WriteHeaders(h2.HeadersFrameParam{StreamID: 2*i + 1, BlockFragment: block, EndHeaders: true}) != nil {
							return
						}
					}
				})
				synctest.Wait() // everybody is stuck
				if grown := heap() - before; grown > 16<<20 {
					t.Errorf("%d KiB are held for a peer that takes nothing", grown>>10)
				}
				_ = c.NetConn().Close()
				sent.Wait()
				wg.Wait()
				w.stop()
				synctest.Wait()
				for len(wrote) > 0 {
					if total := <-wrote; total > 1<<20 {
						t.Errorf("a stream took %d bytes for a peer that gave 64 KiB of window", total)
					}
				}
			})
		})
	}
}
