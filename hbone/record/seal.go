package record

import (
	"errors"
	"slices"
)

// updateAfter is how many records one key protects. AES-GCM is sound for 2^24.5
// full records (RFC 8446 5.5); a new key costs a few microseconds.
const updateAfter = 1 << 22

// errWiped is returned by what was closed.
var errWiped = errors.New("TLS record: the connection is closed")

// A Sealer protects what we send. It is not safe for concurrent use.
type Sealer struct {
	half *half
	left int // records until the key is to be updated
}

// NewSealer returns a Sealer for a cipher suite of TLS 1.3 and the traffic
// secret of our direction, which it copies.
func NewSealer(suite uint16, secret []byte) (*Sealer, error) {
	h, err := newHalf(suite, secret)
	if err != nil {
		return nil, err
	}
	return &Sealer{half: h, left: updateAfter}, nil
}

// Seal appends p to dst, as records of application data. An empty p is no
// record. p and dst must not overlap.
func (s *Sealer) Seal(dst, p []byte) ([]byte, error) {
	var err error
	dst = slices.Grow(dst, len(p)+(len(p)/MaxPlaintext+1)*Overhead)
	for len(p) > 0 {
		if s.left <= 0 {
			if dst, err = s.Update(dst, false); err != nil {
				return dst, err
			}
		}
		n := min(len(p), MaxPlaintext)
		if dst, err = s.record(dst, typeApplication, p[:n]); err != nil {
			return dst, err
		}
		p = p[n:]
	}
	return dst, nil
}

// SealOwned is Seal without its copy of p, which is the caller's own memory:
// p has at least one byte of capacity behind its end. That byte is changed
// while SealOwned runs, and restored.
func (s *Sealer) SealOwned(dst, p []byte) ([]byte, error) {
	var err error
	dst = slices.Grow(dst, len(p)+(len(p)/MaxPlaintext+2)*Overhead)
	for len(p) > 0 {
		if s.left <= 0 {
			if dst, err = s.Update(dst, false); err != nil {
				return dst, err
			}
		}
		n := min(len(p), MaxPlaintext)
		if dst, err = s.owned(dst, p[:n+1]); err != nil {
			return dst, err
		}
		p = p[n:]
	}
	return dst, nil
}

// owned appends one record of application data. The last byte of p is not part
// of it, and is where its type goes for the while.
func (s *Sealer) owned(dst, p []byte) ([]byte, error) {
	h := s.half
	if h.aead == nil {
		return dst, errWiped
	}
	n := len(p) + tagLen
	at := len(dst)
	dst = append(dst, typeApplication, 3, 3, byte(n>>8), byte(n))
	last := p[len(p)-1]
	p[len(p)-1] = typeApplication
	dst = h.aead.Seal(dst, h.nextNonce(), p, dst[at:])
	p[len(p)-1] = last
	s.left--
	return dst, nil
}

// Update appends a KeyUpdate and changes the key (RFC 8446 4.6.3). With
// request the peer is asked to change its own.
func (s *Sealer) Update(dst []byte, request bool) ([]byte, error) {
	msg := [5]byte{typeKeyUpdate, 0, 0, 1, 0}
	if request {
		msg[4] = 1
	}
	dst, err := s.record(dst, typeHandshake, msg[:])
	if err != nil {
		return dst, err
	}
	s.left = updateAfter
	return dst, s.half.update()
}

// Alert appends an alert. The level has no meaning in TLS 1.3, and is as
// RFC 8446 6 wants it.
func (s *Sealer) Alert(dst []byte, alert uint8) ([]byte, error) {
	level := byte(2)
	if alert == alertCloseNotify || alert == alertUserCanceled {
		level = 1
	}
	return s.record(dst, typeAlert, []byte{level, alert})
}

// Wipe forgets the secrets. What is sealed after it fails.
func (s *Sealer) Wipe() { s.half.wipe() }

// record appends one record (RFC 8446 5.2), without padding.
func (s *Sealer) record(dst []byte, typ byte, content []byte) ([]byte, error) {
	h := s.half
	if h.aead == nil {
		return dst, errWiped
	}
	n := len(content) + 1 + tagLen
	at := len(dst)
	// The outer type and version are fixed, for middleboxes.
	dst = append(dst, typeApplication, 3, 3, byte(n>>8), byte(n))
	body := len(dst)
	dst = append(dst, content...)
	dst = append(dst, typ)
	// Sealed where it lies; the tag is appended.
	sealed := h.aead.Seal(dst[body:body], h.nextNonce(), dst[body:], dst[at:body])
	s.left--
	return append(dst[:body], sealed...), nil // onto itself, if there was room
}
