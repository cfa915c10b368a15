package netns

import (
	"net"
	"net/netip"
	"os"
	"testing"
	"time"
)

// TestKeepAlive asks the kernel for sockets that probe, and for others.
func TestKeepAlive(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("entering a network namespace needs root")
	}
	here, err := Current()
	if err != nil {
		t.Fatal(err)
	}
	defer here.Close()
	on := net.KeepAliveConfig{Enable: true, Idle: 40 * time.Second, Interval: 7 * time.Second, Count: 3}
	for _, c := range []struct {
		name   string
		listen string
		config net.KeepAliveConfig
		other  bool // ask for a socket that is not there
		want   time.Duration
	}{
		{name: "IPv4", listen: "127.0.0.1:0", config: on, want: on.Idle},
		{name: "IPv6", listen: "[::1]:0", config: on, want: on.Idle},
		{name: "off", listen: "127.0.0.1:0"},
		{name: "no such socket", listen: "127.0.0.1:0", config: on, other: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			l, err := net.Listen("tcp", c.listen)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			d := net.Dialer{KeepAliveConfig: c.config}
			if !c.config.Enable {
				d.KeepAlive = -1
			}
			app, err := d.Dial("tcp", l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer app.Close()
			peer, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer peer.Close()
			local := peer.RemoteAddr().(*net.TCPAddr).AddrPort()
			remote := peer.LocalAddr().(*net.TCPAddr).AddrPort()
			if c.other {
				remote = netip.AddrPortFrom(netip.MustParseAddr("127.9.9.9"), remote.Port())
			}
			got, err := here.KeepAlive(local, remote)
			if err != nil {
				t.Fatal(err)
			}
			if got > c.want || got < c.want-20*time.Second {
				t.Errorf("the socket probes in %v, want up to %v", got, c.want)
			}
		})
	}
}

func TestParseDiagOfNonsense(t *testing.T) {
	for n := range diagAnswer {
		if d, err := parseDiag(make([]byte, n)); err == nil && d != 0 {
			t.Errorf("%d zero bytes say %v", n, d)
		}
	}
}
