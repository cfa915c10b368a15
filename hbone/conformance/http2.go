package conformance

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"time"

	h2 "golang.org/x/net/http2"
)

// with runs f over a greeted connection.
func with(f func(s *suite, p *peer) error, ours ...h2.Setting) func(*suite) error {
	return func(s *suite) error {
		p, err := s.greet(ours...)
		if err != nil {
			return err
		}
		defer p.close()
		return f(s, p)
	}
}

// connectionChecks are about the HTTP/2 connection as such.
func connectionChecks() []check {
	return []check{
		{"h2.settings.first", "4.1", Must, (*suite).settingsFirst},
		{"h2.settings.ack", "4.1", Must, with(func(*suite, *peer) error { return nil })},
		{"h2.settings.values", "4.1", Must, with(func(_ *suite, p *peer) error {
			if v := p.theirs[h2.SettingEnablePush]; v != 0 {
				return fmt.Errorf("the server sends SETTINGS_ENABLE_PUSH %d", v)
			}
			if n, ok := p.theirs[h2.SettingMaxConcurrentStreams]; ok && n == 0 {
				return errors.New("the server allows no streams")
			}
			return nil
		})},
		{"h2.settings.streams", "4.4", Should, with(func(_ *suite, p *peer) error {
			if n, ok := p.theirs[h2.SettingMaxConcurrentStreams]; !ok || n < 100 {
				return fmt.Errorf("SETTINGS_MAX_CONCURRENT_STREAMS is %d (announced: %v), want a limit of at least 100", n, ok)
			}
			return nil
		})},
		{"h2.settings.unknown", "4.1", Must, with(func(_ *suite, p *peer) error { return p.alive() },
			h2.Setting{ID: 0x4a4a, Val: 7}, h2.Setting{ID: h2.SettingHeaderTableSize, Val: 0})},
		{"h2.ping", "4.5", Must, with(func(_ *suite, p *peer) error { return p.alive() })},
		{"h2.unknown.frame", "4.2", Must, with(func(_ *suite, p *peer) error {
			p.said(p.fr.WriteRawFrame(0xfa, 0xff, 0, []byte("what is this")))
			p.said(p.fr.WriteRawFrame(0xfb, 0, 7, nil))
			p.said(p.fr.WritePriority(3, h2.PriorityParam{StreamDep: 5, Weight: 9}))
			return p.alive()
		})},
		{"h2.goaway.client", "4.6", Must, with((*suite).finishesAfterGoAway)},
		{"h2.liveness", "4.5", Should, (*suite).asksWhetherWeLive},
	}
}

// settingsFirst looks at the very first frame.
func (s *suite) settingsFirst() error {
	c, err := s.dial(nil)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(s.Timeout))
	var b bytes.Buffer
	b.WriteString(h2.ClientPreface)
	_ = h2.NewFramer(&b, nil).WriteSettings() // to memory
	if _, err := c.Write(b.Bytes()); err != nil {
		return err
	}
	head, err := h2.ReadFrameHeader(c)
	if err != nil {
		return err
	}
	if head.Type != h2.FrameSettings || head.Flags.Has(h2.FlagSettingsAck) || head.StreamID != 0 {
		return fmt.Errorf("the first frame is %v, want SETTINGS", head)
	}
	return nil
}

func (s *suite) finishesAfterGoAway(p *peer) error {
	target, err := s.target()
	if err != nil {
		return err
	}
	st, err := p.open(target)
	if err != nil {
		return err
	}
	p.said(p.fr.WriteGoAway(0, h2.ErrCodeNo, nil))
	return p.echo(st, pattern(50_000), 16<<10)
}

// asksWhetherWeLive waits for a PING, does not answer, and wants to be dropped.
func (s *suite) asksWhetherWeLive() error {
	if !s.Slow {
		return skipError{"no --slow: it takes up to a minute"}
	}
	patient := *s
	patient.Timeout = 40 * time.Second
	p, err := patient.greet()
	if err != nil {
		return err
	}
	defer p.close()
	p.deaf = true
	if err := p.wait("a PING", func() bool { return p.pings > 0 }); err != nil {
		return err
	}
	if err := p.wait("the end", func() bool { return false }); p.ended == nil {
		return fmt.Errorf("the server keeps a peer that answers no PING: %w", err)
	}
	return nil
}

// errorChecks are what RFC 9113 says must end a connection or a stream.
func errorChecks() []check {
	conn := func(name string, send func(*peer), codes ...h2.ErrCode) check {
		return check{"h2.error." + name, "4.7", Must, with(func(_ *suite, p *peer) error {
			send(p)
			return p.wantConnError(codes...)
		})}
	}
	raw := func(t h2.FrameType, flags h2.Flags, id uint32, n int) func(*peer) {
		return func(p *peer) { p.said(p.fr.WriteRawFrame(t, flags, id, make([]byte, n))) }
	}
	setting := func(id h2.SettingID, v uint32) func(*peer) {
		return func(p *peer) { p.said(p.fr.WriteSettings(h2.Setting{ID: id, Val: v})) }
	}
	return []check{
		{"h2.error.preface", "4.1", Must, (*suite).refusesOtherProtocols},
		conn("data.stream0", raw(h2.FrameData, 0, 0, 1), h2.ErrCodeProtocol),
		conn("data.idle", raw(h2.FrameData, 0, 1, 1), h2.ErrCodeProtocol, h2.ErrCodeStreamClosed),
		conn("headers.stream0", raw(h2.FrameHeaders, 4, 0, 1), h2.ErrCodeProtocol),
		conn("headers.even", func(p *peer) { p.next = 2; p.ask(false, connectTo("10.0.0.1:80")...) }, h2.ErrCodeProtocol),
		conn("headers.backwards", func(p *peer) {
			p.next = 5
			p.ask(true, connectTo("0.0.0.0:0")...)
			p.next = 3
			p.ask(false, connectTo("0.0.0.0:0")...)
		}, h2.ErrCodeProtocol, h2.ErrCodeStreamClosed),
		conn("headers.interrupted", func(p *peer) {
			p.said(p.fr.WriteHeaders(h2.HeadersFrameParam{StreamID: 1, BlockFragment: p.encode(":method=CONNECT")}))
			p.said(p.fr.WritePing(false, [8]byte{}))
		}, h2.ErrCodeProtocol),
		conn("headers.padding", func(p *peer) { p.said(p.fr.WriteRawFrame(h2.FrameHeaders, 8|4, 1, []byte{9, 0, 0})) }, h2.ErrCodeProtocol),
		conn("headers.hpack", func(p *peer) {
			p.said(p.fr.WriteHeaders(h2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, EndHeaders: true}))
		}, h2.ErrCodeCompression),
		conn("continuation.alone", raw(h2.FrameContinuation, 4, 1, 0), h2.ErrCodeProtocol),
		conn("push", raw(h2.FramePushPromise, 4, 1, 4), h2.ErrCodeProtocol),
		conn("rst.stream0", raw(h2.FrameRSTStream, 0, 0, 4), h2.ErrCodeProtocol),
		conn("rst.idle", raw(h2.FrameRSTStream, 0, 1, 4), h2.ErrCodeProtocol),
		conn("rst.size", raw(h2.FrameRSTStream, 0, 1, 3), h2.ErrCodeFrameSize),
		conn("settings.stream", raw(h2.FrameSettings, 0, 1, 0), h2.ErrCodeProtocol),
		conn("settings.size", raw(h2.FrameSettings, 0, 0, 5), h2.ErrCodeFrameSize),
		conn("settings.ack", raw(h2.FrameSettings, 1, 0, 6), h2.ErrCodeFrameSize),
		conn("settings.push", setting(h2.SettingEnablePush, 2), h2.ErrCodeProtocol),
		conn("settings.window", setting(h2.SettingInitialWindowSize, 1<<31), h2.ErrCodeFlowControl),
		conn("settings.frame", setting(h2.SettingMaxFrameSize, 16<<10-1), h2.ErrCodeProtocol),
		conn("ping.stream", raw(h2.FramePing, 0, 1, 8), h2.ErrCodeProtocol),
		conn("ping.size", raw(h2.FramePing, 0, 0, 7), h2.ErrCodeFrameSize),
		conn("goaway.stream", raw(h2.FrameGoAway, 0, 1, 8), h2.ErrCodeProtocol),
		conn("window.size", raw(h2.FrameWindowUpdate, 0, 0, 3), h2.ErrCodeFrameSize),
		conn("window.zero", func(p *peer) { p.said(p.fr.WriteWindowUpdate(0, 0)) }, h2.ErrCodeProtocol),
		conn("window.idle", func(p *peer) { p.said(p.fr.WriteWindowUpdate(1, 1)) }, h2.ErrCodeProtocol),
		conn("window.overflow", func(p *peer) { p.said(p.fr.WriteWindowUpdate(0, 1<<31-1)) }, h2.ErrCodeFlowControl),
		{"h2.error.frame.size", "4.2", Must, with(func(_ *suite, p *peer) error {
			n := p.maxFrame() + 1
			if n >= 1<<24 {
				return skipError{"the server takes frames of any size"}
			}
			p.said(p.fr.WriteRawFrame(h2.FrameData, 0, 0, make([]byte, n)))
			return p.wantConnError(h2.ErrCodeFrameSize, h2.ErrCodeProtocol)
		})},
		{"h2.error.stream.window.zero", "4.7", Must, with(func(s *suite, p *peer) error {
			return s.onOpen(p, func(st *stream) { p.said(p.fr.WriteWindowUpdate(st.id, 0)) }, h2.ErrCodeProtocol)
		})},
		{"h2.error.stream.window.overflow", "4.7", Must, with(func(s *suite, p *peer) error {
			return s.onOpen(p, func(st *stream) { p.said(p.fr.WriteWindowUpdate(st.id, 1<<31-1)) }, h2.ErrCodeFlowControl)
		})},
		{"h2.error.stream.trailers", "4.7", Must, with(func(s *suite, p *peer) error {
			return s.onOpen(p, func(st *stream) {
				p.said(p.fr.WriteHeaders(h2.HeadersFrameParam{StreamID: st.id, BlockFragment: p.encode(":method=CONNECT"), EndHeaders: true}))
			}, h2.ErrCodeProtocol)
		})},
	}
}

// onOpen opens a stream, does f to it, and wants it reset.
func (s *suite) onOpen(p *peer, f func(*stream), codes ...h2.ErrCode) error {
	target, err := s.target()
	if err != nil {
		return err
	}
	st, err := p.open(target)
	if err != nil {
		return err
	}
	f(st)
	failed := func() bool { return st.reset || len(p.goAways) > 0 }
	if err := p.wait("the end of the stream", failed); err != nil && p.ended == nil {
		return fmt.Errorf("want RST_STREAM %v, but the stream goes on", codes)
	}
	for _, c := range codes {
		if st.reset && st.code == c {
			return nil
		}
	}
	if st.reset {
		return fmt.Errorf("want RST_STREAM %v, got %v", codes, st.code)
	}
	return p.judge(codes)
}

// refusesOtherProtocols talks HTTP/1.1 over a connection that is for HTTP/2.
func (s *suite) refusesOtherProtocols() error {
	c, err := s.dial(nil)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(s.Timeout))
	if _, err := c.Write([]byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n")); err != nil {
		return nil
	}
	var got strings.Builder
	b := make([]byte, 4096)
	for {
		n, err := c.Read(b)
		got.Write(b[:n])
		if strings.Contains(got.String(), "HTTP/1.1 2") {
			return errors.New("the server speaks HTTP/1.1")
		}
		if err != nil {
			if ne, ok := err.(interface{ Timeout() bool }); ok && ne.Timeout() {
				return errors.New("the server keeps a client that does not speak HTTP/2")
			}
			return nil
		}
	}
}
