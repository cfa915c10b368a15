package hbone

import (
	"sync"
	"time"
)

// A deadline is a moment that can be moved while somebody waits for it. It is
// guarded by the mutex given to set. Its zero value never comes.
type deadline struct {
	timer *time.Timer
	moved int // how often it was set: tells a stopped timer that fires anyway
	past  bool
}

// set moves the deadline to t, or takes it away if t is zero, and calls wake
// when it has come. The caller holds mu, and wake is called without it.
func (d *deadline) set(mu *sync.Mutex, t time.Time, wake func()) {
	d.stop()
	if t.IsZero() {
		return
	}
	wait := time.Until(t)
	if wait <= 0 {
		d.past = true
		return
	}
	moved := d.moved
	d.timer = time.AfterFunc(wait, func() {
		mu.Lock()
		current := d.moved == moved
		if current {
			d.past = true
		}
		mu.Unlock()
		if current {
			wake()
		}
	})
}

// stop takes the deadline away. The caller holds the mutex.
func (d *deadline) stop() {
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
	d.moved++
	d.past = false
}
