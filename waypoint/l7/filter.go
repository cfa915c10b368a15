package l7

// A Verdict is what a filter makes of a request. The zero Verdict refuses it,
// with a 500: a filter that has not decided lets nothing through.
type Verdict uint8

// The verdicts.
const (
	Refuse   Verdict = iota // answered with 500
	Continue                // the next filter decides
	Answered                // x.Answer has been called
	Close                   // the connection is closed without an answer
)

// A Filter takes part in every exchange. It is made once for an Engine and is
// called by many exchanges at the same time; what it remembers of one it keeps
// in its place of x.Scratch.
//
// OnRequest is called in the order of the chain until one of them does not
// return Continue. OnResponse is called in the opposite order, and for answers
// of the proxy itself too, from the filter that answered on back: before the
// head of the response goes out, so that it can still be edited. OnEnd is called
// once for every exchange, by all filters in the chain's order, when all is
// over, whatever happened.
type Filter interface {
	OnRequest(x *Exchange) Verdict
	OnResponse(x *Exchange)
	OnEnd(x *Exchange)
}

// A Blocker is a Filter whose OnRequest may take time for some exchanges. Where
// Blocks (which reads what earlier filters have left) returns true, it is called
// in a goroutine of the exchange's own. Filters that are no Blocker, and
// OnResponse and OnEnd of all, never wait for anything.
type Blocker interface {
	Filter
	Blocks(x *Exchange) bool
}

// Pass is a Filter that does nothing. Others embed it for the methods that they
// do not need.
type Pass struct{}

// OnRequest lets the request pass.
func (Pass) OnRequest(*Exchange) Verdict { return Continue }

// OnResponse does nothing.
func (Pass) OnResponse(*Exchange) {}

// OnEnd does nothing.
func (Pass) OnEnd(*Exchange) {}
