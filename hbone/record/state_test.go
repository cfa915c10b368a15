package record

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math"
	"strings"
	"testing"

	"github.com/weft-mesh/weft/internal/pack"
)

// moved returns a Sealer in the state of s that shares no memory with it, and
// wipes s.
func (s *Sealer) moved(t testing.TB) *Sealer {
	t.Helper()
	st, err := s.State()
	if err != nil {
		t.Fatal(err)
	}
	b := pack.Write(st.Pack)
	st.Wipe()
	s.Wipe()
	var read SealerState
	if err := pack.Read(b, read.Pack); err != nil {
		t.Fatal(err)
	}
	n, err := ResumeSealer(read)
	if err != nil {
		t.Fatal(err)
	}
	read.Wipe()
	return n
}

// moved is the same for an Opener.
func (o *Opener) moved(t testing.TB) *Opener {
	t.Helper()
	st, err := o.State()
	if err != nil {
		t.Fatal(err)
	}
	b := pack.Write(st.Pack)
	st.Wipe()
	o.Wipe()
	var read OpenerState
	if err := pack.Read(b, read.Pack); err != nil {
		t.Fatal(err)
	}
	n, err := ResumeOpener(read)
	if err != nil {
		t.Fatal(err)
	}
	read.Wipe()
	return n
}

// TestMovedBetweenRecords moves both ends before each record, with data, a
// change of keys with and without a wish, a ticket and an end in between.
func TestMovedBetweenRecords(t *testing.T) {
	for _, id := range suites {
		s, o := pair(t, id)
		var wire, want, got []byte
		var err error
		add := func(b []byte, aerr error) {
			if aerr != nil {
				t.Fatal(aerr)
			}
			wire = b
		}
		for i := range 40 {
			s = s.moved(t)
			p := []byte(fmt.Sprintf("piece %d", i))
			want = append(want, p...)
			add(s.Seal(wire, p))
			s = s.moved(t)
			switch i % 4 {
			case 1:
				add(s.Update(wire, i%8 == 1))
			case 2:
				add(s.record(wire, typeHandshake, append([]byte{typeNewSessionTicket, 0, 0, 9}, "ticket..."...)))
			}
		}
		add(s.moved(t).Alert(wire, alertCloseNotify))
		for {
			o = o.moved(t)
			var data []byte
			var used bool
			data, wire, used, err = o.Open(wire)
			got = append(got, data...)
			if err != nil || !used {
				break
			}
		}
		if err != io.EOF || !bytes.Equal(got, want) {
			t.Errorf("suite %x: %v, got %q", id, err, got)
		}
	}
}

// TestMovedInsideAMessage moves the Opener while a handshake message has come
// in part, at each of its bytes.
func TestMovedInsideAMessage(t *testing.T) {
	for name, msg := range map[string][]byte{
		"KeyUpdate": {typeKeyUpdate, 0, 0, 1, 1},
		"ticket":    append([]byte{typeNewSessionTicket, 0, 0, 9}, "ticket..."...),
	} {
		s, o := pair(t, tls.TLS_AES_128_GCM_SHA256)
		var wire []byte
		for i := range msg {
			wire, _ = s.record(wire, typeHandshake, msg[i:i+1])
		}
		if msg[0] == typeKeyUpdate {
			if err := s.half.update(); err != nil {
				t.Fatal(err)
			}
		}
		wire, _ = s.Seal(wire, []byte("after"))
		var data []byte
		for len(wire) > 0 {
			o = o.moved(t)
			var used bool
			var err error
			if data, wire, used, err = o.Open(wire); err != nil || !used {
				t.Fatalf("%s: %v, %v", name, used, err)
			}
		}
		if string(data) != "after" {
			t.Errorf("%s: got %q", name, data)
		}
		if owed := o.moved(t).KeyUpdateOwed(); owed != (msg[0] == typeKeyUpdate) {
			t.Errorf("%s: a KeyUpdate is owed: %v", name, owed)
		}
	}
}

// TestMovedAgainstCryptoTLS talks with crypto/tls in both roles, which does not
// notice that the keys at our end move to other objects all the time, with a
// record in every state of being received.
func TestMovedAgainstCryptoTLS(t *testing.T) {
	for _, client := range []bool{true, false} {
		ours, theirs := ends(t, client, false, 11)
		done := make(chan error, 1)
		go func() {
			buf := make([]byte, 64)
			for {
				n, err := io.ReadAtLeast(theirs, buf, 1)
				if err == nil {
					_, err = theirs.Write(buf[:n])
				}
				if err != nil {
					done <- err
					return
				}
			}
		}()
		const text = "what is said must come back"
		record := headerLen + len(text) + 1 + tagLen
		for cut := range record {
			if cut%8 == 3 {
				out, err := ours.seal.Update(nil, false)
				if err == nil {
					_, err = ours.conn.Write(out)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			out, err := ours.seal.Seal(nil, []byte(text))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := ours.conn.Write(out[:cut]); err != nil {
				t.Fatal(err)
			}
			ours.seal = ours.seal.moved(t) // what was sealed is on its way, in part
			if _, err := ours.conn.Write(out[cut:]); err != nil {
				t.Fatal(err)
			}
			// crypto/tls may answer in several records.
			var in, got []byte
			for len(got) < len(text) {
				buf := make([]byte, max(1, cut))
				n, err := ours.conn.Read(buf)
				if err != nil {
					t.Fatal(err)
				}
				in = append(in, buf[:n]...)
				for {
					ours.open = ours.open.moved(t)
					data, rest, used, err := ours.open.Open(in)
					if err != nil {
						t.Fatal(err)
					}
					if !used {
						break
					}
					got, in = append(got, data...), rest
				}
			}
			if string(got) != text {
				t.Fatalf("cut at %d: got %q", cut, got)
			}
		}
		_ = ours.conn.Close()
		<-done
	}
}

// TestMovedTwiceIsNoticed shows that what an exporter keeps is not a second
// sealer: after Wipe nothing can be sealed or exported.
func TestMovedTwiceIsNoticed(t *testing.T) {
	s, o := pair(t, tls.TLS_AES_256_GCM_SHA384)
	secret := s.half.secret
	s.moved(t)
	o.moved(t)
	if _, err := s.Seal(nil, []byte("x")); err == nil {
		t.Error("a wiped Sealer seals")
	}
	if _, err := s.State(); err == nil {
		t.Error("a wiped Sealer has a state")
	}
	if _, err := o.State(); err == nil {
		t.Error("a wiped Opener has a state")
	}
	if !bytes.Equal(secret, make([]byte, len(secret))) {
		t.Error("the secret is still there")
	}
}

func TestResumeRefusesNonsense(t *testing.T) {
	secret := secretFor(t, tls.TLS_AES_128_GCM_SHA256)
	good := OpenerState{Suite: tls.TLS_AES_128_GCM_SHA256, Secret: secret, Client: true}
	if _, err := ResumeOpener(good); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*OpenerState){
		"suite":            func(s *OpenerState) { s.Suite = tls.TLS_RSA_WITH_AES_128_CBC_SHA },
		"secret":           func(s *OpenerState) { s.Secret = s.Secret[1:] },
		"sequence":         func(s *OpenerState) { s.Sequence = math.MaxUint64 },
		"idle":             func(s *OpenerState) { s.Idle = maxIdle + 1 },
		"whole message":    func(s *OpenerState) { s.MessageLen = 5 },
		"unknown message":  func(s *OpenerState) { s.MessageLen, s.Message[0] = 4, 9 },
		"ticket to server": func(s *OpenerState) { s.MessageSkip, s.Client = 5, false },
		"negative":         func(s *OpenerState) { s.MessageLen = -1 },
	} {
		bad := good
		change(&bad)
		if _, err := ResumeOpener(bad); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	s := SealerState{Suite: tls.TLS_AES_128_GCM_SHA256, Secret: secret, Sequence: updateAfter + 5}
	r, err := ResumeSealer(s)
	if err != nil || r.left != 0 {
		t.Errorf("a key that is used up: %v, %d records left", err, r.left)
	}
	for _, bad := range []SealerState{
		{}, {Suite: s.Suite}, {Suite: s.Suite, Secret: secret, Sequence: math.MaxUint64},
	} {
		if _, err := ResumeSealer(bad); err == nil {
			t.Errorf("%+v: taken", bad)
		}
	}
}

// TestSecretsDoNotPrint prints states in every way that a careless line of
// code might.
func TestSecretsDoNotPrint(t *testing.T) {
	secret := Secret("do not tell anybody about this!!")
	o := OpenerState{Suite: tls.TLS_AES_128_GCM_SHA256, Secret: secret}
	s := SealerState{Suite: tls.TLS_AES_128_GCM_SHA256, Secret: secret}
	var out strings.Builder
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x", "%X", "%q", "%d"} {
		for _, v := range []any{secret, s, &s, o, &o, []any{s}, map[string]any{"a": o}} {
			fmt.Fprintf(&out, verb+"\n", v)
		}
	}
	for _, h := range []slog.Handler{slog.NewTextHandler(&out, nil), slog.NewJSONHandler(&out, nil)} {
		slog.New(h).LogAttrs(context.Background(), slog.LevelInfo, "m", slog.Any("a", secret), slog.Any("b", s), slog.Any("c", &o))
	}
	b, err := json.Marshal([]any{s, o, secret})
	if err != nil {
		t.Fatal(err)
	}
	out.Write(b)
	if !strings.Contains(out.String(), hidden) {
		t.Error("nothing was printed")
	}
	for _, leak := range []string{"do not", fmt.Sprintf("%x", "do not"), fmt.Sprintf("%X", "do not"), "ZG8gbm90", "100 111 32"} {
		if strings.Contains(out.String(), leak) {
			t.Errorf("the secret was printed: %q in %s", leak, out.String())
		}
	}
}

// FuzzStates reads states from anything. What can be resumed can be used.
func FuzzStates(f *testing.F) {
	secret := secretFor(f, tls.TLS_AES_128_GCM_SHA256)
	o := OpenerState{Suite: tls.TLS_AES_128_GCM_SHA256, Secret: secret, Client: true, MessageLen: 3, Message: [5]byte{typeKeyUpdate}}
	f.Add(pack.Write(o.Pack), []byte("x"))
	f.Fuzz(func(t *testing.T, b, content []byte) {
		var st OpenerState
		if pack.Read(b, st.Pack) != nil {
			return
		}
		o, err := ResumeOpener(st)
		if err != nil {
			return
		}
		content = content[:min(len(content), MaxPlaintext)]
		s := &Sealer{half: &half{id: o.half.id, suite: o.half.suite, aead: o.half.aead, iv: o.half.iv, seq: o.half.seq, secret: o.half.secret}, left: 1}
		for _, typ := range []byte{typeHandshake, typeApplication, typeAlert} {
			if rec, err := s.record(nil, typ, content); err == nil {
				_, _, _, _ = o.Open(rec)
			}
		}
	})
}
