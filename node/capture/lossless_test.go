package capture

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/weft-mesh/weft/internal/testnet"
)

// A volley is a datagram that goes back and forth between two hosts, as fast as
// it can. Nobody sends it again: it stops when one is lost.
type volley struct {
	name  string
	turns atomic.Int64
	end   chan error // gets why it stopped
	conns []net.PacketConn
}

func startVolley(t testing.TB, name string, from, to *testnet.Host, local, remote netip.Addr) *volley {
	t.Helper()
	v := &volley{name: name, end: make(chan error, 1)}
	open := func(h *testnet.Host, a netip.Addr) *net.UDPConn {
		var c *net.UDPConn
		err := h.NS.Do(func() (err error) {
			c, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(a, 0)))
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		v.conns = append(v.conns, c)
		return c
	}
	client, server := open(from, local), open(to, remote)
	go func() {
		b := make([]byte, 16)
		for {
			n, peer, err := server.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			server.WriteToUDPAddrPort(b[:n], peer)
		}
	}()
	go func() { v.end <- v.play(client, server.LocalAddr().(*net.UDPAddr).AddrPort()) }()
	return v
}

func (v *volley) play(c *net.UDPConn, to netip.AddrPort) error {
	b := make([]byte, 16)
	for {
		if _, err := c.WriteToUDPAddrPort([]byte("there and back"), to); err != nil {
			return err
		}
		c.SetReadDeadline(time.Now().Add(soon))
		if _, _, err := c.ReadFromUDPAddrPort(b); err != nil {
			return err
		}
		v.turns.Add(1)
	}
}

// stop returns why the volley had stopped, nil if it had not.
func (v *volley) stop() error {
	for _, c := range v.conns {
		c.Close()
	}
	if err := <-v.end; !errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("%s: stopped after %d turns: %w", v.name, v.turns.Load(), err)
	}
	return nil
}

// volleys crosses every interface at which a program is attached.
func (s *stage) volleys() (all []*volley) {
	s.t.Helper()
	lo4, lo6 := netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()
	return []*volley{
		startVolley(s.t, "over the wire, IPv4", s.pod.Host, s.outside, s.pod.V4, s.outside.V4),
		startVolley(s.t, "over the wire, IPv6", s.pod.Host, s.outside, s.pod.V6, s.outside.V6),
		startVolley(s.t, "on lo, IPv4", s.pod.Host, s.pod.Host, lo4, lo4),
		startVolley(s.t, "on lo, IPv6", s.pod.Host, s.pod.Host, lo6, lo6),
	}
}

// goOn waits until each volley has made some turns more.
func goOn(t *testing.T, when string, all []*volley) {
	t.Helper()
	for _, v := range all {
		from := v.turns.Load()
		eventually(t, when+", the volley goes on "+v.name, func() bool { return v.turns.Load() > from+20 })
	}
}

// TestNoDatagramIsLost: what is put on a pod that runs, and taken off, costs it
// no packet, not even one of those that nobody sends again: a name query that
// is lost is a request that hangs.
func TestNoDatagramIsLost(t *testing.T) {
	s := newStage(t, testnet.Routed)
	all := s.volleys()
	joinAndLeave := func(m Mode) {
		p, x := s.prepare()
		if !m.New {
			goOn(t, "prepared", all)
		}
		if err := p.Attach(t.Context(), m); err != nil {
			t.Fatal(err)
		}
		goOn(t, "captured", all)
		p.background.Wait()
		goOn(t, "held by links", all)
		if !s.guardsWire(p) {
			t.Error("guard_pod has not come")
		}
		if err := p.Detach(t.Context()); err != nil {
			t.Fatal(err)
		}
		goOn(t, "not captured", all)
		x.stopAccepting()
		if err := p.Drained(t.Context()); err != nil {
			t.Fatal(err)
		}
		x.kill()
		p.Close()
	}
	for range 3 {
		joinAndLeave(Mode{Existing: Keep})
	}
	joinAndLeave(Mode{Existing: Reset})
	for _, v := range all {
		if err := v.stop(); err != nil {
			t.Error(err)
		}
	}
}

// TestNoDatagramOfANewPodIsLost: it may send from the moment in which it is
// captured, while its programs are still being fastened, and when it leaves and
// joins again.
func TestNoDatagramOfANewPodIsLost(t *testing.T) {
	s := newStage(t, testnet.Routed)
	p, x := s.prepare()
	if err := p.Attach(t.Context(), Mode{New: true}); err != nil {
		t.Fatal(err)
	}
	all := s.volleys()
	goOn(t, "captured", all)
	p.background.Wait()
	goOn(t, "held by links", all)
	if filters := s.pod.Run("tc", "filter", "show", "dev", "eth0", "ingress"); filters != "" {
		t.Errorf("filters are left when there are links:\n%s", filters)
	}
	if err := p.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}
	goOn(t, "not captured", all)
	p.Close()
	p, err := s.capture.Prepare(t.Context(), s.target(), &x.files.Listeners)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	s.attach(p, Mode{Existing: Keep})
	goOn(t, "captured again", all)
	for _, v := range all {
		if err := v.stop(); err != nil {
			t.Error(err)
		}
	}
}
