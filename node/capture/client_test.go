package capture

import (
	"fmt"
	"net"
	"net/netip"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"

	"github.com/weft-mesh/weft/internal/testnet"
)

// echoUDP sends a datagram and waits for the answer.
func echoUDP(from, to *testnet.Host, addr netip.Addr) error {
	var server, client net.PacketConn
	err := to.Do(func() (err error) {
		server, err = net.ListenPacket("udp", netip.AddrPortFrom(addr, 0).String())
		return err
	})
	if err != nil {
		return err
	}
	defer server.Close()
	err = from.Do(func() (err error) {
		client, err = net.ListenPacket("udp", ":0")
		return err
	})
	if err != nil {
		return err
	}
	defer client.Close()
	for _, c := range []net.PacketConn{server, client} {
		c.SetDeadline(time.Now().Add(soon))
	}
	b := make([]byte, 16)
	if _, err := client.WriteTo([]byte("ping"), server.LocalAddr()); err != nil {
		return err
	}
	n, peer, err := server.ReadFrom(b)
	if err != nil {
		return err
	}
	if _, err := server.WriteTo(b[:n], peer); err != nil {
		return err
	}
	if n, _, err = client.ReadFrom(b); err != nil {
		return err
	}
	if string(b[:n]) != "ping" {
		return fmt.Errorf("got %q", b[:n])
	}
	return nil
}

// ping sends one echo request of ICMP and waits for the answer.
func ping(from *testnet.Host, to netip.Addr) error {
	network, protocol := "ip4:icmp", 1
	var request, reply icmp.Type = ipv4.ICMPTypeEcho, ipv4.ICMPTypeEchoReply
	if to.Is6() {
		network, protocol = "ip6:ipv6-icmp", 58
		request, reply = ipv6.ICMPTypeEchoRequest, ipv6.ICMPTypeEchoReply
	}
	var c net.PacketConn
	err := from.Do(func() (err error) {
		c, err = icmp.ListenPacket(network, "")
		return err
	})
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(soon))
	out, err := (&icmp.Message{Type: request, Body: &icmp.Echo{ID: 7, Seq: 1, Data: []byte("weft")}}).Marshal(nil)
	if err != nil {
		return err
	}
	if _, err := c.WriteTo(out, &net.IPAddr{IP: to.AsSlice()}); err != nil {
		return err
	}
	for b := make([]byte, 1500); ; {
		n, _, err := c.ReadFrom(b)
		if err != nil {
			return err
		}
		if m, err := icmp.ParseMessage(protocol, b[:n]); err == nil && m.Type == reply {
			return nil
		}
	}
}

func dialMPTCP(from *testnet.Host, to netip.AddrPort) (c *net.TCPConn, err error) {
	err = from.Do(func() error {
		d := net.Dialer{Timeout: soon}
		d.SetMultipathTCP(true)
		conn, err := d.Dial("tcp", to.String())
		if err != nil {
			return err
		}
		c = conn.(*net.TCPConn)
		return nil
	})
	return c, err
}
