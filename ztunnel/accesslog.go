package ztunnel

import (
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"github.com/weft-mesh/weft/internal/obs"
	"github.com/weft-mesh/weft/mesh"
)

const (
	// maxLog bounds the lines that wait for a reader of the log that is slow.
	maxLog = 4 << 20
	// logPause is for how long lines are gathered before they are written.
	logPause = 10 * time.Millisecond
)

// accessLog writes one line for each connection when it is over, in the form
// that tools for ambient meshes read, or as JSON objects with the same fields.
// Who ends a connection never waits for the log: run writes, many lines at once.
type accessLog struct {
	w     io.Writer    // nil: nothing is written
	json  bool         // an object for each line
	level slog.Leveler // lines below it are not written; nil writes all
	now   func() time.Time
	wake  chan struct{}

	mu   sync.Mutex
	buf  []byte
	lost int // lines that found no room
}

func newAccessLog(w io.Writer, json bool, level slog.Leveler) *accessLog {
	return &accessLog{w: w, json: json, level: level, now: time.Now, wake: make(chan struct{}, 1)}
}

// writes reports whether lines of level l are written.
func (a *accessLog) writes(l slog.Level) bool {
	return a.w != nil && (a.level == nil || l >= a.level.Level())
}

// write logs f, which ended with err.
func (a *accessLog) write(f *flow, err error) {
	if !a.writes(levelOf(err)) {
		return
	}
	why := f.verdict()
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.buf) > maxLog {
		a.lost++
		return
	}
	first := len(a.buf) == 0
	a.buf = a.appendLine(a.buf, f, why, err)
	if !first {
		return // run knows
	}
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

// run writes what comes until ctx ends, and then what is left.
func (a *accessLog) run(ctx context.Context) error {
	if a.w == nil {
		return nil
	}
	var spare []byte
	var soon <-chan time.Time
	for {
		select {
		case <-a.wake:
			soon = time.After(logPause)
		case <-soon:
			soon = nil
			spare = a.flush(spare)
		case <-ctx.Done():
			a.flush(spare)
			return nil
		}
	}
}

// flush writes what waits, and returns the memory that it was in.
func (a *accessLog) flush(spare []byte) []byte {
	a.mu.Lock()
	b, lost := a.buf, a.lost
	a.buf, a.lost = spare[:0], 0
	a.mu.Unlock()
	if lost > 0 {
		l := a.begin(b, slog.LevelError, "lines lost: the log was not read fast enough")
		l.number("lines", int64(lost))
		b = l.end()
	}
	if len(b) > 0 {
		a.w.Write(b) // there is nobody to tell that the log is lost
	}
	if cap(b) > 1<<20 {
		return nil
	}
	return b
}

func levelOf(err error) slog.Level {
	if err != nil {
		return slog.LevelError
	}
	return slog.LevelInfo
}

// appendLine appends the line for f, which policies let in for the reason why,
// if they were asked, and which ended with err.
func (a *accessLog) appendLine(b []byte, f *flow, why string, err error) []byte {
	now, p := a.now(), f.who.Value()
	l := a.beginAt(now, b, levelOf(err), "connection complete")
	l.addr("src.addr", f.src())
	l.party("src", p.source, p.sourceID)
	l.addr("dst.addr", p.dst)
	l.addr("dst.hbone_addr", p.target)
	if p.service != nil {
		l.text("dst.service", string(p.service.Name.Host))
	}
	l.party("dst", p.destination, proved(f.destinationID))
	l.text("direction", f.direction.String())
	// Seen from the pod: what it sent, what it received.
	sent, received := f.moved()
	if f.direction == inbound {
		sent, received = received, sent
	}
	l.number("bytes_sent", sent)
	l.number("bytes_recv", received)
	l.text("duration", strconv.FormatInt(now.Sub(time.Unix(0, f.start)).Milliseconds(), 10)+"ms")
	l.text("policy", why)
	if err != nil {
		l.text("error", err.Error())
	}
	return l.end()
}

// line is a log line in the making; each field ends with a space, or begins
// with a comma.
type line struct {
	b    []byte
	json bool
}

func (a *accessLog) begin(b []byte, level slog.Level, message string) line {
	return a.beginAt(a.now(), b, level, message)
}

func (a *accessLog) beginAt(now time.Time, b []byte, level slog.Level, message string) line {
	const layout = "2006-01-02T15:04:05.000000Z"
	if !a.json {
		b = append(now.UTC().AppendFormat(b, layout), '\t')
		b = append(append(b, obs.LevelName(level)...), "\taccess\t"...)
		return line{b: append(append(b, message...), '\t')}
	}
	b = append(now.UTC().AppendFormat(append(b, `{"time":"`...), layout), `","level":"`...)
	b = append(append(b, obs.LevelName(level)...), `","msg":"`...)
	return line{append(append(b, message...), `","scope":"access"`...), true}
}

// end returns the line.
func (l *line) end() []byte {
	if l.json {
		return append(l.b, "}\n"...)
	}
	l.b[len(l.b)-1] = '\n'
	return l.b
}

// party writes the workload at one end. The identity is written only if it was
// proved on this connection.
func (l *line) party(which string, w *mesh.Workload, id mesh.Identity) {
	namespace := id.Namespace
	if w != nil {
		l.text(which+".workload", w.Name.Name)
		namespace = w.Name.Namespace
	}
	l.text(which+".namespace", namespace)
	l.text(which+".identity", id.String())
	if w != nil {
		l.text(which+".cluster", w.Cluster)
	}
}

// field writes a value that needs no quotes in text, and has those that it
// needs in JSON.
func (l *line) field(key, value string) {
	if l.json {
		l.b = append(append(append(l.b, `,"`...), key...), `":`...)
		l.b = append(l.b, value...)
		return
	}
	l.b = append(append(l.b, key...), '=')
	l.b = append(append(l.b, value...), ' ')
}

func (l *line) number(key string, n int64) { l.field(key, strconv.FormatInt(n, 10)) }

// text writes a quoted value, so that nothing in it can pass for a field or a
// line. Empty ones are left out.
func (l *line) text(key, value string) {
	switch {
	case value == "":
	case l.json:
		quoted, _ := json.Marshal(value) // of any string
		l.field(key, string(quoted))
	default:
		l.field(key, strconv.Quote(value))
	}
}

func (l *line) addr(key string, a netip.AddrPort) {
	switch {
	case !a.IsValid():
	case l.json:
		l.text(key, a.String())
	default:
		l.field(key, a.String())
	}
}
