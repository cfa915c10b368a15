package l7

import (
	"net/netip"

	"github.com/weft-mesh/weft/mesh"
)

// An Endpoint is where a request may be sent: a workload at one of its ports,
// or, without a workload, the address that the client asked for.
type Endpoint struct {
	Workload *mesh.Workload // nil if it is not known
	Address  netip.AddrPort
}
