package ztunnel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/weft-mesh/weft/internal/handoff"
	"github.com/weft-mesh/weft/internal/testnet"
	"github.com/weft-mesh/weft/node/capture"
	"github.com/weft-mesh/weft/ztunnel/dns"
)

// A nameServer is an ordinary one, outside of the mesh. What it says depends on
// the first label of the name.
type nameServer struct {
	t    testing.TB
	work sync.WaitGroup

	mu sync.Mutex
	// spoof, if set, is called before an answer is sent, to send others.
	spoof func(c net.PacketConn, to net.Addr, query []byte)
	seen  []string // "protocol client name"
	ids   map[uint16]bool
}

func newNameServer(t testing.TB, h *testnet.Host, addrs ...netip.Addr) *nameServer {
	s := &nameServer{t: t, ids: map[uint16]bool{}}
	t.Cleanup(s.work.Wait) // after all that is registered later
	for _, a := range addrs {
		at := netip.AddrPortFrom(a, 53).String()
		var c net.PacketConn
		if err := h.Do(func() (err error) { c, err = net.ListenPacket("udp", at); return err }); err != nil {
			t.Fatal(err)
		}
		l := h.Listen(at)
		s.work.Go(func() { s.packets(c) })
		s.work.Go(func() { s.connections(l) })
		t.Cleanup(func() { c.Close(); l.Close() })
	}
	return s
}

func (s *nameServer) packets(c net.PacketConn) {
	for b := make([]byte, 65535); ; {
		n, from, err := c.ReadFrom(b)
		if err != nil {
			return
		}
		s.mu.Lock()
		spoof := s.spoof
		s.mu.Unlock()
		if spoof != nil {
			spoof(c, from, b[:n])
		}
		if reply := s.reply("udp", from, b[:n]); reply != nil {
			c.WriteTo(reply, from)
		}
	}
}

func (s *nameServer) connections(l *net.TCPListener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		s.work.Go(func() {
			defer c.Close()
			c.SetDeadline(time.Now().Add(20 * time.Second))
			for {
				m, err := dns.ReadFrame(c)
				if err != nil {
					return
				}
				if strings.Contains(string(m), "zone") { // a transfer: two messages
					dns.WriteFrame(c, s.reply("tcp", c.RemoteAddr(), m))
				}
				if dns.WriteFrame(c, s.reply("tcp", c.RemoteAddr(), m)) != nil || strings.Contains(string(m), "once") {
					return
				}
			}
		})
	}
}

// reply answers A and AAAA for every name.
func (s *nameServer) reply(protocol string, from net.Addr, query []byte) []byte {
	var m dnsmessage.Message
	if err := m.Unpack(query); err != nil || len(m.Questions) != 1 {
		s.t.Errorf("the name server got %x: %v", query, err)
		return nil
	}
	q := m.Questions[0]
	ap, _ := netip.ParseAddrPort(from.String())
	s.mu.Lock()
	s.seen = append(s.seen, fmt.Sprint(protocol, " ", ap.Addr().Unmap(), " ", q.Name))
	s.ids[m.ID] = true
	s.mu.Unlock()
	m.Response, m.Additionals = true, nil
	records := 1
	switch first, _, _ := strings.Cut(strings.ToLower(q.Name.String()), "."); first {
	case "silent":
		return nil
	case "nx":
		m.RCode = dnsmessage.RCodeNameError
		records = 0
	case "big":
		records = 100
		if protocol == "udp" {
			m.Truncated, records = true, 0
		}
	case "huge":
		records = 300 // 4.8 KB, whatever the client takes
	}
	h := dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: 77}
	for i := range records {
		if q.Type == dnsmessage.TypeAAAA {
			m.Answers = append(m.Answers, dnsmessage.Resource{Header: h, Body: &dnsmessage.AAAAResource{AAAA: [16]byte{0x20, 1, 0xd, 0xb8, 15: 5}}})
		} else {
			m.Answers = append(m.Answers, dnsmessage.Resource{Header: h, Body: &dnsmessage.AResource{A: [4]byte{203, 0, byte(i), 5}}})
		}
	}
	b, err := m.Pack()
	if err != nil {
		s.t.Error(err)
	}
	return b
}

func (s *nameServer) asked() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.seen)
}

func (s *nameServer) askedFor(name string) bool {
	return slices.ContainsFunc(s.asked(), func(l string) bool { return strings.HasSuffix(l, " "+name) })
}

// nameStreet is a street whose client's name queries are captured, with a name
// server outside and a service "cart".
func nameStreet(t *testing.T) (*street, *nameServer) {
	t.Helper()
	net := testnet.New(t)
	s := &street{world: newWorld(t), net: net}
	bpffs := testnet.BPFFS(t)
	s.one = s.realNode(net.Node("one"), bpffs)
	s.outside = net.Host("outside")
	s.client, s.server = s.one.host.Pod("client", testnet.Routed), s.one.host.Pod("server", testnet.Routed)
	s.one.enrolNames(s.client)
	s.one.enrolNames(s.server)
	s.change(func(w *world) {
		w.ss = append(w.ss, service("cart", "10.96.0.1", "fd96::1"))
	})
	return s, newNameServer(t, s.outside, s.outside.V4, s.outside.V6)
}

// enrolNames is enrol for a pod whose name queries are captured too.
func (n *realNode) enrolNames(p *testnet.Pod) *capture.Pod {
	t := n.world.t
	t.Helper()
	uid := "uid-" + p.Name
	captured, err := n.capture.Prepare(t.Context(), capture.Target{UID: uid, Netns: p.NS, Addrs: []netip.Addr{p.V4, p.V6}, DNS: true}, nil)
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

// inside returns a dialer that dials from inside h.
func inside(h *testnet.Host) func(ctx context.Context, network, address string) (net.Conn, error) {
	return func(ctx context.Context, network, address string) (c net.Conn, err error) {
		err = h.Do(func() error {
			var d net.Dialer
			c, err = d.DialContext(ctx, network, address)
			return err
		})
		return c, err
	}
}

// resolve looks a name up from inside h, as programs do.
func resolve(h *testnet.Host, server netip.Addr, network, name string) ([]netip.Addr, error) {
	dial := inside(h)
	r := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, proto, _ string) (net.Conn, error) {
		return dial(ctx, proto, netip.AddrPortFrom(server, 53).String())
	}}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	as, err := r.LookupNetIP(ctx, network, name)
	for i := range as {
		as[i] = as[i].Unmap()
	}
	return as, err
}

func TestNamesOfTheMeshAndOfOthers(t *testing.T) {
	s, server := nameStreet(t)
	for _, at := range []netip.Addr{s.outside.V4, s.outside.V6} {
		for _, tc := range []struct{ network, name, want string }{
			{"ip4", "cart.shop.svc.cluster.local.", "[10.96.0.1]"},
			{"ip6", "CART.shop.svc.cluster.local.", "[fd96::1]"},
			{"ip4", "www.example.net.", "[203.0.0.5]"},
			{"ip6", "www.example.net.", "[2001:db8::5]"},
		} {
			got, err := resolve(s.client.Host, at, tc.network, tc.name)
			if err != nil || fmt.Sprint(got) != tc.want {
				t.Errorf("%s of %s, asked %v: %v, %v; want %s", tc.network, tc.name, at, got, err, tc.want)
			}
		}
		var gone *net.DNSError
		if got, err := resolve(s.client.Host, at, "ip4", "nx.example.net."); !errors.As(err, &gone) || !gone.IsNotFound {
			t.Errorf("a name that does not exist: %v, %v", got, err)
		}
		if got, err := resolve(s.client.Host, at, "ip4", "big.example.net."); err != nil || len(got) != 100 {
			t.Errorf("an answer that needs TCP: %d addresses, %v", len(got), err)
		}
		if got, err := resolve(s.client.Host, at, "ip4", "huge.example.net."); err != nil || len(got) != 300 {
			t.Errorf("an answer that is longer than what is read over UDP: %d addresses, %v", len(got), err)
		}
	}
	for _, line := range server.asked() {
		if strings.Contains(strings.ToLower(line), "cart") {
			t.Errorf("a name of the mesh went out: %s", line)
		}
		f := strings.Fields(line)
		if f[1] != s.client.V4.String() && f[1] != s.client.V6.String() {
			t.Errorf("the name server saw %s, want the pod's own address", line)
		}
	}
	if !slices.ContainsFunc(server.asked(), func(l string) bool { return strings.HasPrefix(l, "tcp") }) {
		t.Error("nothing went over TCP")
	}
	for name, least := range map[string]float64{
		"istio_dns_requests_total": 14, "istio_dns_upstream_requests_total": 10, "istio_dns_upstream_request_duration_seconds": 10,
	} {
		if got := s.one.sum(name); got < least {
			t.Errorf("%s is %v, want at least %v", name, got, least)
		}
	}
	// A query that was lost is one, and was repeated.
	asked, failed := s.one.sum("istio_dns_upstream_requests_total"), s.one.sum("istio_dns_upstream_failures_total")
	if asked-failed < 10 {
		t.Errorf("%v of %v queries failed", failed, asked)
	}
}

// sum adds up a metric of the node over its labels.
func (n *node) sum(name string) (sum float64) {
	n.world.t.Helper()
	families, err := n.metrics.Gather()
	if err != nil {
		n.world.t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			sum += m.GetCounter().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	return sum
}

// question is a query of one name, with an ID.
func question(t testing.TB, id uint16, name string, kind dnsmessage.Type) []byte {
	t.Helper()
	m := dnsmessage.Message{Header: dnsmessage.Header{ID: id, RecursionDesired: true},
		Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName(name), Type: kind, Class: dnsmessage.ClassINET}}}
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// connected opens a socket inside h, with a deadline.
func connected(t testing.TB, h *testnet.Host, network string, to netip.AddrPort) net.Conn {
	t.Helper()
	c, err := inside(h)(t.Context(), network, to.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(15 * time.Second))
	return c
}

// exchange asks and, as resolvers do, asks again after a while: a datagram may
// be lost.
func exchange(t testing.TB, c net.Conn, query []byte) []byte {
	t.Helper()
	b, _ := ask(t, c, query)
	return b
}

// ask is exchange that says how often it has asked.
func ask(t testing.TB, c net.Conn, query []byte) (answer []byte, sent int) {
	t.Helper()
	b := make([]byte, 65535)
	for n := range 20 {
		if _, err := c.Write(query); err != nil {
			t.Fatal(err)
		}
		c.SetReadDeadline(time.Now().Add(2 * time.Second))
		size, err := c.Read(b)
		if err == nil {
			return b[:size], n + 1
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("no answer: %v", err)
		}
	}
	t.Fatal("no answer to any of 20 queries")
	return nil, 0
}

// Whoever can send packets to the pod must not be able to answer for its name
// server.
func TestSpoofedAnswersArePassedOver(t *testing.T) {
	s, server := nameStreet(t)
	lie := func(query []byte, edit func(m *dnsmessage.Message)) []byte {
		var m dnsmessage.Message
		if err := m.Unpack(query); err != nil {
			t.Error(err)
		}
		m.Response = true
		m.Answers = []dnsmessage.Resource{{
			Header: dnsmessage.ResourceHeader{Name: m.Questions[0].Name, Class: dnsmessage.ClassINET},
			Body:   &dnsmessage.AResource{A: [4]byte{6, 6, 6, 6}},
		}}
		edit(&m)
		b, err := m.Pack()
		if err != nil {
			t.Error(err)
		}
		return b
	}
	same := func(*dnsmessage.Message) {}
	var elsewhere net.PacketConn
	if err := s.outside.Do(func() (err error) { elsewhere, err = net.ListenPacket("udp", ":0"); return err }); err != nil {
		t.Fatal(err)
	}
	defer elsewhere.Close()
	server.mu.Lock()
	server.spoof = func(c net.PacketConn, to net.Addr, query []byte) {
		elsewhere.WriteTo(lie(query, same), to) // from another port
		c.WriteTo(nil, to)
		c.WriteTo([]byte("x"), to)
		c.WriteTo(query, to) // not an answer
		for range 20 {
			c.WriteTo(lie(query, func(m *dnsmessage.Message) { m.ID++ }), to)
		}
		c.WriteTo(lie(query, func(m *dnsmessage.Message) { m.Questions[0].Name = dnsmessage.MustNewName("other.example.net.") }), to)
		c.WriteTo(lie(query, func(m *dnsmessage.Message) { m.Questions[0].Type = dnsmessage.TypeMX }), to)
	}
	server.mu.Unlock()
	for id := range uint16(20) {
		c := connected(t, s.client.Host, "udp", netip.AddrPortFrom(s.outside.V4, 53))
		var m dnsmessage.Message
		if err := m.Unpack(exchange(t, c, question(t, id, "www.example.net.", dnsmessage.TypeA))); err != nil {
			t.Fatal(err)
		}
		if m.ID != id || len(m.Answers) != 1 || m.Answers[0].Body.GoString() != (&dnsmessage.AResource{A: [4]byte{203, 0, 0, 5}}).GoString() {
			t.Fatalf("answer %+v to ID %d", m, id)
		}
	}
	server.mu.Lock()
	defer server.mu.Unlock()
	if n := len(server.seen); n < 20 || len(server.ids) < n-1 {
		t.Errorf("%d queries went out with %d different IDs", n, len(server.ids))
	}
	small := 0
	for id := range server.ids {
		if id < 20 {
			small++
		}
	}
	if small > 2 {
		t.Errorf("%d queries went out with an ID like the client's", small)
	}
}

// A pod that floods, with queries that no server answers, must not keep another
// from its answers. Those ask again as often as they like: a datagram may be
// lost on the way, but who has to wait for the flood's places waits for ever.
func TestFloodOfOnePodIsItsOwn(t *testing.T) {
	s, _ := nameStreet(t)
	at := netip.AddrPortFrom(s.outside.V4, 53)
	stop := make(chan struct{})
	var flood sync.WaitGroup
	var sent atomic.Int64
	for range 4 {
		c := connected(t, s.client.Host, "udp", at)
		c.SetDeadline(time.Time{})
		flood.Go(func() {
			q := question(t, 1, "silent.example.net.", dnsmessage.TypeA)
			for {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := c.Write(q); err == nil {
					sent.Add(1)
				}
			}
		})
	}
	defer flood.Wait()
	defer close(stop)
	eventually(t, "more queries than there are places", func() bool {
		return s.one.sum("istio_dns_upstream_failures_total") > 100 && sent.Load() > 2*maxUpstream
	})
	for i := range uint16(50) {
		c := connected(t, s.server.Host, "udp", at)
		var m dnsmessage.Message
		if err := m.Unpack(exchange(t, c, question(t, i, fmt.Sprintf("n%d.example.net.", i), dnsmessage.TypeA))); err != nil {
			t.Fatal(err)
		}
		if m.RCode != dnsmessage.RCodeSuccess || len(m.Answers) != 1 {
			t.Fatalf("another pod got %+v", m)
		}
	}
}

// A pod whose queries take all of its places at name servers, because those do
// not answer, still gets the names of the mesh; and no more than the places are
// taken.
func TestNamesOfTheMeshNeedNoPlace(t *testing.T) {
	s, server := nameStreet(t)
	at := netip.AddrPortFrom(s.outside.V4, 53)
	s.one.mu.Lock()
	r := s.one.pods["uid-client"].resolver
	s.one.mu.Unlock()
	for range maxUpstream { // as if so many waited
		r.waiting <- struct{}{}
	}
	c := connected(t, s.client.Host, "udp", at)
	if got := exchange(t, c, question(t, 7, "cart.shop.svc.cluster.local.", dnsmessage.TypeA)); binary.BigEndian.Uint16(got) != 7 {
		t.Errorf("for a name of the mesh the pod got %x", got)
	}
	eventually(t, "a query to be dropped", func() bool {
		if _, err := c.Write(question(t, 8, "www.example.net.", dnsmessage.TypeA)); err != nil {
			t.Fatal(err)
		}
		return s.one.sum("istio_dns_upstream_failures_total") > 0
	})
	if server.askedFor("www.example.net.") {
		t.Error("a query went out though every place was taken")
	}
	for range maxUpstream {
		<-r.waiting
	}
	for m := (dnsmessage.Message{}); m.ID != 9; { // answers to 8 may come too: its last repetition was after that
		if err := m.Unpack(exchange(t, c, question(t, 9, "www.example.net.", dnsmessage.TypeA))); err != nil {
			t.Fatal(err)
		}
	}
}

// What is no query is not sent on, and does no harm.
func TestOddPacketsToNameServers(t *testing.T) {
	s, server := nameStreet(t)
	c := connected(t, s.client.Host, "udp", netip.AddrPortFrom(s.outside.V4, 53))
	answer := question(t, 1, "www.example.net.", dnsmessage.TypeA)
	answer[2] |= 0x80
	for _, b := range [][]byte{{}, {1}, make([]byte, 65000), answer, append(question(t, 9, "long.example.net.", dnsmessage.TypeA), make([]byte, 5000)...)} {
		if _, err := c.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	if got := exchange(t, c, []byte{0xbe, 0xef, 1, 0, 0, 9, 0, 0, 0, 0, 0, 0}); len(got) != 12 || got[0] != 0xbe || got[3]&0xf != 1 {
		t.Errorf("nine questions that are not there: %x, want a format error", got)
	}
	if got := exchange(t, c, question(t, 7, "cart.shop.svc.cluster.local.", dnsmessage.TypeA)); binary.BigEndian.Uint16(got) != 7 {
		t.Errorf("after all of that the answer is %x", got)
	}
	if len(server.asked()) != 0 {
		t.Errorf("the name server was asked %v", server.asked())
	}
}

// A name server that is not there is a failure at once, not a silence.
func TestNameServerThatRefuses(t *testing.T) {
	s, _ := nameStreet(t)
	c := connected(t, s.client.Host, "udp", netip.AddrPortFrom(s.one.host.V4, 53)) // nobody listens there
	var m dnsmessage.Message
	if err := m.Unpack(exchange(t, c, question(t, 5, "www.example.net.", dnsmessage.TypeA))); err != nil {
		t.Fatal(err)
	}
	if m.RCode != dnsmessage.RCodeServerFailure || m.ID != 5 { // a server that is silent is not answered for
		t.Errorf("%+v, want a server failure", m.Header)
	}
	if got := s.one.sum("istio_dns_upstream_failures_total"); got < 1 {
		t.Errorf("%v failures counted, want 1", got)
	}
}

// An address that the pod holds and the agent does not know leads back to the
// proxy: it must not be asked.
func TestNameQueriesDoNotLoop(t *testing.T) {
	s, _ := nameStreet(t)
	s.client.Run("ip", "addr", "add", "192.0.2.53/32", "dev", "lo")
	eventually(t, "the address to be known", func() bool {
		s.one.mu.Lock()
		defer s.one.mu.Unlock()
		stays, err := s.one.pods["uid-client"].out.Holds(netip.MustParseAddr("192.0.2.53"), true)
		return err == nil && stays
	})
	c := connected(t, s.client.Host, "udp", netip.MustParseAddrPort("192.0.2.53:53"))
	if _, err := c.Write(question(t, 5, "www.example.net.", dnsmessage.TypeA)); err != nil {
		t.Fatal(err)
	}
	var m dnsmessage.Message
	b := make([]byte, maxQuery)
	if n, err := c.Read(b); err == nil && (m.Unpack(b[:n]) != nil || m.RCode != dnsmessage.RCodeServerFailure) {
		t.Errorf("answer %x, want a server failure, or that nobody is there", b[:n])
	} else if errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("no answer at all")
	}
	if got := s.one.sum("istio_dns_requests_total"); got > 1 {
		t.Errorf("%v queries were read: it came back", got)
	}
}

// A pod can be a name server itself, before and after it has asked others.
func TestPodThatIsANameServer(t *testing.T) {
	s, _ := nameStreet(t)
	for round := range 2 {
		if got, err := resolve(s.client.Host, s.outside.V4, "ip4", "www.example.net."); err != nil || len(got) != 1 {
			t.Fatalf("round %d: %v, %v", round, got, err)
		}
		if round == 0 { // on all addresses, sharing the port with nobody
			var c net.PacketConn
			if err := s.client.Do(func() (err error) { c, err = net.ListenPacket("udp4", "0.0.0.0:53"); return err }); err != nil {
				t.Fatalf("the pod's own name server does not start: %v", err)
			}
			defer c.Close()
		}
	}
}

func TestNamesOverTCP(t *testing.T) {
	s, server := nameStreet(t)
	c := connected(t, s.client.Host, "tcp", netip.AddrPortFrom(s.outside.V4, 53))
	ask := func(id uint16, name string, kind dnsmessage.Type) dnsmessage.Message {
		t.Helper()
		if err := dns.WriteFrame(c, question(t, id, name, kind)); err != nil {
			t.Fatal(err)
		}
		b, err := dns.ReadFrame(c)
		var m dnsmessage.Message
		if err != nil || m.Unpack(b) != nil || m.ID != id {
			t.Fatalf("%s: %x, %v", name, b, err)
		}
		return m
	}
	for i := range uint16(3) { // on one connection, in turn
		if m := ask(i, "cart.shop.svc.cluster.local.", dnsmessage.TypeA); len(m.Answers) != 1 {
			t.Errorf("mesh: %+v", m)
		}
		if m := ask(100+i, "www.example.net.", dnsmessage.TypeA); len(m.Answers) != 1 || m.Answers[0].Header.TTL != 77 {
			t.Errorf("outside: %+v", m)
		}
	}
	if server.askedFor("cart.shop.svc.cluster.local.") {
		t.Error("a name of the mesh went out")
	}
	// A zone transfer is more than one message.
	if m := ask(9, "zone.example.net.", dnsmessage.TypeAXFR); !m.Response {
		t.Errorf("transfer: %+v", m)
	}
	if b, err := dns.ReadFrame(c); err != nil || b[1] != 9 {
		t.Errorf("the second message of the transfer: %x, %v", b, err)
	}
	c.Close()
	s.one.logged(`direction="outbound"`, "dst.addr="+netip.AddrPortFrom(s.outside.V4, 53).String())
}

// A name server that hangs up after each answer is asked again, and one that
// cannot be reached is a failure, not the end of the connection.
func TestNamesOverTCPWhenTheServerHangsUp(t *testing.T) {
	s, server := nameStreet(t)
	ask := func(c net.Conn, id uint16, name string) dnsmessage.Message {
		t.Helper()
		if err := dns.WriteFrame(c, question(t, id, name, dnsmessage.TypeA)); err != nil {
			t.Fatal(err)
		}
		b, err := dns.ReadFrame(c)
		var m dnsmessage.Message
		if err != nil || m.Unpack(b) != nil || m.ID != id {
			t.Fatalf("%s: %x, %v", name, b, err)
		}
		return m
	}
	c := connected(t, s.client.Host, "tcp", netip.AddrPortFrom(s.outside.V4, 53))
	for id := range uint16(3) {
		if m := ask(c, id, "once.example.net."); len(m.Answers) != 1 {
			t.Errorf("question %d: %+v", id, m.Header)
		}
	}
	if got := len(server.asked()); got != 3 {
		t.Errorf("the name server was asked %d times, want 3", got)
	}
	gone := connected(t, s.client.Host, "tcp", netip.AddrPortFrom(s.one.host.V4, 53)) // nobody listens there
	for id := range uint16(2) {
		if m := ask(gone, id, "www.example.net."); m.RCode != dnsmessage.RCodeServerFailure {
			t.Errorf("question %d: %+v, want a server failure", id, m.Header)
		}
		if m := ask(gone, id, "cart.shop.svc.cluster.local."); len(m.Answers) != 1 {
			t.Errorf("question %d: %+v, want the mesh's answer", id, m.Header)
		}
	}
}

// A pod may have so many connections to name servers, and no more.
func TestStreamsOfAPodAreBounded(t *testing.T) {
	s, _ := nameStreet(t)
	at := netip.AddrPortFrom(s.outside.V4, 53)
	served := func() net.Conn {
		c := connected(t, s.client.Host, "tcp", at)
		if err := dns.WriteFrame(c, question(t, 1, "cart.shop.svc.cluster.local.", dnsmessage.TypeA)); err != nil {
			return nil
		}
		if _, err := dns.ReadFrame(c); err != nil {
			return nil
		}
		return c
	}
	var open []net.Conn
	for range maxStreams {
		c := served()
		if c == nil {
			t.Fatalf("only %d connections were served", len(open))
		}
		open = append(open, c)
	}
	if served() != nil {
		t.Errorf("more than %d connections were served", maxStreams)
	}
	open[0].Close()
	eventually(t, "room for another", func() bool { return served() != nil })
}

// TCP to port 53 of a workload of the mesh is like any other: it is for who is
// there, through the tunnel.
func TestNameServerInTheMeshIsNotReplaced(t *testing.T) {
	s, _ := nameStreet(t)
	serveApp(t, s.server.Host, ":53")
	if saw, err := greeting(s.client.Host, netip.AddrPortFrom(s.server.V4, 53), "not a name query"); err != nil || !strings.HasPrefix(saw, s.client.V4.String()) {
		t.Errorf("%q, %v", saw, err)
	}
	s.one.logged(`direction="outbound"`, `dst.identity="spiffe://cluster.local/ns/shop/sa/server"`)
}

// While two proxies hold a pod's sockets, each query is answered by one of
// them; one that drains reads no more.
func TestNameQueriesDuringARollout(t *testing.T) {
	s, _ := nameStreet(t)
	successor := s.node(nil)
	held := s.one.Held()
	for _, e := range held {
		if e.Files.Listeners[handoff.DNS4] == nil || e.Files.Listeners[handoff.DNS6] == nil {
			t.Fatal("the sockets for name queries are not among what is held")
		}
		if err := successor.Add(t.Context(), e.Pod, e.Files); err != nil {
			t.Fatal(err)
		}
	}
	both := func() float64 {
		return s.one.sum("istio_dns_requests_total") + successor.sum("istio_dns_requests_total")
	}
	at, sent := netip.AddrPortFrom(s.outside.V4, 53), 0
	for id := range uint16(50) {
		got, n := ask(t, connected(t, s.client.Host, "udp", at), question(t, id, "cart.shop.svc.cluster.local.", dnsmessage.TypeA))
		if binary.BigEndian.Uint16(got) != id {
			t.Fatalf("answer %x to ID %d", got, id)
		}
		sent += n
	}
	if got := both(); got < 50 || got > float64(sent) {
		t.Errorf("%d queries were read %v times", sent, got)
	}
	s.one.stop()
	before := s.one.sum("istio_dns_requests_total")
	for id := range uint16(50) {
		if got := exchange(t, connected(t, s.client.Host, "udp", at), question(t, id, "www.example.net.", dnsmessage.TypeA)); binary.BigEndian.Uint16(got) != id {
			t.Fatalf("answer %x to ID %d", got, id)
		}
	}
	if got := s.one.sum("istio_dns_requests_total"); got != before {
		t.Errorf("the proxy that has ended read %v queries", got-before)
	}
}

// The same sockets again are no other pod.
func TestSameNameSocketsChangeNothing(t *testing.T) {
	s, _ := nameStreet(t)
	born := s.one.born
	for _, e := range s.one.Held() {
		if err := s.one.Add(t.Context(), e.Pod, e.Files); err != nil {
			t.Fatal(err)
		}
	}
	if s.one.born != born {
		t.Error("pods were replaced by themselves")
	}
	for _, e := range s.one.Held() { // without them it is another
		e.Files.Listeners[handoff.DNS4].Close()
		e.Files.Listeners[handoff.DNS4] = nil
		if err := s.one.Add(t.Context(), e.Pod, e.Files); err != nil {
			t.Fatal(err)
		}
	}
	if s.one.born != born+2 {
		t.Errorf("%d pods were replaced, want both: a socket is not there any more", s.one.born-born)
	}
}

func TestAppendDatagram(t *testing.T) {
	for _, tc := range []struct{ from, to string }{{"10.96.0.10:53", "10.0.0.1:4000"}, {"[fd96::a]:53", "[fd00::1]:4000"}} {
		from, to := netip.MustParseAddrPort(tc.from), netip.MustParseAddrPort(tc.to)
		for _, data := range []string{"", "x", "some text"} {
			b, err := appendDatagram(nil, from, to, []byte(data))
			if err != nil || !strings.HasSuffix(string(b), data) {
				t.Fatalf("%x, %v", b, err)
			}
			udp := b[len(b)-len(data)-udpHeader:]
			if got := udpChecksum(from.Addr(), to.Addr(), udp); got != 0xffff && got != 0 {
				t.Errorf("the checksum of %q does not add up: %x", data, got)
			}
		}
	}
	for _, tc := range []struct {
		from, to string
		size     int
	}{{"10.0.0.1:53", "[fd00::1]:4000", 1}, {"10.0.0.1:53", "10.0.0.2:4000", 65535}} {
		if b, err := appendDatagram(nil, netip.MustParseAddrPort(tc.from), netip.MustParseAddrPort(tc.to), make([]byte, tc.size)); err == nil {
			t.Errorf("%v: %d bytes", tc, len(b))
		}
	}
	if _, err := appendDatagram(nil, netip.AddrPort{}, netip.AddrPort{}, nil); err == nil {
		t.Error("a packet from nowhere")
	}
}
