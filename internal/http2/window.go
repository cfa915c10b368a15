package http2

// A SendWindow is how much the peer lets us send on a stream or connection. It
// may be negative after the peer lowered its initial window (RFC 9113 6.9.2).
// The zero SendWindow allows nothing.
type SendWindow struct{ left int32 }

// Left returns how many bytes may be sent now, never less than 0.
func (w *SendWindow) Left() int { return int(max(w.left, 0)) }

// Add opens the window by n, or with a negative n closes it. It reports false
// if the window would be larger than RFC 9113 6.9.1 allows; that ends the
// stream, or the connection, with FLOW_CONTROL_ERROR.
func (w *SendWindow) Add(n int64) bool {
	left := int64(w.left) + n
	if left > MaxWindow || left < -MaxWindow {
		return false
	}
	w.left = int32(left)
	return true
}

// Take accounts for n sent bytes, n at most Left.
func (w *SendWindow) Take(n int) { w.left -= int32(n) }

// A ReceiveWindow is how much we let the peer send. The zero ReceiveWindow
// allows nothing.
type ReceiveWindow struct {
	size  int32 // what the peer should have when everything is credited
	left  int32 // what the peer may still send
	owing int32 // credited, not yet announced
}

// NewReceiveWindow returns a window of size bytes of which the peer has heard.
func NewReceiveWindow(size int) ReceiveWindow {
	return ReceiveWindow{size: int32(size), left: int32(size)}
}

// Size returns the size last set.
func (w *ReceiveWindow) Size() int { return int(w.size) }

// Receive accounts for n bytes from the peer, padding included. It reports
// false if the peer sent more than it may (RFC 9113 6.9.1).
func (w *ReceiveWindow) Receive(n int) bool {
	if n > int(w.left) {
		return false
	}
	w.left -= int32(n)
	return true
}

// Unread returns how many received bytes were not yet credited.
func (w *ReceiveWindow) Unread() int { return int(w.size - w.left - w.owing) }

// Credit notes that n received bytes were taken, to be announced later.
func (w *ReceiveWindow) Credit(n int) { w.owing += int32(n) }

// Grow raises the size to n; the difference is announced with the next
// credit. A size that is not larger is ignored: a window never shrinks.
func (w *ReceiveWindow) Grow(n int) {
	if d := int32(n) - w.size; d > 0 {
		w.size += d
		w.owing += d
	}
}

// Announce returns the increment for a WINDOW_UPDATE, or 0 while less than a
// quarter of the window is owing: many small updates would cost both sides
// more than they help.
func (w *ReceiveWindow) Announce() uint32 {
	if w.owing == 0 || w.owing < w.size/4 {
		return 0
	}
	n := min(w.owing, MaxWindow-w.left)
	w.owing -= n
	w.left += n
	return uint32(n)
}
