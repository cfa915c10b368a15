//lint:file-ignore SA1019 these tests are about golang.org/x/net/http2

package hbone

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"

	h2 "golang.org/x/net/http2"

	"github.com/weft-mesh/weft/hbone/record"
	"github.com/weft-mesh/weft/internal/http2"
	"github.com/weft-mesh/weft/internal/pack"
)

// moved returns a tunnel in the state of t that shares no memory with it.
func (t *Tunnel) moved(tb testing.TB, now time.Time) *Tunnel {
	tb.Helper()
	s, err := t.State(now)
	if err != nil {
		tb.Fatal(err)
	}
	var read TunnelState
	if err := pack.Read(pack.Write(s.Pack), read.Pack); err != nil {
		tb.Fatal(err)
	}
	n, err := ResumeTunnel(read, now)
	if err != nil {
		tb.Fatalf("%v in state %+v", err, s)
	}
	n.working, n.guard = t.working, t.guard // a driver's, and made anew by design
	return n
}

// A side is one end of a tunnel whose driver is a schedule. What it sends on a
// stream is a function of the stream and the place.
type side struct {
	t      testing.TB
	role   Role
	tunnel *Tunnel
	now    func() time.Time
	wire   []byte // on its way to the other side
	flows  map[uint32]*sideFlow
	other  *side
	fatal  error
}

type sideFlow struct {
	sent, got      int
	toSend         int
	end, ended     bool // we have ended, they have
	answered, gone bool
	unread         int
}

func content(role Role, id uint32, at int) byte { return byte(at*7 + at>>8 + int(id)*13 + int(role)) }

func (s *side) Requested(id uint32, authority string, _ Header) {
	if authority != fmt.Sprintf("10.0.0.%d:80", id%250) {
		s.t.Errorf("stream %d asks for %s", id, authority)
	}
	s.flows[id] = &sideFlow{}
}

func (s *side) Answered(id uint32, status int, _ Header) {
	s.flows[id].answered = true
	s.flows[id].gone = status != 200
}

func (s *side) Data(id uint32, p []byte) {
	f := s.flows[id]
	for i, b := range p {
		if want := content(s.other.role, id, f.got+i); b != want {
			s.t.Fatalf("stream %d: byte %d is %d, want %d", id, f.got+i, b, want)
		}
	}
	f.got += len(p)
	f.unread += len(p)
}

func (s *side) Ended(id uint32) { s.flows[id].ended = true }

func (s *side) Aborted(id uint32, _ *http2.StreamError, _ bool) { s.flows[id].gone = true }
func (s *side) Writable(uint32)                                 {}

// push sends what it can of what a flow has to send.
func (s *side) push(id uint32) {
	f := s.flows[id]
	if f.gone || !f.answered {
		return
	}
	p := make([]byte, f.toSend)
	for i := range p {
		p[i] = content(s.role, id, f.sent+i)
	}
	n := s.tunnel.Send(id, p, f.end)
	f.sent, f.toSend = f.sent+n, f.toSend-n
}

// deliver passes on n bytes of what is on the wire to the other side.
func (s *side) deliver(n int) {
	s.wire = append(s.wire, s.tunnel.TakeOutput(nil)...)
	n = min(n, len(s.wire))
	if err := s.other.tunnel.Receive(s.now(), s.wire[:n], s.other); err != nil && s.other.fatal == nil {
		s.other.fatal = err
	}
	s.wire = s.wire[n:]
}

// schedule runs two tunnels against each other over what rnd decides. With
// moves each is replaced by one in its state at random points.
func schedule(t testing.TB, rnd *rand.Rand, moves bool) [2]*side {
	now := epoch
	clock := func() time.Time { return now }
	var ends [2]*side
	for i, role := range []Role{ClientRole, ServerRole} {
		tn, err := NewTunnel(role, Limits{StreamWindow: 1 << 16, MaxStreamWindow: 1 << 18, ConnWindow: 1 << 17, MaxStreams: 20}, now)
		if err != nil {
			t.Fatal(err)
		}
		ends[i] = &side{t: t, role: role, tunnel: tn, now: clock, flows: make(map[uint32]*sideFlow)}
	}
	client, server := ends[0], ends[1]
	client.other, server.other = server, client
	for range 400 {
		s := ends[rnd.IntN(2)]
		ids := slices.Sorted(maps.Keys(s.flows))
		var id uint32
		if len(ids) > 0 {
			id = ids[rnd.IntN(len(ids))]
		}
		op, size := rnd.IntN(20), rnd.IntN(40_000)
		if rnd.IntN(2) == 0 {
			size = rnd.IntN(30)
		}
		if moves && op%3 == 0 {
			s.tunnel = s.tunnel.moved(t, now)
		}
		f := s.flows[id]
		switch {
		case op < 2:
			next := client.tunnel.next
			if _, err := client.tunnel.Connect(fmt.Sprintf("10.0.0.%d:80", next%250), Header{Baggage: fmt.Sprint("b=", op)}); err == nil {
				client.flows[next] = &sideFlow{}
			}
		case op < 11:
			s.deliver(size)
		case op == 11:
			now = now.Add(time.Duration(size) * 100 * time.Microsecond)
			_ = s.tunnel.Tick(now)
		case f == nil || f.gone:
		case op < 13 && s == server && !f.answered:
			status := 200
			if op == 12 && size%2 == 0 {
				status = 503
			}
			s.tunnel.Answer(id, status, Header{})
			f.answered, f.gone = true, status != 200
			s.tunnel.Release()
		case op < 15 && !f.end:
			f.toSend += size
			s.push(id)
		case op == 15 && size < 15:
			f.end = true
			s.push(id)
		case op == 16 && size < 3:
			s.tunnel.Reset(id, http2.Cancel)
			f.gone = true
			if s == server && !f.answered {
				s.tunnel.Release()
			}
		case op < 19:
			n := min(size, f.unread)
			f.unread -= n
			s.tunnel.Consumed(id, n)
			s.push(id)
		}
	}
	settle(ends)
	return ends
}

// settle lets everything arrive, and everything that is open end.
func settle(ends [2]*side) {
	quiet := func() {
		for range 400 {
			for _, s := range ends {
				for _, id := range slices.Sorted(maps.Keys(s.flows)) {
					f := s.flows[id]
					s.tunnel.Consumed(id, f.unread)
					f.unread = 0
					s.push(id)
				}
				s.deliver(1 << 20)
			}
		}
	}
	quiet()
	server := ends[1]
	for id, f := range server.flows {
		if !f.gone && !f.answered {
			f.answered = true
			server.tunnel.Answer(id, 200, Header{})
			server.tunnel.Release()
		}
	}
	quiet()
	for _, s := range ends {
		for _, f := range s.flows {
			f.end = true
		}
	}
	quiet()
}

// TestMovedTunnelsBehaveTheSame runs random schedules with and without moves:
// no stream and no byte may differ, and both ends must agree on every window.
func TestMovedTunnelsBehaveTheSame(t *testing.T) {
	seeds := uint64(60)
	if testing.Short() {
		seeds = 10
	}
	for seed := range seeds {
		for _, moves := range []bool{false, true} {
			ends := schedule(t, rand.New(rand.NewPCG(seed, 9)), moves)
			for i, s := range ends {
				if s.fatal != nil {
					t.Fatalf("seed %d, moves %v: %v", seed, moves, s.fatal)
				}
				if n := s.tunnel.Streams(); n != 0 {
					t.Errorf("seed %d, moves %v: %d streams are left", seed, moves, n)
				}
				if s.tunnel.Queued() != 0 {
					t.Errorf("seed %d, moves %v: %d bytes unread", seed, moves, s.tunnel.Queued())
				}
				for id, f := range s.flows {
					o := s.other.flows[id]
					if o == nil || f.gone || o.gone {
						continue
					}
					if f.toSend != 0 || f.sent != o.got || !f.ended {
						t.Errorf("seed %d, moves %v, stream %d: %+v and %+v", seed, moves, id, *f, *o)
					}
				}
				// The peer may send what we are ready to take, to the byte.
				in, out := pack.Write(s.tunnel.receive.Pack), s.other.tunnel.send.Left()
				w := http2.NewReceiveWindow(0)
				if err := pack.Read(in, w.Pack); err != nil {
					t.Fatal(err)
				}
				if out > 0 && (!w.Receive(out) || w.Receive(1)) {
					t.Errorf("seed %d, moves %v: end %d gives another window than its peer has", seed, moves, i)
				}
			}
		}
	}
}

// TestMovedTunnelAtEveryByte runs the peer of another make against a tunnel
// that is moved before each of its bytes.
func TestMovedTunnelAtEveryByte(t *testing.T) {
	script := greeted(t, ServerRole, Limits{})
	script.connect(1)
	script.headers(3, true, ":method=GET", ":path=/", ":scheme=https")
	script.must(script.fr.WriteHeaders(h2.HeadersFrameParam{StreamID: 5, BlockFragment: script.encode(":method=CONNECT")}))
	script.must(script.fr.WriteContinuation(5, true, script.encode(":authority="+target, "baggage=a=b")))
	script.must(script.fr.WriteDataPadded(1, false, []byte("hello"), make([]byte, 7)))
	script.must(script.fr.WriteSettings(h2.Setting{ID: h2.SettingInitialWindowSize, Val: 3}))
	script.must(script.fr.WritePing(false, [8]byte{1}))
	script.must(script.fr.WriteWindowUpdate(5, 10))
	script.must(script.fr.WriteData(1, true, []byte("end")))
	script.connect(7)
	script.must(script.fr.WriteRSTStream(7, h2.ErrCodeCancel))
	in := bytes.Clone(script.in.Bytes())
	var want string
	for _, moves := range []bool{false, true} {
		p := greeted(t, ServerRole, Limits{})
		p.auto = accept
		for i := range in {
			if moves {
				p.tunnel = p.tunnel.moved(t, p.now)
			}
			p.must(p.tunnel.Receive(p.now, in[i:i+1], p))
		}
		got := fmt.Sprint(p.events, p.data, p.tunnel.Send(1, make([]byte, 100), false), p.answers())
		if !moves {
			want = got
			continue
		}
		if got != want {
			t.Errorf("got\n%s, want\n%s", got, want)
		}
	}
}

// A mover drives one end of a connection over TLS the plainest way, and moves
// all of it to other objects before each read.
type mover struct {
	t      testing.TB
	tunnel *Tunnel
	seal   *record.Sealer
	open   *record.Opener
	in     []byte // of a record that is not whole
	back   map[uint32][]byte
	ended  map[uint32]bool
	rnd    *rand.Rand
}

func (m *mover) Requested(id uint32, _ string, _ Header) {
	m.back[id] = nil // one that is empty ends as well
	m.tunnel.Answer(id, 200, Header{})
}
func (m *mover) Answered(id uint32, status int, _ Header) {
	if status != 200 {
		m.t.Errorf("stream %d: status %d", id, status)
	}
}
func (m *mover) Data(id uint32, p []byte) { m.back[id] = append(m.back[id], p...) }
func (m *mover) Ended(id uint32)          { m.ended[id] = true }
func (m *mover) Aborted(id uint32, err *http2.StreamError, _ bool) {
	m.t.Errorf("stream %d: %v", id, err)
}
func (m *mover) Writable(uint32) {}

// move replaces every object.
func (m *mover) move() {
	m.tunnel = m.tunnel.moved(m.t, epoch)
	s, err1 := m.seal.State()
	o, err2 := m.open.State()
	m.seal.Wipe()
	m.open.Wipe()
	var err3, err4 error
	m.seal, err3 = record.ResumeSealer(s)
	m.open, err4 = record.ResumeOpener(o)
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		m.t.Fatal(err)
	}
}

// flush seals and writes what there is to say.
func (m *mover) flush(c net.Conn) error {
	var out []byte
	var err error
	if m.open.KeyUpdateOwed() || m.rnd.IntN(8) == 0 {
		if out, err = m.seal.Update(out, false); err != nil {
			return err
		}
	}
	if out, err = m.seal.Seal(out, m.tunnel.TakeOutput(nil)); err != nil {
		return err
	}
	_, err = c.Write(out)
	return err
}

// step reads once and acts on it.
func (m *mover) step(c net.Conn) error {
	buf := make([]byte, 1+m.rnd.IntN(30_000))
	n, err := c.Read(buf)
	if err != nil {
		return err
	}
	m.move()
	m.in = append(m.in, buf[:n]...)
	for {
		data, rest, used, err := m.open.Open(m.in)
		if err != nil {
			return err
		}
		if !used {
			break
		}
		if err := m.tunnel.Receive(epoch, data, m); err != nil {
			return err
		}
		m.in = rest
	}
	return nil
}

// echo sends back what it got, as the windows allow.
func (m *mover) echo() {
	for _, id := range slices.Sorted(maps.Keys(m.back)) {
		n := m.tunnel.Send(id, m.back[id], m.ended[id])
		m.back[id] = m.back[id][n:]
		m.tunnel.Consumed(id, n)
	}
}

// TestMovedServerAgainstForeignClient serves a client of x/net over crypto/tls,
// which does not notice that its server moves all the time.
func TestMovedServerAgainstForeignClient(t *testing.T) {
	w := newWorld(t, echo, func(w *world, _ *ServerConfig, pc *PoolConfig) {
		var wg sync.WaitGroup
		w.t.Cleanup(wg.Wait)
		pc.Dial = func(context.Context, Target) (net.Conn, error) {
			a, b := socketPipe(w.t)
			wg.Go(func() { moveServer(w, b) })
			return a, nil
		}
	})
	cc := w.xClient(&h2.Transport{})
	var wg sync.WaitGroup
	for _, n := range sizes(6) {
		wg.Go(func() {
			p := payload(n / 4)
			resp, err := cc.RoundTrip(connectRequest(t.Context(), target, io.NopCloser(bytes.NewReader(p))))
			if err != nil {
				t.Error(err)
				return
			}
			defer resp.Body.Close()
			got, err := io.ReadAll(resp.Body)
			if err != nil || resp.StatusCode != http.StatusOK || !bytes.Equal(got, p) {
				t.Errorf("status %d, %d of %d bytes, %v", resp.StatusCode, len(got), len(p), err)
			}
		})
	}
	wg.Wait()
}

func moveServer(w *world, c net.Conn) {
	defer c.Close()
	s, err := NewServer(ServerConfig{TLS: w.serverTLS(cart)}).Handshake(context.Background(), c)
	if err != nil {
		w.t.Error(err)
		return
	}
	m := &mover{t: w.t, back: make(map[uint32][]byte), ended: make(map[uint32]bool), rnd: rand.New(rand.NewPCG(1, 2))}
	m.seal, m.open, m.in = s.Conn.Detach()
	if m.tunnel, err = NewTunnel(ServerRole, Limits{}, epoch); err != nil {
		w.t.Error(err)
		return
	}
	for {
		m.echo()
		if m.flush(c) != nil || m.step(c) != nil {
			return // the client is done
		}
	}
}

// TestMovedClientAgainstForeignServer is the same the other way round: two
// streams send, one after the other ends.
func TestMovedClientAgainstForeignServer(t *testing.T) {
	w := newWorld(t, nil, xServer(&h2.Server{}))
	c, err := w.pool.cfg.Dial(t.Context(), w.target())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	sec, err := Handshake(t.Context(), c, w.clientTLS(web, cart), time.Minute, NewHandshakes(), nil)
	if err != nil {
		t.Fatal(err)
	}
	m := &mover{t: t, back: make(map[uint32][]byte), ended: make(map[uint32]bool), rnd: rand.New(rand.NewPCG(1, 3))}
	m.seal, m.open, m.in = sec.Conn.Detach()
	if m.tunnel, err = NewTunnel(ClientRole, Limits{}, epoch); err != nil {
		t.Fatal(err)
	}
	left, want := make(map[uint32][]byte), make(map[uint32][]byte)
	for _, n := range []int{100_000, 1_000_000, 3_000_000} {
		id, err := m.tunnel.Connect(target, Header{Baggage: "a=b"})
		if err != nil {
			t.Fatal(err)
		}
		left[id], want[id] = payload(n), payload(n)
	}
	for len(m.ended) < len(want) {
		for _, id := range slices.Sorted(maps.Keys(left)) {
			n := m.tunnel.Send(id, left[id], true)
			left[id] = left[id][n:]
		}
		if err := m.flush(c); err != nil {
			t.Fatal(err)
		}
		before := make(map[uint32]int)
		for id, b := range m.back {
			before[id] = len(b)
		}
		if err := m.step(c); err != nil {
			t.Fatal(err)
		}
		for id, b := range m.back {
			m.tunnel.Consumed(id, len(b)-before[id])
		}
	}
	for id, p := range want {
		if !bytes.Equal(m.back[id], p) {
			t.Errorf("stream %d: %d of %d bytes came back", id, len(m.back[id]), len(p))
		}
	}
}

// TestStateOfAnEndedTunnel shows that there is none.
func TestStateOfAnEndedTunnel(t *testing.T) {
	f := greeted(t, ServerRole, Limits{})
	f.tunnel.Close()
	if _, err := f.tunnel.State(epoch); err == nil {
		t.Error("an ended tunnel has a state")
	}
}

func TestResumeTunnelRefuses(t *testing.T) {
	f := greeted(t, ServerRole, Limits{})
	f.auto = accept
	f.connect(1)
	f.connect(3)
	f.must(f.feed())
	good := func() TunnelState {
		s, err := f.tunnel.State(epoch)
		f.must(err)
		return s
	}
	if _, err := ResumeTunnel(good(), epoch); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*TunnelState){
		"role":          func(s *TunnelState) { s.Role = NoRole },
		"limits":        func(s *TunnelState) { s.Limits.MaxFrame = 1 },
		"next":          func(s *TunnelState) { s.Next = 2 },
		"no next":       func(s *TunnelState) { s.Next = http2.MaxStreamID + 2 },
		"last":          func(s *TunnelState) { s.Last = s.Seen + 2 },
		"recent":        func(s *TunnelState) { s.Recent = make([]uint32, 33) },
		"goaway":        func(s *TunnelState) { s.GoAway = 3 },
		"final goaway":  func(s *TunnelState) { s.GoAway = 2 },
		"queued":        func(s *TunnelState) { s.Queued = -1 },
		"streams":       func(s *TunnelState) { s.Streams = make([]StreamState, 300) },
		"even stream":   func(s *TunnelState) { s.Streams[0].ID = 2 },
		"twice":         func(s *TunnelState) { s.Streams[1].ID = 1 },
		"never opened":  func(s *TunnelState) { s.Streams[1].ID = 99 },
		"ended":         func(s *TunnelState) { s.Streams[0].SentEnd, s.Streams[0].GotEnd = true, true },
		"hints":         func(s *TunnelState) { s.Streams[0].Hints = 9 },
		"parser":        func(s *TunnelState) { s.Parser.Head = make([]byte, 20) },
		"HPACK":         func(s *TunnelState) { s.Fields.Max = 1 },
		"frame payload": func(s *TunnelState) { s.FramePayload = -1 },
	} {
		s := good()
		change(&s)
		if _, err := ResumeTunnel(s, epoch); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

// FuzzTunnelState reads states from anything. What can be resumed can be used.
func FuzzTunnelState(f *testing.F) {
	for _, role := range []Role{ServerRole, ClientRole} {
		p := greeted(f, role, Limits{})
		if role == ServerRole {
			p.auto = accept
			p.connect(1)
			p.must(p.fr.WriteData(1, false, []byte("hello")))
			p.must(p.feed())
		} else if _, err := p.tunnel.Connect(target, Header{}); err != nil {
			f.Fatal(err)
		}
		p.connect(3)
		s, err := p.tunnel.State(epoch)
		p.must(err)
		f.Add(pack.Write(s.Pack), p.in.Bytes())
		f.Add(pack.Write(s.Pack), []byte(nil))
	}
	f.Fuzz(func(t *testing.T, b, in []byte) {
		var s TunnelState
		if pack.Read(b, s.Pack) != nil {
			return
		}
		tn, err := ResumeTunnel(s, epoch)
		if err != nil {
			return
		}
		p := &foreign{t: t, tunnel: tn, now: epoch, data: make(map[uint32]int), auto: accept}
		_ = tn.Receive(epoch, in, p)
		for id := range s.Streams {
			tn.Send(uint32(id), make([]byte, 10), id%2 == 0)
			tn.Consumed(uint32(id), 1)
		}
		_, _ = tn.Connect(target, Header{Baggage: "a=b"})
		tn.Shutdown(epoch)
		_ = tn.Tick(epoch.Add(time.Hour))
		if again, err := tn.State(epoch); err == nil {
			_ = pack.Write(again.Pack)
		}
	})
}
