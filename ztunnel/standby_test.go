package ztunnel

import (
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/weft-mesh/weft/mesh"
)

// A proxy that stands by takes pods and leaves their connections alone, so
// that another may accept them; activated, it accepts those that wait.
func TestStandby(t *testing.T) {
	w := newWorld(t)
	n := w.node(func(c *Config) { c.Standby = true })
	client := n.add("client", nil)
	server := n.add("server", func(w *mesh.Workload) { w.Transport = mesh.PlainTCP })
	at := server.app(echo)
	// What the client dials: its outbound listener, at the server's address.
	target := net.TCPAddr{IP: server.addr.AsSlice(), Port: int(client.port)}
	c, err := net.DialTCP("tcp", &net.TCPAddr{IP: client.addr.AsSlice()}, &target)
	if err != nil {
		t.Fatal(err) // the listener's backlog takes it
	}
	defer c.Close()
	if _, err := c.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	if got := client.outlet.dialed(); len(got) != 0 {
		t.Fatalf("standing by, it has dialed %v", got)
	}
	if held := n.Held(); len(held) != 2 {
		t.Errorf("it holds %d pods, want 2", len(held))
	} else {
		for _, e := range held {
			e.Files.Close()
		}
	}
	client.outlet.route(netip.AddrPortFrom(server.addr, client.port), at)
	n.Activate()
	n.Activate()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	b := make([]byte, 5)
	if _, err := io.ReadFull(c, b); err != nil || string(b) != "hello" {
		t.Errorf("activated: %q, %v", b, err)
	}
	// A pod that comes later is served at once.
	late := n.add("late", nil)
	late.outlet.route(netip.AddrPortFrom(server.addr, late.port), at)
	c2, err := net.DialTCP("tcp", &net.TCPAddr{IP: late.addr.AsSlice()}, &net.TCPAddr{IP: server.addr.AsSlice(), Port: int(late.port)})
	if err != nil {
		t.Fatal(err)
	}
	defer c2.Close()
	c2.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := c2.Write([]byte("again")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c2, b); err != nil || string(b) != "again" {
		t.Errorf("a later pod: %q, %v", b, err)
	}
}
