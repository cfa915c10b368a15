package http2

import "time"

// A Bucket bounds how often something may happen: burst times at once, and
// rate times a second in the long run. The zero Bucket is full.
type Bucket struct {
	used float64
	last time.Time
}

// Take reports whether it may happen once more at now.
func (b *Bucket) Take(now time.Time, burst, rate int) bool {
	if d := now.Sub(b.last); d > 0 && !b.last.IsZero() {
		b.used = max(0, b.used-d.Seconds()*float64(rate))
	}
	b.last = now
	if b.used+1 > float64(burst) {
		return false
	}
	b.used++
	return true
}

// Give takes back up to n uses.
func (b *Bucket) Give(n int) { b.used = max(0, b.used-float64(n)) }

// Limits of a Guard. An honest peer stays far below them; each exists because
// an attack is known that does not.
const (
	// Frames that move no bytes: PING, SETTINGS, PRIORITY, WINDOW_UPDATE,
	// empty DATA, frames of unknown type (CVE-2019-9512, 9513, 9515, 9518). DATA pays for them,
	// since a peer that measures the path sends a PING with its data.
	idleBurst, idleRate = 2000, 500
	// Streams that ended in a reset that the peer caused (CVE-2023-44487 by
	// resetting them, CVE-2025-8671 by making us reset them).
	resetBurst, resetRate = 1000, 500
	// Answers that the peer does not read (CVE-2019-9512, 9514, 9515).
	maxReplies = 4096
)

// A Guard notices a peer that makes us work without moving bytes. The zero
// Guard has seen nothing.
type Guard struct {
	idle, resets Bucket
	replies      int
}

// Idle counts a frame that moved no bytes. The error is a *ConnError.
func (g *Guard) Idle(now time.Time) error {
	if !g.idle.Take(now, idleBurst, idleRate) {
		return connError(EnhanceYourCalm, "too many frames without data")
	}
	return nil
}

// Moved notes a DATA frame with n bytes of data, in either direction.
func (g *Guard) Moved(n int) {
	// A tiny frame pays for one, as interactive streams send them; a large one
	// for the window updates of a reader that takes it in pieces.
	if n > 0 {
		g.idle.Give(1 + n/2048)
	}
}

// Reset counts a stream that ended in a reset that the peer caused. The error
// is a *ConnError.
func (g *Guard) Reset(now time.Time) error {
	if !g.resets.Take(now, resetBurst, resetRate) {
		return connError(EnhanceYourCalm, "too many streams were reset")
	}
	return nil
}

// Reply counts a frame queued only because the peer asked for it. The error is
// a *ConnError.
func (g *Guard) Reply() error {
	if g.replies++; g.replies > maxReplies {
		return connError(EnhanceYourCalm, "%d answers are waiting and the peer does not read", maxReplies)
	}
	return nil
}

// Flushed notes that the queued answers are on their way.
func (g *Guard) Flushed() { g.replies = 0 }
