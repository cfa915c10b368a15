package l7

import (
	"bytes"
	"errors"

	"github.com/weft-mesh/weft/mesh/view"
	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

// speaks is what a client speaks.
type speaks uint8

const (
	speaksTCP speaks = iota // or anything that is not looked into
	speaksHTTP1
	speaksHTTP2
)

// preface is what a client of HTTP/2 says first (RFC 9113 3.4). It is read only.
var preface = []byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")

// protocol finds out what the client speaks: HTTP where the port says so, and
// which version by the first bytes; where it says nothing, a client that is
// silent for the time of Limits.Sniff is taken for one whose server speaks
// first.
func (e *Engine) protocol(v *view.View, c *conn) (speaks, error) {
	declared := declaredProtocol(v, &c.facts)
	switch declared {
	case "http2", "grpc", "h2c", "kubernetes.io/h2c":
		// Who speaks neither gets no answer in HTTP/1.
		p, err := e.version12(c)
		if err == nil && p == speaksHTTP1 && looksLike(c.unread()) == decidedTCP {
			return p, errNotHTTP
		}
		return p, err
	case "http", "grpc-web", "kubernetes.io/ws":
		return e.version12(c)
	case "":
		if err := c.sniff(func(b []byte) bool { return looksLike(b) != undecided }, e.limits.Sniff); err != nil {
			return speaksTCP, err
		}
		switch looksLike(c.unread()) {
		case decidedHTTP1:
			return speaksHTTP1, nil
		case decidedHTTP2:
			return speaksHTTP2, nil
		}
	}
	return speaksTCP, nil
}

// errNotHTTP is of a client that speaks something else than the port says.
var errNotHTTP = errors.New("the client speaks neither HTTP/1 nor HTTP/2")

// version12 waits for as much as tells HTTP/1 from HTTP/2.
func (e *Engine) version12(c *conn) (speaks, error) {
	e.quiet(c)
	defer e.unquiet(c)
	c.idle.set(e.limits.Idle)
	defer c.idle.clear()
	for {
		b := c.unread()
		n := min(len(b), len(preface))
		switch {
		case !bytes.Equal(b[:n], preface[:n]):
			return speaksHTTP1, nil
		case n == len(preface):
			return speaksHTTP2, nil
		}
		if err := c.fill(); err != nil {
			return speaksTCP, err
		}
	}
}

// declaredProtocol returns what the mesh says about the port that was asked for:
// "" if it does not say.
func declaredProtocol(v *view.View, f *Facts) string {
	if f.Workload == "" {
		if s := v.ServiceByName(f.Service); s != nil {
			return appProtocol(s, f.Port)
		}
		return ""
	}
	w := v.ByUID(f.Workload)
	if w == nil {
		return ""
	}
	for i := range w.Services {
		m := &w.Services[i]
		for _, p := range m.Ports {
			if p.Target != f.Port {
				continue
			}
			if p.AppProtocol != "" {
				return p.AppProtocol
			}
			if s := v.ServiceByName(m.Service); s != nil {
				return appProtocol(s, p.Service)
			}
		}
	}
	return ""
}

// decided is what the first bytes of a connection look like.
type decided uint8

const (
	undecided decided = iota
	decidedTCP
	decidedHTTP1
	decidedHTTP2
)

// looksLike looks at the first bytes: for the preface of HTTP/2, or a request
// line of HTTP/1, whole.
func looksLike(b []byte) decided {
	n := min(len(b), len(preface))
	if bytes.Equal(b[:n], preface[:n]) {
		if n == len(preface) {
			return decidedHTTP2
		}
		return undecided
	}
	i := 0
	for i < len(b) && msg.IsToken(b[i]) {
		i++
	}
	switch {
	case i == len(b) && i <= 32:
		return undecided
	case i == 0 || i > 32 || i == len(b) || b[i] != ' ':
		return decidedTCP
	}
	end := bytes.IndexByte(b, '\n')
	if end < 0 {
		if len(b) > 16<<10 {
			return decidedTCP
		}
		return undecided
	}
	line := bytes.TrimSuffix(b[:end], []byte("\r"))
	if bytes.HasSuffix(line, []byte(" HTTP/1.1")) || bytes.HasSuffix(line, []byte(" HTTP/1.0")) {
		return decidedHTTP1
	}
	return decidedTCP
}
