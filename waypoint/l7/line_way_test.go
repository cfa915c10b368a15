package l7

import (
	"testing"

	"github.com/weft-mesh/weft/mesh"
)

// TestLineGivesConnectionsByWay: who waits gets no connection whose other end
// was verified under another name, or not at all.
func TestLineGivesConnectionsByWay(t *testing.T) {
	var l line
	pool, tls := &http1Pool{}, &mesh.UpstreamTLS{Mode: mesh.TLSSimple}
	wanted := way{tls, "a.example"}
	p := &place{pool: pool, way: wanted, called: make(chan *http1Call, 1)}
	l.join(p, false)
	for _, other := range []way{{}, {tls, "b.example"}} {
		if l.give(&http1Call{pool: pool, way: other}) {
			t.Fatalf("who wants %v got a connection by %v", wanted, other)
		}
	}
	if !l.give(&http1Call{pool: pool, way: wanted}) {
		t.Error("the connection that is wanted was not given")
	}
}
