package l7

import (
	"bytes"
	"context"
	"io"
	"net"
	"sync"
	"time"

	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/route"
	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

const (
	// maxMirrors bounds the copies that are under way. Above it requests are
	// not copied: a mirror is never a reason to wait.
	maxMirrors = 256
	// mirrorTime bounds one copy where the route bounds nothing.
	mirrorTime = 15 * time.Second
	// maxDrawn is how many mirrors of a rule get copies at all.
	maxDrawn = 64
)

// mirrors sends copies of requests. What is answered to them is thrown away,
// and nobody waits for it. A request is copied if its body is no longer than
// Limits.Gather: the rest of a longer one is never all here.
type mirrors struct {
	Pass
	e      *Engine
	ctx    context.Context
	cancel context.CancelFunc
	room   chan struct{}
	wg     sync.WaitGroup
}

func newMirrors(e *Engine) *mirrors {
	m := &mirrors{e: e, room: make(chan struct{}, maxMirrors)}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	return m
}

// stop ends the copies that are under way, and returns when they have ended. No
// new ones may begin.
func (m *mirrors) stop() {
	m.cancel()
	m.wg.Wait()
}

// mirrorOf returns the mirror of x's rule and backend at a place, nil after the
// last one.
func mirrorOf(x *Exchange, place int) *mesh.Mirror {
	if x.Matched.Rule == nil || place >= maxDrawn {
		return nil
	}
	list := x.Matched.Rule.Spec.Mirrors
	if place < len(list) {
		return &list[place]
	}
	if place -= len(list); x.Drawn != nil && place < len(x.Drawn.Spec.Mirrors) {
		return &x.Drawn.Spec.Mirrors[place]
	}
	return nil
}

// OnRequest draws which mirrors get a copy.
func (m *mirrors) OnRequest(x *Exchange) Verdict {
	for i := 0; mirrorOf(x, i) != nil; i++ {
		if m.e.rand()%1_000_000 < uint64(mirrorOf(x, i).PerMillion) {
			x.marks.mirrors |= 1 << i
		}
	}
	if len(x.Request.Protocol) > 0 || string(x.Request.Method) == "CONNECT" {
		x.marks.mirrors = 0
	}
	return Continue
}

// begin sends the copies of a request whose body is all here.
func (m *mirrors) begin(x *Exchange, body []byte) {
	drawn := x.marks.mirrors
	x.marks.mirrors = 0
	for i := 0; mirrorOf(x, i) != nil; i++ {
		if drawn&(1<<i) != 0 {
			m.send(x, mirrorOf(x, i), body)
		}
	}
}

// OnEnd sends the copies of a request whose body came while it was sent on, if
// all of it was kept.
func (m *mirrors) OnEnd(x *Exchange) {
	if x.marks.mirrors == 0 {
		return
	}
	if w := &x.work; w.upload != nil && w.upload.whole() && !w.lost {
		var body []byte
		if w.kept != nil {
			body = w.kept[:w.keptLen]
		}
		m.begin(x, body)
	}
}

// send makes a copy of a request and sends it.
func (m *mirrors) send(x *Exchange, spec *mesh.Mirror, body []byte) {
	select {
	case m.room <- struct{}{}:
	default:
		return
	}
	facts := *x.Facts
	c := m.e.newExchange(m.ctx, &facts, nil)
	c.View, c.known, c.Version, c.GRPC, c.Service, c.Start = x.View, x.known, x.Version, x.GRPC, x.Service, time.Now()
	c.Policy = &noPolicy
	copyHead(&c.Request, &x.Request, body)
	if !spec.PlainHost {
		c.Request.Authority = shadowHost(c.Request.Authority)
	}
	editHead(&c.Request, &spec.Backend.RequestHeaders)
	within := x.Matched.Rule.Spec.Timeout
	if within <= 0 {
		within = mesh.Duration(mirrorTime)
	}
	c.Matched = route.Result{Rule: &route.Rule{Spec: &mesh.Rule{Timeout: within}}, Index: -1}
	c.Drawn = &route.Backend{Spec: &spec.Backend}
	s := &shadow{left: bytes.Clone(body)}
	m.wg.Go(func() {
		defer func() { <-m.room }()
		if (&match{e: m.e}).backend(c).status == 0 {
			m.e.forward(c, s)
		}
		c.work.settle()
		m.e.putExchange(c)
	})
}

// copyHead copies a request's head, with a body of known length.
func copyHead(to, from *msg.Head, body []byte) {
	to.Reset()
	to.Method, to.Scheme = bytes.Clone(from.Method), from.Scheme
	to.Authority, to.Path = bytes.Clone(from.Authority), bytes.Clone(from.Path)
	for name, value := range from.All {
		msg.Append(to, name, value)
	}
	to.Length = int64(len(body))
	if len(body) > 0 {
		to.Body = msg.Sized
	} else if from.Body == msg.NoBody {
		to.Length = from.Length
	}
}

// shadowHost returns an authority by which a copy can be told from the request.
func shadowHost(authority []byte) []byte {
	host := hostOf(authority)
	return append(append(append([]byte(nil), host...), "-shadow"...), authority[len(host):]...)
}

// shadow is the client of a copy: it has the body, and wants no answer.
type shadow struct{ left []byte }

func (s *shadow) body() Body { return s }

// whole returns the body.
func (s *shadow) whole(int) ([]byte, error) { return s.left, nil }

// Next returns the body.
func (s *shadow) Next() ([]byte, error) {
	b := s.left
	s.left = nil
	return b, io.EOF
}

// Ready reports true: the body is here.
func (*shadow) Ready() bool { return true }

// Trailer returns nil.
func (*shadow) Trailer() *msg.Head { return nil }

func (*shadow) inform(*msg.Head) error                      { return nil }
func (*shadow) respond(*Exchange, []byte, bool, bool) error { return nil }
func (*shadow) write([]byte) error                          { return nil }
func (*shadow) finish([]byte, *msg.Head) error              { return nil }
func (*shadow) stop()                                       {}
func (*shadow) abort()                                      {}
func (*shadow) tunnel() net.Conn                            { a, b := net.Pipe(); b.Close(); return a }
