package e2e

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/weft-mesh/weft/e2e/wire"
)

// Pods of one node do without the tunnel exactly when the namespaces of both
// say so.
func TestSameNodeByNamespace(t *testing.T) {
	const ns = "fast"
	apply(t, namespaceYAML(ns, "ambient")+podYAML(ns, "client", "node1", "args: [sleep]")+podYAML(ns, "server", "node1", "args: [server]"))
	ready(t, ns)
	wantCaptured(t, ns, "client", true)
	wantCaptured(t, ns, "server", true)
	client, _ := addresses(t, ns, "client")
	server, _ := addresses(t, ns, "server")
	near, _ := addresses(t, meshed, "near")

	tunneled := func(to netip.Addr) (bool, error) {
		tap, err := wire.Open(world.c.NodeNetns("node1"), "")
		if err != nil {
			return false, err
		}
		start := time.Now()
		got := try(t, ns, "client", "get", "http://"+netip.AddrPortFrom(to, 8080).String()+"/")
		if err := tap.Close(); err != nil {
			return false, err
		}
		if from, err := netip.ParseAddrPort(got.Remote); !got.OK || err != nil || from.Addr() != client {
			return false, fmt.Errorf("got %+v, want an answer, and the client's address %v seen", got, client)
		}
		s, err := tap.Between([]netip.Addr{client, to}, nil, start)
		if err == nil && s.Other > 0 {
			err = fmt.Errorf("packets in clear between the pods' interfaces: %+v", s)
		}
		return s.Tunnel > 0, err
	}
	for _, step := range []struct{ label, name string }{
		{"ambient.weft.dev/same-node-", "without the label"},
		{"ambient.weft.dev/same-node=direct", "with it"},
		{"ambient.weft.dev/same-node-", "without it again"},
	} {
		kubectl(t, "label", "namespace", ns, "--overwrite", step.label)
		direct := step.name == "with it"
		eventually(t, patience, func() error {
			tunnel, err := tunneled(server)
			if err == nil && tunnel == direct {
				err = fmt.Errorf("%s: through a tunnel: %v", step.name, tunnel)
			}
			return err
		})
		if tunnel, err := tunneled(near); err != nil || !tunnel {
			t.Errorf("%s, to a namespace without it: through a tunnel: %v, %v", step.name, tunnel, err)
		}
	}
}
