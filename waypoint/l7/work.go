package l7

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/weft-mesh/weft/mesh/balance"
	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

// work is what the engine itself remembers of an exchange while it runs.
type work struct {
	reached int         // filters whose OnRequest ran
	replied atomic.Bool // the response's head was given to the client
	last    bool        // the client's connection is not to carry another exchange

	picked  *Endpoint           // was chosen before the try began
	rewound bool                // what of the body the first try has sent is there again
	tried   []*balance.Endpoint // that failed
	piece   []byte              // the body, or what of it had come when the first try began
	whole   bool                // piece is all of it, but for the trailer
	trailer *msg.Head
	// kept is what an upload has sent, for another try, as long as it fits.
	kept    *[bigLen]byte
	keptLen int
	lost    bool // it did not fit, or nobody wanted it kept
	upload  *upload

	timer *time.Timer // made on demand, and used again

	mu      sync.Mutex
	routeAt time.Time          // guarded by mu: the route's timeout; zero is none
	tryAt   time.Time          // guarded by mu: that of the try
	call    call               // guarded by mu: what is to be aborted
	cancel  context.CancelFunc // guarded by mu: the dial that is to be cancelled
	reason  reason             // guarded by mu: why it was
}

// A reason is why an exchange was interrupted from outside.
type reason uint8

const (
	running reason = iota
	routeTimeout
	tryTimeout // only this try
	streamIdle
	clientGone
	engineStopped
)

// reset prepares for another exchange. It keeps memory.
func (w *work) reset() {
	clear(w.tried)
	w.reached, w.last, w.tried = 0, false, w.tried[:0]
	w.picked, w.rewound = nil, false
	w.replied.Store(false)
	w.piece, w.whole, w.trailer, w.keptLen, w.lost, w.upload = nil, false, nil, 0, false, nil
	if w.kept != nil {
		bigPool.Put(w.kept)
		w.kept = nil
	}
	w.mu.Lock()
	w.routeAt, w.tryAt, w.call, w.cancel, w.reason = time.Time{}, time.Time{}, nil, nil, running
	w.mu.Unlock()
}

// interrupt ends what the exchange waits for at the endpoint. The first reason
// counts; that of a try gives way to another.
func (w *work) interrupt(why reason) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.reason == running || w.reason == tryTimeout {
		w.reason = why
	}
	w.stop()
}

// stop aborts the call or the dial. The mutex is held.
func (w *work) stop() {
	if w.call != nil {
		w.call.abort()
	}
	if w.cancel != nil {
		w.cancel()
	}
}

// why returns the reason for which the exchange was interrupted.
func (w *work) why() reason {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.reason
}

// dialing registers a dial, and reports false if it must not begin any more.
func (w *work) dialing(cancel context.CancelFunc) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.cancel = cancel
	return w.reason == running
}

// dialed takes back the registration.
func (w *work) dialed() {
	w.mu.Lock()
	w.cancel = nil
	w.mu.Unlock()
}

// calling registers the call that can be interrupted from now on, nil for none.
func (w *work) calling(c call) {
	w.mu.Lock()
	w.call = c
	if c != nil && w.reason != running {
		c.abort()
	}
	w.mu.Unlock()
}

// beginTry bounds a try, and forgets that the one before ran out of time.
func (w *work) beginTry(x *Exchange, within time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.reason == tryTimeout {
		w.reason = running
	}
	w.tryAt = time.Time{}
	if within > 0 {
		w.tryAt = time.Now().Add(within)
		w.arm(x)
	}
}

// beginRoute bounds the exchange.
func (w *work) beginRoute(x *Exchange, within time.Duration) {
	if within <= 0 {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.routeAt = time.Now().Add(within)
	w.arm(x)
}

// endTry ends the bound of a try: its answer has begun.
func (w *work) endTry() {
	w.mu.Lock()
	w.tryAt = time.Time{}
	w.mu.Unlock()
}

// settle ends all bounds.
func (w *work) settle() {
	w.mu.Lock()
	if w.timer != nil && !(w.routeAt.IsZero() && w.tryAt.IsZero()) {
		w.timer.Stop()
	}
	w.routeAt, w.tryAt, w.call = time.Time{}, time.Time{}, nil
	w.mu.Unlock()
}

// arm sets the timer to what comes first. The mutex is held.
func (w *work) arm(x *Exchange) {
	first := w.routeAt
	if !w.tryAt.IsZero() && (first.IsZero() || w.tryAt.Before(first)) {
		first = w.tryAt
	}
	if first.IsZero() {
		return
	}
	d := time.Until(first)
	if w.timer == nil {
		w.timer = time.AfterFunc(d, x.onTimer)
		return
	}
	w.timer.Reset(d)
}

// onTimer looks what is due. It may come late, when the exchange it was armed
// for is over and x is another one's: then nothing is due.
func (x *Exchange) onTimer() {
	w := &x.work
	now := time.Now()
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case !w.routeAt.IsZero() && !now.Before(w.routeAt):
		if w.reason == running || w.reason == tryTimeout {
			w.reason = routeTimeout
		}
		w.routeAt, w.tryAt = time.Time{}, time.Time{}
		w.stop()
	case !w.tryAt.IsZero() && !now.Before(w.tryAt):
		if w.reason == running {
			w.reason = tryTimeout
		}
		w.tryAt = time.Time{}
		w.stop()
		w.arm(x)
	default:
		w.arm(x)
	}
}
