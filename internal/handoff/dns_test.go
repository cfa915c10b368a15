package handoff

import (
	"context"
	"net"
	"path/filepath"
	"testing"
)

// TestNameSockets: the sockets for name queries go only to a ztunnel that says
// that it takes them. To one of a release without them they would be a breach
// of the protocol.
func TestNameSockets(t *testing.T) {
	c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for name, takes := range map[string]bool{"takes them": true, "of an earlier release": false} {
		t.Run(name, func(t *testing.T) {
			f, _ := testFiles(t)
			socket, err := c.File()
			if err != nil {
				t.Fatal(err)
			}
			defer socket.Close()
			f.Listeners[DNS4] = socket
			path := filepath.Join(t.TempDir(), "s")
			s := startServer(t, ServerConfig{Path: path})
			if s.ServesDNS() {
				t.Error("nobody is connected, and takes name sockets")
			}
			h := newFakeProxy(t)
			run(t, NewClient(ClientConfig{Path: path, Handler: h, DNS: takes, Log: s.cfg.Log}).Run)
			eventually(t, "the ztunnel", func() bool { n, _ := s.Connected(); return n == 1 })
			if got := s.ServesDNS(); got != takes {
				t.Errorf("ServesDNS is %v, want %v", got, takes)
			}
			if err := s.Add(context.Background(), testPod, f); err != nil {
				t.Fatal(err)
			}
			e, _ := h.entry(testPod.UID)
			if got := e.Files.Listeners[DNS4] != nil; got != takes {
				t.Errorf("the socket has come: %v, want %v", got, takes)
			}
			if e.Files.Listeners[Out4] == nil {
				t.Error("the listener has not come")
			}
		})
	}
}
