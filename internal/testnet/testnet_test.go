package testnet

import (
	"net/netip"
	"os"
	"path/filepath"
	"testing"
)

func TestPodsReachEachOther(t *testing.T) {
	w := New(t)
	one, two := w.Node("one"), w.Node("two")
	outside := w.Host("outside")
	pods := []*Pod{one.Pod("a", Routed), one.Pod("b", Bridged), two.Pod("c", Routed), two.Pod("d", Bridged)}
	hosts := []*Host{one.Host, outside}
	for _, p := range pods {
		hosts = append(hosts, p.Host)
	}
	for _, to := range pods {
		l := to.Listen(":8080")
		for _, from := range hosts {
			for _, a := range []netip.Addr{to.V4, to.V6} {
				c, err := from.Dial(netip.AddrPortFrom(a, 8080))
				if err != nil {
					t.Errorf("%s to %s: %v", from.Name, to.Name, err)
					continue
				}
				got, err := l.AcceptTCP()
				if err != nil {
					t.Fatal(err)
				}
				got.Close()
				c.Close()
			}
		}
	}
}

func TestPodWithoutIPv6(t *testing.T) {
	p := New(t).Node("one").PodWithoutIPv6("a", Routed)
	addrs, err := p.Addrs()
	if err != nil {
		t.Fatal(err)
	}
	if len(addrs) != 1 || addrs[0] != p.V4 {
		t.Errorf("addresses %v, want only %v", addrs, p.V4)
	}
}

func TestBPFFSIsWritable(t *testing.T) {
	dir := BPFFS(t)
	if err := os.Mkdir(filepath.Join(dir, "a"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(dir, "a"), filepath.Join(dir, "b")); err != nil {
		t.Fatal(err)
	}
}
