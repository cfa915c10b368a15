package handover

import (
	"fmt"
	"slices"

	"github.com/weft-mesh/weft/internal/pack"
)

// A Greeting is who a successor is.
type Greeting struct {
	Instance string   // for the logs
	Rank     uint32   // of several successors that are ready the highest is the heir
	Parts    []uint32 // versions of parts that it takes, the best first
}

// hi is the text of hello. Its first field does not change in any version.
type hi struct {
	version uint32
	Greeting
}

func (h *hi) pack(c *pack.Coder) {
	pack.Uint(c, &h.version, 1<<16)
	pack.String(c, &h.Instance, 256)
	pack.Uint(c, &h.Rank, 1<<16)
	pack.List(c, &h.Parts, 64, func(c *pack.Coder, v *uint32) { pack.Uint(c, v, 1<<31) })
}

// choose returns the version of parts that both ends know, the best of ours
// first.
func choose(ours []uint32, h hi) (uint32, error) {
	if h.version != Version {
		return 0, fmt.Errorf("the successor %q speaks version %d of the handover, this ztunnel version %d", h.Instance, h.version, Version)
	}
	for _, v := range ours {
		if slices.Contains(h.Parts, v) {
			return v, nil
		}
	}
	return 0, fmt.Errorf("the successor %q takes versions %v of connections, this ztunnel gives %v", h.Instance, h.Parts, ours)
}

// welcomeText is the text of welcome.
type welcomeText struct{ part uint32 }

func (w *welcomeText) pack(c *pack.Coder) { pack.Uint(c, &w.part, 1<<31) }
