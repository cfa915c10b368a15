package conformance

import (
	"errors"
	"fmt"
	"strings"

	h2 "golang.org/x/net/http2"
)

// floodLen is how many frames make a flood: far more than any client needs.
const floodLen = 20_000

// floodChecks are attacks. A server may end the connection or bear it; after
// either it must serve others.
func floodChecks() []check {
	flood := func(name string, send func(p *peer, i int)) check {
		return check{"flood." + name, "8", Must, func(s *suite) error {
			return s.survives(func(p *peer) {
				for i := range floodLen {
					send(p, i)
				}
			})
		}}
	}
	authority := "192.0.2.1:80"
	return []check{
		flood("ping", func(p *peer, i int) { p.said(p.fr.WritePing(false, [8]byte{byte(i)})) }),
		flood("settings", func(p *peer, i int) {
			p.said(p.fr.WriteSettings(h2.Setting{ID: h2.SettingInitialWindowSize, Val: uint32(i)}))
		}),
		flood("priority", func(p *peer, i int) { p.said(p.fr.WritePriority(uint32(2*i+1), h2.PriorityParam{})) }),
		flood("window-update", func(p *peer, i int) { p.said(p.fr.WriteWindowUpdate(0, 1)) }),
		flood("unknown", func(p *peer, i int) { p.said(p.fr.WriteRawFrame(0xee, 0, 0, nil)) }),
		flood("rapid-reset", func(p *peer, i int) {
			id := p.ask(false, connectTo(authority)...).id
			delete(p.streams, id) // twenty thousand are not worth the memory
			p.said(p.fr.WriteRSTStream(id, h2.ErrCodeCancel))
		}),
		flood("made-you-reset", func(p *peer, i int) {
			id := p.ask(false, connectTo(authority)...).id
			delete(p.streams, id)
			p.said(p.fr.WriteWindowUpdate(id, 0))
		}),
		flood("empty-data", func(p *peer, i int) {
			if i == 0 {
				p.ask(false, connectTo(authority)...)
			}
			p.said(p.fr.WriteData(1, false, nil))
		}),
		{"flood.continuation", "8", Must, func(s *suite) error {
			return s.survives(func(p *peer) {
				p.said(p.fr.WriteHeaders(h2.HeadersFrameParam{StreamID: 1, BlockFragment: p.encode(":method=CONNECT")}))
				for range floodLen {
					p.said(p.fr.WriteContinuation(1, false, nil))
				}
			})
		}},
		{"flood.headers", "8", Must, func(s *suite) error {
			return s.survives(func(p *peer) {
				p.ask(true, connectTo(authority, "x="+strings.Repeat("~", 4<<20))...)
			})
		}},
		{"flood.hpack-bomb", "8", Must, (*suite).survivesBomb},
		{"flood.streams", "8", Must, with((*suite).boundsStreams)},
	}
}

// survives attacks one connection and wants another served.
func (s *suite) survives(attack func(*peer)) error {
	p, err := s.greet()
	if err != nil {
		return err
	}
	defer p.close()
	attack(p)
	if err := p.alive(); err != nil && p.ended == nil {
		return errors.New("the server neither ends the connection nor answers on it")
	}
	return s.stillServes()
}

// stillServes wants a new connection to work.
func (s *suite) stillServes() error {
	p, err := s.greet()
	if err == nil {
		defer p.close()
		err = p.alive()
	}
	if err == nil && s.Target != "" {
		var st *stream
		if st, err = p.open(s.Target); err == nil {
			err = p.echo(st, pattern(1000), 1000)
		}
	}
	if err != nil {
		return fmt.Errorf("after the attack, on a new connection: %w", err)
	}
	return nil
}

// survivesBomb refers to one large entry of the HPACK table thousands of
// times: a few KiB that stand for many MiB.
func (s *suite) survivesBomb() error {
	p, err := s.greet()
	if err != nil {
		return err
	}
	defer p.close()
	block := p.encode(append(connectTo("192.0.2.1:80"), "x="+strings.Repeat("a", 3900))...)
	for range 12_000 {
		block = append(block, 0x80|62) // RFC 7541 6.1: the newest entry of the table
	}
	p.said(p.fr.WriteHeaders(h2.HeadersFrameParam{StreamID: 1, BlockFragment: block, EndHeaders: true, EndStream: true}))
	st := &stream{id: 1}
	p.streams[1], p.next = st, 3
	if err := p.wait("a refusal", func() bool { return st.status != "" || st.reset || len(p.goAways) > 0 }); err != nil && p.ended == nil {
		return err
	}
	if strings.HasPrefix(st.status, "2") {
		return errors.New("a header list of 46 MiB was taken")
	}
	return s.stillServes()
}

// boundsStreams opens more streams than the server allows.
func (s *suite) boundsStreams(p *peer) error {
	target, err := s.target()
	if err != nil {
		return err
	}
	most, ok := p.theirs[h2.SettingMaxConcurrentStreams]
	if !ok || most > 2000 {
		return errors.New("the server sets no limit to the streams of a connection")
	}
	var all []*stream
	for range int(most) + 20 {
		all = append(all, p.ask(false, connectTo(target)...))
	}
	count := func() (open, refused int) {
		for _, st := range all {
			if st.reset && st.status == "" {
				refused++
			} else if st.status != "" {
				open++
			}
		}
		return open, refused
	}
	err = p.wait("an answer to each", func() bool { o, r := count(); return o+r == len(all) || len(p.goAways) > 0 })
	if o, r := count(); o > int(most) {
		return fmt.Errorf("%d streams are open, %d are allowed", o, most)
	} else if r == 0 && p.ended == nil && len(p.goAways) == 0 {
		return fmt.Errorf("none of %d streams was refused where %d are allowed: %w", len(all), most, err)
	}
	for _, st := range all {
		if st.reset && st.status == "" && st.code != h2.ErrCodeRefusedStream && st.code != h2.ErrCodeProtocol {
			return fmt.Errorf("a stream too many is reset with %v, want REFUSED_STREAM", st.code)
		}
	}
	return nil
}
