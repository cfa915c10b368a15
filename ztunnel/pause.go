package ztunnel

import (
	"fmt"
	"strings"
	"time"
)

// A gift is what a tunnel took that was handed over: until it stood still, until
// its state was written, and until the successor had taken it.
type gift struct {
	conns              int
	freeze, pack, give time.Duration
}

// gifts are the tunnels that were handed over.
type gifts struct {
	tunnels, conns int
	slowest        gift
}

func (gs *gifts) add(g gift) {
	gs.tunnels++
	gs.conns += g.conns
	if g.freeze+g.pack+g.give > gs.slowest.freeze+gs.slowest.pack+gs.slowest.give {
		gs.slowest = g
	}
}

// A pause is how long a tunnel stood still that was taken over, from when its
// former process stopped to carry it until this one began, and what of that was
// spent here: on reading its state, on making it, and on letting it go.
type pause struct {
	conns               int
	whole               time.Duration
	read, resume, begin time.Duration
}

// maxPauses bounds how many are kept for the log.
const maxPauses = 256

// paused notes the pause of a tunnel.
func (p *Proxy) paused(d pause) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if d.whole > p.longest.whole {
		p.longest = d
	}
	if len(p.pauses) < maxPauses {
		p.pauses = append(p.pauses, d)
	}
}

// TookOver returns, for the log, how long the tunnels stood still that were
// taken over since it was called last: the longest pause and what of it was
// spent here, and for each tunnel, up to 256, its connections and its pause.
func (p *Proxy) TookOver() []any {
	p.mu.Lock()
	longest, all := p.longest, p.pauses
	p.longest, p.pauses = pause{}, nil
	p.mu.Unlock()
	conns := 0
	var text strings.Builder
	for i, d := range all {
		if i > 0 {
			text.WriteByte(',')
		}
		conns += d.conns
		fmt.Fprintf(&text, "%d@%v", d.conns, d.whole)
	}
	return []any{
		"connections", conns, "pauses", text.String(), "slowest_read", longest.read, "slowest_resume", longest.resume,
		"slowest_go", longest.begin, "longest_pause", longest.whole,
	}
}
