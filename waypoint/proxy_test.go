package waypoint

import (
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/weft-mesh/weft/hbone"
	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/view"
)

func status(err error) int {
	var s *hbone.StatusError
	if errors.As(err, &s) {
		return s.Code
	}
	return 0
}

// A connection goes through two tunnels: to the waypoint, and in its own name to
// the pod.
func TestThroughTheWaypoint(t *testing.T) {
	w := newWorld(t, cart)
	w.publish("1", ref, nil)
	s, err := w.connect("10.96.0.1:80", hbone.Header{Forwarded: `for="203.0.113.9:1"`})
	if err != nil {
		t.Fatal(err)
	}
	if err := echoed(s, "hello"); err != nil {
		t.Fatal(err)
	}
	if err := s.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if rest, err := io.ReadAll(s); err != nil || len(rest) > 0 {
		t.Errorf("after the end: %q, %v", rest, err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	f := w.facts[0]
	if f.Peer != client || f.Service.Host != "cart.shop.svc.cluster.local" || f.Port != 80 || f.Destination.String() != "10.96.0.1:80" {
		t.Errorf("facts %+v", f)
	}
	if !f.Source.Addr().IsLoopback() {
		t.Errorf("a forged source was believed: %v", f.Source)
	}
	r := w.asked[0]
	if r.Peer != ours || r.Authority.String() != w.pod.String()+":8080" || r.Header.Forwarded != "" {
		t.Errorf("the pod was asked for %v by %v with %+v", r.Authority, r.Peer, r.Header)
	}
}

// What is not bound to this waypoint is answered with 404, and the tunnel stays.
func TestNotBoundHere(t *testing.T) {
	w := newWorld(t, cart)
	w.publish("1", mesh.GatewayRef{}, nil)
	var all sync.WaitGroup // each waits for the View a moment
	for _, authority := range []string{"10.96.0.1:80", "10.96.0.9:80", w.pod.String() + ":8080", "127.0.0.1:15000", "cart.shop.svc.cluster.local:80"} {
		all.Go(func() {
			if _, err := w.connect(authority, hbone.Header{}); status(err) != 404 {
				t.Errorf("%s: %v, want 404", authority, err)
			}
		})
	}
	all.Wait()
	w.publish("2", ref, nil)
	s, err := w.connect("10.96.0.1:80", hbone.Header{})
	if err != nil {
		t.Fatal(err)
	}
	if err := echoed(s, "x"); err != nil {
		t.Error(err)
	}
}

// A client whose View is ahead waits for ours; one whose View is behind is still
// served.
func TestViewsDiffer(t *testing.T) {
	w := newWorld(t, cart)
	w.publish("1", mesh.GatewayRef{}, nil)
	answered := make(chan error, 1)
	go func() {
		s, err := w.connect("10.96.0.1:80", hbone.Header{})
		if err == nil {
			err = echoed(s, "early")
		}
		answered <- err
	}()
	w.publish("2", ref, nil)
	if err := <-answered; err != nil {
		t.Errorf("ahead of the View: %v", err)
	}
	w.noted(mesh.ServiceName{Namespace: "shop", Host: "cart.shop.svc.cluster.local"})
	w.publish("3", mesh.GatewayRef{}, nil)
	s, err := w.connect("10.96.0.1:80", hbone.Header{})
	if err != nil {
		t.Fatalf("behind the View: %v", err)
	}
	if err := echoed(s, "late"); err != nil {
		t.Error(err)
	}
}

// A pod that proves to be somebody else gets nothing, and nothing goes in clear.
func TestWrongPod(t *testing.T) {
	w := newWorld(t, client)
	w.publish("1", ref, nil)
	plain, err := net.Listen("tcp", w.pod.String()+":8080")
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	s, err := w.connect("10.96.0.1:80", hbone.Header{})
	if err != nil {
		t.Fatal(err)
	}
	if err := echoed(s, "secret"); err == nil {
		t.Error("a pod with a wrong identity was spoken to")
	}
	w.mu.Lock()
	if len(w.asked) > 0 {
		t.Errorf("it was asked for %v", w.asked[0].Authority)
	}
	w.mu.Unlock()
	plain.(*net.TCPListener).SetDeadline(time.Now())
	if c, err := plain.Accept(); err == nil {
		t.Errorf("a connection in clear from %v", c.RemoteAddr())
	}
}

// Only a peer that proves to be the waypoint is spoken to, and only who proves
// an identity is listened to.
func TestTunnelIdentities(t *testing.T) {
	w := newWorld(t, cart)
	w.publish("1", ref, nil)
	_, err := w.pool.Connect(t.Context(), hbone.Target{Owner: "c", Source: client, Peers: []mesh.Identity{cart}, Address: w.at}, "10.96.0.1:80", hbone.Header{})
	if err == nil || !strings.Contains(err.Error(), "not who was expected") {
		t.Errorf("expecting somebody else: %v", err)
	}
	stranger := client
	stranger.TrustDomain = "example.org"
	if _, err := w.pool.Connect(t.Context(), hbone.Target{Owner: "c", Source: stranger, Peers: []mesh.Identity{ours}, Address: w.at}, "10.96.0.1:80", hbone.Header{}); err == nil {
		t.Error("an identity of another trust domain was let in")
	}
}

// A waypoint that is asked to end is not ready, finishes what it serves, and
// takes nothing new.
func TestDrain(t *testing.T) {
	w := newWorld(t, cart)
	if err := w.proxy.Ready(); err == nil {
		t.Error("ready without a View")
	}
	w.publish("1", ref, nil)
	s, err := w.connect("10.96.0.1:80", hbone.Header{})
	if err != nil {
		t.Fatal(err)
	}
	if err := echoed(s, "before"); err != nil {
		t.Fatal(err)
	}
	if err := w.proxy.Ready(); err != nil {
		t.Errorf("not ready: %v", err)
	}
	w.end()
	refuses := func(what string, try func() (net.Conn, error)) {
		t.Helper()
		for deadline := time.Now().Add(20 * time.Second); ; {
			c, err := try()
			if err != nil {
				return
			}
			c.Close()
			if time.Now().After(deadline) {
				t.Fatalf("it still takes %s", what)
			}
		}
	}
	refuses("tunnels", func() (net.Conn, error) { return net.Dial("tcp", w.at.String()) })
	if err := w.proxy.Ready(); err == nil {
		t.Error("ready while it ends")
	}
	if err := echoed(s, "meanwhile"); err != nil {
		t.Errorf("what was open: %v", err)
	}
	// A tunnel that has not been told yet may bring one.
	refuses("connections", func() (net.Conn, error) { return w.connect("10.96.0.1:80", hbone.Header{}) })
	s.Close()
	if err := <-w.ended; err != nil {
		t.Errorf("Run = %v", err)
	}
}

func TestReadySaysWhyNot(t *testing.T) {
	w := newWorld(t, cart)
	w.store.Set(view.New("1", nil, nil, nil))
	if err := w.proxy.Ready(); err == nil || !strings.Contains(err.Error(), "shop/waypoint") {
		t.Errorf("without the waypoint in the View: %v", err)
	}
}

func TestConfigComplainsOfAll(t *testing.T) {
	_, err := New(Config{})
	for _, want := range []string{"View", "Identity", "Roots", "ID", "Gateway", "Log"} {
		if err == nil || !strings.Contains(err.Error(), "Config."+want) {
			t.Errorf("no complaint of %s in %v", want, err)
		}
	}
}
