package record

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"

	"golang.org/x/crypto/chacha20poly1305"
)

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Traffic secrets of RFC 8448 3, "Simple 1-RTT Handshake".
const (
	clientSecret = "9e40646ce79a7f9dc05af8889bce6552875afa0b06df0087f792ebb7c17504a5"
	serverSecret = "a11af9f05531f856ad47116b45a950328204b4f44bfb6b3a4b4f1f3fcb631643"
)

// TestRFC8448 seals and opens the records of application data and the alerts
// of RFC 8448 3.
func TestRFC8448(t *testing.T) {
	payload := make([]byte, 50)
	for i := range payload {
		payload[i] = byte(i)
	}
	clientData := unhex(t, `17 03 03 00 43 a2 3f 70 54 b6 2c 94 d0 af fa fe 82 28 ba 55 cb ef ac ea 42 f9 14 aa 66 bc ab 3f 2b 98 19
		a8 a5 b4 6b 39 5b d5 4a 9a 20 44 1e 2b 62 97 4e 1f 5a 62 92 a2 97 70 14 bd 1e 3d ea e6 3a ee bb 21 69 49 15 e4`)
	clientAlert := unhex(t, "17 03 03 00 13 c9 87 27 60 65 56 66 b7 4d 7f f1 15 3e fd 6d b6 d0 b0 e3")
	serverData := unhex(t, `17 03 03 00 43 2e 93 7e 11 ef 4a c7 40 e5 38 ad 36 00 5f c4 a4 69 32 fc 32 25 d0 5f 82 aa 1b 36 e3 0e fa
		f9 7d 90 e6 df fc 60 2d cb 50 1a 59 a8 fc c4 9c 4b f2 e5 f0 a2 1c 00 47 c2 ab f3 32 54 0d d0 32 e1 67 c2 95 5d`)
	serverAlert := unhex(t, "17 03 03 00 13 b5 8f d6 71 66 eb f5 99 d2 47 20 cf be 7e fa 7a 88 64 a9")
	for _, tt := range []struct {
		name, secret string
		skip         uint64 // records before: the server's first is a ticket
		data, alert  []byte
	}{
		{"client", clientSecret, 0, clientData, clientAlert},
		{"server", serverSecret, 1, serverData, serverAlert},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, err := NewSealer(tls.TLS_AES_128_GCM_SHA256, unhex(t, tt.secret))
			if err != nil {
				t.Fatal(err)
			}
			s.half.seq = tt.skip
			if b, err := s.Seal(nil, payload); err != nil || !bytes.Equal(b, tt.data) {
				t.Errorf("sealed % x, %v", b, err)
			}
			if b, err := s.Alert(nil, alertCloseNotify); err != nil || !bytes.Equal(b, tt.alert) {
				t.Errorf("sealed % x, %v", b, err)
			}
			o, err := NewOpener(tls.TLS_AES_128_GCM_SHA256, unhex(t, tt.secret), false)
			if err != nil {
				t.Fatal(err)
			}
			o.half.seq = tt.skip
			in := slices.Concat(tt.data, tt.alert)
			data, rest, used, err := o.Open(in)
			if !used || err != nil || !bytes.Equal(data, payload) || len(rest) != len(tt.alert) {
				t.Errorf("opened % x, %v, %v", data, used, err)
			}
			if _, _, _, err := o.Open(rest); err != io.EOF {
				t.Errorf("close_notify: %v", err)
			}
		})
	}
}

// TestRFC8448Keys checks the key schedule against the write keys of RFC 8448 3.
func TestRFC8448Keys(t *testing.T) {
	s, _ := suiteOf(tls.TLS_AES_128_GCM_SHA256)
	for _, tt := range []struct{ secret, key, iv string }{
		{clientSecret, "17422dda596ed5d9acd890e3c63f5051", "5b78923dee08579033e523d9"},
		{serverSecret, "9f02283b6c9c07efc26bb9f2ac92e356", "cf782b88dd83549aadf1e984"},
	} {
		key, err1 := expandLabel(s.hash, unhex(t, tt.secret), "key", 16)
		iv, err2 := expandLabel(s.hash, unhex(t, tt.secret), "iv", 12)
		if err := errors.Join(err1, err2); err != nil || hex.EncodeToString(key) != tt.key || hex.EncodeToString(iv) != tt.iv {
			t.Errorf("key %x, iv %x, %v", key, iv, err)
		}
	}
}

var suites = []uint16{tls.TLS_AES_128_GCM_SHA256, tls.TLS_AES_256_GCM_SHA384, tls.TLS_CHACHA20_POLY1305_SHA256}

// secretFor returns a traffic secret of the right length.
func secretFor(t testing.TB, id uint16) []byte {
	s, err := suiteOf(id)
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Repeat([]byte{0x5a}, s.hash().Size())
}

func pair(t testing.TB, id uint16) (*Sealer, *Opener) {
	t.Helper()
	s, err := NewSealer(id, secretFor(t, id))
	if err != nil {
		t.Fatal(err)
	}
	o, err := NewOpener(id, secretFor(t, id), true)
	if err != nil {
		t.Fatal(err)
	}
	return s, o
}

// A reference seals a record by the words of RFC 8446 5.2 and 5.3 and nothing
// else, with any content.
func reference(t testing.TB, id uint16, secret []byte, seq uint64, content []byte) []byte {
	t.Helper()
	su, _ := suiteOf(id)
	key, _ := expandLabel(su.hash, secret, "key", su.keyLen)
	nonce, _ := expandLabel(su.hash, secret, "iv", 12)
	for i := range 8 {
		nonce[11-i] ^= byte(seq >> (8 * i))
	}
	var a cipher.AEAD
	if id == tls.TLS_CHACHA20_POLY1305_SHA256 {
		a, _ = chacha20poly1305.New(key)
	} else {
		b, _ := aes.NewCipher(key)
		a, _ = cipher.NewGCM(b)
	}
	n := len(content) + 16
	head := []byte{23, 3, 3, byte(n >> 8), byte(n)}
	return append(head, a.Seal(nil, nonce, content, head)...)
}

func TestSealIsWhatTheReferenceSeals(t *testing.T) {
	for _, id := range suites {
		s, _ := pair(t, id)
		for seq, n := range []int{1, 5, 100, MaxPlaintext} {
			p := bytes.Repeat([]byte{byte(n)}, n)
			got, err := s.Seal([]byte("before"), p)
			want := append([]byte("before"), reference(t, id, secretFor(t, id), uint64(seq), append(p, typeApplication))...)
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s, %d bytes: differ, %v", tls.CipherSuiteName(id), n, err)
			}
		}
	}
}

// openAll opens all of in.
func openAll(o *Opener, in []byte) (data []byte, err error) {
	in = bytes.Clone(in)
	for {
		p, rest, used, err := o.Open(in)
		data = append(data, p...)
		if err != nil || !used {
			return data, err
		}
		in = rest
	}
}

func TestManyRecordsAndKeyUpdates(t *testing.T) {
	for _, id := range suites {
		s, o := pair(t, id)
		var want, wire []byte
		for i := range 50 {
			p := bytes.Repeat([]byte{byte(i)}, i*997)
			want = append(want, p...)
			var err error
			if wire, err = s.Seal(wire, p); err != nil {
				t.Fatal(err)
			}
			if i%7 == 3 {
				if wire, err = s.Update(wire, i%2 == 0); err != nil {
					t.Fatal(err)
				}
			}
		}
		got, err := openAll(o, wire)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d of %d bytes, %v", tls.CipherSuiteName(id), len(got), len(want), err)
		}
		if !o.KeyUpdateOwed() || o.KeyUpdateOwed() {
			t.Error("a wish for a new key is owed once")
		}
	}
}

func TestKeyIsUpdatedInTime(t *testing.T) {
	s, o := pair(t, tls.TLS_AES_128_GCM_SHA256)
	s.left = 2
	before := bytes.Clone(s.half.secret)
	wire, err := s.Seal(nil, make([]byte, 3*MaxPlaintext))
	if err != nil || bytes.Equal(before, s.half.secret) {
		t.Errorf("the key is the same, %v", err)
	}
	if got, err := openAll(o, wire); err != nil || len(got) != 3*MaxPlaintext {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	// 2^24.5 full records are the limit of AES-GCM (RFC 8446 5.5).
	if updateAfter > 1<<24 {
		t.Error("too late")
	}
}

// TestOpenRefuses lists what must end a connection, and the alert it ends
// with.
func TestOpenRefuses(t *testing.T) {
	const id = tls.TLS_AES_128_GCM_SHA256
	secret := secretFor(t, id)
	rec := func(seq uint64, typ byte, content ...byte) []byte {
		return reference(t, id, secret, seq, append(content, typ))
	}
	flip := func(b []byte, i int) []byte {
		b = bytes.Clone(b)
		b[i] ^= 1
		return b
	}
	good := rec(0, typeApplication, []byte("hello")...)
	tests := []struct {
		name  string
		in    []byte
		alert uint8
	}{
		{"a changed payload", flip(good, 7), alertBadRecordMAC},
		{"a changed tag", flip(good, len(good)-1), alertBadRecordMAC},
		{"a changed version", flip(good, 2), alertBadRecordMAC},
		{"a record left out", rec(1, typeApplication, 'x'), alertBadRecordMAC},
		{"a record repeated", slices.Concat(good, good), alertBadRecordMAC},
		{"a shorter record", append([]byte{23, 3, 3, 0, byte(len(good) - 6)}, good[5:]...), alertBadRecordMAC},
		{"a record without room for a tag", []byte{23, 3, 3, 0, 16, 1, 2, 3}, alertBadRecordMAC},
		{"an empty record", []byte{23, 3, 3, 0, 0}, alertBadRecordMAC},
		{"a record too long", []byte{23, 3, 3, 0x41, 1}, alertRecordOverflow},
		{"content too long", reference(t, id, secret, 0, append(make([]byte, MaxPlaintext+1), typeApplication)), alertRecordOverflow},
		{"padding too long", reference(t, id, secret, 0, append([]byte{1, typeApplication}, make([]byte, MaxPlaintext)...)), alertRecordOverflow},
		{"padding only", reference(t, id, secret, 0, make([]byte, 20)), alertUnexpectedMessage},
		{"change_cipher_spec", []byte{20, 3, 3, 0, 1, 1}, alertUnexpectedMessage},
		{"an alert in clear", []byte{21, 3, 3, 0, 2, 1, 0}, alertUnexpectedMessage},
		{"a handshake message in clear", []byte{22, 3, 3, 0, 5, 24, 0, 0, 1, 0}, alertUnexpectedMessage},
		{"HTTP", []byte("GET / HTTP/1.1"), alertUnexpectedMessage},
		{"a protected change_cipher_spec", rec(0, 20, 1), alertUnexpectedMessage},
		{"an unknown content", rec(0, 99, 1), alertUnexpectedMessage},
		{"an empty handshake record", rec(0, typeHandshake), alertUnexpectedMessage},
		{"an empty alert", rec(0, typeAlert), alertUnexpectedMessage},
		{"half an alert", rec(0, typeAlert, 2), alertDecodeError},
		{"two alerts in one", rec(0, typeAlert, 1, 90, 1, 0), alertDecodeError},
		{"a ClientHello", rec(0, typeHandshake, 1, 0, 0, 0), alertUnexpectedMessage},
		{"a CertificateRequest", rec(0, typeHandshake, 13, 0, 0, 0), alertUnexpectedMessage},
		{"a KeyUpdate of two bytes", rec(0, typeHandshake, 24, 0, 0, 2, 0, 0), alertDecodeError},
		{"a KeyUpdate with an unknown wish", rec(0, typeHandshake, 24, 0, 0, 1, 2), alertIllegalParameter},
		{"two KeyUpdates in one record", rec(0, typeHandshake, 24, 0, 0, 1, 0, 24, 0, 0, 1, 0), alertUnexpectedMessage},
		{"a record of the old key after a KeyUpdate", slices.Concat(rec(0, typeHandshake, 24, 0, 0, 1, 0), rec(1, typeApplication, 'x')), alertBadRecordMAC},
		{"data within a handshake message", slices.Concat(rec(0, typeHandshake, 24, 0), rec(1, typeApplication, 'x')), alertUnexpectedMessage},
		{"an alert within a ticket", slices.Concat(rec(0, typeHandshake, 4, 0, 0, 50, 1, 2), rec(1, typeAlert, 1, 0)), alertUnexpectedMessage},
		{"an endless ticket", rec(0, typeHandshake, 4, 0xff, 0xff, 0xff), alertDecodeError},
		{"a ticket longer by one byte than any", rec(0, typeHandshake, 4, (maxTicket+1)>>16, (maxTicket+1)>>8&0xff, (maxTicket+1)&0xff), alertDecodeError},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, o := pair(t, id)
			_, err := openAll(o, tt.in)
			var bad *Error
			if !errors.As(err, &bad) || bad.Alert != tt.alert {
				t.Errorf("%v, want alert %v", err, tls.AlertError(tt.alert))
			}
			// It is final, whatever comes.
			if data, _, _, again := o.Open(bytes.Clone(good)); again != err || data != nil {
				t.Errorf("then %q, %v", data, again)
			}
		})
	}
}

func TestOpenBears(t *testing.T) {
	const id = tls.TLS_AES_256_GCM_SHA384
	secret := secretFor(t, id)
	rec := func(seq uint64, content ...byte) []byte { return reference(t, id, secret, seq, content) }
	_, o := pair(t, id)
	ticket := append([]byte{4, 0, 0, 200}, make([]byte, 200)...)
	in := slices.Concat(
		rec(0, typeApplication),                               // no data
		rec(1, 'a', typeApplication, 0, 0, 0),                 // padding
		rec(2, append(bytes.Clone(ticket), typeHandshake)...), // a ticket
		rec(3, append(bytes.Clone(ticket[:3]), typeHandshake)...),
		rec(4, append(slices.Concat(ticket[3:], ticket[:50]), typeHandshake)...), // tickets in pieces
		rec(5, append(bytes.Clone(ticket[50:]), typeHandshake)...),
		rec(6, 1, alertUserCanceled, typeAlert),
		rec(7, append(bytes.Repeat([]byte("b"), MaxPlaintext), typeApplication)...), // the largest record
		rec(8, 1, alertCloseNotify, typeAlert),
	)
	got, err := openAll(o, in)
	if err != io.EOF || len(got) != 1+MaxPlaintext {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	_, o = pair(t, id)
	if _, err := openAll(o, rec(0, 1, 48, typeAlert)); err != error(tls.AlertError(48)) {
		t.Errorf("a fatal alert at level warning: %v", err)
	}
}

func TestTicketsAreForClients(t *testing.T) {
	const id = tls.TLS_AES_128_GCM_SHA256
	o, _ := NewOpener(id, secretFor(t, id), false)
	if _, err := openAll(o, reference(t, id, secretFor(t, id), 0, []byte{4, 0, 0, 0, typeHandshake})); err == nil {
		t.Error("a server took a ticket")
	}
}

func TestIdleRecordsAreBounded(t *testing.T) {
	const id = tls.TLS_AES_128_GCM_SHA256
	_, o := pair(t, id)
	for seq := range uint64(maxIdle + 1) {
		_, err := openAll(o, reference(t, id, secretFor(t, id), seq, []byte{typeApplication}))
		if (err != nil) != (seq == maxIdle) {
			t.Fatalf("record %d: %v", seq, err)
		}
	}
}

// Records that change keys, or say that they will close, count among those
// without data, and data makes up for them all.
func TestIdleRecordsOfAllKinds(t *testing.T) {
	const id = tls.TLS_AES_128_GCM_SHA256
	for name, idle := range map[string]func(s *Sealer) ([]byte, error){
		"KeyUpdate":     func(s *Sealer) ([]byte, error) { return s.Update(nil, false) },
		"user_canceled": func(s *Sealer) ([]byte, error) { return s.Alert(nil, alertUserCanceled) },
	} {
		s, o := pair(t, id)
		for range 2 {
			for range maxIdle {
				b, err := idle(s)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := openAll(o, b); err != nil {
					t.Fatalf("%s: %v", name, err)
				}
			}
			b, err := s.Seal(nil, []byte("x"))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := openAll(o, b); err != nil {
				t.Fatalf("%s, then data: %v", name, err)
			}
		}
		if o.KeyUpdateOwed() {
			t.Errorf("%s: a new key is owed that nobody asked for", name)
		}
		var err error
		for range maxIdle + 1 {
			var b []byte
			if b, err = idle(s); err != nil {
				t.Fatal(err)
			}
			_, err = openAll(o, b)
		}
		var bad *Error
		if !errors.As(err, &bad) || bad.Alert != alertUnexpectedMessage {
			t.Errorf("%s: a flood ends with %v", name, err)
		}
	}
}

func TestWrongSecretsAndSuites(t *testing.T) {
	if _, err := NewSealer(tls.TLS_AES_128_GCM_SHA256, make([]byte, 48)); err == nil {
		t.Error("a secret of the wrong length was taken")
	}
	if _, err := NewOpener(tls.TLS_AES_128_GCM_SHA256, nil, true); err == nil {
		t.Error("no secret was taken")
	}
	if _, err := NewSealer(tls.TLS_RSA_WITH_AES_128_CBC_SHA, make([]byte, 32)); err == nil {
		t.Error("a suite of TLS 1.2 was taken")
	}
}

func TestWipe(t *testing.T) {
	s, o := pair(t, tls.TLS_AES_128_GCM_SHA256)
	secret := s.half.secret
	s.Wipe()
	o.Wipe()
	if !bytes.Equal(secret, make([]byte, len(secret))) {
		t.Error("the secret is still there")
	}
	if _, err := s.Seal(nil, []byte("x")); err == nil {
		t.Error("sealed without a key")
	}
	if _, _, _, err := o.Open(make([]byte, 100)); err == nil {
		t.Error("opened without a key")
	}
}

func FuzzOpen(f *testing.F) {
	const id = tls.TLS_AES_128_GCM_SHA256
	s, _ := pair(f, id)
	b, _ := s.Seal(nil, []byte("hello"))
	b, _ = s.Update(b, true)
	b, _ = s.Seal(b, []byte("world"))
	f.Add(b, byte(3))
	f.Fuzz(func(t *testing.T, in []byte, cut byte) {
		_, o := pair(t, id)
		whole, err1 := openAll(o, in)
		_, o = pair(t, id)
		var pieces, have []byte
		var err2 error
		for p := range slices.Chunk(in, int(cut)+1) {
			have = append(have, bytes.Clone(p)...)
			for err2 == nil {
				data, rest, used, err := o.Open(have)
				pieces, err2 = append(pieces, data...), err
				if !used {
					break
				}
				have = bytes.Clone(rest)
			}
		}
		if !bytes.Equal(whole, pieces) || (err1 == nil) != (err2 == nil) {
			t.Errorf("whole %x, %v; in pieces %x, %v", whole, err1, pieces, err2)
		}
	})
}

// FuzzContent is FuzzOpen behind the tag: the peer is genuine, and hostile.
func FuzzContent(f *testing.F) {
	const id = tls.TLS_CHACHA20_POLY1305_SHA256
	f.Add([]byte{24, 0, 0, 1, 1, 22}, []byte{'x', 23}, true)
	f.Add([]byte{4, 0, 0, 9, 1, 22, 0, 0}, []byte{1, 2, 3, 4, 5, 6, 7, 8, 22}, true)
	f.Add([]byte{1, 0, 21}, []byte{2, 40, 21}, false)
	f.Fuzz(func(t *testing.T, a, b []byte, client bool) {
		o, err := NewOpener(id, secretFor(t, id), client)
		if err != nil {
			t.Fatal(err)
		}
		for i, c := range [][]byte{a, b} {
			if len(c) == 0 || len(c) > maxCiphertext-tagLen {
				continue
			}
			_, _, used, err := o.Open(reference(t, id, secretFor(t, id), uint64(i), c))
			if !used && err == nil {
				t.Error("a whole record was not taken")
			}
		}
	})
}
