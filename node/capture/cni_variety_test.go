package capture

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/weft-mesh/weft/internal/testnet"
)

// bulk is how much is sent each way through one connection.
const bulk = 1 << 19

// exchange sends a lot and wants it back.
func (k talk) exchange() error {
	k.SetDeadline(time.Now().Add(4 * soon))
	defer k.SetDeadline(time.Time{})
	out := make([]byte, bulk)
	src := rand.NewChaCha8([32]byte{1})
	src.Read(out)
	sent := make(chan error, 1)
	go func() {
		_, err := k.Write(out)
		sent <- err
	}()
	in := make([]byte, bulk)
	_, err := io.ReadFull(k, in)
	if err != nil {
		k.Close()
		<-sent
		return err
	}
	if err := <-sent; err != nil {
		return err
	}
	if !bytes.Equal(in, out) {
		return fmt.Errorf("%d bytes came back changed", bulk)
	}
	return nil
}

// A trip is one connection that a captured pod has to have.
type trip struct {
	name     string
	from, to *testnet.Host
	role     string // of the proxy's listener that has to see it; empty if none
	// at is the address to connect to, if it is not one of the host's own.
	at []netip.Addr
}

func (s *stage) trips() []trip {
	return []trip{
		{name: "out to the outside", from: s.pod.Host, to: s.outside, role: "out"},
		{name: "out to the neighbour", from: s.pod.Host, to: s.peer.Host, role: "out"},
		{name: "out to the node", from: s.pod.Host, to: s.node.Host, role: "out"},
		{name: "in from the outside", from: s.outside, to: s.pod.Host, role: "in"},
		{name: "in from the neighbour", from: s.peer.Host, to: s.pod.Host, role: "in"},
		{name: "probe", from: s.node.Host, to: s.pod.Host},
		{name: "itself", from: s.pod.Host, to: s.pod.Host},
	}
}

// works makes the trips in every family that the pod has, with data in bulk,
// and counts those that fail.
func (s *stage) works(t *testing.T, c *card, row string, x *proxy, trips []trip) {
	t.Helper()
	for _, tr := range trips {
		at := tr.at
		if at == nil {
			at = []netip.Addr{tr.to.V4, tr.to.V6}
		}
		for _, a := range at {
			if !a.IsValid() || a.Is4() && !s.pod.V4.IsValid() || a.Is6() && !s.pod.V6.IsValid() {
				continue
			}
			err := s.trip(tr, netip.AddrPortFrom(a, 8080), x)
			c.use(row, err == nil)
			if err != nil {
				t.Errorf("%s, %s to %v: %v", row, tr.name, a, err)
			}
		}
	}
}

func (s *stage) trip(tr trip, to netip.AddrPort, x *proxy) error {
	before := map[string]int{"in": x.count("in"), "out": x.count("out")}
	k, err := connect(tr.from, to)
	if err != nil {
		return err
	}
	defer k.Close()
	if err := k.exchange(); err != nil {
		return fmt.Errorf("in bulk: %w", err)
	}
	for role, n := range before {
		want := n
		if role == tr.role {
			want++
		}
		if got := x.count(role); got != want {
			return fmt.Errorf("the proxy saw %d connections on %s, want %d", got-n, role, want-n)
		}
	}
	// The server sees who it is, also behind the proxy. Of several addresses,
	// the kernel may choose another for the proxy than for the app.
	own, err := tr.from.Addrs()
	if err == nil && !slices.Contains(own, k.client.Addr()) {
		err = fmt.Errorf("the server sees %v, want one of %v", k.client.Addr(), own)
	}
	return err
}

// TestPluginVariety captures a pod in networks as CNI plug-ins make them.
func TestPluginVariety(t *testing.T) {
	worlds := []struct {
		row     string
		kind    testnet.Kind
		shape   testnet.Shape
		prepare func(s *stage)
	}{
		{row: "cni.bridge", kind: testnet.Bridged},
		{row: "cni.routed", kind: testnet.Routed},
		{row: "cni.rp_filter", kind: testnet.Routed, prepare: strictEverywhere},
		{row: "cni.rp_filter", kind: testnet.Bridged, prepare: strictEverywhere},
		{row: "cni.ipv6_only", kind: testnet.Routed, shape: testnet.Shape{NoIPv4: true}},
		{row: "cni.ipv6_only", kind: testnet.Bridged, shape: testnet.Shape{NoIPv4: true}},
		{row: "cni.ipv6_disabled", kind: testnet.Routed, shape: testnet.Shape{NoIPv6: true}},
		{row: "cni.ipv6_disabled", kind: testnet.Bridged, shape: testnet.Shape{NoIPv6: true}},
		{row: "cni.interface_name", kind: testnet.Routed, shape: testnet.Shape{Interface: "net-7.x"}},
		{row: "cni.mtu_1280", kind: testnet.Routed, prepare: mtu(1280)},
		{row: "cni.mtu_1280", kind: testnet.Bridged, prepare: mtu(1280)},
		{row: "cni.mtu_1500", kind: testnet.Bridged, prepare: mtu(1500)},
		{row: "cni.mtu_9000", kind: testnet.Routed, prepare: mtu(9000)},
		{row: "cni.mtu_9000", kind: testnet.Bridged, prepare: mtu(9000)},
		// The pods' wires are wider than the way between nodes: whoever sends
		// must be told, and in the pod that is the proxy.
		{row: "cni.mtu_mixed", kind: testnet.Routed, prepare: func(s *stage) { s.world.SetMTU(1280) }},
	}
	score := newCard(t)
	for _, w := range worlds {
		kind := map[testnet.Kind]string{testnet.Routed: "routed", testnet.Bridged: "bridged"}[w.kind]
		t.Run(w.row+"/"+kind, func(t *testing.T) {
			s := shapedStage(t, w.kind, w.shape)
			if w.prepare != nil {
				w.prepare(s)
			}
			s.apps()
			_, x := s.captured(Mode{New: true})
			s.works(t, score, w.row, x, s.trips())
		})
	}
}

// strictEverywhere sets the strict reverse path filter, which a node of testnet
// has, in the pods too.
func strictEverywhere(s *stage) {
	for _, h := range []*testnet.Host{s.node.Host, s.outside, s.pod.Host, s.peer.Host} {
		for _, which := range []string{"all", "default", "lo"} {
			h.Sysctl("net/ipv4/conf/"+which+"/rp_filter", "1")
		}
	}
	for _, p := range []*testnet.Pod{s.pod, s.peer} {
		p.Sysctl("net/ipv4/conf/"+p.Interface+"/rp_filter", "1")
		p.Node.Sysctl("net/ipv4/conf/"+p.Veth+"/rp_filter", "1")
	}
}

func mtu(n int) func(s *stage) {
	return func(s *stage) { s.world.SetMTU(n, s.pod, s.peer) }
}

// TestTwoAddressesOfAFamily: what is for a pod's second address is captured as
// what is for its first.
func TestTwoAddressesOfAFamily(t *testing.T) {
	s := newStage(t, testnet.Routed)
	score := newCard(t)
	second := []netip.Addr{netip.MustParseAddr("10.77.1.99"), netip.MustParseAddr("fd77:0:0:1::99")}
	for _, a := range second {
		s.pod.Run("ip", "addr", "add", netip.PrefixFrom(a, a.BitLen()).String(), "dev", "eth0")
		s.node.Run("ip", "route", "add", netip.PrefixFrom(a, a.BitLen()).String(), "dev", s.pod.Veth)
		s.node.Run("ip", "neigh", "replace", a.String(), "lladdr", s.pod.MAC("eth0").String(), "dev", s.pod.Veth, "nud", "permanent")
	}
	s.apps()
	_, x := s.captured(Mode{New: true})
	trips := s.trips()
	for _, tr := range s.trips() {
		if tr.to == s.pod.Host {
			tr.at = second
			tr.name += ", second address"
			trips = append(trips, tr)
		}
	}
	s.works(t, score, "cni.two_addresses", x, trips)
}

// TestTwoPluginsOnOneNode: captured pods of a bridge and captured pods with
// routes of their own, on one node, reach each other and are told apart.
func TestTwoPluginsOnOneNode(t *testing.T) {
	s := newStage(t, testnet.Routed)
	score := newCard(t)
	bridged := s.node.Pod("bridged", testnet.Bridged)
	startApp(t, bridged.Host, ":8080")
	s.apps()
	_, x := s.captured(Mode{New: true})
	p, err := s.capture.Prepare(t.Context(), targetOf(bridged), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	y := startProxy(t, p)
	if err := p.Attach(t.Context(), Mode{New: true}); err != nil {
		t.Fatal(err)
	}
	s.works(t, score, "cni.bridge_and_ptp", x, []trip{
		{name: "routed to bridged", from: s.pod.Host, to: bridged.Host, role: "out"},
		{name: "bridged to routed", from: bridged.Host, to: s.pod.Host, role: "in"},
	})
	s.works(t, score, "cni.bridge_and_ptp", y, []trip{
		{name: "routed to bridged", from: s.pod.Host, to: bridged.Host, role: "in"},
		{name: "bridged to routed", from: bridged.Host, to: s.pod.Host, role: "out"},
		{name: "bridged to the outside", from: bridged.Host, to: s.outside, role: "out"},
		{name: "the outside to bridged", from: s.outside, to: bridged.Host, role: "in"},
		{name: "the node to bridged", from: s.node.Host, to: bridged.Host},
	})
}
