package compile

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	networkingv1alpha3 "istio.io/api/networking/v1alpha3"

	"github.com/weft-mesh/weft/mesh"
)

// entriesOf returns as many ServiceEntries with a host each.
func entriesOf(n int) []ServiceEntry {
	var out []ServiceEntry
	for i := range n {
		out = append(out, ServiceEntry{
			Meta: Meta{Name: mesh.Name{Namespace: "shop", Name: fmt.Sprint("e", i)}, Created: time.Unix(int64(n-i), 0)},
			Spec: &networkingv1alpha3.ServiceEntry{
				Hosts: []string{fmt.Sprintf("h%d.example.com", i)}, Resolution: networkingv1alpha3.ServiceEntry_STATIC,
				Ports:     []*networkingv1alpha3.ServicePort{{Number: 80, Name: "http"}},
				Endpoints: []*networkingv1alpha3.WorkloadEntry{{Address: "203.0.113.1"}},
			},
		})
	}
	return out
}

// given returns the address of each host, after which it is told to the objects.
func given(t *testing.T, in []ServiceEntry) map[mesh.Host]netip.Addr {
	t.Helper()
	w := Compile(Settings{}, Inputs{ServiceEntries: in})
	out := map[mesh.Host]netip.Addr{}
	owner := map[netip.Addr]mesh.Host{}
	for _, s := range w.Services {
		if len(s.VIPs) != 1 {
			t.Fatalf("%s has addresses %v, want one", s.Name, s.VIPs)
		}
		a := s.VIPs[0].Prefix.Addr()
		if o, taken := owner[a]; taken || !netip.MustParsePrefix("240.240.0.0/16").Contains(a) {
			t.Fatalf("%s has address %v, which is also that of %q", s.Name, a, o)
		}
		owner[a], out[s.Name.Host] = s.Name.Host, a
	}
	for i := range in {
		in[i].Given = w.entries[in[i].Name].given
	}
	return out
}

// TestGivenAddresses proves that each host has an address of its own, also
// where names fall on the same, and that a host keeps what it was told
// whatever else comes: clients know it.
func TestGivenAddresses(t *testing.T) {
	const some, all = 300, 1200 // of 65,535 addresses: names fall on the same
	entries := entriesOf(all)
	first := given(t, entries[:some])
	later := given(t, entries) // those that came are older, and go first
	moved := 0
	for h, a := range first {
		if later[h] != a {
			moved++
		}
	}
	if len(first) != some || len(later) != all || moved > 0 {
		t.Errorf("%d hosts and then %d, of which %d have another address", len(first), len(later), moved)
	}
	for i := range entries[:some] {
		entries[i].Given = nil
	}
	if again := given(t, entries[some:]); len(again) != all-some {
		t.Errorf("%d hosts, want %d", len(again), all-some)
	}
}
