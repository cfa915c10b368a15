package ztunnel

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/weft-mesh/weft/internal/handover"
	"github.com/weft-mesh/weft/internal/pack"
)

// TestHandoverOfPlainConnections replaces a proxy many times under connections
// that leave the mesh and that come from outside, which talk, are idle and are
// half closed.
func TestHandoverOfPlainConnections(t *testing.T) {
	w := newWorld(t)
	n := w.node(nil)
	pod := n.add("pod", nil)
	pod.app(echo)
	outside := startApp(t, freshAddr().String()+":0", echo)
	target := netip.AddrPortFrom(freshAddr(), pod.port)
	pod.outlet.route(target, outside)
	line := begin(t, n, pod)
	n.stop()
	open := func(in bool) *net.TCPConn {
		if !in {
			c := pod.dial(target)
			hello(t, c)
			return c
		}
		c, err := net.Dial("tcp", pod.plain.String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		c.SetDeadline(time.Now().Add(60 * time.Second))
		hello(t, c)
		return c.(*net.TCPConn)
	}
	ways := []bool{false, true}
	var idle, half []*net.TCPConn
	for _, in := range ways {
		idle, half = append(idle, open(in)), append(half, open(in))
	}
	var talks sync.WaitGroup
	stop := make(chan struct{})
	for i := range 6 {
		c := open(ways[i%2])
		talks.Go(func() { talk(t, c, i, 1+i*2000, stop) })
	}
	parts := 0
	for range 5 {
		parts += line.succeed()
	}
	close(stop)
	talks.Wait()
	// One may stay, and drain, when it did not stand still in time.
	if parts < 5*8 {
		t.Errorf("%d connections were handed over in 5 times, want most of 10 each time", parts)
	}
	for i, c := range half {
		if _, err := io.WriteString(c, "question"); err != nil {
			t.Error(err)
		}
		_ = c.CloseWrite()
		if b, err := io.ReadAll(c); err != nil || string(b) != "question" {
			t.Errorf("half-closed connection %d: %q, %v", i, b, err)
		}
	}
	line.node.logged("bytes_sent=13", "bytes_recv=13") // of all its processes together
	// From outside, each port of a client is still taken.
	if src := addrPort(idle[1].LocalAddr()); !line.node.podAt(pod.addr).clients.has(src) {
		t.Errorf("nobody knows that %v is the port of a plain connection", src)
	}
	for i, c := range idle {
		if err := roundTrip(c, "still there"); err != nil {
			t.Errorf("idle connection %d: %v", i, err)
		}
	}
	// What is decided anew is decided of these as well.
	w.setPolicies(allowOnly("a", "nobody"))
	closed(t, idle[1])
	if err := roundTrip(idle[0], "nobody's policy"); err != nil {
		t.Errorf("what leaves the mesh: %v", err)
	}
}

// TestHandoverWhileHalfClosed: an end that was passed on is not passed on twice,
// and the other direction goes on.
func TestHandoverWhileHalfClosed(t *testing.T) {
	w := newWorld(t)
	n := w.node(nil)
	pod := n.add("pod", nil)
	answer := make(chan struct{})
	outside := startApp(t, freshAddr().String()+":0", func(c *net.TCPConn) {
		b, err := io.ReadAll(c)
		if err != nil {
			t.Error(err)
		}
		<-answer
		c.Write(b)
	})
	target := netip.AddrPortFrom(freshAddr(), pod.port)
	pod.outlet.route(target, outside)
	line := begin(t, n, pod)
	n.stop()
	c := pod.dial(target)
	if _, err := io.WriteString(c, "all of it"); err != nil {
		t.Fatal(err)
	}
	_ = c.CloseWrite()
	f := line.node.onlyFlow()
	eventually(t, "the end", func() bool {
		_, over, ok := f.plain.halter.Halt(time.Second)
		if ok {
			f.plain.halter.Resume()
		}
		return ok && over[0] && !over[1]
	})
	for range 3 {
		if parts := line.succeed(); parts != 1 {
			t.Fatalf("%d parts were handed over, want 1", parts)
		}
	}
	close(answer)
	if b, err := io.ReadAll(c); err != nil || string(b) != "all of it" {
		t.Errorf("%q, %v", b, err)
	}
	line.node.logged("bytes_sent=9", "bytes_recv=9")
}

// TestFailedHandoverOfPlainConnections: what nobody takes goes on here.
func TestFailedHandoverOfPlainConnections(t *testing.T) {
	for name, refusal := range map[string]error{"declined": handover.ErrDeclined, "broken": errors.New("gone")} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			n := w.node(nil)
			pod := n.add("pod", nil)
			outside := startApp(t, freshAddr().String()+":0", echo)
			target := netip.AddrPortFrom(freshAddr(), pod.port)
			pod.outlet.route(target, outside)
			c := pod.dial(target)
			hello(t, c)
			f := n.onlyFlow()
			var texts [][]byte
			h := &heirs{}
			h.give = func(text []byte, files []int) error {
				texts = append(texts, h.text)
				if len(files) != 2 {
					t.Errorf("%d files", len(files))
				}
				return refusal
			}
			for range 3 {
				if _, err := f.give(h, 10*time.Second); !errors.Is(err, refusal) {
					t.Fatalf("give: %v", err)
				}
				hello(t, c)
			}
			// Neither does one take what is wrong.
			q := n.podAt(pod.addr)
			for name, try := range map[string]func() error{
				"no files": func() error { _, _, err := n.Take(PartVersion, texts[0], nil, nil); return err },
				"no such files": func() error {
					_, _, err := n.Take(PartVersion, texts[0], nil, []int{1 << 20, 1<<20 + 1})
					return err
				},
				"cut": func() error {
					_, _, err := n.Take(PartVersion, texts[0][:len(texts[0])-1], nil, []int{0, 1})
					return err
				},
			} {
				if try() == nil {
					t.Errorf("%s: taken", name)
				}
			}
			if len(n.flows.all()) != 1 || q.open.Load() != 1 {
				t.Errorf("%d flows, %d open", len(n.flows.all()), q.open.Load())
			}
			hello(t, c)
		})
	}
}

// TestHandoverBetweenPodsOfANode replaces a proxy that joins two pods of its node
// without a tunnel. Both flows of each connection go on: the bytes, what has
// ended, the log, and the policies.
func TestHandoverBetweenPodsOfANode(t *testing.T) {
	w := newWorld(t)
	near := func(c *Config) { c.SameNode = true }
	n := w.node(near)
	client, server := n.add("client", nil), n.add("server", nil)
	service := w.publish("server", client, server, server.app(echo).Port(), nil)
	w.setPolicies(allowOnly("a", "client"))
	line := beginWith(t, n, near, client, server)
	n.stop()
	idle, half, doomed := client.dial(service), client.dial(service), client.dial(service)
	for _, c := range []*net.TCPConn{idle, half, doomed} {
		hello(t, c)
	}
	var talks sync.WaitGroup
	stop := make(chan struct{})
	for i := range 4 {
		c := client.dial(service)
		talks.Go(func() { talk(t, c, i, 1+i*2000, stop) })
	}
	parts := 0
	for range 5 {
		parts += line.succeed()
	}
	close(stop)
	talks.Wait()
	// One may stay, and drain, when it did not stand still in time.
	if parts < 5*5 {
		t.Errorf("%d connections were handed over in 5 times, want most of 7 each time", parts)
	}
	if n := len(line.node.flows.all()); n < 6 || n%2 == 1 {
		t.Errorf("%d flows, want two of each connection", n)
	}
	if _, err := io.WriteString(half, "question"); err != nil {
		t.Error(err)
	}
	_ = half.CloseWrite()
	if b, err := io.ReadAll(half); err != nil || string(b) != "question" {
		t.Errorf("the half-closed connection: %q, %v", b, err)
	}
	for _, direction := range []string{"outbound", "inbound"} { // of all its processes together
		line.node.logged(`direction="`+direction+`"`, "bytes_sent=13", "bytes_recv=13")
	}
	if err := roundTrip(idle, "still there"); err != nil {
		t.Errorf("the idle connection: %v", err)
	}
	w.setPolicies(denyFrom("d", "client"))
	closed(t, doomed)
	line.node.logged(`error="closed: no longer allowed: denied by policy shop/d"`)
}

// TestTakeRefusesStrangePairs gives a proxy connections between two pods that
// are not those it serves.
func TestTakeRefusesStrangePairs(t *testing.T) {
	w := newWorld(t)
	n := w.node(func(c *Config) { c.SameNode = true })
	client, server := n.add("client", nil), n.add("server", nil)
	c := client.dial(w.publish("server", client, server, server.app(echo).Port(), nil))
	hello(t, c)
	h := &heirs{give: func([]byte, []int) error { return handover.ErrDeclined }}
	pods := []*pod{n.podAt(client.addr), n.podAt(server.addr)}
	if err := n.handOverPlain(h, pods, time.Now().Add(time.Minute), new(gifts)); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*movedPart){
		"no peer":        func(m *movedPart) { m.plain.peer = "" },
		"another peer":   func(m *movedPart) { m.plain.peer = "nobody" },
		"its name":       func(m *movedPart) { m.plain.peerID.ServiceAccount = "somebody" },
		"one flow":       func(m *movedPart) { m.flows = m.flows[:1] },
		"another client": func(m *movedPart) { m.pod = "nobody" },
	} {
		var m movedPart
		if err := pack.Read(h.text, m.pack); err != nil {
			t.Fatal(err)
		}
		change(&m)
		if _, _, err := n.Take(PartVersion, pack.Write(m.pack), nil, []int{0, 1}); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	hello(t, c)
}
