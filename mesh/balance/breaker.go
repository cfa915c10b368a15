package balance

import (
	"sync/atomic"

	"github.com/weft-mesh/weft/mesh"
)

// A Kind is something of which a Breaker lets only so much exist at once.
type Kind uint8

// The kinds.
const (
	Connections Kind = iota // to the endpoints
	Pending                 // requests that wait for a connection
	Requests                // at the endpoints, those that wait included
	Retries                 // requests that are tried again, while they run
	kinds
)

// A Breaker counts what a service's endpoints are asked to bear and refuses
// more than its policy allows. The zero Breaker counts and refuses nothing. It
// is for concurrent use.
type Breaker struct {
	used      [kinds]atomic.Int64
	limit     [kinds]atomic.Int64 // 0 is none
	overflows [kinds]atomic.Uint64
	budget    atomic.Pointer[mesh.RetryBudget]
}

// set takes over the limits of a policy. What is in use stays counted.
func (b *Breaker) set(p *mesh.TrafficPolicy) {
	c := &p.Connections
	b.limit[Connections].Store(int64(c.Max))
	b.limit[Pending].Store(int64(c.MaxPending))
	b.limit[Requests].Store(int64(c.MaxRequests))
	b.limit[Retries].Store(int64(c.MaxRetries))
	b.budget.Store(p.RetryBudget)
}

// Take counts one more of kind k, and reports false, having counted nothing but
// the overflow, if there may not be one more. Release must follow if it
// succeeds.
func (b *Breaker) Take(k Kind) bool {
	limit := b.limit[k].Load()
	if p := b.budget.Load(); p != nil && k == Retries {
		// The share is of what runs, the retried requests themselves included.
		limit = max(int64(p.Min), b.used[Requests].Load()*int64(p.Percent)/100)
		if limit == 0 {
			limit = -1
		}
	}
	n := b.used[k].Add(1)
	if limit != 0 && n > limit {
		b.used[k].Add(-1)
		b.overflows[k].Add(1)
		return false
	}
	return true
}

// Release gives back what Take has counted.
func (b *Breaker) Release(k Kind) { b.used[k].Add(-1) }

// Used returns how many of kind k there are.
func (b *Breaker) Used(k Kind) int { return int(b.used[k].Load()) }

// Overflows returns how often Take has refused one of kind k.
func (b *Breaker) Overflows(k Kind) uint64 { return b.overflows[k].Load() }
