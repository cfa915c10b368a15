package conformance

import (
	"errors"
	"fmt"
	"time"

	h2 "golang.org/x/net/http2"
)

// flowChecks are about windows.
func flowChecks() []check {
	small := h2.Setting{ID: h2.SettingInitialWindowSize, Val: 1000}
	return []check{
		{"flow.small-window", "7.1", Must, opened(func(p *peer, st *stream) error { return p.echo(st, pattern(30_000), 1000) }, small)},
		{"flow.stalled-by-us", "7.2", Must, opened((*peer).staysInWindow, small)},
		{"flow.shrinking-window", "7.1", Must, opened((*peer).shrinks)},
		{"flow.excess", "7.1", Must, opened((*peer).exceeds)},
		{"flow.stalled-neighbours", "7.2", Should, with((*suite).passesStalled)},
	}
}

// exceeds sends without regard to windows to an application that is stuck
// because nobody takes what it sends back.
func (p *peer) exceeds(st *stream) error {
	st.stalled = true
	for range 1024 {
		p.said(p.fr.WriteData(st.id, false, make([]byte, min(p.maxFrame(), 64<<10))))
		for p.takeIn() {
		}
		if st.reset || p.ended != nil || len(p.goAways) > 0 {
			break
		}
	}
	failed := func() bool { return st.reset || len(p.goAways) > 0 }
	if err := p.wait("FLOW_CONTROL_ERROR", failed); err != nil && p.ended == nil {
		return errors.New("more than the windows was taken without a complaint")
	}
	if st.reset && st.code != h2.ErrCodeFlowControl {
		return fmt.Errorf("want FLOW_CONTROL_ERROR, got RST_STREAM %v", st.code)
	}
	return p.judge([]h2.ErrCode{h2.ErrCodeFlowControl})
}

// staysInWindow gives no credit: exactly the window comes back, and the
// connection stays in order.
func (p *peer) staysInWindow(st *stream) error {
	st.stalled = true
	if err := p.send(st, pattern(5000), 1000, false); err != nil {
		return err
	}
	if err := p.wait("the window's 1000 bytes", func() bool { return st.got.Len() >= 1000 }); err != nil {
		return err
	}
	if err := p.alive(); err != nil {
		return err
	}
	if n := st.got.Len(); n != 1000 {
		return fmt.Errorf("%d bytes came in a window of 1000", n)
	}
	st.stalled = false
	p.grant(st, 10_000)
	p.said(p.fr.WriteData(st.id, true, nil))
	if err := p.wait("the rest", func() bool { return st.ended || st.reset }); err != nil {
		return err
	}
	return st.returned(pattern(5000))
}

// shrinks makes a stream's window negative (RFC 9113 6.9.2).
func (p *peer) shrinks(st *stream) error {
	st.stalled = true
	if err := p.send(st, pattern(30_000), 1000, false); err != nil {
		return err
	}
	if err := p.wait("30000 bytes", func() bool { return st.got.Len() == 30_000 }); err != nil {
		return err
	}
	p.acked = false
	p.said(p.fr.WriteSettings(h2.Setting{ID: h2.SettingInitialWindowSize, Val: 100}))
	if err := p.wait("the answer to SETTINGS", func() bool { return p.acked }); err != nil {
		return err
	}
	st.ours += 100 - 65535
	if err := p.send(st, pattern(10_000), 1000, false); err != nil {
		return err
	}
	if err := p.alive(); err != nil {
		return err
	}
	if n := st.got.Len(); n != 30_000 {
		return fmt.Errorf("%d bytes came after the window was taken away", n-30_000)
	}
	st.stalled = false
	p.grant(st, 60_000)
	return p.wait("the rest", func() bool { return st.got.Len() == 40_000 })
}

// passesStalled fills streams whose application is stuck, and wants another to
// go on as if nothing was.
func (s *suite) passesStalled(p *peer) error {
	target, err := s.target()
	if err != nil {
		return err
	}
	for range 8 {
		st, err := p.open(target)
		if err != nil {
			return err
		}
		st.stalled = true
		if err := p.fill(st); err != nil {
			return err
		}
	}
	st, err := p.open(target)
	if err != nil {
		return fmt.Errorf("with 8 stalled streams: %w", err)
	}
	if err := p.echo(st, pattern(256<<10), 16<<10); err != nil {
		return fmt.Errorf("with 8 stalled streams on the same connection: %w", err)
	}
	return nil
}

// fill sends as much as may be sent, until the application that nobody reads
// from has stopped to take it.
func (p *peer) fill(st *stream) error {
	const enough = 64 << 20
	for sent, quiet := 0, 0; sent < enough && quiet < 10; {
		for p.takeIn() {
		}
		n := int(min(st.window, p.window, int64(p.maxFrame()), 64<<10))
		if n <= 0 {
			// An answer to PING says that what was sent has been read, and a
			// while later the window for it must have come, if it comes.
			if err := p.alive(); err != nil {
				return err
			}
			time.Sleep(5 * time.Millisecond)
			quiet++
			continue
		}
		quiet = 0
		p.said(p.fr.WriteData(st.id, false, make([]byte, n)))
		st.window -= int64(n)
		p.window -= int64(n)
		sent += n
	}
	return nil
}
