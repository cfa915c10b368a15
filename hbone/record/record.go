// Package record is the record protection of TLS 1.3 (RFC 8446 5) with the
// secrets of a handshake that crypto/tls has finished. It seals many records
// into one buffer and opens them where they lie, which crypto/tls cannot, and
// once the handshake is over nothing of crypto/tls is kept.
//
// Sealer and Opener are pure; Conn joins them to a net.Conn.
package record

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"hash"

	"golang.org/x/crypto/chacha20poly1305"
)

const (
	headerLen = 5
	tagLen    = 16 // of all suites of TLS 1.3 that we know
	// MaxPlaintext is the largest content of a record (RFC 8446 5.1).
	MaxPlaintext = 1 << 14
	// maxCiphertext is the largest payload of a protected record (5.2).
	maxCiphertext = MaxPlaintext + 256
	// Overhead is what protection adds to a record.
	Overhead = headerLen + 1 + tagLen
	// maxRecord is the largest record, header included.
	maxRecord = headerLen + maxCiphertext
)

// Content types (RFC 8446 5.1).
const (
	typeAlert       = 21
	typeHandshake   = 22
	typeApplication = 23
)

// Alerts (RFC 8446 6) that we send.
const (
	alertCloseNotify       = 0
	alertUnexpectedMessage = 10
	alertBadRecordMAC      = 20
	alertRecordOverflow    = 22
	alertIllegalParameter  = 47
	alertDecodeError       = 50
	alertUserCanceled      = 90
)

// An Error is a record that the peer must not have sent. The connection is
// over; Alert is what to tell the peer.
type Error struct {
	Alert  uint8
	Reason string
}

// Error says what was wrong with the record.
func (e *Error) Error() string {
	return fmt.Sprintf("TLS record: %s (%v)", e.Reason, tls.AlertError(e.Alert))
}

// A suite is what the cipher suite decides.
type suite struct {
	keyLen int
	hash   func() hash.Hash
	aead   func(key []byte) (cipher.AEAD, error)
}

func suiteOf(id uint16) (suite, error) {
	switch id {
	case tls.TLS_AES_128_GCM_SHA256:
		return suite{16, sha256.New, newGCM}, nil
	case tls.TLS_AES_256_GCM_SHA384:
		return suite{32, sha512.New384, newGCM}, nil
	case tls.TLS_CHACHA20_POLY1305_SHA256:
		return suite{chacha20poly1305.KeySize, sha256.New, chacha20poly1305.New}, nil
	}
	return suite{}, fmt.Errorf("TLS record: cipher suite %s is not known", tls.CipherSuiteName(id))
}

func newGCM(key []byte) (cipher.AEAD, error) {
	b, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(b)
}

// half is the protection of one direction. It is nil-safe nowhere: make it
// with newHalf.
type half struct {
	id     uint16 // of the suite
	suite  suite
	secret []byte // application_traffic_secret_N
	aead   cipher.AEAD
	iv     [12]byte
	nonce  [12]byte // of the record at hand; a field, so that it does not escape each time
	seq    uint64
}

// newHalf returns the protection with a traffic secret, which it copies.
func newHalf(id uint16, secret []byte) (*half, error) {
	s, err := suiteOf(id)
	if err != nil {
		return nil, err
	}
	if n := s.hash().Size(); len(secret) != n {
		return nil, fmt.Errorf("TLS record: traffic secret of %d bytes, want %d", len(secret), n)
	}
	h := &half{id: id, suite: s}
	return h, h.rekey(append([]byte(nil), secret...))
}

// rekey derives key and iv from a traffic secret (RFC 8446 7.3), which it
// takes over, and begins to count anew (5.3).
func (h *half) rekey(secret []byte) error {
	key, err := expandLabel(h.suite.hash, secret, "key", h.suite.keyLen)
	if err != nil {
		return err
	}
	defer clear(key)
	iv, err := expandLabel(h.suite.hash, secret, "iv", len(h.iv))
	if err != nil {
		return err
	}
	defer clear(iv)
	if h.aead, err = h.suite.aead(key); err != nil {
		return err
	}
	clear(h.secret)
	h.secret, h.seq = secret, 0
	copy(h.iv[:], iv)
	return nil
}

// update moves on to the next traffic secret (RFC 8446 7.2).
func (h *half) update() error {
	next, err := expandLabel(h.suite.hash, h.secret, "traffic upd", h.suite.hash().Size())
	if err != nil {
		return err
	}
	return h.rekey(next)
}

// nextNonce returns the nonce of the next record (RFC 8446 5.3).
func (h *half) nextNonce() []byte {
	h.nonce = h.iv
	binary.BigEndian.PutUint64(h.nonce[4:], binary.BigEndian.Uint64(h.iv[4:])^h.seq)
	h.seq++
	return h.nonce[:]
}

// wipe forgets the secrets that are ours to forget. The key schedule inside
// the AEAD is left to the garbage collector.
func (h *half) wipe() {
	clear(h.secret)
	clear(h.iv[:])
	clear(h.nonce[:])
	h.aead = nil
}

// expandLabel is HKDF-Expand-Label with an empty context (RFC 8446 7.1).
func expandLabel(hash func() hash.Hash, secret []byte, label string, n int) ([]byte, error) {
	const prefix = "tls13 "
	info := binary.BigEndian.AppendUint16(nil, uint16(n))
	info = append(info, byte(len(prefix)+len(label)))
	info = append(info, prefix...)
	info = append(info, label...)
	info = append(info, 0)
	return hkdf.Expand(hash, secret, string(info), n)
}
