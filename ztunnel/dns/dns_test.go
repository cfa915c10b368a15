package dns

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/view"
)

func service(ns, host string, vips []string, edit func(*mesh.Service)) mesh.Service {
	s := mesh.Service{Name: mesh.ServiceName{Namespace: ns, Host: mesh.Host(host)}}
	for _, v := range vips {
		s.VIPs = append(s.VIPs, mesh.VIP{Prefix: netip.MustParsePrefix(v)})
	}
	if edit != nil {
		edit(&s)
	}
	return s
}

func endpoint(name, of string, edit func(*mesh.Workload), as ...string) mesh.Workload {
	w := mesh.Workload{
		UID: mesh.UID("c//Pod/shop/" + name), Name: mesh.Name{Namespace: "shop", Name: name}, Healthy: true,
		Services: []mesh.Membership{{Service: mesh.ServiceName{Namespace: "shop", Host: mesh.Host(of)}}},
	}
	for _, a := range as {
		w.Addresses = append(w.Addresses, netip.MustParseAddr(a))
	}
	if edit != nil {
		edit(&w)
	}
	return w
}

func town() *view.View {
	sick := func(w *mesh.Workload) { w.Healthy = false }
	far := func(w *mesh.Workload) { w.Network = "far" }
	ws := []mesh.Workload{
		endpoint("p0", "peers.shop.svc.cluster.local", nil, "10.1.0.1", "fd01::1"),
		endpoint("p1", "peers.shop.svc.cluster.local", nil, "10.1.0.2", "fd01::2"),
		endpoint("p2", "peers.shop.svc.cluster.local", sick, "10.1.0.3"),
		endpoint("p3", "peers.shop.svc.cluster.local", far, "10.1.0.4"),
		endpoint("n0", "early.shop.svc.cluster.local", sick, "10.1.0.5"),
		endpoint("x0", "nobody.shop.svc.cluster.local", sick, "10.1.0.6"),
		endpoint("f0", "four.shop.svc.cluster.local", nil, "10.1.0.7", "fd01::7"),
	}
	for i := range 300 {
		ws = append(ws, endpoint(fmt.Sprint("m", i), "many.shop.svc.cluster.local", nil, fmt.Sprintf("10.2.%d.%d", i/256, i%256), fmt.Sprintf("fd02::%x", i+1)))
	}
	return view.New("1", ws, []mesh.Service{
		service("shop", "cart.shop.svc.cluster.local", []string{"10.96.0.1/32", "fd96::1/128"}, func(s *mesh.Service) {
			s.ExternalAddresses = []netip.Addr{netip.MustParseAddr("198.51.100.1")}
		}),
		service("shop", "old.shop.svc.cluster.local", []string{"10.96.0.2/32"}, nil),
		service("shop", "peers.shop.svc.cluster.local", nil, nil),
		service("shop", "early.shop.svc.cluster.local", nil, func(s *mesh.Service) { s.AllowUnhealthy = true }),
		service("shop", "nobody.shop.svc.cluster.local", nil, nil),
		service("shop", "many.shop.svc.cluster.local", nil, nil),
		service("shop", "four.shop.svc.cluster.local", nil, func(s *mesh.Service) { s.IPFamilies = "ipv4" }),
		service("shop", "range.example.com", []string{"10.97.0.0/24"}, nil),
		service("shop", "*.example.com", []string{"240.240.0.1/32"}, nil),
		service("pay", "secret.example.org", []string{"240.240.0.2/32"}, func(s *mesh.Service) { s.Private = true }),
		service("shop", "far.example.org", nil, func(s *mesh.Service) {
			s.VIPs = []mesh.VIP{{Network: "far", Prefix: netip.MustParsePrefix("240.240.0.3/32")}}
		}),
	}, nil)
}

// An ask is a query in the making.
type ask struct {
	name  string
	kind  dnsmessage.Type
	class dnsmessage.Class
	size  int  // of its OPT record; 0 has none
	do    bool // DNSSEC OK, in it
	edit  func([]byte) []byte
}

func (a ask) message(t testing.TB) []byte {
	t.Helper()
	name, err := dnsmessage.NewName(a.name)
	if err != nil {
		t.Fatal(err)
	}
	if a.class == 0 {
		a.class = dnsmessage.ClassINET
	}
	b := dnsmessage.NewBuilder(nil, dnsmessage.Header{ID: 0xbeef, RecursionDesired: true})
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check(b.StartQuestions())
	check(b.Question(dnsmessage.Question{Name: name, Type: a.kind, Class: a.class}))
	if a.size > 0 {
		check(b.StartAdditionals())
		var h dnsmessage.ResourceHeader
		check(h.SetEDNS0(a.size, 0, a.do))
		check(b.OPTResource(h, dnsmessage.OPTResource{}))
	}
	m, err := b.Finish()
	check(err)
	if a.edit != nil {
		m = a.edit(m)
	}
	return m
}

// addresses returns what a reply says, sorted.
func addresses(t testing.TB, reply []byte) (out []string, m dnsmessage.Message) {
	t.Helper()
	if err := m.Unpack(reply); err != nil {
		t.Fatalf("the reply cannot be read: %v", err)
	}
	for _, r := range m.Answers {
		switch b := r.Body.(type) {
		case *dnsmessage.AResource:
			out = append(out, netip.AddrFrom4(b.A).String())
		case *dnsmessage.AAAAResource:
			out = append(out, netip.AddrFrom16(b.AAAA).String())
		default:
			t.Errorf("answer of type %v", r.Header.Type)
		}
		if r.Header.TTL != TTL {
			t.Errorf("TTL %d, want %d", r.Header.TTL, TTL)
		}
	}
	slices.Sort(out)
	return out, m
}

func TestDecide(t *testing.T) {
	v := town()
	const a, aaaa = dnsmessage.TypeA, dnsmessage.TypeAAAA
	forwarded := []string{"forwarded"}
	for _, tc := range []struct {
		name string
		ask  ask
		from Client
		want []string // addresses, sorted; nil is a reply without any
	}{
		{"a service's address", ask{name: "cart.shop.svc.cluster.local.", kind: a}, Client{}, []string{"10.96.0.1"}},
		{"its IPv6 address", ask{name: "cart.shop.svc.cluster.local.", kind: aaaa}, Client{}, []string{"fd96::1"}},
		{"whatever the case", ask{name: "cArT.ShOp.svc.CLUSTER.local.", kind: a}, Client{}, []string{"10.96.0.1"}},
		{"a family it has not: no address, but the name is there", ask{name: "old.shop.svc.cluster.local.", kind: aaaa}, Client{}, nil},
		{"a short name is for search paths", ask{name: "cart.", kind: a}, Client{Namespace: "shop"}, forwarded},
		{"a search path that does not fit", ask{name: "cart.shop.svc.cluster.local.pay.svc.cluster.local.", kind: a}, Client{}, forwarded},
		{"headless: the endpoints that are healthy and near", ask{name: "peers.shop.svc.cluster.local.", kind: a}, Client{}, []string{"10.1.0.1", "10.1.0.2"}},
		{"headless over IPv6", ask{name: "peers.shop.svc.cluster.local.", kind: aaaa}, Client{}, []string{"fd01::1", "fd01::2"}},
		{"headless, of another network", ask{name: "peers.shop.svc.cluster.local.", kind: a}, Client{Network: "far"}, []string{"10.1.0.4"}},
		{"headless: unready endpoints if they are published", ask{name: "early.shop.svc.cluster.local.", kind: a}, Client{}, []string{"10.1.0.5"}},
		{"headless without anybody: its resolver knows best", ask{name: "nobody.shop.svc.cluster.local.", kind: a}, Client{}, forwarded},
		{"headless of one family", ask{name: "four.shop.svc.cluster.local.", kind: a}, Client{}, []string{"10.1.0.7"}},
		{"headless of one family, asked for the other", ask{name: "four.shop.svc.cluster.local.", kind: aaaa}, Client{}, nil},
		{"a pod's name below a headless service", ask{name: "p0.peers.shop.svc.cluster.local.", kind: a}, Client{}, forwarded},
		{"a wildcard", ask{name: "any.thing.example.com.", kind: a}, Client{}, []string{"240.240.0.1"}},
		{"not the wildcard's own parent", ask{name: "example.com.", kind: a}, Client{}, forwarded},
		{"a range is no address", ask{name: "range.example.com.", kind: a}, Client{}, forwarded},
		{"a private service, from its namespace", ask{name: "secret.example.org.", kind: a}, Client{Namespace: "pay"}, []string{"240.240.0.2"}},
		{"a private service, from elsewhere", ask{name: "secret.example.org.", kind: a}, Client{Namespace: "shop"}, forwarded},
		{"a virtual address of another network", ask{name: "far.example.org.", kind: a}, Client{}, forwarded},
		{"a virtual address of the own network", ask{name: "far.example.org.", kind: a}, Client{Network: "far"}, []string{"240.240.0.3"}},
		{"unknown", ask{name: "www.example.net.", kind: a}, Client{}, forwarded},
		{"the root", ask{name: ".", kind: dnsmessage.TypeNS}, Client{}, forwarded},
		{"hints would lead past the mesh", ask{name: "any.example.com.", kind: typeHTTPS}, Client{}, nil},
		{"hints for a name outside", ask{name: "www.example.net.", kind: typeHTTPS}, Client{}, forwarded},
		{"other types", ask{name: "cart.shop.svc.cluster.local.", kind: dnsmessage.TypeSRV}, Client{}, forwarded},
		{"everything there is", ask{name: "cart.shop.svc.cluster.local.", kind: dnsmessage.TypeALL}, Client{}, forwarded},
		{"other classes", ask{name: "cart.shop.svc.cluster.local.", kind: a, class: dnsmessage.ClassCHAOS}, Client{}, forwarded},
		{"with EDNS", ask{name: "cart.shop.svc.cluster.local.", kind: a, size: 1232}, Client{}, []string{"10.96.0.1"}},
		{"with EDNS, and DNSSEC OK", ask{name: "cart.shop.svc.cluster.local.", kind: a, size: 1232, do: true}, Client{}, []string{"10.96.0.1"}},
		{"with EDNS of a later version", ask{name: "cart.shop.svc.cluster.local.", kind: a, size: 1232, edit: func(m []byte) []byte {
			m[len(m)-5] = 1
			return m
		}}, Client{}, forwarded},
		{"an update", ask{name: "cart.shop.svc.cluster.local.", kind: a, edit: func(m []byte) []byte { m[2] |= 5 << 3; return m }}, Client{}, forwarded},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m := tc.ask.message(t)
			d := Decide(v, tc.from, Packet{Message: m}, 1)
			if slices.Equal(tc.want, forwarded) {
				if d.Verdict != Forward || d.Message != nil {
					t.Fatalf("verdict %d, message %x; want it forwarded", d.Verdict, d.Message)
				}
				return
			}
			if d.Verdict != Reply {
				t.Fatalf("verdict %d, want a reply", d.Verdict)
			}
			got, reply := addresses(t, d.Message)
			if !slices.Equal(got, tc.want) {
				t.Errorf("addresses %v, want %v", got, tc.want)
			}
			h := reply.Header
			if h.ID != 0xbeef || !h.Response || h.RCode != 0 || !h.RecursionDesired || !h.RecursionAvailable || h.Truncated {
				t.Errorf("header %+v", h)
			}
			if q := reply.Questions; len(q) != 1 || q[0].Name.String() != tc.ask.name || q[0].Type != tc.ask.kind {
				t.Errorf("question %v, want what was asked, letter for letter", q)
			}
			if opt := len(reply.Additionals); opt != min(1, tc.ask.size) {
				t.Errorf("%d additional records, want OPT exactly if it was asked with one", opt)
			} else if opt > 0 && reply.Additionals[0].Header.DNSSECAllowed() != tc.ask.do {
				t.Errorf("OPT %+v, want DNSSEC OK to be %v, as it was asked", reply.Additionals[0].Header, tc.ask.do)
			}
			if !Answers(m, d.Message) {
				t.Error("the reply is no answer to the query")
			}
		})
	}
}

func TestNothingIsKnownBeforeTheFirstSync(t *testing.T) {
	m := ask{name: "cart.shop.svc.cluster.local.", kind: dnsmessage.TypeA}.message(t)
	var ss []mesh.Service
	for s := range town().Services() {
		ss = append(ss, *s)
	}
	for name, v := range map[string]*view.View{"zero": {}, "not complete": view.New("", nil, ss, nil)} {
		if d := Decide(v, Client{}, Packet{Message: m}, 0); d.Verdict != Forward {
			t.Errorf("%s: verdict %d, want it forwarded", name, d.Verdict)
		}
	}
}

func TestLargeAnswersAreCutToSize(t *testing.T) {
	v := town()
	for _, tc := range []struct {
		name string
		kind dnsmessage.Type
		size int
		tcp  bool
		cut  bool
		most int
	}{
		{"over UDP without EDNS", dnsmessage.TypeA, 0, false, true, 512},
		{"less than every client takes", dnsmessage.TypeA, 100, false, true, 512},
		{"what the client takes", dnsmessage.TypeAAAA, 1232, false, true, 1232},
		{"never more than 4096 over UDP", dnsmessage.TypeAAAA, 65535, false, true, 4096},
		{"over TCP all", dnsmessage.TypeAAAA, 1232, true, false, 65535},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m := ask{name: "many.shop.svc.cluster.local.", kind: tc.kind, size: tc.size}.message(t)
			d := Decide(v, Client{}, Packet{Message: m, TCP: tc.tcp}, 3)
			got, reply := addresses(t, d.Message)
			if len(d.Message) > tc.most || reply.Truncated != tc.cut || (len(got) == 300) == tc.cut {
				t.Errorf("%d bytes, %d addresses, truncated %v; want at most %d bytes, truncated %v", len(d.Message), len(got), reply.Truncated, tc.most, tc.cut)
			}
			if tc.cut && len(d.Message) < tc.most-60 {
				t.Errorf("%d bytes: more would fit in %d", len(d.Message), tc.most)
			}
		})
	}
}

func TestOrderOfEndpointsFollowsChance(t *testing.T) {
	m := ask{name: "many.shop.svc.cluster.local.", kind: dnsmessage.TypeA}.message(t)
	first := map[string]bool{}
	for rnd := range uint64(20) {
		d := Decide(town(), Client{}, Packet{Message: m}, rnd)
		var msg dnsmessage.Message
		if err := msg.Unpack(d.Message); err != nil {
			t.Fatal(err)
		}
		first[fmt.Sprint(msg.Answers[0].Body)] = true
	}
	if len(first) < 10 {
		t.Errorf("of 20 replies only %d begin differently", len(first))
	}
}

func TestMessagesThatAreNoQueries(t *testing.T) {
	good := ask{name: "cart.shop.svc.cluster.local.", kind: dnsmessage.TypeA, size: 1232}.message(t)
	edit := func(f func(m []byte) []byte) []byte { return f(slices.Clone(good)) }
	question := len(good) - 11 // where the OPT record begins
	for _, tc := range []struct {
		name string
		msg  []byte
		want Verdict
	}{
		{"nothing", nil, Drop},
		{"half a header", good[:11], Drop},
		{"an answer: two of us would talk for ever", edit(func(m []byte) []byte { m[2] |= 0x80; return m }), Drop},
		{"a header", good[:12], Reply},
		{"half a question", good[:20], Reply},
		{"half an OPT record", good[:len(good)-1], Reply},
		{"no question", edit(func(m []byte) []byte { m[5] = 0; return m }), Reply},
		{"two questions", edit(func(m []byte) []byte { m[5] = 2; return m }), Reply},
		{"65535 questions", edit(func(m []byte) []byte { m[4], m[5] = 255, 255; return m }), Reply},
		{"two OPT records", edit(func(m []byte) []byte { m[11] = 2; return append(m, m[question:]...) }), Reply},
		{"a name that points to itself", edit(func(m []byte) []byte { m[12], m[13] = 0xc0, 12; return m }), Reply},
		{"a name of 256 bytes", slices.Concat(good[:12], []byte(strings.Repeat("\x3f"+strings.Repeat("a", 63), 4)), []byte("\x00\x00\x01\x00\x01")), Reply},
		{"a label of 64 bytes", slices.Concat(good[:12], []byte{64}, bytes.Repeat([]byte{'a'}, 64), []byte("\x00\x00\x01\x00\x01")), Reply},
		{"a label that holds a dot", edit(func(m []byte) []byte { m[14] = '.'; return m }), Forward},
		{"a signature", edit(func(m []byte) []byte { m[question+2] = 250; return m }), Forward},
		{"1000 additional records", edit(func(m []byte) []byte { m[10] = 4; return m }), Forward},
		{"an answer in a query", edit(func(m []byte) []byte { m[7] = 1; return m }), Forward},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := Decide(town(), Client{}, Packet{Message: tc.msg}, 0)
			if d.Verdict != tc.want {
				t.Fatalf("verdict %d, want %d", d.Verdict, tc.want)
			}
			if d.Verdict != Reply {
				return
			}
			if h := d.Message; h[3]&maskRCode != byte(dnsmessage.RCodeFormatError) || h[2]&bitResponse == 0 || binary.BigEndian.Uint16(h) != 0xbeef {
				t.Errorf("reply %x, want a format error", h)
			}
			if len(d.Message) > len(tc.msg) {
				t.Errorf("%d bytes answered with %d: a bad query must not be worth it", len(tc.msg), len(d.Message))
			}
		})
	}
}

func TestAnswers(t *testing.T) {
	query := ask{name: "www.example.net.", kind: dnsmessage.TypeA}.message(t)
	reply := func(f func(m []byte) []byte) []byte {
		m := slices.Clone(query)
		m[2] |= 0x80
		return f(m)
	}
	same := func(m []byte) []byte { return m }
	for _, tc := range []struct {
		name string
		msg  []byte
		want bool
	}{
		{"the answer", reply(same), true},
		{"with letters of another case", reply(func(m []byte) []byte { m[13] = 'W'; return m }), true},
		{"nothing", nil, false},
		{"the query itself", query, false},
		{"another ID", reply(func(m []byte) []byte { m[0]++; return m }), false},
		{"another name", reply(func(m []byte) []byte { m[13] = 'x'; return m }), false},
		{"another name that folds to the same outside of ASCII", reply(func(m []byte) []byte { m[13] = 0xe4; return m }), false},
		{"another type", reply(func(m []byte) []byte { m[len(m)-3] = 28; return m }), false},
		{"another class", reply(func(m []byte) []byte { m[len(m)-1] = 3; return m }), false},
		{"another opcode", reply(func(m []byte) []byte { m[2] |= 4 << 3; return m }), false},
		{"a longer name", reply(func(m []byte) []byte { return append(append(m[:12:12], 1, 'a'), m[12:]...) }), false},
		{"no question", reply(func(m []byte) []byte { m[5] = 0; return m[:12] }), false},
		{"no question, because it could not be read", reply(func(m []byte) []byte { m[3], m[5] = 1, 0; return m[:12] }), true},
		{"cut off", reply(func(m []byte) []byte { return m[:len(m)-1] }), false},
	} {
		if got := Answers(query, tc.msg); got != tc.want {
			t.Errorf("%s: %v, want %v", tc.name, got, tc.want)
		}
	}
}

func TestFailure(t *testing.T) {
	query := ask{name: "www.example.net.", kind: dnsmessage.TypeA, size: 1232}.message(t)
	got := Failure(query)
	var m dnsmessage.Message
	if err := m.Unpack(got); err != nil || m.RCode != dnsmessage.RCodeServerFailure || !Answers(query, got) {
		t.Errorf("%+v, %v, want a server failure for the question", m, err)
	}
	if Failure(got) != nil || Failure(query[:5]) != nil {
		t.Error("what is no query fails with a reply")
	}
	// OPT is answered with OPT, also in a failure and in place of a long answer.
	for _, a := range []ask{{size: 0}, {size: 1232}, {size: 512, do: true}} {
		a.name, a.kind = "www.example.net.", dnsmessage.TypeA
		query := a.message(t)
		for what, reply := range map[string][]byte{"failure": Failure(query), "truncated": truncated(query)} {
			var m dnsmessage.Message
			if err := m.Unpack(reply); err != nil || len(m.Additionals) != min(1, a.size) {
				t.Errorf("%s, OPT of %d: %+v, %v", what, a.size, m, err)
				continue
			}
			if a.size > 0 && (m.Additionals[0].Header.Type != dnsmessage.TypeOPT || m.Additionals[0].Header.Class != maxUDP || m.Additionals[0].Header.DNSSECAllowed() != a.do) {
				t.Errorf("%s: OPT %+v, want %d bytes, DNSSEC OK %v", what, m.Additionals[0].Header, maxUDP, a.do)
			}
		}
	}
}

func TestStreams(t *testing.T) {
	for kind, want := range map[dnsmessage.Type]bool{dnsmessage.TypeA: false, dnsmessage.TypeAXFR: true, typeIXFR: true} {
		if got := Streams(ask{name: "example.net.", kind: kind}.message(t)); got != want {
			t.Errorf("type %v: %v, want %v", kind, got, want)
		}
	}
}

// FuzzDecide sends bytes of a pod through everything that reads them.
func FuzzDecide(f *testing.F) {
	for _, a := range []ask{
		{name: "cart.shop.svc.cluster.local.", kind: dnsmessage.TypeA},
		{name: "many.shop.svc.cluster.local.", kind: dnsmessage.TypeAAAA, size: 1232},
		{name: "www.example.net.", kind: typeHTTPS, size: 4096},
	} {
		f.Add(a.message(f), false)
	}
	v := town()
	buf := make([]byte, 0, maxUDP)
	f.Fuzz(func(t *testing.T, msg []byte, tcp bool) {
		before := slices.Clone(msg)
		d := Decide(v, Client{Namespace: "shop"}, Packet{Message: msg, TCP: tcp, Buffer: buf}, 1)
		if !slices.Equal(before, msg) {
			t.Fatal("the message was changed")
		}
		limit := maxUDP
		if tcp {
			limit = maxTCP
		}
		if len(d.Message) > limit || (d.Verdict == Reply) != (d.Message != nil) {
			t.Fatalf("verdict %d with %d bytes", d.Verdict, len(d.Message))
		}
		if d.Verdict != Reply {
			return
		}
		if len(d.Message) < headerSize || d.Message[2]&bitResponse == 0 || d.Message[0] != msg[0] || d.Message[1] != msg[1] {
			t.Fatalf("reply %x to %x", d.Message, msg)
		}
		if d.Message[3]&maskRCode == 0 {
			if !Answers(msg, d.Message) {
				t.Fatalf("reply %x is no answer to %x", d.Message, msg)
			}
			addresses(t, d.Message)
		}
		Streams(msg)
		if r := Failure(msg); r != nil && len(r) > len(msg) {
			t.Fatal("a failure is longer than the query")
		}
	})
}

// FuzzAnswers takes both from the network.
func FuzzAnswers(f *testing.F) {
	query := ask{name: "www.example.net.", kind: dnsmessage.TypeA}.message(f)
	f.Add(query, query)
	f.Fuzz(func(t *testing.T, query, reply []byte) {
		if Answers(query, reply) && (reply[2]&bitResponse == 0 || query[0] != reply[0]) {
			t.Fatalf("%x passes for an answer to %x", reply, query)
		}
	})
}

func BenchmarkDecide(b *testing.B) {
	v := town()
	for _, name := range []string{"cart.shop.svc.cluster.local.", "www.example.net."} {
		m := ask{name: name, kind: dnsmessage.TypeA, size: 1232}.message(b)
		buf := make([]byte, 0, maxUDP)
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				Decide(v, Client{}, Packet{Message: m, Buffer: buf}, 1)
			}
		})
	}
}
