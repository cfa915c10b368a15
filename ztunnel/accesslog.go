package ztunnel

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"github.com/weft-mesh/weft/mesh"
)

const (
	// maxLog bounds the lines that wait for a reader of the log that is slow.
	maxLog = 4 << 20
	// logPause is for how long lines are gathered before they are written.
	logPause = 10 * time.Millisecond
)

// accessLog writes one line for each connection when it is over, in the form
// that tools for ambient meshes read. Who ends a connection never waits for the
// log: run writes, many lines at once.
type accessLog struct {
	w    io.Writer // nil: nothing is written
	now  func() time.Time
	wake chan struct{}

	mu   sync.Mutex
	buf  []byte
	lost int // lines that found no room
}

func newAccessLog(w io.Writer) *accessLog {
	return &accessLog{w: w, now: time.Now, wake: make(chan struct{}, 1)}
}

// write logs f, which ended with err.
func (a *accessLog) write(f *flow, err error) {
	if a.w == nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.buf) > maxLog {
		a.lost++
		return
	}
	first := len(a.buf) == 0
	a.buf = appendAccessLine(a.buf, f, err, a.now())
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
		b = fmt.Appendf(b, "%s\terror\taccess\tlines lost: the log was not read fast enough\tlines=%d\n",
			a.now().UTC().Format("2006-01-02T15:04:05.000000Z"), lost)
	}
	if len(b) > 0 {
		a.w.Write(b) // there is nobody to tell that the log is lost
	}
	if cap(b) > 1<<20 {
		return nil
	}
	return b
}

// appendAccessLine appends the line for f at time now.
func appendAccessLine(b []byte, f *flow, err error, now time.Time) []byte {
	b = now.UTC().AppendFormat(b, "2006-01-02T15:04:05.000000Z")
	if err != nil {
		b = append(b, "\terror\taccess\tconnection complete\t"...)
	} else {
		b = append(b, "\tinfo\taccess\tconnection complete\t"...)
	}
	l, p := line{b}, f.who.Value()
	l.addr("src.addr", f.src())
	l.end("src", p.source, p.sourceID)
	l.addr("dst.addr", p.dst)
	l.addr("dst.hbone_addr", p.target)
	if p.service != nil {
		l.text("dst.service", string(p.service.Name.Host))
	}
	l.end("dst", p.destination, proved(f.destinationID))
	l.text("direction", f.direction.String())
	// Seen from the pod: what it sent, what it received.
	sent, received := f.moved()
	if f.direction == inbound {
		sent, received = received, sent
	}
	l.raw("bytes_sent", strconv.FormatInt(sent, 10))
	l.raw("bytes_recv", strconv.FormatInt(received, 10))
	l.text("duration", strconv.FormatInt(now.Sub(time.Unix(0, f.start)).Milliseconds(), 10)+"ms")
	if err != nil {
		l.text("error", err.Error())
	}
	l.b[len(l.b)-1] = '\n'
	return l.b
}

// line is a log line in the making; each field ends with a space.
type line struct{ b []byte }

// end writes the workload at one end. The identity is written only if it was
// proved on this connection.
func (l *line) end(which string, w *mesh.Workload, id mesh.Identity) {
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

func (l *line) raw(key, value string) {
	l.b = append(l.b, key...)
	l.b = append(l.b, '=')
	l.b = append(l.b, value...)
	l.b = append(l.b, ' ')
}

// text writes a quoted value, so that nothing in it can pass for a field or a
// line. Empty ones are left out.
func (l *line) text(key, value string) {
	if value != "" {
		l.raw(key, strconv.Quote(value))
	}
}

func (l *line) addr(key string, a netip.AddrPort) {
	if a.IsValid() {
		l.raw(key, a.String())
	}
}
