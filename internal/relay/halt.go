package relay

import (
	"errors"
	"net"
	"os"
	"sync"
	"time"
)

// ErrLeft is why a Copy ended that goes on elsewhere.
var ErrLeft = errors.New("the connections go on elsewhere")

// A Halter stops a Copy between two TCP connections so that another process can
// go on with copies of their descriptors. It is for one Copy. Its zero value is
// ready; the methods may be called at any time and from any goroutine.
type Halter struct {
	mu      sync.Mutex
	ends    [2]*net.TCPConn // while Copy runs
	dirs    [2]dirState     // the bytes of the first, of the second
	halting bool
	left    bool
	changed chan struct{} // closed and replaced at every change; nil when nobody waits
}

// dirState is what a direction does.
type dirState uint8

const (
	moving dirState = iota
	parked
	ended
	failed
)

// Ended says, before Copy is called, which directions have ended already, and
// were told so: that of the bytes of the first connection, and of the second.
func (h *Halter) Ended(first, second bool) {
	for i, e := range []bool{first, second} {
		if e {
			h.dirs[i] = ended
		}
	}
}

// begin says what is copied. It returns whether each direction is to be moved.
func (h *Halter) begin(a, b net.Conn) (first, second bool) {
	if h == nil {
		return true, true
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	at, aTCP := a.(*net.TCPConn)
	bt, bTCP := b.(*net.TCPConn)
	if aTCP && bTCP {
		h.ends = [2]*net.TCPConn{at, bt}
	}
	return h.dirs[0] != ended, h.dirs[1] != ended
}

// set notes what direction i does. h.mu is held.
func (h *Halter) set(i int, s dirState) {
	h.dirs[i] = s
	h.tell()
}

func (h *Halter) tell() {
	if h.changed != nil {
		close(h.changed)
		h.changed = nil
	}
}

// wait returns a channel that is closed at the next change. h.mu is held.
func (h *Halter) wait() <-chan struct{} {
	if h.changed == nil {
		h.changed = make(chan struct{})
	}
	return h.changed
}

// finish notes how direction i has ended.
func (h *Halter) finish(i int, err error) {
	if h == nil {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if err != nil {
		h.set(i, failed)
		return
	}
	h.set(i, ended)
}

// park waits, if err says that direction i was halted, and then returns nil if
// it is to go on, and ErrLeft if not. All that it has read is written by then.
// Any other err is returned.
func (h *Halter) park(i int, err error) error {
	if h == nil || !errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.set(i, parked)
	for h.halting && !h.left {
		changed := h.wait()
		h.mu.Unlock()
		<-changed
		h.mu.Lock()
	}
	if h.left {
		return ErrLeft
	}
	h.dirs[i] = moving
	return nil
}

// Halt stops the Copy and returns its connections, and which directions have
// ended, as Ended takes them. Until Resume or Leave, one of which must follow,
// nothing of them is read or written. It reports false if there is nothing to
// halt, or if what was read could not be written within patience; then the Copy
// goes on.
func (h *Halter) Halt(patience time.Duration) (ends [2]*net.TCPConn, over [2]bool, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.ends[0] == nil || h.halting || h.left {
		return ends, over, false
	}
	h.halting = true
	for _, c := range h.ends {
		_ = c.SetReadDeadline(time.Unix(1, 0)) // it fails if the direction has, too
	}
	timeout := time.NewTimer(patience)
	defer timeout.Stop()
	for h.dirs[0] == moving || h.dirs[1] == moving {
		changed := h.wait()
		h.mu.Unlock()
		late := false
		select {
		case <-changed:
		case <-timeout.C:
			late = true
		}
		h.mu.Lock()
		if late {
			break
		}
	}
	for i, d := range h.dirs {
		over[i] = d == ended
		if d == moving || d == failed {
			h.resume()
			return ends, over, false
		}
	}
	if over[0] && over[1] {
		h.resume()
		return ends, over, false
	}
	return h.ends, over, true
}

// Resume lets the Copy go on after Halt.
func (h *Halter) Resume() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.resume()
}

func (h *Halter) resume() {
	for _, c := range h.ends {
		_ = c.SetReadDeadline(time.Time{}) // as in Halt
	}
	h.halting = false
	h.tell()
}

// Leave ends the Copy after Halt, with ErrLeft: it closes its descriptors and
// says nothing to anybody, so copies of them can go on.
func (h *Halter) Leave() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.left = true
	h.tell()
}
