package ztunnel

import (
	"fmt"
	"strings"
	"time"
)

// A gift is what a part took that was handed over: until it stood still, until
// its state was written, and until the successor had taken it.
type gift struct {
	conns              int
	freeze, pack, give time.Duration
}

// gifts are the parts that were handed over.
type gifts struct {
	tunnels, plain int // parts of each kind
	conns          int // in all of them
	slowest        gift
}

func (gs *gifts) add(g gift) {
	gs.conns += g.conns
	if g.freeze+g.pack+g.give > gs.slowest.freeze+gs.slowest.pack+gs.slowest.give {
		gs.slowest = g
	}
}

// A pause is how long a part stood still that was taken over, from when its
// former process stopped to carry it until this one began, and what of that was
// spent here: on reading its state, on making it, and on letting it go.
type pause struct {
	conns               int
	plain               bool // without a tunnel
	whole               time.Duration
	read, resume, begin time.Duration
}

// maxPauses bounds how many are kept for the log.
const maxPauses = 256

// pauses are those of one takeover.
type pauses struct {
	tunnels, plain, conns int
	longest               pause
	first                 []pause
}

// paused notes the pause of a part.
func (p *Proxy) paused(d pause) {
	p.mu.Lock()
	defer p.mu.Unlock()
	ps := &p.pauses
	if d.plain {
		ps.plain++
	} else {
		ps.tunnels++
	}
	ps.conns += d.conns
	if d.whole > ps.longest.whole {
		ps.longest = d
	}
	if len(ps.first) < maxPauses {
		ps.first = append(ps.first, d)
	}
}

// TookOver returns, for the log, what was taken over since it was called last,
// and how long it stood still: the longest pause and what of it was spent here,
// and for each of the first 256 tunnels, and connections without one, the number
// of connections and the pause.
func (p *Proxy) TookOver() []any {
	p.mu.Lock()
	ps := p.pauses
	p.pauses = pauses{}
	p.mu.Unlock()
	var text strings.Builder
	for i, d := range ps.first {
		if i > 0 {
			text.WriteByte(',')
		}
		fmt.Fprintf(&text, "%d@%v", d.conns, d.whole)
	}
	return []any{
		"tunnels", ps.tunnels, "connections", ps.conns, "without_tunnel", ps.plain, "pauses", text.String(),
		"slowest_read", ps.longest.read, "slowest_resume", ps.longest.resume, "slowest_go", ps.longest.begin,
		"longest_pause", ps.longest.whole,
	}
}
