package record

import (
	"crypto/tls"
	"encoding/binary"
	"io"
	"slices"
)

// Handshake messages that may follow the handshake (RFC 8446 4.6).
const (
	typeNewSessionTicket = 4
	typeKeyUpdate        = 24
)

const (
	// maxIdle is how many records without data may follow one another. More
	// is a peer that keeps us busy for nothing.
	maxIdle = 32
	// maxTicket bounds a NewSessionTicket by what its fields can hold.
	maxTicket = 4 + 4 + 1 + 255 + 2 + 1<<16 + 2 + 1<<16
)

// An Opener checks and opens what the peer sends. It is not safe for
// concurrent use.
type Opener struct {
	half   *half
	client bool // we are the client, who may be sent tickets
	idle   int
	err    error // set once; io.EOF after close_notify

	// The handshake message at hand, which may come in several records.
	msg     [5]byte // header and, of a KeyUpdate, its one byte
	msgLen  int     // of msg
	msgSkip int     // bytes of a ticket to come
	// owed is set when the peer has asked us to change our key.
	owed bool
}

// NewOpener returns an Opener for a cipher suite of TLS 1.3 and the traffic
// secret of the peer's direction, which it copies. client says that we are the
// client.
func NewOpener(suite uint16, secret []byte, client bool) (*Opener, error) {
	h, err := newHalf(suite, secret)
	if err != nil {
		return nil, err
	}
	return &Opener{half: h, client: client}, nil
}

// Open takes the first record of in, if it is whole, and opens it where it
// lies. It returns the application data in it, which is a part of in and may be
// empty, and what follows the record. used false means that the record is not
// whole yet.
//
// The error is io.EOF after close_notify, a tls.AlertError for any other alert
// of the peer's, and else an *Error. It is final.
func (o *Opener) Open(in []byte) (data, rest []byte, used bool, err error) {
	n, err := o.length(in)
	if err != nil || n == 0 {
		return nil, in, false, err
	}
	rest = in[n:]
	typ, content, err := o.decrypt(in[headerLen:headerLen], in[:n:n])
	if err == nil {
		data, err = o.content(typ, content)
	}
	if err != nil {
		return nil, rest, true, err
	}
	return data, rest, true, nil
}

// OpenTo is Open, but appends the application data to dst, so that the data of
// many records lies in one piece. dst and in must not overlap. Spare capacity
// of dst may be overwritten. When it fails dst is returned as it came.
func (o *Opener) OpenTo(dst, in []byte) (out, rest []byte, used bool, err error) {
	n, err := o.length(in)
	if err != nil || n == 0 {
		return dst, in, false, err
	}
	rest = in[n:]
	dst = slices.Grow(dst, n)
	typ, content, err := o.decrypt(dst[len(dst):], in[:n:n])
	var data []byte
	if err == nil {
		data, err = o.content(typ, content)
	}
	if err != nil {
		return dst, rest, true, err
	}
	return dst[:len(dst)+len(data)], rest, true, nil
}

// length returns the length of the first record of in with its header, or 0 if
// the record is not whole yet.
func (o *Opener) length(in []byte) (int, error) {
	if o.err != nil {
		return 0, o.err
	}
	if len(in) < headerLen {
		return 0, nil
	}
	n := int(binary.BigEndian.Uint16(in[3:]))
	switch {
	case in[0] != typeApplication:
		// 5: after the handshake every record is protected, and a
		// change_cipher_spec may come no more.
		return 0, o.fail(alertUnexpectedMessage, "a record that is not protected")
	case n > maxCiphertext:
		return 0, o.fail(alertRecordOverflow, "a record longer than 2^14+256 bytes") // 5.2
	case n < tagLen+1:
		return 0, o.fail(alertBadRecordMAC, "a record too short for its tag")
	case len(in) < headerLen+n:
		return 0, nil
	}
	return headerLen + n, nil
}

// KeyUpdateOwed reports whether the peer has asked for a new key since the
// last call. We owe a KeyUpdate before our next application data (4.6.3).
func (o *Opener) KeyUpdateOwed() bool {
	owed := o.owed
	o.owed = false
	return owed
}

// Wipe forgets the secrets. What is opened after it fails.
func (o *Opener) Wipe() {
	o.half.wipe()
	if o.err == nil {
		o.err = errWiped
	}
}

// decrypt opens one record into dst, which is empty and lies where the record's
// payload does, or apart from it, and takes off the padding.
func (o *Opener) decrypt(dst, rec []byte) (typ byte, content []byte, err error) {
	h := o.half
	body := rec[headerLen:]
	// 5.2: the header as it came is what the tag covers too.
	plain, err := h.aead.Open(dst, h.nextNonce(), body, rec[:headerLen])
	if err != nil {
		return 0, nil, o.fail(alertBadRecordMAC, "a record that was changed, left out, repeated or moved")
	}
	if len(plain) > MaxPlaintext+1 {
		return 0, nil, o.fail(alertRecordOverflow, "content longer than 2^14 bytes") // 5.4
	}
	i := len(plain) - 1
	for i >= 0 && plain[i] == 0 {
		i--
	}
	if i < 0 {
		return 0, nil, o.fail(alertUnexpectedMessage, "a record of padding only") // 5.4
	}
	return plain[i], plain[:i:i], nil
}

// content acts on what was in a record.
func (o *Opener) content(typ byte, p []byte) ([]byte, error) {
	if o.inMessage() && typ != typeHandshake {
		return nil, o.fail(alertUnexpectedMessage, "a handshake message was interrupted") // 5.1
	}
	if typ != typeApplication || len(p) == 0 {
		if o.idle++; o.idle > maxIdle {
			return nil, o.fail(alertUnexpectedMessage, "too many records without data")
		}
	}
	switch typ {
	case typeApplication:
		if len(p) > 0 {
			o.idle = 0
		}
		return p, nil
	case typeAlert:
		return nil, o.alert(p)
	case typeHandshake:
		return nil, o.handshake(p)
	}
	return nil, o.fail(alertUnexpectedMessage, "a record of unknown content")
}

// alert acts on an alert (RFC 8446 6): whatever its level, it is final.
func (o *Opener) alert(p []byte) error {
	if len(p) == 0 {
		return o.fail(alertUnexpectedMessage, "an empty alert") // 5.4
	}
	if len(p) != 2 {
		return o.fail(alertDecodeError, "an alert that is not two bytes") // 5.1: not in pieces
	}
	switch p[1] {
	case alertCloseNotify:
		o.err = io.EOF // 6.1: what follows is ignored
	case alertUserCanceled:
		return nil // 6.1: a close_notify follows
	default:
		o.err = tls.AlertError(p[1])
	}
	return o.err
}

func (o *Opener) inMessage() bool { return o.msgLen > 0 || o.msgSkip > 0 }

// handshake acts on a piece of the handshake messages after the handshake.
func (o *Opener) handshake(p []byte) error {
	if len(p) == 0 {
		return o.fail(alertUnexpectedMessage, "an empty piece of a handshake message") // 5.1
	}
	for len(p) > 0 {
		if o.msgSkip > 0 {
			n := min(o.msgSkip, len(p))
			o.msgSkip, p = o.msgSkip-n, p[n:]
			continue
		}
		want := 4
		if o.msgLen >= 4 {
			want = 5
		}
		n := copy(o.msg[o.msgLen:want], p)
		o.msgLen, p = o.msgLen+n, p[n:]
		if o.msgLen < want {
			return nil
		}
		if err := o.message(len(p) > 0); err != nil {
			return err
		}
	}
	return nil
}

// message acts on the header of a message, or on a whole KeyUpdate. more says
// that the record goes on.
func (o *Opener) message(more bool) error {
	n := int(o.msg[1])<<16 | int(o.msg[2])<<8 | int(o.msg[3])
	switch {
	case o.msg[0] == typeNewSessionTicket && o.client:
		// We never resume. A ticket is thrown away unread.
		if n > maxTicket {
			return o.fail(alertDecodeError, "a ticket longer than any ticket")
		}
		o.msgLen, o.msgSkip = 0, n
		return nil
	case o.msg[0] != typeKeyUpdate:
		// 4.6.2: nothing else may come, as we offered no post_handshake_auth.
		return o.fail(alertUnexpectedMessage, "an unexpected handshake message")
	case n != 1:
		return o.fail(alertDecodeError, "a KeyUpdate that is not one byte")
	case o.msgLen < 5:
		return nil
	case o.msg[4] > 1:
		return o.fail(alertIllegalParameter, "a KeyUpdate with an unknown wish") // 4.6.3
	case more:
		return o.fail(alertUnexpectedMessage, "a record that spans a change of keys") // 5.1
	}
	o.msgLen = 0
	o.owed = o.owed || o.msg[4] == 1
	if err := o.half.update(); err != nil {
		o.err = err
		return err
	}
	return nil
}

func (o *Opener) fail(alert uint8, reason string) error {
	o.err = &Error{Alert: alert, Reason: reason}
	return o.err
}
