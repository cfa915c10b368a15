package run

import (
	"context"
	"math/rand/v2"
	"time"
)

// The bounds of a zero Backoff.
const (
	defaultMin = 10 * time.Millisecond
	defaultMax = 15 * time.Second
)

// A Backoff says how long to wait between attempts: about Min after the first
// failure, twice as long after each further one, never more than Max. The zero
// value is 10 ms to 15 s.
type Backoff struct {
	Min, Max time.Duration
}

// bounds returns the limits with the defaults applied, Min not above Max.
func (b Backoff) bounds() (lo, hi time.Duration) {
	lo, hi = b.Min, b.Max
	if lo <= 0 {
		lo = defaultMin
	}
	if hi <= 0 {
		hi = defaultMax
	}
	return min(lo, hi), hi
}

// delay returns the wait after the given number of failures in a row, counted
// from 1. rnd in [0,1) spreads it over the upper half of the interval, so that
// clients which failed together do not come back together.
func (b Backoff) delay(failures int, rnd float64) time.Duration {
	lo, hi := b.bounds()
	d := lo
	for i := 1; i < failures && d < hi; i++ {
		d = min(2*d, hi)
	}
	return d/2 + time.Duration(rnd*float64(d-d/2))
}

// Retry calls f until it returns nil or ctx ends, and waits between the calls
// as b says. A call that lasted longer than b's Max counts as a success that
// broke later: after it the waiting starts again from Min. Retry returns nil
// after a nil from f, else the cause of the end of ctx. It does not report the
// errors of f: f logs what is worth logging.
func Retry(ctx context.Context, b Backoff, f func(context.Context) error) error {
	_, hi := b.bounds()
	failures := 0
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		began := time.Now()
		if f(ctx) == nil {
			return nil
		}
		if time.Since(began) > hi {
			failures = 0
		}
		failures++
		wait := time.NewTimer(b.delay(failures, rand.Float64()))
		select {
		case <-ctx.Done():
			wait.Stop()
			return context.Cause(ctx)
		case <-wait.C:
		}
	}
}
