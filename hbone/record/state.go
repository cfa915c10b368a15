package record

import (
	"crypto/sha512"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"

	"github.com/weft-mesh/weft/internal/pack"
)

// A Secret is a traffic secret: who has it can read and write in the name of
// both ends. It prints as nothing of itself, whatever prints it.
type Secret []byte

// Wipe clears the secret.
func (s Secret) Wipe() { clear(s) }

const hidden = "[secret]"

// String returns no part of the secret.
func (s Secret) String() string { return hidden }

// Format writes no part of the secret, whatever the verb.
func (s Secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, hidden) }

// MarshalText returns no part of the secret.
func (s Secret) MarshalText() ([]byte, error) { return []byte(hidden), nil }

// LogValue returns no part of the secret.
func (s Secret) LogValue() slog.Value { return slog.StringValue(hidden) }

// A SealerState is all that another process needs to go on where a Sealer
// stopped. Two that go on from one state would use a nonce twice, which gives
// AES-GCM's key away (RFC 8446 5.3): so exactly one may, and the Sealer that it
// came from must seal nothing more once another has begun.
type SealerState struct {
	Suite    uint16
	Secret   Secret // application_traffic_secret_N of our direction
	Sequence uint64 // of the next record
}

// Wipe clears the secret.
func (s *SealerState) Wipe() { s.Secret.Wipe() }

// Pack names the fields to c. Read from bytes, they are not checked further
// than that they fit: ResumeSealer does.
func (s *SealerState) Pack(c *pack.Coder) {
	packHalf(c, &s.Suite, &s.Secret, &s.Sequence)
}

// State returns a copy of the Sealer's state, with a secret that the caller
// wipes. It fails when the Sealer was wiped.
func (s *Sealer) State() (SealerState, error) {
	if s.half.aead == nil {
		return SealerState{}, errWiped
	}
	return SealerState{Suite: s.half.id, Secret: append(Secret(nil), s.half.secret...), Sequence: s.half.seq}, nil
}

// ResumeSealer returns a Sealer that goes on from s, whose secret it copies.
func ResumeSealer(s SealerState) (*Sealer, error) {
	h, err := resumeHalf(s.Suite, s.Secret, s.Sequence)
	if err != nil {
		return nil, err
	}
	return &Sealer{half: h, left: int(updateAfter - min(s.Sequence, updateAfter))}, nil
}

// An OpenerState is all that another process needs to go on where an Opener
// stopped, but for the bytes of a record that is not whole: those are its
// caller's. The message at hand is one that comes in several records
// (RFC 8446 5.1).
type OpenerState struct {
	Suite    uint16
	Secret   Secret // application_traffic_secret_N of the peer's direction
	Sequence uint64 // of the next record
	Client   bool   // we are the client
	Idle     int    // records without data that came in a row
	Owed     bool   // KeyUpdateOwed would return true

	Message     [5]byte
	MessageLen  int // of Message
	MessageSkip int // bytes of a ticket to come
}

// Wipe clears the secret.
func (s *OpenerState) Wipe() { s.Secret.Wipe() }

// Pack names the fields to c, as SealerState.Pack does.
func (s *OpenerState) Pack(c *pack.Coder) {
	packHalf(c, &s.Suite, &s.Secret, &s.Sequence)
	pack.Bool(c, &s.Client)
	pack.Uint(c, &s.Idle, maxIdle)
	pack.Bool(c, &s.Owed)
	pack.Array(c, s.Message[:])
	pack.Uint(c, &s.MessageLen, uint64(len(s.Message)))
	pack.Uint(c, &s.MessageSkip, maxTicket)
}

// State returns a copy of the Opener's state, with a secret that the caller
// wipes. It fails when the Opener was wiped or its direction has ended.
func (o *Opener) State() (OpenerState, error) {
	if o.err != nil {
		return OpenerState{}, fmt.Errorf("the peer's direction has ended: %w", o.err)
	}
	return OpenerState{
		Suite: o.half.id, Secret: append(Secret(nil), o.half.secret...), Sequence: o.half.seq,
		Client: o.client, Idle: o.idle, Owed: o.owed,
		Message: o.msg, MessageLen: o.msgLen, MessageSkip: o.msgSkip,
	}, nil
}

// ResumeOpener returns an Opener that goes on from s, whose secret it copies.
func ResumeOpener(s OpenerState) (*Opener, error) {
	if err := s.check(); err != nil {
		return nil, fmt.Errorf("TLS record: resume: %w", err)
	}
	h, err := resumeHalf(s.Suite, s.Secret, s.Sequence)
	if err != nil {
		return nil, err
	}
	return &Opener{
		half: h, client: s.Client, idle: s.Idle, owed: s.Owed,
		msg: s.Message, msgLen: s.MessageLen, msgSkip: s.MessageSkip,
	}, nil
}

// check reports whether an Opener can be in this state.
func (s *OpenerState) check() error {
	switch {
	case s.Idle < 0 || s.Idle > maxIdle:
		return fmt.Errorf("%d records without data", s.Idle)
	case s.MessageSkip < 0 || s.MessageSkip > maxTicket || s.MessageSkip > 0 && (s.MessageLen > 0 || !s.Client):
		return errors.New("a ticket that cannot be")
	case s.MessageLen < 0 || s.MessageLen >= len(s.Message):
		return errors.New("a handshake message that is whole")
	case s.MessageLen >= 4 && s.Message[0] != typeKeyUpdate:
		return errors.New("a handshake message that is not known")
	}
	return nil
}

// packHalf names the protection of one direction.
func packHalf(c *pack.Coder, suite *uint16, secret *Secret, sequence *uint64) {
	pack.Uint(c, suite, math.MaxUint16)
	pack.Bytes(c, secret, sha512.Size384)
	pack.Uint(c, sequence, math.MaxUint64)
}

// resumeHalf returns the protection as it was before the record sequence.
func resumeHalf(suite uint16, secret Secret, sequence uint64) (*half, error) {
	if sequence == math.MaxUint64 {
		return nil, errors.New("TLS record: resume: the sequence number would wrap") // RFC 8446 5.3
	}
	h, err := newHalf(suite, secret)
	if err != nil {
		return nil, err
	}
	h.seq = sequence
	return h, nil
}
