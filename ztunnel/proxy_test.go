package ztunnel

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weft-mesh/weft/mesh"
)

// A pair is a client pod and a server pod on two nodes, with a service before
// the server.
type pair struct {
	*world
	clientNode, serverNode *node
	client, server         *testPod
	app                    netip.AddrPort
	service                netip.AddrPort
}

func newPair(t *testing.T, serve func(*net.TCPConn)) *pair {
	t.Helper()
	w := newWorld(t)
	p := &pair{world: w, clientNode: w.node(nil), serverNode: w.node(nil)}
	p.client = p.clientNode.add("client", nil)
	p.server = p.serverNode.add("server", nil)
	p.app = p.server.app(serve)
	p.service = w.publish("server", p.client, p.server, p.app.Port(), nil)
	return p
}

func TestThroughTheTunnel(t *testing.T) {
	p := newPair(t, echo)
	c := p.client.dial(p.service)
	if err := roundTrip(c, "hello"); err != nil {
		t.Fatal(err)
	}
	c.CloseWrite()
	if b, err := io.ReadAll(c); err != nil || len(b) > 0 {
		t.Fatalf("after the end: %q, %v", b, err)
	}

	// All that left the client's pod went to the server's tunnel port.
	hbonePort := netip.AddrPortFrom(p.server.addr, 15008)
	if got := p.client.outlet.dialed(); len(got) != 1 || got[0] != hbonePort {
		t.Errorf("the client's node dialed %v, want only %v", got, hbonePort)
	}
	out := p.clientNode.logged(`direction="outbound"`)
	in := p.serverNode.logged(`direction="inbound"`)
	for _, want := range []string{
		"\tinfo\taccess\tconnection complete\tsrc.addr=" + p.client.addr.String() + ":",
		`src.workload="client" src.namespace="shop" src.identity="spiffe://cluster.local/ns/shop/sa/client" src.cluster="Kubernetes"`,
		`dst.addr=` + hbonePort.String(), `dst.hbone_addr=` + p.app.String(),
		`dst.workload="server" dst.namespace="shop" dst.identity="spiffe://cluster.local/ns/shop/sa/server" dst.cluster="Kubernetes"`,
		`bytes_sent=5 bytes_recv=5 duration="`,
	} {
		for _, line := range []string{out, in} {
			if !strings.Contains(line, want) {
				t.Errorf("access line\n%s\nlacks %s", line, want)
			}
		}
	}
	if !strings.Contains(out, `dst.service="server.shop.svc.cluster.local"`) {
		t.Errorf("outbound line without the service: %s", out)
	}
	if strings.Contains(out+in, "error=") {
		t.Errorf("a clean connection was logged with an error:\n%s\n%s", out, in)
	}
	if !strings.Contains(in, `policy="allowed: no policy forbids it"`) || strings.Contains(out, "policy=") {
		t.Errorf("policies are asked where the connection comes in, and nowhere else:\n%s\n%s", out, in)
	}
}

func TestAccessLineNamesThePolicy(t *testing.T) {
	p := newPair(t, echo)
	p.setPolicies(allowOnly("friends", "client"))
	c := p.client.dial(p.service)
	if err := roundTrip(c, "hello"); err != nil {
		t.Fatal(err)
	}
	c.Close()
	p.serverNode.logged(`policy="allowed by policy shop/friends"`)
}

func TestManyConnectionsShareATunnel(t *testing.T) {
	p := newPair(t, echo)
	for i := range 20 {
		if err := roundTrip(p.client.dial(p.service), fmt.Sprint("n", i)); err != nil {
			t.Fatal(err)
		}
	}
	if got := p.client.outlet.dialed(); len(got) != 1 {
		t.Errorf("%d tunnels, want 1", len(got))
	}
}

func TestServerSpeaksFirst(t *testing.T) {
	p := newPair(t, func(c *net.TCPConn) {
		io.WriteString(c, "220 ready\n")
		io.Copy(io.Discard, c)
	})
	b := make([]byte, 10)
	if _, err := io.ReadFull(p.client.dial(p.service), b); err != nil || string(b) != "220 ready\n" {
		t.Errorf("banner %q, %v", b, err)
	}
}

// The client ends its direction first; only then the server answers, and much.
func TestHalfCloseAndLargeAnswer(t *testing.T) {
	const size = 8 << 20
	p := newPair(t, func(c *net.TCPConn) {
		h := sha256.New()
		n, _ := io.Copy(h, c)
		fmt.Fprintf(c, "%d %x\n", n, h.Sum(nil))
		io.CopyN(c, zeros{}, size)
		c.CloseWrite()
	})
	c := p.client.dial(p.service)
	sent := sha256.New()
	if _, err := io.CopyN(io.MultiWriter(c, sent), rand.Reader, size); err != nil {
		t.Fatal(err)
	}
	c.CloseWrite()
	b, err := io.ReadAll(c)
	if err != nil {
		t.Fatal(err)
	}
	head, rest, _ := bytes.Cut(b, []byte("\n"))
	if want := fmt.Sprintf("%d %x", size, sent.Sum(nil)); string(head) != want {
		t.Errorf("the server got %s, want %s", head, want)
	}
	if len(rest) != size {
		t.Errorf("answer of %d bytes, want %d", len(rest), size)
	}
}

// Urgent data is not carried, and what is around it is: by an application that
// calls, by one that answers, and without a tunnel.
func TestUrgentData(t *testing.T) {
	say := func(c *net.TCPConn) error {
		_, err := io.WriteString(c, "one")
		raw, rerr := c.SyscallConn()
		if err := errors.Join(err, rerr); err != nil {
			return err
		}
		var sent error
		err = raw.Write(func(fd uintptr) bool {
			sent = syscall.Sendto(int(fd), []byte("!"), syscall.MSG_OOB, nil)
			return sent != syscall.EAGAIN
		})
		if err := errors.Join(err, sent); err != nil {
			return err
		}
		_, err = io.WriteString(c, "two")
		return err
	}
	hear := func(c *net.TCPConn) error {
		b := make([]byte, 6)
		_ = c.SetReadDeadline(time.Now().Add(time.Minute))
		if n, err := io.ReadFull(c, b); err != nil || string(b) != "onetwo" {
			return fmt.Errorf("%q, %v", b[:n], err)
		}
		return nil
	}
	heard := make(chan error, 1)
	app := func(c *net.TCPConn) { heard <- errors.Join(hear(c), say(c)) }
	p := newPair(t, app)
	unknown := netip.AddrPortFrom(freshAddr(), p.client.port)
	p.client.outlet.route(unknown, startApp(t, "127.0.0.1:0", app))
	for name, to := range map[string]netip.AddrPort{"a tunnel": p.service, "none": unknown} {
		c := p.client.dial(to)
		if err := say(c); err != nil {
			t.Fatal(err)
		}
		if err := hear(c); err != nil {
			t.Errorf("%s: the client got %v", name, err)
		}
		if err := <-heard; err != nil {
			t.Errorf("%s: the server got %v", name, err)
		}
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func TestAbortReachesTheOtherEnd(t *testing.T) {
	got := make(chan error, 1)
	p := newPair(t, func(c *net.TCPConn) {
		io.WriteString(c, "x")
		_, err := io.ReadAll(c)
		got <- err
	})
	c := p.client.dial(p.service)
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	c.SetLinger(0)
	c.Close()
	if err := <-got; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the server saw %v, want a reset: half an upload must not look whole", err)
	}
}

func TestPassthrough(t *testing.T) {
	p := newPair(t, echo)
	outside := startApp(t, "127.0.0.1:0", echo)
	unknown := netip.AddrPortFrom(freshAddr(), p.client.port)
	p.client.outlet.route(unknown, outside)
	if err := roundTrip(p.client.dial(unknown), "to the outside"); err != nil {
		t.Fatal(err)
	}
	if got := p.client.outlet.dialed(); len(got) != 1 || got[0] != unknown {
		t.Errorf("dialed %v, want %v as it was asked", got, unknown)
	}
}

// refused wants a connection to end with an RST.
func (p *testPod) refused(to netip.AddrPort) {
	t := p.node.world.t
	t.Helper()
	d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(p.addr, 0)), Timeout: 5 * time.Second}
	c, err := d.Dial("tcp", to.String())
	var n int
	if err == nil { // else the RST was faster than connect
		defer c.Close()
		c.SetReadDeadline(time.Now().Add(10 * time.Second))
		n, err = c.Read(make([]byte, 1))
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("connection to %v: %d bytes and %v, want a reset", to, n, err)
	}
}

func TestOutboundRefusals(t *testing.T) {
	p := newPair(t, echo)
	unset := netip.AddrPortFrom(freshAddr(), p.client.port)
	p.change(func(w *world) {
		w.ws = append(w.ws, with(workload("unset", unset.Addr().String()), func(w *mesh.Workload) { w.Transport = mesh.TransportUnset }))
	})
	p.client.refused(unset)
	p.clientNode.logged("\terror\taccess", "transport is unset")

	// The application is not there: 503 at the other end, a reset here.
	gone := p.publish("gone", p.client, p.server, 1, nil)
	p.client.refused(gone)
	p.clientNode.logged("cannot be reached")
	p.serverNode.logged("does not answer")
	if n := p.counter("istio_tcp_connections_closed_total", p.clientNode, "response_flags", flagConnect); n < 2 {
		t.Errorf("%v connections closed with %s, want 2", n, flagConnect)
	}
}

func TestPodMayNotDialTheProxyItself(t *testing.T) {
	p := newPair(t, echo)
	p.client.refused(netip.AddrPortFrom(p.client.addr, p.client.port))
	if got := p.client.outlet.dialed(); len(got) != 0 {
		t.Errorf("dialed %v", got)
	}
}

// The server pod at the planned address has another identity than was planned.
func TestWrongPeerIsNotTalkedTo(t *testing.T) {
	p := newPair(t, echo)
	p.change(func(w *world) {
		for i := range w.ws {
			if w.ws[i].Name.Name == "server" {
				w.ws[i].Identity.ServiceAccount = "somebody-else"
			}
		}
	})
	p.client.refused(p.service)
	p.clientNode.logged("peer is not who was expected")
	if got := p.client.outlet.dialed(); len(got) != 1 || got[0].Port() != 15008 {
		t.Errorf("dialed %v, want one tunnel and nothing in clear", got)
	}
}

func TestWaitsForTheFirstSync(t *testing.T) {
	w := newWorld(t)
	n := w.node(nil)
	e, client := w.entry("client", freshAddr())
	client.node = n
	n.enter = enterWith(client)
	if err := n.Add(t.Context(), e.Pod, e.Files); err != nil {
		t.Fatal(err)
	}
	outside := startApp(t, "127.0.0.1:0", echo)
	unknown := netip.AddrPortFrom(freshAddr(), client.port)
	client.outlet.route(unknown, outside)
	c := client.dial(unknown)
	io.WriteString(c, "early")
	c.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
		t.Fatalf("before the first sync: %v, want that nothing happens", err)
	}
	if got := client.outlet.dialed(); len(got) != 0 {
		t.Fatalf("dialed %v before the first sync", got)
	}
	w.change(func(*world) {})
	c.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.ReadFull(c, make([]byte, 5)); err != nil {
		t.Errorf("after the sync: %v", err)
	}
}

// counter sums a metric of n over the series whose label has that value.
func (w *world) counter(name string, n *node, label, value string) float64 {
	w.t.Helper()
	fs, err := n.metrics.Gather()
	if err != nil {
		w.t.Fatal(err)
	}
	var sum float64
	for _, f := range fs {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				if l.GetName() == label && l.GetValue() == value {
					sum += m.GetCounter().GetValue()
				}
			}
		}
	}
	return sum
}

func TestMetrics(t *testing.T) {
	p := newPair(t, func(c *net.TCPConn) {
		io.ReadAll(c)
		io.WriteString(c, "seven b")
		c.CloseWrite()
	})
	c := p.client.dial(p.service)
	io.WriteString(c, "abc")
	c.CloseWrite()
	io.ReadAll(c)
	p.clientNode.logged("outbound")
	p.serverNode.logged("inbound")
	for _, n := range []*node{p.clientNode, p.serverNode} {
		for name, want := range map[string]float64{
			"istio_tcp_connections_opened_total": 1,
			"istio_tcp_connections_closed_total": 1,
			"istio_tcp_received_bytes_total":     3, // both as the server sees it
			"istio_tcp_sent_bytes_total":         7,
		} {
			if got := p.counter(name, n, "source_principal", "spiffe://cluster.local/ns/shop/sa/client"); got != want {
				t.Errorf("%s = %v, want %v", name, got, want)
			}
		}
		if got := p.counter("istio_tcp_connections_opened_total", n, "connection_security_policy", "mutual_tls"); got != 1 {
			t.Errorf("mutual_tls connections %v, want 1", got)
		}
	}
	if got := p.counter("istio_tcp_connections_opened_total", p.clientNode, "reporter", "source"); got != 1 {
		t.Errorf("reporter source %v, want 1", got)
	}
	if got := p.counter("istio_tcp_connections_opened_total", p.serverNode, "reporter", "destination"); got != 1 {
		t.Errorf("reporter destination %v, want 1", got)
	}
}

// gauge returns a metric of n that has no labels.
func (w *world) gauge(name string, n *node) float64 {
	w.t.Helper()
	fs, err := n.metrics.Gather()
	if err != nil {
		w.t.Fatal(err)
	}
	for _, f := range fs {
		if f.GetName() == name {
			return f.GetMetric()[0].GetGauge().GetValue()
		}
	}
	w.t.Fatalf("no metric %s", name)
	return 0
}
