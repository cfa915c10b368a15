package ztunnel

import (
	"encoding/hex"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/weft-mesh/weft/mesh"
)

func TestProxyHeader(t *testing.T) {
	id := mesh.Identity{TrustDomain: "td", Namespace: "n", ServiceAccount: "s"}
	tlv := "d0" + "0015" + hex.EncodeToString([]byte("spiffe://td/ns/n/sa/s"))
	for _, tt := range []struct{ src, dst, want string }{
		{"10.0.0.1:4000", "10.0.0.2:80", "0d0a0d0a000d0a515549540a" + "2111" + "0024" + "0a000001" + "0a000002" + "0fa0" + "0050" + tlv},
		{"[fd00::1]:4000", "[fd00::2]:80", "0d0a0d0a000d0a515549540a" + "2121" + "003c" +
			"fd000000000000000000000000000001" + "fd000000000000000000000000000002" + "0fa0" + "0050" + tlv},
	} {
		got := hex.EncodeToString(proxyHeader(netip.MustParseAddrPort(tt.src), netip.MustParseAddrPort(tt.dst), id))
		if got != tt.want {
			t.Errorf("%s to %s:\ngot  %s\nwant %s", tt.src, tt.dst, got, tt.want)
		}
	}
}

// An application that asks for it is told who calls, at the port it has said,
// before the first byte; and only of connections whose caller is proved.
func TestApplicationTunnel(t *testing.T) {
	w := newWorld(t)
	client := w.node(nil).add("client", nil)
	n := w.node(nil)
	server := n.add("server", nil)
	got := make(chan string, 2)
	app := server.app(func(c *net.TCPConn) {
		b, _ := io.ReadAll(c)
		got <- string(b)
	})
	w.change(func(w *world) {
		for i := range w.ws {
			if w.ws[i].Name.Name == "server" {
				w.ws[i].AppTunnel = mesh.AppTunnel{Proxy: true, Port: app.Port()}
			}
		}
	})
	const asked = 8080 // where nobody listens
	c := client.dial(w.publish("server", client, server, asked, nil))
	if _, err := io.WriteString(c, "hello"); err != nil {
		t.Fatal(err)
	}
	c.CloseWrite()
	text := <-got
	if !strings.HasPrefix(text, "\r\n\r\n\x00\r\nQUIT\n\x21\x11") || !strings.HasSuffix(text, "spiffe://cluster.local/ns/shop/sa/clienthello") {
		t.Errorf("the application got %q", text)
	}
	source, target := net.IP(text[16:20]).String(), int(text[26])<<8|int(text[27])
	if source != client.addr.String() || target != asked {
		t.Errorf("the header says %s and port %d, want %v and %d", source, target, client.addr, asked)
	}

	plain, err := net.Dial("tcp", server.plain.String())
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	if _, err := io.WriteString(plain, "hello"); err != nil {
		t.Fatal(err)
	}
	plain.(*net.TCPConn).CloseWrite()
	if text := <-got; text != "hello" {
		t.Errorf("of a caller without an identity the application was told %q", text)
	}
}
