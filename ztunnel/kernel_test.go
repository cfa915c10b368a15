package ztunnel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/internal/handoff"
	"github.com/weft-mesh/weft/internal/testnet"
	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/node/capture"
)

// A realNode is a node of network namespaces with a proxy and the capture of
// its pods.
type realNode struct {
	*node
	host    *testnet.Node
	capture *capture.Capture
}

func (w *world) realNode(host *testnet.Node, bpffs string) *realNode {
	w.t.Helper()
	c, err := capture.New(capture.Config{
		BPFRoot: bpffs + "/" + host.Name, ProcRoot: "/proc", HostNS: host.NS,
		Log: slog.New(slog.NewTextHandler(w.t.Output(), nil)),
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { c.Close() })
	return &realNode{node: w.node(nil), host: host, capture: c}
}

// enrol captures a pod and publishes it.
func (n *realNode) enrol(p *testnet.Pod) *capture.Pod {
	t := n.world.t
	t.Helper()
	uid := "uid-" + p.Name
	captured, err := n.capture.Prepare(t.Context(), capture.Target{UID: uid, Netns: p.NS, Addrs: []netip.Addr{p.V4, p.V6}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { captured.Close() })
	f, err := captured.Files()
	if err != nil {
		t.Fatal(err)
	}
	err = n.Add(t.Context(), handoff.Pod{
		UID: uid, Name: p.Name, Namespace: "shop", ServiceAccount: p.Name, Addresses: []netip.Addr{p.V4, p.V6},
	}, handoff.Files{Netns: f.Netns, Blessed: f.Blessed, Listeners: f.Listeners})
	if err != nil {
		t.Fatal(err)
	}
	if err := captured.Attach(t.Context(), capture.Mode{New: true}); err != nil {
		t.Fatal(err)
	}
	n.world.change(func(w *world) { w.ws = append(w.ws, workload(p.Name, p.V4.String(), p.V6.String())) })
	return captured
}

// A street is two nodes with a captured pod each, and one outside the mesh.
type street struct {
	*world
	net            *testnet.World
	one, two       *realNode
	client, server *testnet.Pod
	capturedServer *capture.Pod
	outside        *testnet.Host
}

func newStreet(t *testing.T) *street {
	t.Helper()
	net := testnet.New(t)
	s := &street{world: newWorld(t), net: net}
	bpffs := testnet.BPFFS(t)
	s.one, s.two = s.realNode(net.Node("one"), bpffs), s.realNode(net.Node("two"), bpffs)
	s.outside = net.Host("outside")
	s.client, s.server = s.one.host.Pod("client", testnet.Routed), s.two.host.Pod("server", testnet.Bridged)
	s.one.enrol(s.client)
	s.capturedServer = s.two.enrol(s.server)
	return s
}

// serveApp answers each connection with the addresses it sees, then echoes.
// The first clients' full addresses are sent to the channel.
func serveApp(t *testing.T, h *testnet.Host, address string) <-chan netip.AddrPort {
	l := h.Listen(address)
	clients := make(chan netip.AddrPort, 10)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.AcceptTCP()
			if err != nil {
				return
			}
			select {
			case clients <- addrPort(c.RemoteAddr()):
			default:
			}
			go func() {
				defer c.Close()
				fmt.Fprintf(c, "%v %v\n", addrPort(c.RemoteAddr()).Addr(), addrPort(c.LocalAddr()))
				io.Copy(c, c)
			}()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	return clients
}

// greeting dials to from h and returns the addresses that the application saw,
// having sent payload both ways.
func greeting(h *testnet.Host, to netip.AddrPort, payload string) (string, error) {
	c, err := h.Dial(to)
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	var line []byte
	for b := make([]byte, 1); ; line = append(line, b[0]) {
		if _, err := io.ReadFull(c, b); err != nil {
			return "", err
		}
		if b[0] == '\n' {
			break
		}
	}
	return string(line), roundTrip(c, payload)
}

func TestTwoNodes(t *testing.T) {
	s := newStreet(t)
	serveApp(t, s.server.Host, ":8080")
	vip4, vip6 := netip.MustParseAddr("10.96.0.1"), netip.MustParseAddr("fd96::1")
	s.change(func(w *world) {
		w.ss = append(w.ss, service("server", vip4.String(), vip6.String()))
		for i := range w.ws {
			if w.ws[i].Name.Name == "server" {
				w.ws[i] = in(w.ws[i], "server", 8080)
			}
		}
	})
	for _, tt := range []struct {
		name string
		to   netip.AddrPort
		sees string
	}{
		{"pod address", netip.AddrPortFrom(s.server.V4, 8080), fmt.Sprintf("%v %v", s.client.V4, netip.AddrPortFrom(s.server.V4, 8080))},
		{"pod address over IPv6", netip.AddrPortFrom(s.server.V6, 8080), fmt.Sprintf("%v %v", s.client.V6, netip.AddrPortFrom(s.server.V6, 8080))},
		{"service", netip.AddrPortFrom(vip4, 80), fmt.Sprintf("%v %v", s.client.V4, netip.AddrPortFrom(s.server.V4, 8080))},
		{"service over IPv6", netip.AddrPortFrom(vip6, 80), fmt.Sprintf("%v %v", s.client.V6, netip.AddrPortFrom(s.server.V6, 8080))},
	} {
		t.Run(tt.name, func(t *testing.T) {
			const secret = "the payload that nobody on the wire may read"
			tap := s.two.host.Tap("uplink")
			saw, err := greeting(s.client.Host, tt.to, secret)
			if err != nil {
				t.Fatal(err)
			}
			if saw != tt.sees {
				t.Errorf("the application saw %q, want %q: the client's own address", saw, tt.sees)
			}
			// Something in clear that comes after all of it on the same wire.
			last := []byte("end of the tape")
			s.outside.Do(func() error {
				c, err := net.Dial("udp", netip.AddrPortFrom(s.two.host.V4, 9).String())
				if err == nil {
					defer c.Close()
					_, err = c.Write(last)
				}
				return err
			})
			frames := tap.Until(last)
			tunnel := 0
			for _, f := range frames {
				if bytes.Contains(f, []byte(secret)) {
					t.Error("the payload was on the wire in clear")
				}
				if bytes.Contains(f, []byte{0x3a, 0xa0}) { // port 15008
					tunnel++
				}
			}
			if tunnel == 0 {
				t.Errorf("none of %d frames was of the tunnel", len(frames))
			}
		})
	}
	s.one.logged(`direction="outbound"`, `src.identity="spiffe://cluster.local/ns/shop/sa/client"`, `dst.identity="spiffe://cluster.local/ns/shop/sa/server"`)
	s.two.logged(`direction="inbound"`, `src.identity="spiffe://cluster.local/ns/shop/sa/client"`, `dst.identity="spiffe://cluster.local/ns/shop/sa/server"`)
}

func TestPlainClientOnTheWire(t *testing.T) {
	s := newStreet(t)
	serveApp(t, s.server.Host, ":8080")
	for name, to := range map[string]netip.AddrPort{
		s.outside.V4.String(): netip.AddrPortFrom(s.server.V4, 8080),
		s.outside.V6.String(): netip.AddrPortFrom(s.server.V6, 8080),
	} {
		s.setPolicies()
		saw, err := greeting(s.outside, to, "plain")
		if err != nil {
			t.Fatalf("PERMISSIVE, from %s: %v", name, err)
		}
		if want := fmt.Sprintf("%s %v", name, to); saw != want {
			t.Errorf("the application saw %q, want %q", saw, want)
		}
		s.setPolicies(strict())
		saw, err = greeting(s.outside, to, "plain")
		if err == nil {
			t.Errorf("STRICT, from %s: the application answered %q", name, saw)
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("STRICT, from %s: %v, want to be refused at once", name, err)
		}
		if _, err := greeting(s.client.Host, to, "tunnelled"); err != nil {
			t.Errorf("STRICT, from the mesh: %v", err)
		}
	}
	// Our own ports are no way in.
	for _, port := range []uint16{15001, 15006} {
		if saw, err := greeting(s.outside, netip.AddrPortFrom(s.server.V4, port), "x"); err == nil {
			t.Errorf("port %d answered %q", port, saw)
		}
	}
}

func TestCapturedPodReachesTheOutside(t *testing.T) {
	s := newStreet(t)
	serveApp(t, s.outside, ":7000")
	for _, tt := range []struct{ from, to netip.Addr }{{s.client.V4, s.outside.V4}, {s.client.V6, s.outside.V6}} {
		to := netip.AddrPortFrom(tt.to, 7000)
		saw, err := greeting(s.client.Host, to, "plain")
		if err != nil {
			t.Fatal(err)
		}
		if want := fmt.Sprintf("%v %v", tt.from, to); saw != want {
			t.Errorf("the outside saw %q, want %q", saw, want)
		}
	}
}

// alias gives lo another address.
func alias(t *testing.T, h *testnet.Host, addr string) {
	t.Helper()
	err := h.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		r, err := unix.NewIfreq("lo:1")
		if err != nil {
			return err
		}
		if err := r.SetInet4Addr(netip.MustParseAddr(addr).AsSlice()); err != nil {
			return err
		}
		return unix.IoctlIfreq(fd, unix.SIOCSIFADDR, r)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// A process that dials the listeners in its own pod gets nothing but an end.
func TestPodDialsItsOwnListeners(t *testing.T) {
	s := newStreet(t)
	alias(t, s.client.Host, "192.0.2.50") // an address that the agent does not know
	for _, to := range []string{
		"127.0.0.1:15001", "[::1]:15001", s.client.V4.String() + ":15001", s.client.V4.String() + ":15006",
		"127.0.0.1:15006", "192.0.2.50:80", "192.0.2.50:15001",
	} {
		ap := netip.MustParseAddrPort(to)
		if saw, err := greeting(s.client.Host, ap, "x"); err == nil {
			t.Errorf("%s answered %q", to, saw)
		}
	}
	eventually(t, "that nothing goes round in the proxy", func() bool { return len(s.one.flows.all()) == 0 })
	for _, l := range s.one.log.lines() {
		if strings.Contains(l, "15001") && !strings.Contains(l, "error=") {
			t.Errorf("a connection to our own listener was carried: %s", l)
		}
	}
}

// A client's plain connection must not have the port that the proxy uses in
// the client's name towards the same application. With as few ports as here,
// the kernel's own choice would soon make it so.
func TestClientPortsAreNotTakenTwice(t *testing.T) {
	s := newStreet(t)
	serveApp(t, s.server.Host, ":8080")
	to := netip.AddrPortFrom(s.server.V4, 8080)
	s.server.Sysctl("net/ipv4/ip_local_port_range", "40000 40015")
	s.outside.Sysctl("net/ipv4/ip_local_port_range", "40000 40015")
	for i := range 8 {
		c, err := s.outside.Dial(to)
		if err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		c.SetDeadline(time.Now().Add(5 * time.Second))
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
	}
}

// An application can start to listen on a port that the proxy uses in a
// client's name.
func TestClientPortsDoNotBlockListeners(t *testing.T) {
	s := newStreet(t)
	ports := serveApp(t, s.server.Host, ":8080")
	c, err := s.outside.Dial(netip.AddrPortFrom(s.server.V4, 8080))
	if err != nil {
		t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	s.server.Listen(fmt.Sprintf(":%d", (<-ports).Port()))
}

// What arrives while no proxy accepts waits for the next one.
func TestProxyRestart(t *testing.T) {
	s := newStreet(t)
	serveApp(t, s.server.Host, ":8080")
	to := netip.AddrPortFrom(s.server.V4, 8080)
	if _, err := greeting(s.client.Host, to, "before"); err != nil {
		t.Fatal(err)
	}
	held := s.two.Held()
	s.two.stop()
	done := make(chan error, 1)
	go func() {
		_, err := greeting(s.client.Host, to, "meanwhile")
		done <- err
	}()
	next := s.node(nil)
	for _, e := range held {
		if err := next.Add(context.Background(), e.Pod, e.Files); err != nil {
			t.Fatal(err)
		}
	}
	if err := <-done; err != nil {
		t.Errorf("a connection made while the proxy was away: %v", err)
	}
	next.logged(`direction="inbound"`)
}

// A pod leaves the mesh: what is open goes on, what is new goes direct.
func TestLeavingKeepsConnections(t *testing.T) {
	s := newStreet(t)
	serveApp(t, s.server.Host, ":8080")
	to := netip.AddrPortFrom(s.server.V4, 8080)
	open := func(h *testnet.Host) net.Conn {
		c, err := h.Dial(to)
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(30 * time.Second))
		for b := make([]byte, 1); b[0] != '\n'; { // the greeting
			if _, err := io.ReadFull(c, b); err != nil {
				t.Fatal(err)
			}
		}
		return c
	}
	tunnelled, plain := open(s.client.Host), open(s.outside)
	// The order of the node agent: the peers are told, the capture ends, the
	// proxy is told.
	s.change(func(w *world) {
		for i := range w.ws {
			if w.ws[i].Name.Name == "server" {
				w.ws[i].Transport = mesh.PlainTCP
			}
		}
	})
	if err := s.capturedServer.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.two.Del("uid-server")
	for name, c := range map[string]net.Conn{"tunnelled": tunnelled, "plain": plain} {
		if err := roundTrip(c, "after"); err != nil {
			t.Errorf("the %s connection: %v", name, err)
		}
	}
	before := len(s.two.flows.all())
	for _, h := range []*testnet.Host{s.client.Host, s.outside} {
		if _, err := greeting(h, to, "direct"); err != nil {
			t.Errorf("a new connection from %s: %v", h.Name, err)
		}
	}
	if after := len(s.two.flows.all()); after != before {
		t.Errorf("%d connections in the proxy, before it were %d", after, before)
	}
}
