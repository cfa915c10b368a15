package l7

import (
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// tick is how often deadlines are looked at. They pass that much late at most.
const tick = 50 * time.Millisecond

// A clock is the coarse clock of an engine, and knows whose time may run out.
// Arming a deadline is one store, where a timer or a deadline of the kernel's
// poller would cost as much as parsing a request.
type clock struct {
	now atomic.Int64 // nanoseconds, by the monotonic clock, since base

	base time.Time

	mu      sync.Mutex
	watched deadline // guarded by mu: a ring of those that are watched begins here
}

func newClock() *clock {
	c := &clock{base: time.Now()}
	c.watched.next, c.watched.before = &c.watched, &c.watched
	return c
}

// advance sets the clock and calls every deadline that has passed.
func (c *clock) advance() {
	now := int64(time.Since(c.base))
	c.now.Store(now)
	var due []*deadline
	c.mu.Lock()
	for d := c.watched.next; d != &c.watched; d = d.next {
		if at := d.at.Load(); at != 0 && at <= now {
			due = append(due, d)
		}
	}
	c.mu.Unlock()
	for _, d := range due {
		if at := d.at.Load(); at != 0 && at <= now && d.at.CompareAndSwap(at, 0) {
			d.passed()
		}
	}
}

// watch makes the clock look at d until forget.
func (c *clock) watch(d *deadline) {
	c.mu.Lock()
	if d.next == nil {
		d.next, d.before = &c.watched, c.watched.before
		d.before.next, d.next.before = d, d
	}
	c.mu.Unlock()
}

func (c *clock) forget(d *deadline) {
	c.mu.Lock()
	if d.next != nil {
		d.before.next, d.next.before = d.next, d.before
		d.next, d.before = nil, nil
	}
	c.mu.Unlock()
}

// A deadline is one that can be set often and cheaply.
type deadline struct {
	clock  *clock
	at     atomic.Int64 // 0 is none
	passed func()       // called by the clock's goroutine; must not wait

	next, before *deadline // guarded by clock.mu: in its ring, nil if it is not watched
}

// set lets the deadline pass after about d from now.
func (d *deadline) set(after time.Duration) {
	d.at.Store(d.clock.now.Load() + int64(after))
}

// clear takes the deadline back. It may just have passed.
func (d *deadline) clear() { d.at.Store(0) }

// long ago is before any deadline of a connection.
var longAgo = time.Unix(1, 0)

// interrupt makes reads from conn return, now and later.
func interrupt(conn net.Conn) { _ = conn.SetReadDeadline(longAgo) } // it fails on a closed one only

// cut makes reads and writes of conn return, now and later.
func cut(conn net.Conn) { _ = conn.SetDeadline(longAgo) } // as above
