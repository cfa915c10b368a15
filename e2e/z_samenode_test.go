package e2e

import (
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/weft-mesh/weft/e2e/wire"
)

// With the short cut, two pods of one node talk without a tunnel between their
// interfaces; identity and policy hold as before.
func TestSameNodeShortCut(t *testing.T) {
	reinstall := func(mode string) {
		t.Helper()
		if out, err := world.a.Install(t.Context(), world.c, "--set", "ztunnel.sameNode="+mode); err != nil {
			world.c.Dump(t.Context(), os.Stderr)
			t.Fatalf("%v\n%s", err, out)
		}
	}
	client, _ := addresses(t, meshed, "client")
	near, _ := addresses(t, meshed, "near")
	for _, r := range []struct {
		mode   string
		tunnel bool // seen between the pods' interfaces
	}{{"direct", false}, {"tunnel", true}} {
		t.Run(r.mode, func(t *testing.T) {
			reinstall(r.mode)
			wantServed(t, meshed, "client", "near", true)
			tap, err := wire.Open(world.c.NodeNetns("node1"), "")
			if err != nil {
				t.Fatal(err)
			}
			start := time.Now()
			got := try(t, meshed, "client", "get", "http://"+netip.AddrPortFrom(near, 8080).String()+"/")
			if from, err := netip.ParseAddrPort(got.Remote); !got.OK || err != nil || from.Addr() != client {
				t.Errorf("got %+v, want an answer, and the client's address %v seen", got, client)
			}
			if err := tap.Close(); err != nil {
				t.Fatal(err)
			}
			s, err := tap.Between([]netip.Addr{client, near}, nil, start)
			if err != nil {
				t.Fatal(err)
			}
			if (s.Tunnel > 0) != r.tunnel || s.Other > 0 {
				t.Errorf("between the pods' interfaces: %+v, want a tunnel: %v, and nothing else", s, r.tunnel)
			}
			apply(t, authorizationPolicy("v1", "nobody", `{}`))
			wantServed(t, meshed, "client", "near", false)
		})
	}
}
