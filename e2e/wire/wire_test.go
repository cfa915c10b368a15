package wire

import (
	"net"
	"net/netip"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
)

func frame(t *testing.T, src, dst netip.AddrPort, payload string) []byte {
	t.Helper()
	eth := &layers.Ethernet{SrcMAC: make(net.HardwareAddr, 6), DstMAC: make(net.HardwareAddr, 6), EthernetType: layers.EthernetTypeIPv6}
	ip := &layers.IPv6{Version: 6, NextHeader: layers.IPProtocolTCP, HopLimit: 64, SrcIP: src.Addr().AsSlice(), DstIP: dst.Addr().AsSlice()}
	tcp := &layers.TCP{SrcPort: layers.TCPPort(src.Port()), DstPort: layers.TCPPort(dst.Port()), ACK: true}
	if err := tcp.SetNetworkLayerForChecksum(ip); err != nil {
		t.Fatal(err)
	}
	buf := gopacket.NewSerializeBuffer()
	err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, eth, ip, tcp, gopacket.Payload(payload))
	if err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func TestSighting(t *testing.T) {
	a, b := netip.MustParseAddr("fd00::1"), netip.MustParseAddr("fd00::2")
	hello := "\x16\x03\x03\x00\x7a\x02 random \x00\x2b\x00\x02\x03\x04"
	rows := []struct {
		name     string
		src, dst netip.AddrPort
		payload  string
		want     Sighting
	}{
		{"plain text with the marker", netip.AddrPortFrom(a, 4000), netip.AddrPortFrom(b, 8080), "GET /marker", Sighting{Segments: 1, Marked: 1, Other: 1}},
		{"plain text without", netip.AddrPortFrom(b, 8080), netip.AddrPortFrom(a, 4000), "200", Sighting{Segments: 1, Other: 1}},
		{"the marker at the tunnel's port", netip.AddrPortFrom(a, 4000), netip.AddrPortFrom(b, HBONE), "marker", Sighting{Segments: 1, Marked: 1, Tunnel: 1}},
		{"a server chooses TLS 1.3", netip.AddrPortFrom(b, HBONE), netip.AddrPortFrom(a, 4000), hello, Sighting{Segments: 1, Tunnel: 1, TLS13: 1}},
		{"no payload", netip.AddrPortFrom(a, 4000), netip.AddrPortFrom(b, 8080), "", Sighting{}},
		{"a stranger", netip.AddrPortFrom(a, 4000), netip.MustParseAddrPort("[fd00::3]:80"), "marker", Sighting{}},
	}
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			tap := &Tap{}
			if s, ok := parse(frame(t, r.src, r.dst, r.payload)); ok {
				tap.record(s)
			}
			got, err := tap.Between([]netip.Addr{a, b}, []byte("marker"), time.Time{})
			got.FirstOther = ""
			if err != nil || got != r.want {
				t.Errorf("got %+v, %v, want %+v", got, err, r.want)
			}
		})
	}
}

// What crossed the interface before Close is told, however late the reader is.
func TestCloseReadsWhatIsLeft(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("not root: a packet socket needs CAP_NET_RAW")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	to := l.Addr().(*net.TCPAddr).AddrPort()
	late := make(chan struct{})
	seen := 0
	tap, err := OpenFunc("/proc/self/ns/net", "lo", func(s Segment) {
		<-late
		if s.SYN && s.Dst == to {
			seen++
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	const n = 20
	for range n {
		c, err := net.Dial("tcp", to.String())
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
	closed := make(chan error, 1)
	go func() { closed <- tap.Close() }()
	for !tap.closed.Load() {
		runtime.Gosched()
	}
	close(late)
	if err := <-closed; err != nil {
		t.Fatal(err)
	}
	// On lo each crosses twice: out and in.
	if seen < n {
		t.Errorf("%d of %d connections were seen", seen, n)
	}
}
