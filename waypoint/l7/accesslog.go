package l7

import (
	"context"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/weft-mesh/weft/mesh"
)

const (
	// maxLog bounds the lines that wait for a reader of the log that is slow.
	maxLog = 4 << 20
	// logBatch is how much wakes the writer at once, and logDelay how long less
	// than that may wait. A write costs more than its bytes: it wakes Go's monitor,
	// which looks around every 20 µs for a while.
	logBatch = 1 << 20
	logDelay = 100 * time.Millisecond
	// usualLine is room for most lines.
	usualLine = 1 << 10
)

// accessLog writes a line for each exchange when it is over, in the form that
// the Waypoint wants. Who ends an exchange never waits for the log: run writes,
// many lines at once.
type accessLog struct {
	Pass
	w        io.Writer // nil: nothing is written
	waypoint mesh.Name // zero: all is written, as text
	wake     chan struct{}
	full     chan struct{}

	stamp stamp

	mu   sync.Mutex
	buf  []byte // guarded by mu
	lost int    // guarded by mu: lines that found no room
}

func newAccessLog(w io.Writer, waypoint mesh.Name) *accessLog {
	return &accessLog{w: w, waypoint: waypoint, wake: make(chan struct{}, 1), full: make(chan struct{}, 1)}
}

// OnEnd logs an exchange.
func (a *accessLog) OnEnd(x *Exchange) {
	if a.w == nil {
		return
	}
	form := "text"
	if a.waypoint != (mesh.Name{}) {
		form = ""
		if w := x.known.waypoint; w != nil {
			form = w.AccessLog
		}
	}
	if form == "" {
		return
	}
	var room [usualLine]byte // so that others need not wait for the line
	line := room[:0]
	if form == "json" {
		line = appendJSONLine(line, x, &a.stamp)
	} else {
		line = appendTextLine(line, x, &a.stamp)
	}
	a.mu.Lock()
	before := len(a.buf)
	if before > maxLog {
		a.lost++
		a.mu.Unlock()
		return
	}
	a.buf = append(a.buf, line...)
	now := len(a.buf)
	a.mu.Unlock()
	if before == 0 {
		signal(a.wake)
	}
	if before <= logBatch && now > logBatch {
		signal(a.full)
	}
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// run writes what comes until ctx ends, and then what is left.
func (a *accessLog) run(ctx context.Context) {
	if a.w == nil {
		return
	}
	var spare []byte
	t := time.NewTimer(logDelay)
	defer t.Stop()
	for {
		select {
		case <-a.wake:
		case <-ctx.Done():
			a.flush(spare)
			return
		}
		t.Reset(logDelay)
		select {
		case <-t.C:
		case <-a.full:
		case <-ctx.Done():
		}
		spare = a.flush(spare)
	}
}

// flush writes what waits, and returns the memory that it was in. A log that
// cannot be written to is no reason to refuse requests.
func (a *accessLog) flush(spare []byte) []byte {
	a.mu.Lock()
	b, lost := a.buf, a.lost
	a.buf, a.lost = spare[:0], 0
	a.mu.Unlock()
	if lost > 0 {
		b = fmt.Appendf(b, "[%s] lines lost: the log was not read fast enough: %d\n", time.Now().UTC().Format(logTime), lost)
	}
	if len(b) > 0 {
		_, _ = a.w.Write(b)
	}
	if cap(b) > 2*maxLog {
		return nil
	}
	return b
}
