package ztunnel

import (
	"fmt"
	"strings"
	"sync"
	"time"
)

// A gift is what a part took that was handed over: until it stood still, until
// its state was written, and until the successor had taken it.
type gift struct {
	conns              int
	bytes, ahead       int           // of its text, and of what was sent before it stood still
	early              time.Duration // that took to send: applications with a backlog wait so long
	freeze, pack, give time.Duration
}

// gifts are the parts that were handed over.
type gifts struct {
	begun          uint32         // parts that were tried
	stay           map[mover]bool // tunnels that are not given
	tunnels, plain int            // parts of each kind
	conns          int            // in all of them
	ahead          int            // bytes
	early          time.Duration  // the longest
	awaited        time.Duration  // what the heir's late answers took
	slowest        gift
}

const (
	// promptAnswer is how long an heir's answer takes at the most when it finds a
	// processor at once. One that is later would find none for the next part
	// either, whose connections stand still until it does.
	promptAnswer = 10 * time.Millisecond
	// awaitTime bounds what is spent on late answers in a whole handover: a node
	// may be that busy for ever.
	awaitTime = time.Second
)

// await returns when heir answers promptly, or has had its time for that. It is
// called before anything stands still, and fails when heir is gone.
func (gs *gifts) await(heir Heir) error {
	for gs.awaited < awaitTime {
		start := time.Now()
		if err := heir.Settle(); err != nil {
			return err
		}
		took := time.Since(start)
		if took <= promptAnswer {
			return nil
		}
		gs.awaited += took
	}
	return nil
}

func (gs *gifts) add(g gift) {
	gs.conns += g.conns
	gs.ahead += g.ahead
	gs.early = max(gs.early, g.early)
	if g.freeze+g.pack+g.give > gs.slowest.freeze+gs.slowest.pack+gs.slowest.give {
		gs.slowest = g
	}
}

func (gs *gifts) stays(m mover) {
	if gs.stay == nil {
		gs.stay = make(map[mover]bool)
	}
	gs.stay[m] = true
}

// A pause is how long a part stood still that was taken over, from when its
// former process stopped to carry it until this one began, and what of that was
// spent until it was here, on reading its state, on making it, and on letting it
// go.
type pause struct {
	conns                       int
	plain                       bool // without a tunnel
	whole                       time.Duration
	arrive, read, resume, begin time.Duration
}

// maxPauses bounds how many are kept for the log.
const maxPauses = 256

// pauses are those of one takeover. Its zero value is ready.
type pauses struct {
	begun sync.WaitGroup // parts that are about to go on
	mu    sync.Mutex
	taken taken // guarded by mu
}

// taken is what was taken over, and how long it stood still.
type taken struct {
	tunnels, plain, conns int
	longest               pause
	first                 []pause
}

// begin says that a part is about to go on. What it returns is called once, when
// it does, and does not block.
func (ps *pauses) begin() (note func(pause)) {
	ps.begun.Add(1)
	return func(d pause) {
		defer ps.begun.Done()
		ps.mu.Lock()
		defer ps.mu.Unlock()
		ps.taken.add(d)
	}
}

func (t *taken) add(d pause) {
	if d.plain {
		t.plain++
	} else {
		t.tunnels++
	}
	t.conns += d.conns
	if d.whole > t.longest.whole {
		t.longest = d
	}
	if len(t.first) < maxPauses {
		t.first = append(t.first, d)
	}
}

// TookOver waits until all that was taken over goes on. It returns, for the log,
// what that was since it was called last, and how long it stood still: the
// longest pause and what it was spent on, and for each of the first 256
// tunnels, and connections without one, the number of connections and the pause.
func (p *Proxy) TookOver() []any {
	p.pauses.begun.Wait()
	p.pauses.mu.Lock()
	t := p.pauses.taken
	p.pauses.taken = taken{}
	p.pauses.mu.Unlock()
	var text strings.Builder
	for i, d := range t.first {
		if i > 0 {
			text.WriteByte(',')
		}
		fmt.Fprintf(&text, "%d@%v", d.conns, d.whole)
	}
	return []any{
		"tunnels", t.tunnels, "connections", t.conns, "without_tunnel", t.plain, "pauses", text.String(),
		"slowest_arrive", t.longest.arrive, "slowest_read", t.longest.read, "slowest_resume", t.longest.resume, "slowest_go", t.longest.begin,
		"longest_pause", t.longest.whole,
	}
}
