package ztunnel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/weft-mesh/weft/hbone/loop"
	"github.com/weft-mesh/weft/internal/handover"
)

// A dynasty is a succession of proxies that serve pods of a world, each joined
// to the next by a real handover socket.
type dynasty struct {
	t      *testing.T
	world  *world
	pods   map[string]*testPod // by UID
	node   *node
	server *handover.Server
	path   string
	born   int
	change func(*Config) // may be nil
}

// begin makes the first proxy of a dynasty, which serves the pods of n as well.
// What n accepted so far stays its own.
func begin(t *testing.T, n *node, pods ...*testPod) *dynasty {
	return beginWith(t, n, nil, pods...)
}

// beginWith is begin with a change of each Config.
func beginWith(t *testing.T, n *node, change func(*Config), pods ...*testPod) *dynasty {
	l := &dynasty{t: t, change: change, world: n.world, pods: map[string]*testPod{}, node: n, path: filepath.Join(t.TempDir(), "run", "handover.sock")}
	for _, p := range pods {
		l.pods[p.uid] = p
	}
	next, server := l.proxy()
	l.adopt(n, next)
	l.node, l.server = next, server
	return l
}

// proxy makes a proxy with a handover socket of its own.
func (l *dynasty) proxy() (*node, *handover.Server) {
	l.born++
	path := fmt.Sprint(l.path, l.born)
	s := handover.NewServer(handover.ServerConfig{Path: path, Parts: []uint32{PartVersion}, Log: slog.New(slog.DiscardHandler)})
	background(l.t, s.Run)
	n := l.world.node(func(c *Config) {
		c.Heir = func() Heir {
			if h, _ := s.Heir(); h != nil {
				return h
			}
			return nil
		}
		c.DrainTimeout = 200 * time.Millisecond
		if l.change != nil {
			l.change(c)
		}
	})
	return n, s
}

// adopt gives next the pods that n serves.
func (l *dynasty) adopt(n, next *node) {
	l.t.Helper()
	for _, e := range n.Held() {
		next.enter = enterWith(l.pods[e.Pod.UID])
		if err := next.Add(l.t.Context(), e.Pod, e.Files); err != nil {
			l.t.Fatal(err)
		}
	}
}

// succeed replaces the proxy by a new one, which takes over, and returns how
// many parts went. The old one has ended then.
func (l *dynasty) succeed() int {
	l.t.Helper()
	next, server := l.proxy()
	l.adopt(l.node, next)
	if err := next.Warm(l.t.Context()); err != nil {
		l.t.Fatal(err)
	}
	ready := make(chan struct{})
	close(ready)
	taken := make(chan int, 1)
	eventually(l.t, "the socket of the old one", func() bool {
		_, err := os.Stat(fmt.Sprint(l.path, l.born-1))
		return err == nil
	})
	go func() {
		n, err := handover.Take(context.Background(), handover.ClientConfig{
			Path: fmt.Sprint(l.path, l.born-1), Greeting: handover.Greeting{Instance: "next", Parts: []uint32{PartVersion}},
			Taker: next.Proxy, Ready: ready, Log: slog.New(slog.DiscardHandler),
		})
		if err != nil {
			l.t.Error(err)
		}
		taken <- n
	}()
	eventually(l.t, "a successor", func() bool { h, _ := l.server.Heir(); return h != nil })
	l.node.stop()
	l.node, l.server = next, server
	return <-taken
}

// TestHandoverKeepsConnections replaces the proxies at both ends, one after the
// other and many times, under connections that talk, that are idle and that are
// half closed, while new ones come. Policies and the log go on.
func TestHandoverKeepsConnections(t *testing.T) {
	p := newPair(t, func(c *net.TCPConn) {
		if err := roundTrip(c, "ready?"); err != nil {
			return
		}
		echo(c)
	})
	p.setPolicies(allowOnly("a", "client"))
	clients, servers := begin(t, p.clientNode, p.client), begin(t, p.serverNode, p.server)
	p.clientNode.stop()
	p.serverNode.stop()
	open := func() *net.TCPConn {
		c := p.client.dial(p.service)
		if _, err := io.ReadFull(c, make([]byte, 6)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(c, "ready?"); err != nil {
			t.Fatal(err)
		}
		return c
	}
	idle, half, doomed := open(), open(), open()
	if _, err := io.WriteString(half, "question"); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for i := range 8 {
		c := open()
		wg.Go(func() { talk(t, c, i, 1+i*500, stop) })
	}
	wg.Go(func() { // new ones all the time
		for i := 0; ; i++ {
			if err := roundTrip(open(), "new"); err != nil {
				t.Errorf("new connection %d: %v", i, err)
				return
			}
			select {
			case <-stop:
				return
			default:
			}
		}
	})
	parts := 0
	for range 4 {
		parts += clients.succeed()
		parts += servers.succeed()
	}
	close(stop)
	wg.Wait()
	if parts < 8 {
		t.Errorf("%d tunnels were handed over, want one each time at least", parts)
	}
	if err := roundTrip(idle, "still there"); err != nil {
		t.Errorf("the idle connection: %v", err)
	}
	_ = half.CloseWrite()
	if b, err := io.ReadAll(half); err != nil || string(b) != "question" {
		t.Errorf("the half-closed connection: %q, %v", b, err)
	}
	// It ends where it is, with all its bytes.
	idle.Close()
	for _, l := range []*dynasty{clients, servers} {
		l.node.logged("bytes_sent=17", "bytes_recv=17")
	}
	// What is decided anew is decided of these as well.
	p.setPolicies(denyFrom("d", "client"))
	closed(t, doomed)
	servers.node.logged(`error="closed: no longer allowed: denied by policy shop/d"`)
}

// TestHandoverSendsBacklogsAhead replaces a proxy while an application does not
// read: what waits for it is not in what is sent while the tunnel stands still,
// and the application gets it all.
func TestHandoverSendsBacklogsAhead(t *testing.T) {
	const size = 12 << 20
	p := newPair(t, func(c *net.TCPConn) {
		b := make([]byte, size)
		for i := range b {
			b[i] = byte(i * 7 >> 3)
		}
		c.Write(b)
	})
	clients := begin(t, p.clientNode, p.client)
	p.clientNode.stop()
	c := p.client.dial(p.service)
	const much = 200 << 10
	eventually(t, "a backlog", func() bool { return clients.node.engine.Unread() > much })

	var ahead int
	h := &heirs{
		ahead: func(text []byte) error { ahead += len(text); return nil },
		give:  func([]byte, []int) error { return handover.ErrDeclined },
	}
	q := clients.node.podAt(p.client.addr)
	ms := clients.node.pool.Movers(q.owner)
	eventually(t, "a part without its backlog", func() bool { // more may come at the wrong moment
		ahead = 0
		if _, err := q.give(h, ms[0], new(gifts)); !errors.Is(err, handover.ErrDeclined) {
			t.Fatal(err)
		}
		return ahead > much/2 && len(h.text) < much/2
	})
	// What somebody else has sent ahead is no part of it.
	for name, early := range map[string][][]byte{"none": nil, "short": {{0, 0, 0, 1}}, "of another part": {{0, 0, 0, 2, 0, 0, 0, 1, 'x'}}} {
		if _, _, err := clients.node.Take(PartVersion, h.text, early, nil); err == nil {
			t.Errorf("%s: taken", name)
		}
	}

	for range 3 {
		if n := clients.succeed(); n != 1 {
			t.Errorf("%d tunnels were handed over", n)
		}
		if _, err := io.CopyN(io.Discard, c, 1<<20); err != nil {
			t.Fatal(err)
		}
		eventually(t, "a backlog", func() bool { return clients.node.engine.Unread() > much })
	}
	got, err := io.ReadAll(c)
	if err != nil || len(got) != size-3<<20 {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	for i, b := range got {
		if want := byte((i + 3<<20) * 7 >> 3); b != want {
			t.Fatalf("byte %d is %d, want %d", i, b, want)
		}
	}
}

// heirs is an Heir that does as it is told.
type heirs struct {
	ahead  func(text []byte) error
	settle func() error
	give   func(text []byte, files []int) error
	text   []byte
}

func (h *heirs) Give(text []byte, files []int) error {
	h.text = append([]byte(nil), text...)
	return h.give(text, files)
}
func (h *heirs) Done() error { return nil }
func (h *heirs) Settle() error {
	if h.settle == nil {
		return nil
	}
	return h.settle()
}
func (h *heirs) Ahead(text []byte) error {
	if h.ahead == nil {
		return nil
	}
	return h.ahead(text)
}

// TestHandoverWaitsForHandshakes replaces a proxy while a tunnel to it is being
// made: that is finished, and handed over with the rest.
func TestHandoverWaitsForHandshakes(t *testing.T) {
	p := newPair(t, echo)
	servers := begin(t, p.serverNode, p.server)
	p.serverNode.stop()
	at := netip.AddrPortFrom(p.server.addr, 15008)
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var work sync.WaitGroup
	t.Cleanup(work.Wait)
	t.Cleanup(func() { l.Close() })
	var came atomic.Int64
	release := make(chan struct{})
	open := sync.OnceFunc(func() { close(release) })
	t.Cleanup(open)
	work.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			came.Add(1)
			s, err := net.Dial("tcp", at.String())
			if err != nil {
				t.Error(err)
				c.Close()
				return
			}
			work.Go(func() { io.Copy(s, c); s.Close() })
			work.Go(func() { // the server's part of the handshake is held back
				<-release
				io.Copy(c, s)
				c.Close()
			})
		}
	})
	p.client.outlet.route(at, addrPort(l.Addr()))
	c := p.client.dial(p.service)
	old := servers.node.Proxy
	eventually(t, "a handshake", func() bool { return came.Load() == 1 && old.arriving.Load() == 1 })
	moved := make(chan int, 1)
	go func() { moved <- servers.succeed() }()
	eventually(t, "the end of the old one", old.stoppedNow)
	open()
	if err := roundTrip(c, "hello"); err != nil {
		t.Error(err)
	}
	if n := <-moved; n != 1 {
		t.Errorf("%d tunnels were handed over, want the one", n)
	}
	if err := roundTrip(c, "and then"); err != nil {
		t.Error(err)
	}
	if n := came.Load(); n != 1 {
		t.Errorf("%d tunnels were made, want one", n)
	}
	p.clientNode.stop()
}

// TestHandoverOfANodeWithItself replaces a proxy that has both ends of all
// tunnels, again and again, in the very moment in which clients that had none
// make their first. Nothing is reset.
func TestHandoverOfANodeWithItself(t *testing.T) {
	const rounds, fresh = 10, 3
	w := newWorld(t)
	n := w.node(nil)
	server := n.add("server", nil)
	app := server.app(echo)
	pods := []*testPod{server}
	var services []netip.AddrPort
	for i := range rounds * fresh {
		c := n.add(fmt.Sprint("client-", i), nil)
		pods = append(pods, c)
		services = append(services, w.publish(fmt.Sprint("service-", i), c, server, app.Port(), nil))
	}
	line := begin(t, n, pods...)
	n.stop()
	for round := range rounds {
		var talks sync.WaitGroup
		stop := make(chan struct{})
		for i := round * fresh; i < (round+1)*fresh; i++ {
			talks.Go(func() {
				for k := 0; ; k++ {
					c := pods[1+i].dial(services[i])
					if err := roundTrip(c, "hello"); err != nil {
						t.Errorf("round %d, client %d, connection %d: %v", round, i, k, err)
						return
					}
					c.Close()
					select {
					case <-stop:
						return
					default:
					}
				}
			})
		}
		line.succeed()
		close(stop)
		talks.Wait()
	}
	line.node.stop()
}

// TestFailedHandoverDrains shows that connections which nobody takes go on
// until they drain, as without a successor.
func TestFailedHandoverDrains(t *testing.T) {
	for name, err := range map[string]error{"declined": handover.ErrDeclined, "broken": errors.New("gone")} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, echo)
			h := &heirs{give: func([]byte, []int) error { return err }}
			p.clientNode.cfg.Heir = func() Heir { return h }
			c := p.client.dial(p.service)
			if err := roundTrip(c, "before"); err != nil {
				t.Fatal(err)
			}
			done := make(chan struct{})
			go func() { p.clientNode.stop(); close(done) }()
			eventually(t, "the try", func() bool { return p.clientNode.stoppedNow() })
			for range 20 {
				if err := roundTrip(c, "goes on"); err != nil {
					t.Fatal(err)
				}
			}
			c.Close()
			<-done
		})
	}
}

// A stuck tunnel cannot be made to stand still.
type stuck struct {
	mover
	tries, kept *int
}

func (s stuck) Freeze() (*loop.Frozen, error) { *s.tries++; return nil, errors.New("it is stuck") }
func (s stuck) Keep()                         { *s.kept++; s.mover.Keep() }

// TestHandoverLeavesAStuckTunnelBehind: the others go, and it works on.
func TestHandoverLeavesAStuckTunnelBehind(t *testing.T) {
	w := newWorld(t)
	n := w.node(nil)
	client := n.add("client", nil)
	var conns []net.Conn
	for i := range 3 {
		server := n.add(fmt.Sprint("server-", i), nil)
		c := client.dial(w.publish(fmt.Sprint("service-", i), client, server, server.app(echo).Port(), nil))
		hello(t, c)
		conns = append(conns, c)
	}
	q := n.podAt(client.addr)
	movers := q.movers()
	if len(movers) != len(conns) {
		t.Fatalf("%d tunnels, want %d", len(movers), len(conns))
	}
	var tries, kept, given int
	movers[0] = stuck{movers[0], &tries, &kept}
	h := &heirs{give: func([]byte, []int) error { given++; return nil }}
	all := new(gifts)
	for range 2 { // a stuck one is not tried again
		behind, err := giveAll(h, q, movers, all)
		if err != nil || !behind {
			t.Errorf("one stays: %v, %v", behind, err)
		}
	}
	if given != len(movers)-1 || all.tunnels != given || tries != 1 || kept != 2 {
		t.Errorf("%d of %d were given, the stuck one was tried %d times and kept %d times", given, len(movers), tries, kept)
	}
	works := 0
	for _, c := range conns { // the successor of the others has let go of them
		if roundTrip(c, "still there") == nil {
			works++
		}
	}
	if works != 1 {
		t.Errorf("%d connections are left, want that of the stuck tunnel", works)
	}
}

func (p *Proxy) stoppedNow() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.stopped
}

// TestTakeRefuses gives a proxy parts that it must not take. Nothing of them is
// left, and no file is closed.
func TestTakeRefuses(t *testing.T) {
	p := newPair(t, echo)
	c := p.client.dial(p.service)
	if err := roundTrip(c, "before"); err != nil {
		t.Fatal(err)
	}
	asked := 0
	h := &heirs{
		settle: func() error { asked++; return roundTrip(c, "nothing stands still yet") },
		give:   func([]byte, []int) error { return errors.New("gone") },
	}
	q := p.clientNode.podAt(p.client.addr)
	ms := p.clientNode.pool.Movers(q.owner)
	if len(ms) != 1 {
		t.Fatalf("%d tunnels", len(ms))
	}
	if _, err := q.give(h, ms[0], new(gifts)); err == nil || asked == 0 {
		t.Fatalf("given: %v, after the heir was asked %d times whether it is there", err, asked)
	}
	for name, try := range map[string]func() error{
		"version": func() error { _, _, err := p.clientNode.Take(PartVersion+1, h.text, nil, nil); return err },
		"empty":   func() error { _, _, err := p.clientNode.Take(PartVersion, nil, nil, nil); return err },
		"cut": func() error {
			_, _, err := p.clientNode.Take(PartVersion, h.text[:len(h.text)-1], nil, nil)
			return err
		},
		"files": func() error { _, _, err := p.clientNode.Take(PartVersion, h.text, nil, nil); return err },
		"pod":   func() error { _, _, err := p.serverNode.Take(PartVersion, h.text, nil, nil); return err },
	} {
		if try() == nil {
			t.Errorf("%s: taken", name)
		}
	}
	if n := len(p.clientNode.flows.all()); n != 1 {
		t.Errorf("%d flows are left", n)
	}
	if err := roundTrip(c, "after"); err != nil {
		t.Error(err)
	}
}
