package ztunnel

import (
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"github.com/weft-mesh/weft/mesh"
)

// accessLog writes one line for each connection when it is over, in the form
// that tools for ambient meshes read.
type accessLog struct {
	mu  sync.Mutex
	w   io.Writer // nil: nothing is written
	now func() time.Time
}

// write logs f, which ended with err.
func (a *accessLog) write(f *flow, err error) {
	if a.w == nil {
		return
	}
	line := accessLine(f, err, a.now())
	a.mu.Lock()
	defer a.mu.Unlock()
	a.w.Write(line) // there is nobody to tell that the log is lost
}

// accessLine is the line for f at time now.
func accessLine(f *flow, err error, now time.Time) []byte {
	level := "info"
	if err != nil {
		level = "error"
	}
	b := make([]byte, 0, 512)
	b = now.UTC().AppendFormat(b, "2006-01-02T15:04:05.000000Z")
	b = fmt.Appendf(b, "\t%s\taccess\tconnection complete\t", level)
	l := line{b}
	l.addr("src.addr", f.src)
	l.end("src", f.source, f.sourceID)
	l.addr("dst.addr", f.dst)
	l.addr("dst.hbone_addr", f.target)
	if f.service != nil {
		l.text("dst.service", string(f.service.Name.Host))
	}
	l.end("dst", f.destination, f.destinationID)
	l.text("direction", string(f.direction))
	// Seen from the pod: what it sent, what it received.
	sent, received := f.stats.Sent.Load(), f.stats.Received.Load()
	if f.direction == inbound {
		sent, received = received, sent
	}
	l.raw("bytes_sent", strconv.FormatInt(sent, 10))
	l.raw("bytes_recv", strconv.FormatInt(received, 10))
	l.text("duration", strconv.FormatInt(now.Sub(f.start).Milliseconds(), 10)+"ms")
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
