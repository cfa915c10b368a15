package identity

import (
	"crypto/tls"
	"math/rand/v2"
	"time"

	"github.com/weft-mesh/weft/mesh"
)

const (
	backoffMin = 100 * time.Millisecond
	backoffMax = time.Minute
	// backoffWaiting bounds the pause between attempts while a handshake
	// waits.
	backoffWaiting = time.Second
	// longestSleep bounds how late a Manager notices that the wall clock
	// jumped, for example because the machine was suspended.
	longestSleep = time.Minute
)

// An entry is what a Manager knows of one identity.
type entry struct {
	id      mesh.Identity
	pods    int              // Warm minus Forget
	waiting int              // callers of Certificate that wait
	used    bool             // handed out since it was issued
	cert    *tls.Certificate // nil before the first
	arrived chan struct{}    // closed when the next certificate is there

	running  bool      // an attempt is under way
	due      time.Time // when to try next; the zero time is now
	failures int       // in a row
	err      error     // of the last attempt
	failedAt time.Time
}

// urgency orders attempts; the higher goes first.
type urgency int

const (
	renewal   urgency = iota // has a certificate that is still valid
	warmUp                   // a pod is here that has made no connection yet
	handshake                // someone waits
)

// valid reports whether e holds a certificate that peers accept at now.
func (e *entry) valid(now time.Time) bool {
	return e.cert != nil && now.Before(e.cert.Leaf.NotAfter)
}

// idle reports whether nobody has any use for e: no pod, no waiter, no
// attempt, and its certificate, if any, went unused for half its life.
func (e *entry) idle(now time.Time) bool {
	if e.pods > 0 || e.waiting > 0 || e.running {
		return false
	}
	return !e.valid(now) || !e.used && !now.Before(e.due)
}

func (e *entry) urgency(now time.Time) urgency {
	switch {
	case e.waiting > 0:
		return handshake
	case !e.valid(now):
		return warmUp
	}
	return renewal
}

// dueAt is when the next attempt may start. A waiting handshake shortens the
// pause after a failure, but does not remove it: a CA that is down must not
// be asked once for every connection.
func (e *entry) dueAt(now time.Time) time.Time {
	switch {
	case e.failures > 0 && e.waiting > 0:
		return earlier(e.due, e.failedAt.Add(backoffWaiting))
	case e.failures == 0 && !e.valid(now):
		return time.Time{} // also a certificate that ran out while we slept
	}
	return e.due
}

// next chooses the identity to ask the CA for at now, when busy of limit
// attempts are under way. It returns nil when there is nothing to do or no
// room for it; later is then how long that stays so unless something happens.
// One place is kept free for handshakes.
func next(entries map[mesh.Identity]*entry, now time.Time, busy, limit int) (best *entry, later time.Duration) {
	later = longestSleep
	for _, e := range entries {
		if e.running {
			continue
		}
		if wait := e.dueAt(now).Sub(now); wait > 0 {
			later = min(later, wait)
			continue
		}
		if best == nil || before(e, best, now) {
			best = e
		}
	}
	if best == nil {
		return nil, later
	}
	room := limit
	if limit > 1 && best.urgency(now) != handshake {
		room = limit - 1
	}
	if busy >= room {
		return nil, longestSleep // the end of an attempt wakes us
	}
	return best, 0
}

// before reports whether a goes before b: by urgency, then by how long it has
// been due, then by name so that the order is always the same.
func before(a, b *entry, now time.Time) bool {
	if ua, ub := a.urgency(now), b.urgency(now); ua != ub {
		return ua > ub
	}
	if da, db := a.dueAt(now), b.dueAt(now); !da.Equal(db) {
		return da.Before(db)
	}
	return a.id.String() < b.id.String()
}

// renewAt returns when to renew a certificate that was obtained at now and
// ends at notAfter: after half its life, give or take a tenth of that, so
// that certificates issued together are not renewed together.
func renewAt(now, notAfter time.Time) time.Time {
	half := notAfter.Sub(now) / 2
	d := time.Duration(float64(half) * (0.9 + 0.2*rand.Float64()))
	return wall(now.Add(max(d, backoffMin)))
}

// retryAt returns when to try again after the given number of failures in a
// row, the last of them at now. Half of the pause is random.
func retryAt(now time.Time, failures int) time.Time {
	d := backoffMax
	if shift := failures - 1; shift < 16 {
		d = min(backoffMin<<shift, backoffMax)
	}
	return wall(now.Add(d/2 + time.Duration(rand.Int64N(int64(d/2)+1))))
}

// wall strips the monotonic clock, which stands still while a machine is
// suspended. Certificates expire by the wall clock.
func wall(t time.Time) time.Time { return t.Round(0) }

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}
