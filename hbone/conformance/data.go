package conformance

import (
	"fmt"

	h2 "golang.org/x/net/http2"
)

// pattern returns n bytes that repeat late.
func pattern(n int) []byte {
	b := make([]byte, n)
	x := uint32(n) | 1
	for i := range b {
		x ^= x << 13
		x ^= x >> 17
		x ^= x << 5
		b[i] = byte(x)
	}
	return b
}

// opened runs f on a stream to the target.
func opened(f func(p *peer, st *stream) error, ours ...h2.Setting) func(*suite) error {
	return with(func(s *suite, p *peer) error {
		target, err := s.target()
		if err != nil {
			return err
		}
		st, err := p.open(target)
		if err != nil {
			return err
		}
		return f(p, st)
	}, ours...)
}

// dataChecks are about the bytes of a connection and their end.
func dataChecks() []check {
	return []check{
		{"data.echo", "6.1", Must, opened(func(p *peer, st *stream) error { return p.echo(st, pattern(100_000), 1000) })},
		{"data.nothing", "6.2", Must, opened(func(p *peer, st *stream) error { return p.echo(st, nil, 1) })},
		{"data.frames.16k", "4.2", Must, opened(func(p *peer, st *stream) error {
			if err := p.echo(st, pattern(4<<20), 16<<10); err != nil {
				return err
			}
			if p.frame > 16<<10 {
				return fmt.Errorf("the server sends frames of %d bytes, and we take 16384", p.frame)
			}
			return nil
		})},
		{"data.frames.1m", "4.2", Must, opened(func(p *peer, st *stream) error {
			return p.echo(st, pattern(6<<20), 1<<20)
		}, h2.Setting{ID: h2.SettingMaxFrameSize, Val: 1 << 20}, h2.Setting{ID: h2.SettingInitialWindowSize, Val: 4 << 20})},
		{"data.frames.one-byte", "6.1", Must, opened(func(p *peer, st *stream) error { return p.echo(st, pattern(500), 1) })},
		{"data.padding", "7.1", Must, opened((*peer).echoPadded)},
		{"data.half-close.server-reads-on", "6.2", Must, opened(func(p *peer, st *stream) error {
			// All that was sent before the end comes back after it.
			return p.echo(st, pattern(1<<20), 16<<10)
		})},
		{"data.early-end", "6.2", Must, with(func(s *suite, p *peer) error {
			target, err := s.target()
			if err != nil {
				return err
			}
			st := p.ask(true, connectTo(target)...)
			return p.wait("200 and END_STREAM for a request that ends at once", func() bool { return st.status == "200" && st.ended })
		})},
		{"data.reset", "6.3", Must, opened(func(p *peer, st *stream) error {
			if err := p.send(st, pattern(10_000), 1000, false); err != nil {
				return err
			}
			p.said(p.fr.WriteRSTStream(st.id, h2.ErrCodeCancel))
			return p.alive()
		})},
		{"data.after-end", "4.7", Must, opened(func(p *peer, st *stream) error {
			p.said(p.fr.WriteData(st.id, true, []byte("the end")))
			p.said(p.fr.WriteData(st.id, false, []byte("and more")))
			return p.wantClosed(st)
		})},
	}
}

// echoPadded sends padding, which counts for flow control but is no data.
func (p *peer) echoPadded(st *stream) error {
	want := pattern(50_000)
	for b := want; len(b) > 0; {
		n := min(len(b), 1000)
		cost := int64(n + 201)
		if err := p.wait("window for padded data", func() bool { return st.window >= cost && p.window >= cost }); err != nil {
			return err
		}
		p.said(p.fr.WriteDataPadded(st.id, n == len(b), b[:n], make([]byte, 200)))
		st.window -= cost
		p.window -= cost
		b = b[n:]
	}
	if err := p.wait("all of it back", func() bool { return st.ended || st.reset }); err != nil {
		return err
	}
	return st.returned(want)
}

// wantClosed wants the error for a frame on a stream that has ended.
func (p *peer) wantClosed(st *stream) error {
	failed := func() bool { return st.reset || len(p.goAways) > 0 }
	if err := p.wait("STREAM_CLOSED", failed); err != nil && p.ended == nil {
		return err
	}
	if st.reset && st.code != h2.ErrCodeStreamClosed {
		return fmt.Errorf("want STREAM_CLOSED, got RST_STREAM %v", st.code)
	}
	return p.judge([]h2.ErrCode{h2.ErrCodeStreamClosed})
}
