package hbone

import (
	"net/netip"
	"strings"
	"testing"
)

func TestParseAuthority(t *testing.T) {
	v4, v6 := netip.MustParseAddr("10.0.0.7"), netip.MustParseAddr("fd00::7")
	for _, tt := range []struct {
		in   string
		want Authority
	}{
		{"10.0.0.7:8080", Authority{Addr: v4, Port: 8080}},
		{"[fd00::7]:1", Authority{Addr: v6, Port: 1}},
		{"[fd00:0:0::0007]:65535", Authority{Addr: v6, Port: 65535}},
		{"cart:80", Authority{Host: "cart", Port: 80}},
		{"Cart.Shop.svc.cluster.local:80", Authority{Host: "cart.shop.svc.cluster.local", Port: 80}},
		{"a_b-c.x1:80", Authority{Host: "a_b-c.x1", Port: 80}},
	} {
		got, err := ParseAuthority(tt.in)
		if err != nil || got != tt.want {
			t.Errorf("%q: %+v, %v, want %+v", tt.in, got, err, tt.want)
		}
		if again, err := ParseAuthority(got.String()); err != nil || again != got {
			t.Errorf("%q is written %q and read back as %+v, %v", tt.in, got, again, err)
		}
	}
}

func TestParseAuthorityRefuses(t *testing.T) {
	for _, in := range []string{
		"", ":", ":80", "cart", "10.0.0.7", "10.0.0.7:", "10.0.0.7:0", "10.0.0.7:65536", "10.0.0.7:080", "10.0.0.7:+80", "10.0.0.7:80 ", " 10.0.0.7:80",
		"10.0.0.7:http", "10.0.0.7:80:80", "fd00::7:80", "[fd00::7]", "[fd00::7]80", "[fd00::7:80", "fd00::7]:80", "[10.0.0.7]:80", "[fe80::1%eth0]:80",
		"[::ffff:10.0.0.7]:80", "[[fd00::7]]:80", "010.0.0.7:80", "10.0.7:80", "1:80", "10.0.0.0x7:80", "cart.:80", ".cart:80", "ca..rt:80", "-cart:80", "cart-:80",
		"ca rt:80", "ca/rt:80", "user@cart:80", "cart?:80", "cart#:80", "cart\x00:80", "kärt:80", "http://cart:80", strings.Repeat("a", 64) + ":80", strings.Repeat("a.", 127) + "b:80",
	} {
		if got, err := ParseAuthority(in); err == nil {
			t.Errorf("%q was read as %+v", in, got)
		}
	}
}

func TestZeroAuthorityIsNoTarget(t *testing.T) {
	if (Authority{}).AddrPort().IsValid() {
		t.Error("the zero Authority is an address")
	}
	if _, err := ParseAuthority(Authority{}.String()); err == nil {
		t.Error("the zero Authority can be sent")
	}
}

func FuzzParseAuthority(f *testing.F) {
	for _, s := range []string{"10.0.0.7:8080", "[fd00::7]:1", "cart.shop:80", "::", "[::1%x]:1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		a, err := ParseAuthority(s)
		if err != nil {
			return
		}
		if a.Port == 0 || a.Addr.IsValid() == (a.Host != "") {
			t.Errorf("%q is read as %+v", s, a)
		}
		if b, err := ParseAuthority(a.String()); err != nil || a != b {
			t.Errorf("%q is written %q and read back as %+v, %v", s, a, b, err)
		}
	})
}
